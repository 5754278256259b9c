"""A HybridModel is the GPT model of the same weights, in our jobs too: on local modules, over one gloo rank
and then two.

Attention and MoE are layers of their own there, so Megatron's layer numbers differ; the place among the MoE
layers does not.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.models.hybrid.hybrid_layer_allocation import (
    Symbols,
    get_layer_maps_from_layer_type_list,
    validate_segment_layers,
)
from safetensors.torch import load_file
from small_run import (
    aligned_flags,
    offline_flags,
    outcome,
    profile_flags,
    run_table,
    training_flags,
    write_world,
)

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.records import read_divergence, read_taxonomy
from ramoe_megatron.mcore.router import hybrid_moe_layer_numbers

PATTERN = ("--hybrid-layer-pattern", "*E*E*E*E")
MIXED = "*-EE*E-"
DEPRECATED = ("--hybrid-override-pattern", MIXED)
VIRTUAL = ("--hybrid-layer-pattern", "*E|*E|*E|*E", "--pipeline-model-parallel-size", "2")
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
TP = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
PER_TOKEN = ("--calculate-per-token-loss",)
MICRO2 = ("--micro-batch-size", "2")
GPT = {"gpt": (), "gpt-tokens": PER_TOKEN, "gpt-micro2": MICRO2}
SAME_AS_GPT: dict[str, tuple[str, tuple[str, ...]]] = {
    "hybrid": ("gpt", PATTERN),
    "hybrid-full": ("gpt", (*PATTERN, *FULL)),
    "hybrid-tokens": ("gpt-tokens", (*PATTERN, *PER_TOKEN)),
    "hybrid-micro2": ("gpt-micro2", (*PATTERN, *MICRO2)),
    "hybrid-dp": ("gpt", PATTERN),
    "hybrid-dp-tokens": ("gpt-tokens", (*PATTERN, *PER_TOKEN)),
    "hybrid-tp": ("gpt", (*PATTERN, *TP)),
    "hybrid-tp-tokens": ("gpt-tokens", (*PATTERN, *TP, *PER_TOKEN)),
    "hybrid-ep": ("gpt", (*PATTERN, "--expert-model-parallel-size", "2")),
    "hybrid-virtual-full": ("gpt", (*VIRTUAL, *FULL)),
    "hybrid-virtual-full-tokens": ("gpt-tokens", (*VIRTUAL, *FULL, *PER_TOKEN)),
}
TWO_RANKS = [name for name in SAME_AS_GPT if {"dp", "tp", "ep", "virtual"} & set(name.split("-"))]
REFERENCE = str(Path(__file__).parents[1] / "support/reference_job.py")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hybrid")
    write_world(folder)

    def aligned(name: str) -> dict[str, Any]:
        return {"name": name, "job": "finetune", "argv": aligned_flags(folder, *SAME_AS_GPT[name][1])}

    def scratch(name: str, *more: str) -> dict[str, Any]:
        flags = training_flags(
            folder, "--train-iters", "2", "--save", str(folder / name), "--save-interval", "2", *more
        )
        return {"name": name, "job": "finetune", "argv": flags}

    def refused(name: str, *more: str) -> dict[str, Any]:
        return {"name": name, "job": "taxonomy", "argv": offline_flags(folder, "refused", *more)}

    trained = ("--load", str(folder / "trained"))
    run_table(
        1,
        [
            scratch("base"),
            {"name": "profile", "job": "profile", "argv": profile_flags(folder, "profile")},
            {
                "name": "profile-hybrid",
                "job": "profile",
                "argv": profile_flags(folder, "profile-hybrid", *PATTERN),
            },
            {"name": "reference", "job": REFERENCE, "argv": offline_flags(folder, "reference")},
            {
                "name": "reference-hybrid",
                "job": REFERENCE,
                "argv": offline_flags(folder, "reference-hybrid", *PATTERN),
            },
            *(
                {"name": name, "job": "finetune", "argv": aligned_flags(folder, *flags)}
                for name, flags in GPT.items()
            ),
            *(aligned(name) for name in SAME_AS_GPT if name not in TWO_RANKS),
            scratch("trained", "--hybrid-layer-pattern", MIXED),
            {
                "name": "taxonomy",
                "job": "taxonomy",
                "argv": offline_flags(folder, "taxonomy", *trained, *DEPRECATED),
            },
            {
                "name": "profile-mixed",
                "job": "profile",
                "argv": profile_flags(folder, "profile-mixed", *trained, *DEPRECATED),
            },
            refused("to-gpt", *trained),
            refused("three", "--hybrid-layer-pattern", "*E*E*E"),
            refused("unpaired", "--hybrid-layer-pattern", "*E*E*EE"),
            refused("mamba", "--hybrid-layer-pattern", "M*E*E*E*E"),
            refused("predicting", "--hybrid-layer-pattern", "*E*E*E*E/*E"),
        ],
        folder,
    )
    run_table(2, [aligned(name) for name in TWO_RANKS], folder)
    return folder


def tensors(folder: Path, name: str, prefix: str) -> dict[str, torch.Tensor]:
    """What `worker.py` recorded on all ranks; a tensor that several ranks have must be the same on each."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob(f"{name}.[0-9].safetensors")):
        for key, tensor in load_file(path).items():
            if key.startswith(prefix):
                torch.testing.assert_close(tensor, found.setdefault(key, tensor), rtol=0, atol=0)
    return found


