"""A converted checkpoint of each family computes with Megatron what transformers computes, in any layout."""

import json
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from data_rows import SmallTokenizer
from family_models import computed, family_flags, finetune_flags
from safetensors.torch import load_file
from small_run import load_flags, outcome, run_table, weights
from tiny_models import MODELS
from torch.distributed.checkpoint import FileSystemReader

from ramoe_megatron.artifacts.files import save_document
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.models.convert import export_checkpoint, plan_export
from ramoe_megatron.models.note import FLAGS, NOTE, ORIGINAL
from ramoe_megatron.models.torch_dist import COMMON

SUPPORT = Path(__file__).parents[1] / "support"
OWN_SCRIPT = str(Path(__file__).parents[2] / "examples/pretrain_gpt.py")
TP = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "pp": (2, ("--pipeline-model-parallel-size", "2", "--decoder-first-pipeline-num-layers", "1")),
    "tp": (2, TP),
    "tp-ep": (4, (*TP, "--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1")),
}


def forward(folder: Path, name: str, layout: str, checkpoint: str) -> dict[str, Any]:
    """The row that computes the logits of a checkpoint in a layout: NAME-LAYOUT.

    After training it computes the logits alone, else answers too.
    """
    row, (own, after, _) = f"{name}-{layout}", layout.partition("-after")
    job = SUPPORT / ("family_job.py" if after else "answers_job.py")
    flags = [*family_flags(folder, name), *LAYOUTS[own][1]]
    files = ["--load", str(folder / checkpoint), "--ramoe-output", str(folder / row)]
    return {"name": row, "job": str(job), "argv": [*flags, *files, "--ramoe-batch-tokens", "64"]}


def training(folder: Path, name: str, layout: str, kind: str = "trained") -> dict[str, Any]:
    """The row that trains a family for three steps in a layout and saves to the folder NAME-LAYOUT-KIND.

    --load is the folder of --save, as in a run that can resume.
    """
    row = f"{name}-{layout}-{kind}"
    steps = "--micro-batch-size 2 --global-batch-size 8 --train-iters 3".split()
    saved = ["--save", str(folder / row), "--load", str(folder / row), "--save-interval", "3"]
    start = [flag for flag in load_flags(folder, name) if flag != "--finetune"]
    data = ["--ramoe-data", str(folder / "parallel.jsonl")]
    argv = [*finetune_flags(folder, name), *LAYOUTS[layout][1], *steps, *saved, *start, *data]
    return {"name": row, "job": "finetune", "argv": argv, "everything": True}


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest, families: tuple[Path, dict[str, Any]]) -> str:
    folder, _ = families
    table = [forward(folder, name, request.param, name) for name in MODELS]
    run_table(LAYOUTS[request.param][0], table, folder, request.param)
    return request.param


@pytest.mark.parametrize("name", MODELS)
def test_computes_what_transformers_computes(
    name: str, layout: str, families: tuple[Path, dict[str, Any]], record_property: Callable[..., None]
) -> None:
    folder, expected = families
    outcome(folder, f"{name}-{layout}")
    found = load_file(folder / f"{name}-{layout}/family.safetensors")
    assert found.keys() == expected[name].keys()
    worst = 0.0
    for key, right in expected[name].items():
        if key.startswith("choice"):
            assert torch.equal(found[key], right), key
        elif key.startswith("weight"):
            torch.testing.assert_close(found[key], right, atol=1e-5, rtol=0)
        else:
            worst = max(worst, float((found[key] - right).abs().max() / right.std()))
            assert torch.equal(found[key].argmax(-1), right.argmax(-1)), key
    record_property("parity", [name, layout, worst])
    assert worst < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_cached_answers_are_those_of_whole_sequences(
    name: str, layout: str, families: tuple[Path, dict[str, Any]]
) -> None:
    """Token by token, plain, steered and transplanted; and choices that share their prompt score the same."""
    folder, _ = families
    ranks = json.loads((folder / f"{name}-{layout}/answers.json").read_text())
    assert all(all(rank.pop("experts")) for rank in ranks)
    found = ranks[0]
    assert ranks == [found] * len(ranks)
    assert found["rows"]
    for kind in ("plain", "steered", "transplant"):
        assert found[f"{kind}-cached"] == found[f"{kind}-whole"], kind
        assert found[f"{kind}-shared"] == pytest.approx(found[f"{kind}-apart"], abs=1e-4), kind
        # answers that end at different times, and contexts that matter
        assert len({len(ids) for ids in found[f"{kind}-whole"]}) > 3
        if kind != "plain":
            assert found[f"{kind}-apart"] != pytest.approx(found["plain-apart"], abs=1e-2)


