"""Tables of the runs for the tests of selective training: trained weights, ranks and flags."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from layout_rows import EP, ETP1, FULL, PP, TP, WORLDS
from small_run import alignment_flags, load_flags, profile_flags, training_flags

from ramoe_megatron.artifacts.usage import UsageFile

DISTRIBUTED = ("--use-distributed-optimizer",)
BF16, FP16 = ("--bf16",), ("--fp16", "--initial-loss-scale", "1024")
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
    "tp": Layout(2, TP, etp=2),
    "etp1": Layout(2, (*TP, *EP, *ETP1), ep=2),
    "tp-ep": Layout(4, (*TP, *EP), ep=2, etp=2),
    "ep-pp": Layout(4, (*EP, *PP), ep=2, pp=2),
}
ROWS: dict[str, list[tuple[str, tuple[str, ...]]]] = {  # what is trained, with which flags
    "one": [(kind, ()) for kind in FLAGS] + [("esft-token", DISTRIBUTED)],
    "one-full": [("all", ()), ("esft-token", ()), ("routers", ())],
    "pp": [("all", ()), ("rise", DISTRIBUTED), ("late", ()), ("late", DISTRIBUTED), ("routers", DISTRIBUTED)],
    "pp-full": [("all", ()), ("late", ())],
    "ep": [("all", ()), ("rise", ()), ("late", ()), ("early", DISTRIBUTED)],
    "tp": [("all", ()), ("rise", ())],
    "etp1": [("all", ()), ("late", ())],
    "tp-ep": [("all", ()), ("routers", ()), ("rise", ()), ("esft-token", DISTRIBUTED)],
    "ep-pp": [("all", ()), ("late", ()), ("late", DISTRIBUTED)],
}
RESUMED = [
    (layout, kind, more) for layout, kind in (("pp", "late"), ("ep", "early")) for more in ((), DISTRIBUTED)
]
RESUMED += [("pp", "late", BF16), ("ep", "early", FP16), ("ep-pp", "late", BF16)]
CASES = [(layout, kind, more) for layout, rows in ROWS.items() for kind, more in rows if kind != "all"]


def name(layout: str, kind: str, more: tuple[str, ...] = ()) -> str:
    return "-".join(
        [layout, kind, *{DISTRIBUTED: ["distributed"], BF16: ["bf16"], FP16: ["fp16"]}.get(more, [])]
    )


def argv(folder: Path, kind: str, *more: str, steps: int = 3, from_base: bool = True) -> list[str]:
    flags = list(FLAGS[kind])
    if kind == "task-experts":
        flags += alignment_flags(folder)
    elif flags and kind != "routers":
        flags += [
            "--ramoe-usage",
            str(
                folder / (f"{kind}.safetensors" if kind in ("late", "early") else "profile/usage.safetensors")
            ),
        ]
    trained = ["--train-iters", str(steps), "--weight-decay", "0.1", "--clip-grad", "0.5"]
    return training_flags(folder, *(load_flags(folder) if from_base else ()), *trained, *flags, *more)


def table(folder: Path, ranks: int) -> list[dict[str, Any]]:
    rows = []
    for layout, (needed, flags, *_) in LAYOUTS.items():
        for kind, more in ROWS[layout] if needed == ranks else ():
            steps = 1 if kind == "all" else 3
            row = {
                "name": name(layout, kind, more),
                "job": "finetune",
                "argv": argv(folder, kind, *flags, *more, steps=steps),
            }
            rows.append(row | {"everything": True})
    for layout, flags in {"tp": TP, "pp": PP, "ep": EP}.items() if ranks == 2 else ():
        profile = profile_flags(folder, f"profile-{layout}", "--ramoe-save-usage", *flags)
        rows.append({"name": f"profile-{layout}", "job": "profile", "argv": profile})
    for kind in ("routers", "late") if ranks == 1 else ():
        usage = ["--ramoe-usage", str(folder / "sigmoid.safetensors")] if kind == "late" else []
        flags = argv(folder, kind, *WORLDS["sigmoid"], *usage, steps=1, from_base=False)
        rows.append({"name": f"bias-{kind}", "job": "finetune", "argv": flags, "everything": True})
    for layout, kind, more in RESUMED:
        if LAYOUTS[layout].ranks != ranks:
            continue
        through = f"through-{name(layout, kind, more)}"
        flags = (*LAYOUTS[layout].flags, *more)
        saved = ["--save", str(folder / through), "--save-interval", "2"]
        rows.append({"name": through, "job": "finetune", "argv": argv(folder, kind, *flags, *saved, steps=4)})
        start = ["--load", str(folder / through), "--ckpt-step", "2"]
        again = argv(folder, kind, *flags, *start, steps=4, from_base=False)
        rows.append({"name": f"resumed-{through}", "job": "finetune", "argv": again})
    return rows


def write_usages(folder: Path) -> None:
    """Usage by hand, such that a pipeline stage and an expert-parallel rank have nothing to train."""
    real = UsageFile.load(folder / "profile/usage.safetensors")
    for kind, layers, experts in (("late", slice(2, 4), slice(4, 8)), ("early", slice(0, 2), slice(0, 4))):
        used = torch.zeros_like(real.frequency)
        used[:, layers, experts] = 0.25
        usage = UsageFile(real.languages, real.shape, real.tokens, used, used, real.layer_number, "by hand")
        usage.save(folder / f"{kind}.safetensors")
    replace(usage, shape=replace(real.shape, score_function="sigmoid")).save(folder / "sigmoid.safetensors")