def as_hybrid(key: str) -> str:
    """The name in a model of pattern *E*E.. of a GPT model's weight."""
    parts = key.replace("final_layernorm", "final_norm").split(".")
    if "layers" in parts:
        place = parts.index("layers") + 1
        parts[place] = str(2 * int(parts[place]) + (parts[place + 1] in ("mlp", "pre_mlp_layernorm")))
    return ".".join(parts)


def test_a_gpt_checkpoint_scores_and_routes_the_same(world: Path) -> None:
    """The whole output of the reference job: losses, pooled routing, expert counts and greedy answers."""
    for file in ("reference/reference", "profile/experts", "profile/priors"):
        folder, name = file.split("/")
        gpt, hybrid = (
            load_file(world / place / f"{name}.safetensors") for place in (folder, f"{folder}-hybrid")
        )
        assert gpt.keys() == hybrid.keys()
        for key in gpt.keys() - {"layer_number"}:
            torch.testing.assert_close(
                hybrid[key], gpt[key], rtol=1e-5, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}"
            )
    curves = [
        [row.divergence for row in read_divergence(world / f / "divergence.csv")]
        for f in ("profile", "profile-hybrid")
    ]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_the_files_say_how_megatron_numbers_the_layers(world: Path) -> None:
    numbers = [
        ExpertFile.load(world / f / "experts.safetensors").layer_number.tolist()
        for f in ("profile", "profile-hybrid")
    ]
    assert numbers == [[1, 2, 3, 4], [2, 4, 6, 8]]
    mixed = ExpertFile.load(world / "profile-mixed/experts.safetensors")
    assert mixed.layer_number.tolist() == [3, 4, 6]


@pytest.mark.parametrize("name", SAME_AS_GPT)
def test_the_expert_file_of_a_gpt_model_aligns_the_hybrid_model(world: Path, name: str) -> None:
    """First step: the same alignment loss and router gradients; both steps: the same figures."""
    reference = SAME_AS_GPT[name][0]
    gpt, hybrid = (outcome(world, run) for run in (reference, name))
    assert gpt["first"]["routing_alignment_loss"] > 0
    for step in ("first", "figures"):
        assert hybrid[step] == pytest.approx(gpt[step], rel=2e-5, abs=1e-9)
    expected, found = tensors(world, reference, "grad."), tensors(world, name, "grad.")
    assert found.keys() == {f"grad.{2 * layer}" for layer in (1, 2, 3, 4)}
    for layer in (1, 2, 3, 4):
        gradient = expected[f"grad.{layer}"]
        assert (found[f"grad.{2 * layer}"] - gradient).norm() / gradient.norm() < 1e-5, layer


def test_training_ends_at_the_same_weights(world: Path) -> None:
    """All parameters are equal after two steps, so the language-model and router losses were equal too."""
    gpt, hybrid = tensors(world, "gpt", "weight."), tensors(world, "hybrid", "weight.")
    assert {as_hybrid(key) for key in gpt} == hybrid.keys()
    for key, weight in gpt.items():
        torch.testing.assert_close(
            hybrid[as_hybrid(key)], weight, rtol=1e-5, atol=1e-7, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_a_hybrid_checkpoint_comes_back(world: Path) -> None:
    """An offline job loads every weight and norm of a model that was trained from scratch with MLP layers."""
    saved = {
        key.replace(".module.", "."): weight for key, weight in tensors(world, "trained", "weight.").items()
    }
    loaded = tensors(world, "taxonomy", "weight.")
    norms = {key.removeprefix("weight.0.decoder.") for key in saved if "norm" in key}
    assert {
        "final_norm.weight",
        "layers.0.input_layernorm.weight",
        "layers.1.pre_mlp_layernorm.weight",
    } <= norms
    assert len(norms) == 1 + len(MIXED)
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    assert len(read_taxonomy(world / "taxonomy/taxonomy.jsonl")) == 48


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("to-gpt", ["trained", "saved by a hybrid model run", f"'{MIXED}'"]),
        ("three", ["base", "'*E*E*E'", "3 layers", "num_layers=4"]),
        ("unpaired", ["base", "3 attention", "4 MLP"]),
        ("mamba", ["--hybrid-layer-pattern 'M*E*E*E*E'", "layers M", "transformer-engine"]),
        ("predicting", ["--hybrid-layer-pattern", "multi-token prediction", "transformer-engine"]),
    ],
)
def test_patterns_that_do_not_fit_are_told(world: Path, name: str, words: list[str]) -> None:
    error = json.loads((world / f"{name}.json").read_text())["error"]
    for word in words:
        assert word in error, error


SEGMENT = st.text("*-EM", max_size=6)


@given(st.lists(SEGMENT, min_size=1, max_size=5), st.text("*-EM", min_size=1, max_size=3), st.integers(0, 2))
def test_layers_are_numbered_as_megatron_places_them(segments: list[str], mtp: str, depth: int) -> None:
    """The numbers that a `HybridStack` gives, stage by stage, without boundaries and MTP layers."""
    placed, offset = [], 0
    for segment in segments:
        layers = validate_segment_layers(segment)
        placed += [offset + place + 1 for place in get_layer_maps_from_layer_type_list(layers)[Symbols.MOE]]
        offset += len(layers)
    assert hybrid_moe_layer_numbers("/".join(["|".join(segments)] + [mtp] * depth)) == placed