def test_an_answer_ends_with_the_token_that_completes_a_stop_string(
    layout: str, families: tuple[Path, dict[str, Any]]
) -> None:
    folder, _ = families
    read, shorter = SmallTokenizer((folder / "tokenizer.model").read_bytes()), 0
    for name in MODELS:
        found = json.loads((folder / f"{name}-{layout}/answers.json").read_text())[0]
        for free, until, string in zip(found["free"], found["until"], found["strings"], strict=True):
            texts = [read.detokenize(free[:end]) for end in range(1, len(free) + 1)]
            first = next((end for end, text in enumerate(texts, 1) if string and string in text), len(free))
            assert until == free[:first]
            shorter += first < len(free)
    assert shorter


FOR_TRANSFORMER_ENGINE = re.compile(
    r"decoder\.layers\.(\d+\.)?pre_mlp_layernorm\.(weight|bias)"
    r"|decoder\.layers\.(\d+\.)?(pre_mlp_layernorm|self_attention\.(core_attention|[qk]_layernorm))"
    r"\._extra_state/.*"
    r"|(decoder\.final_layernorm|output_layer)\._extra_state/.*"
)
"""What a conversion writes for transformer-engine's layers alone: the norm before the experts under the name
that they have for it, and the empty objects of their norms, attention and output layer."""


@pytest.mark.parametrize("name", MODELS)
def test_megatron_looks_for_exactly_what_a_conversion_writes(
    name: str, layout: str, families: tuple[Path, dict[str, Any]]
) -> None:
    """Keys, shapes and objects of `sharded_state_dict()` of the real model, over all ranks."""
    folder, _ = families
    read = json.loads((folder / f"{name}-{layout}/keys.json").read_text())
    sought = {(key, tuple(shape)) for key, shape in read}
    entries = FileSystemReader(folder / name / "release").read_metadata().state_dict_metadata
    written = {(key, tuple(getattr(entry, "size", ()))) for key, entry in entries.items()}
    assert sought - written == set()
    more = {key for key, _ in written - sought}
    assert more - {COMMON} == {key for key, _ in written if FOR_TRANSFORMER_ENGINE.fullmatch(key)}


TRAINED = ("olmoe", "phimoe", "gpt-oss")
"""The families with modules of their own."""
TRAININGS = [(name, layout) for layout in ("one", "pp") for name in MODELS] + [(n, "tp-ep") for n in TRAINED]
"""Family and layout of each training of three steps."""


@pytest.fixture(scope="module")
def trained(families: tuple[Path, dict[str, Any]]) -> Path:
    """The checkpoints of `TRAININGS`, each with the logits that Megatron computes of it in its layout."""
    folder, _ = families
    tables: dict[str, list[dict[str, Any]]] = {}
    for name, layout in TRAININGS:
        after = forward(folder, name, f"{layout}-after", f"{name}-{layout}-trained")
        tables.setdefault(layout, []).extend([training(folder, name, layout), after])
    tables["one"].append(training(folder, "phimoe", "one", "own") | {"job": OWN_SCRIPT})
    for layout, table in tables.items():
        run_table(LAYOUTS[layout][0], table, folder, f"trained-{layout}")
    return folder


