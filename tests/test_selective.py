"""Selective training on real Megatron: what is frozen stays bit-for-bit, what is selected trains as in a full run, in every layout."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from layout_rows import EP, ETP1, FULL, PP, TP
from safetensors.torch import load_file
from small_run import alignment_flags, load_flags, profile_flags, run_table, training_flags, write_world

from ramoe_megatron.method.artefacts import ExpertFile, UsageFile
from ramoe_megatron.method.selection import esft, rise

DISTRIBUTED = ("--use-distributed-optimizer",)
BUDGET, TOP_P = 9, 0.5
FLAGS = {
    "all": (),
    "routers": ("--ramoe-train", "routers"),
    "task-experts": ("--ramoe-train", "task-experts"),
    "rise": ("--ramoe-train", "rise", "--ramoe-train-budget", str(BUDGET)),
    "esft-token": ("--ramoe-train", "esft-token", "--ramoe-train-top-p", str(TOP_P)),
    "esft-gate": ("--ramoe-train", "esft-gate", "--ramoe-train-top-p", str(TOP_P)),
    "late": ("--ramoe-train", "esft-token", "--ramoe-train-top-p", "1"),  # experts 4-7 of MoE layers 2-3
    "early": ("--ramoe-train", "esft-token", "--ramoe-train-top-p", "1"),  # experts 0-3 of MoE layers 0-1
}


class Layout(NamedTuple):
    """Ranks, flags, and what tells which weights lie where."""

    ranks: int
    flags: tuple[str, ...] = ()
    pp: int = 1
    ep: int = 1
    etp: int = 1


LAYOUTS = {
    "one": Layout(1),
    "one-full": Layout(1, (*FULL, "--micro-batch-size", "1")),
    "pp": Layout(2, PP, pp=2),
    "pp-full": Layout(2, (*PP, *FULL), pp=2),
    "ep": Layout(2, EP, ep=2),
    "etp1": Layout(2, (*TP, *EP, *ETP1), ep=2),
    "tp-ep": Layout(4, (*TP, *EP), ep=2, etp=2),
    "ep-pp": Layout(4, (*EP, *PP), ep=2, pp=2),
}
ROWS: dict[str, list[tuple[str, tuple[str, ...]]]] = {  # what is trained, with which flags
    "one": [(kind, ()) for kind in FLAGS] + [("esft-token", DISTRIBUTED)],
    "one-full": [("all", ()), ("esft-token", ()), ("routers", ())],
    "pp": [("all", ()), ("rise", ()), ("late", ()), ("late", DISTRIBUTED), ("routers", DISTRIBUTED)],
    "pp-full": [("all", ()), ("late", ())],
    "ep": [("all", ()), ("late", ()), ("early", DISTRIBUTED)],
    "etp1": [("all", ()), ("late", ())],
    "tp-ep": [("all", ()), ("routers", ()), ("rise", ()), ("esft-token", DISTRIBUTED)],
    "ep-pp": [("all", ()), ("late", ()), ("late", DISTRIBUTED)],
}
CASES = [(layout, kind, more) for layout, rows in ROWS.items() for kind, more in rows if kind != "all"]


def name(layout: str, kind: str, more: tuple[str, ...] = ()) -> str:
    return f"{layout}-{kind}{'-distributed' * (more == DISTRIBUTED)}"


def argv(folder: Path, kind: str, *more: str, steps: int = 3) -> list[str]:
    flags = list(FLAGS[kind])
    if kind == "task-experts":
        flags += alignment_flags(folder)
    elif flags and kind != "routers":
        flags += ["--ramoe-usage", str(folder / (f"{kind}.safetensors" if kind in ("late", "early") else "profile/usage.safetensors"))]
    trained = ["--train-iters", str(steps), "--weight-decay", "0.1", "--clip-grad", "0.5"]
    return training_flags(folder, *load_flags(folder), *trained, *flags, *more)


def table(folder: Path, ranks: int) -> list[dict[str, Any]]:
    rows = []
    for layout, (needed, flags, *_) in LAYOUTS.items():
        for kind, more in ROWS[layout] if needed == ranks else ():
            steps = 1 if kind == "all" else 3
            row = {"name": name(layout, kind, more), "job": "finetune", "argv": argv(folder, kind, *flags, *more, steps=steps)}
            rows.append(row | {"everything": True})
    return rows


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All rows, and the base model and profile that they start from."""
    folder = tmp_path_factory.mktemp("selective")
    write_world(folder)
    base = training_flags(folder, "--train-iters", "4", "--save", str(folder / "base"), "--save-interval", "4")
    jobs: list[dict[str, Any]] = [{"name": "base", "job": "finetune", "argv": base}]
    jobs.append({"name": "profile", "job": "profile", "argv": profile_flags(folder, "profile", "--ramoe-save-usage")})
    run_table(1, jobs, folder, "base")
    write_usages(folder)
    for ranks in (1, 2, 4):
        run_table(ranks, table(folder, ranks), folder)
    return folder