@pytest.mark.parametrize(("name", "layout"), TRAININGS)
def test_a_trained_model_is_exported_to_what_was_trained(name: str, layout: str, trained: Path) -> None:
    checkpoint = trained / f"{name}-{layout}-trained"
    assert len(outcome(trained, checkpoint.name)["gradient_norms"]) == 3
    exported = trained / f"{name}-{layout}-exported"
    export_checkpoint(plan_export(checkpoint), exported)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    model.set_attn_implementation("eager")
    found = load_file(trained / f"{name}-{layout}-after/family.safetensors")
    for key, right in computed(model).items():
        torch.testing.assert_close(found[key].float(), right.float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_do_not_depend_on_the_layout(name: str, trained: Path) -> None:
    one, *_ = shards(trained, name, "one", 1)
    four = shards(trained, name, "tp-ep", 4)
    compared = 0
    for key, right in one.items():
        if key.startswith("gradient."):
            found = gathered(four, key)
            torch.testing.assert_close(found, right, atol=1e-5 * float(right.abs().max()), rtol=0, msg=key)
            compared += 1
    assert compared > 60


def test_a_script_of_ones_own_trains_the_same_model(trained: Path) -> None:
    ours, own = (weights(trained, f"phimoe-one-{kind}") for kind in ("trained", "own"))
    assert ours
    assert ours.keys() == own.keys()
    assert all(torch.equal(ours[key], own[key]) for key in ours)
    assert (trained / "phimoe-one-own" / NOTE).is_file()


def shards(folder: Path, name: str, layout: str, ranks: int) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / f"{name}-{layout}-trained.{rank}.safetensors") for rank in range(ranks)]


SPLIT = {
    "word_embeddings.weight": 0, "output_layer.weight": 0, "output_layer.bias": 0, "linear_qkv.weight": 0,
    "linear_qkv.bias": 0, "softmax_offset": 0, "linear_proj.weight": 1,
}  # fmt: skip
"""Ends of the names of weights that TP 2 splits, and the axis. The others are whole on every rank."""


def gathered(four: list[dict[str, torch.Tensor]], key: str) -> torch.Tensor:
    """A whole gradient from those of TP 2 x EP 2, whose second rank has the second half of the experts."""
    if expert := re.search(r"local_experts\.(\d+)", key):
        rank, number = divmod(int(expert[1]), 4)
        return four[rank][key.replace(expert[0], f"local_experts.{number}")]
    for end, axis in SPLIT.items():
        if key.endswith(end):
            return torch.cat([four[0][key], four[1][key]], axis)
    return four[3][key]


@pytest.mark.parametrize("jitter", [0.01, 0.2])
def test_sparse_mixer_is_that_of_transformers(jitter: float) -> None:
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    from ramoe_megatron.mcore.families.phimoe_modules import sparse_mixer

    generator = torch.Generator().manual_seed(3)
    levels = torch.tensor([-1.0, 0.0, 1.0, 2.0, 9.0]).repeat(100)[:, None]
    logits = torch.randn(500, 6, generator=generator) * 0.3 + levels
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    weights, chosen = sparsemixer(theirs, jitter, training=False)
    expected = torch.zeros_like(logits).scatter(1, chosen, weights)
    found = sparse_mixer(ours, jitter)
    assert ((expected > 0) & (expected < 0.99)).any(1).float().mean() > 0.1  # experts do compete
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)
    slope = torch.randn(logits.shape, generator=generator)
    (expected * slope).sum().backward()
    (found * slope).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=0)


def routers() -> list[Any]:
    """Megatron's router and SparseMixer's, both with a load-balancing loss and a z-loss."""
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.transformer_config import TransformerConfig

    from ramoe_megatron.mcore.families.phimoe_modules import SparseMixerRouter

    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, num_moe_experts=4, moe_router_topk=2,
        add_bias_linear=False, moe_aux_loss_coeff=0.1, moe_z_loss_coeff=0.1, use_cpu_initialization=True,
    )  # fmt: skip
    alone = types.SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    groups = types.SimpleNamespace(tp=alone, cp=alone, tp_cp=alone, tp_dp_cp=alone)
    made = [TopKRouter(config, groups), SparseMixerRouter(config, groups, jitter=0.1)]
    for router in made:
        router.set_layer_number(1)
    return made


def test_a_sparse_mixer_router_has_the_losses_of_megatron_and_is_observed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megatron.core.transformer.moe import moe_utils

    from ramoe_megatron.mcore.carrier import routing_context
    from ramoe_megatron.mcore.cpu.backend import cpu_backend
    from ramoe_megatron.mcore.families.phimoe_modules import SparseMixerRouter
    from ramoe_megatron.mcore.router import open_router

    class Listener:
        """Attaches a loss to the softmax over all logits, as alignment does."""

        def on_logits(self, router: Any, logits: torch.Tensor) -> torch.Tensor:
            return logits

        def on_routing(self, router: Any, logits: torch.Tensor, probs: Any, routing_map: Any) -> torch.Tensor:
            from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

            return MoEAuxLossAutoScaler.apply(probs, logits.softmax(-1)[..., 0].sum())

    monkeypatch.setattr(moe_utils, "reduce_from_tensor_model_parallel_region", lambda counts, _: counts)
    start = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(1))
    with cpu_backend():
        slopes = []
        for router in routers():
            open_router(router)
            router.ramoe_layer = 0
            logits = start.clone().requires_grad_()
            with routing_context(Listener()):
                probs, routing_map = router.routing(logits)
            (probs * 0).sum().backward()  # only what is attached has a gradient
            slopes.append(logits.grad)
        assert isinstance(router, SparseMixerRouter)
        assert (routing_map.sum(1) == 2).all()
        assert slopes[0].abs().min() > 0
        torch.testing.assert_close(slopes[1], slopes[0], atol=0, rtol=0)


def test_without_a_note_nothing_changes(tmp_path: Path) -> None:
    from ramoe_megatron.mcore.families import keep_note, note_of, with_modules

    args = types.SimpleNamespace(load=str(tmp_path), pretrained_checkpoint=None, save=str(tmp_path / "out"))
    assert note_of(args) is None
    config = object()
    assert with_modules(config, note_of(args)) is config
    keep_note(args)
    assert not (tmp_path / "out").exists()


def note(folder: Path, modules: str | None = "olmoe", family: str = "olmoe") -> Path:
    body = {"family": family, "modules": modules, "source": {}, "package_version": "0"}
    save_document(folder / NOTE, "ramoe-model", body)
    (folder / ORIGINAL).mkdir()
    (folder / ORIGINAL / "config.json").write_text(family)
    (folder / FLAGS).write_text("a: 1")
    return folder


def test_the_note_of_a_run_that_resumes_is_that_of_its_folder(tmp_path: Path) -> None:
    from ramoe_megatron.mcore.families import keep_note, note_of

    base, save = note(tmp_path / "base"), tmp_path / "save"
    args = types.SimpleNamespace(load=str(save), pretrained_checkpoint=str(base), save=str(save))
    assert note_of(args).folder == base
    keep_note(args)
    assert note_of(args).folder == save
    assert sorted(path.name for path in save.iterdir()) == sorted([NOTE, FLAGS, ORIGINAL])
    assert (save / ORIGINAL / "config.json").read_text() == "olmoe"
    keep_note(
        types.SimpleNamespace(
            load=None, pretrained_checkpoint=str(note(tmp_path / "b", "x", "y")), save=str(save)
        )
    )
    assert note_of(args).family == "olmoe"  # nothing is overwritten
    assert (save / ORIGINAL / "config.json").read_text() == "olmoe"


@pytest.mark.parametrize(
    ("modules", "config", "said"),
    [
        ("rwkv", {"transformer_layer_spec": None}, "modules 'rwkv', expected one of olmoe"),
        ("olmoe", {}, "remove --hybrid-layer-pattern"),
        ("olmoe", {"transformer_layer_spec": "mine"}, "remove --spec"),
    ],
)
def test_modules_that_cannot_be_used_are_rejected(
    modules: str, config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    from ramoe_megatron.mcore.families import note_of, with_modules

    args = types.SimpleNamespace(load=str(note(tmp_path / "base", modules)), pretrained_checkpoint=None)
    with pytest.raises(RamoeError, match=said):
        with_modules(types.SimpleNamespace(**config), note_of(args))


def test_longer_sequences_than_longrope_was_trained_with_are_rejected() -> None:
    from ramoe_megatron.mcore.families.phimoe_modules import RotaryEmbedding, use_short_factors

    group = types.SimpleNamespace(size=lambda: 1)
    rope = RotaryEmbedding(8, 1.0, use_cpu_initialization=True, cp_group=group)
    chunk = types.SimpleNamespace(rotary_pos_emb=rope)
    before = rope.inv_freq
    use_short_factors(chunk, [1.0, 2.0, 4.0, 8.0], 16)
    torch.testing.assert_close(rope.inv_freq * torch.tensor([1.0, 2.0, 4.0, 8.0]), before)
    assert rope.get_freqs_non_repeated(16).shape == (16, 4)
    with pytest.raises(RamoeError, match=r"a sequence of 17 tokens.*--seq-length 16"):
        rope.get_freqs_non_repeated(17)