def write_usages(folder: Path) -> None:
    """Usage by hand, such that a pipeline stage and an expert-parallel rank have nothing to train."""
    real = UsageFile.load(folder / "profile/usage.safetensors")
    for kind, layers, experts in (("late", slice(2, 4), slice(4, 8)), ("early", slice(0, 2), slice(0, 4))):
        used = torch.zeros_like(real.frequency)
        used[:, layers, experts] = 0.25
        UsageFile(real.languages, real.shape, real.tokens, used, used, real.layer_number, "by hand").save(folder / f"{kind}.safetensors")


def chosen(folder: Path, kind: str) -> torch.Tensor:
    """The experts that a row should train. bool [L, E]"""
    if kind == "routers":
        return torch.zeros(4, 8, dtype=torch.bool)
    if kind == "task-experts":
        return ExpertFile.load(folder / "profile/experts.safetensors").expert_mask.any(0)
    if kind in ("late", "early"):
        mask = torch.zeros(4, 8, dtype=torch.bool)
        mask[(slice(2, 4), slice(4, 8)) if kind == "late" else (slice(0, 2), slice(0, 4))] = True
        return mask
    usage = UsageFile.load(folder / "profile/usage.safetensors")
    assert usage.languages == ("en", "es", "tr")
    if kind == "rise":
        return rise(usage.frequency, [1, 2], BUDGET)
    return esft(usage.mean("gate" if kind == "esft-gate" else "frequency", ["en", "es", "tr"]), TOP_P)


def expected(folder: Path, layout: str, kind: str, rank: int, weight: str) -> bool:
    """Whether a weight of a rank, by its own name ("CHUNK.module....") is trained."""
    at, words = LAYOUTS[layout], weight.split(".")
    if "router" in words:
        return kind == "routers"
    if "local_experts" not in words:
        return False
    stage, ep_rank = rank // (at.ranks // at.pp), rank // at.etp % at.ep
    layer = int(words[words.index("layers") + 1]) + stage * (4 // at.pp)
    expert = int(words[words.index("local_experts") + 1]) + ep_rank * (8 // at.ep)
    return bool(chosen(folder, kind)[layer, expert])


def recorded(folder: Path, row: str) -> list[dict[str, torch.Tensor]]:
    """What each rank recorded."""
    found = [load_file(path) for path in sorted(folder.glob(f"{row}.[0-9].safetensors"))]
    assert found
    return found


def of(tensors: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{kind}."): tensor for key, tensor in tensors.items() if key.startswith(f"{kind}.")}


@pytest.mark.parametrize(("layout", "kind", "more"), CASES)
def test_frozen_weights_stay_bit_for_bit_and_the_selected_change(runs: Path, layout: str, kind: str, more: tuple[str, ...]) -> None:
    """Three steps with weight decay and clipping. Gradient buffers hold the selected weights and nothing else, the optimizer two
    moments of them."""
    count = {"trained": 0, "kept": 0}
    for rank, tensors in enumerate(recorded(runs, name(layout, kind, more))):
        before, after, gradients = of(tensors, "start"), of(tensors, "weight"), of(tensors, "gradient")
        should = {weight for weight in before if expected(runs, layout, kind, rank, weight.removeprefix("0.module."))}
        assert {weight for weight in before if not torch.equal(before[weight], after[weight])} == should
        assert gradients.keys() == should
        buffers, kept = tensors["elements"].tolist()
        trained = sum(before[weight].numel() for weight in should)
        assert buffers == trained
        if not more:
            assert kept == 2 * trained
        count = {"trained": count["trained"] + trained, "kept": count["kept"] + kept}
    assert count["trained"] > 0
    if more and layout != "tp-ep" and layout != "ep-pp":
        dense_copies = LAYOUTS[layout].ranks // LAYOUTS[layout].pp if kind == "routers" else 1
        assert count["kept"] == 2 * count["trained"] // dense_copies


@pytest.mark.parametrize(("layout", "kind", "more"), CASES)
def test_the_selected_have_the_gradients_of_a_full_run(runs: Path, layout: str, kind: str, more: tuple[str, ...]) -> None:
    if kind == "task-experts":
        pytest.skip("trained with alignment, which the full run has not")
    full = recorded(runs, name(layout, "all"))
    for rank, tensors in enumerate(recorded(runs, name(layout, kind, more))):
        for weight, gradient in of(tensors, "gradient").items():
            reference = full[rank][f"gradient.{weight}"]
            torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-7, msg=lambda text: f"{weight}: {text}")
