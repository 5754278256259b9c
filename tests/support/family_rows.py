"""The tables of the jobs that run on the converted tiny models, each with what it needs."""

import json
from pathlib import Path
from typing import Any

from data_rows import SmallTokenizer
from family_models import family_flags, finetune_flags
from small_run import SAMPLES, load_flags

from ramoe_megatron.data.packing import PackedDataset
from ramoe_megatron.data.parallel import Example, load_examples

ALIGNED = ("qwen3-moe", "mixtral", "olmoe", "phimoe", "gpt-oss")
ZONE = (1, 2)
"""The aligned layers, of three."""
COEFF = 20.0
DATA = "chosen.jsonl"
STEERED = ("--ramoe-steer", "soft", "--ramoe-steer-layers", "1-2", "--ramoe-steer-strength")
STRENGTHS = {"steered": 1.5, "zero": 0.0}
JOB = str(Path(__file__).parent / "answers_job.py")
HYBRID = {"mixtral": "*E*E*E", "qwen3-moe": "*E*E*E"}
PACKS, ROOM = 2, 64
CP = ("--context-parallel-size", "2")
MULTIPLE = {1: 1, 2: 4}
"""Of what the room of a packed sample is, by the context-parallel size."""


def write_choices(folder: Path) -> None:
    """The examples of small_run, each with the answer of another as its second choice.

    So a random model answers some of them right.
    """
    rows = [json.loads(line) for line in (folder / "parallel.jsonl").read_text().splitlines()]
    responses = list(dict.fromkeys(row["response"] for row in rows))
    for place, row in enumerate(rows):
        others = [response for response in responses if response != row["response"]]
        row["answer"] = row["response"]
        row["choices"] = [row["response"], others[place % len(others)]]
    (folder / DATA).write_text("".join(json.dumps(row) + "\n" for row in rows))


def examples(folder: Path, split: str) -> list[Example]:
    return load_examples([str(folder / DATA)], split=split)


def tokenizer(folder: Path) -> SmallTokenizer:
    return SmallTokenizer((folder / "tokenizer.model").read_bytes())


def offline(folder: Path, name: str, output: str, *more: str) -> list[str]:
    files = ["--ramoe-data", str(folder / DATA), "--ramoe-output", str(folder / output)]
    load = ["--load", str(folder / name), "--ramoe-batch-tokens", "256"]
    return [*family_flags(folder, name), *files, *load, *more]


def profile(folder: Path, name: str) -> dict[str, Any]:
    files = [
        "--ramoe-general",
        str(folder / "general.jsonl"),
        "--ramoe-taxonomy",
        str(folder / "taxonomy.jsonl"),
    ]
    more = "--ramoe-select top-m=3 --ramoe-tokens last --ramoe-save-priors --ramoe-split train,test".split()
    return {
        "name": f"{name}-profile",
        "job": "profile",
        "argv": offline(folder, name, f"{name}-profile", *files, *more),
    }


def alignment(folder: Path, name: str) -> list[str]:
    made = folder / f"{name}-profile"
    flags = f"--ramoe-coeff {COEFF} --ramoe-layers {ZONE[0]}-{ZONE[1]} --ramoe-examples ci+cc"
    files = [
        "--ramoe-taxonomy",
        str(folder / "taxonomy.jsonl"),
        "--ramoe-priors",
        str(made / "priors.safetensors"),
    ]
    flags += " --ramoe-tokens last --ramoe-target example"
    return [*flags.split(), *files, "--ramoe-experts", str(made / "experts.safetensors")]


def aligned(folder: Path, name: str, row: str, *more: str, lm: int = 1) -> dict[str, Any]:
    """A fine-tuning with alignment, of one step if no other number is given."""
    batch = ["--micro-batch-size", "4", "--global-batch-size", str(SAMPLES), "--train-iters", "1"]
    data = ["--ramoe-data", str(folder / DATA)]
    argv = [
        *finetune_flags(folder, name),
        *load_flags(folder, name),
        *alignment(folder, name),
        *batch,
        *data,
        *more,
    ]
    return {"name": row, "job": "finetune", "argv": argv, "lm": lm, "everything": True}


def evaluation(folder: Path, name: str, method: str, *more: str) -> dict[str, Any]:
    experts = [
        "--ramoe-experts",
        str(folder / f"{name}-profile/experts.safetensors"),
        "--ramoe-method",
        method,
    ]
    argv = offline(folder, name, f"{name}-evaluations", "--ramoe-split", "validation", *experts, *more)
    return {"name": f"{name}-evaluate-{method}", "job": "evaluate", "argv": argv}


def table(folder: Path) -> list[dict[str, Any]]:
    """The jobs of one rank, but for GPT-OSS's packs."""
    rows = [profile(folder, name) for name in ALIGNED]
    rows += [aligned(folder, name, f"{name}-aligned", lm=0) for name in ALIGNED]
    select = ["--ramoe-train", "task-experts", "--weight-decay", "0.1", "--train-iters", "2"]
    select += ["--save", str(folder / "phimoe-selective"), "--save-interval", "2"]
    rows.append(aligned(folder, "phimoe", "phimoe-selective", *select))
    rows.append(evaluation(folder, "phimoe", "base"))
    for method, strength in STRENGTHS.items():
        rows.append(evaluation(folder, "phimoe", method, *STEERED, str(strength)))
    refresh = ["--ramoe-refresh-interval", "2", "--ramoe-refresh-examples", "10", "--train-iters", "3"]
    refresh += ["--lr", "1e-2", "--save", str(folder / "olmoe-refresh"), "--save-interval", "2"]
    rows.append(aligned(folder, "olmoe", "olmoe-refresh", *refresh))
    again = offline(
        folder, "olmoe", "olmoe-taxonomy", "--load", str(folder / "olmoe-refresh"), "--ckpt-step", "2"
    )
    rows.append({"name": "olmoe-taxonomy", "job": "taxonomy", "argv": again})
    for name, pattern in HYBRID.items():
        output, words = f"{name}-hybrid", ["--hybrid-layer-pattern", pattern]
        rows.append({"name": output, "job": JOB, "argv": offline(folder, name, output, *words)})
    return rows


def samples(folder: Path, cp: int) -> int:
    """Samples in the first global batch of packs."""
    made = examples(folder, "train"), tokenizer(folder), ROOM, PACKS, 7, PACKS
    return len(PackedDataset(*made, multiple=MULTIPLE[cp]).order)


def packed(folder: Path, cp: int) -> dict[str, Any]:
    """GPT-OSS on packs, with alignment."""
    size = f"--ramoe-pack --micro-batch-size 1 --global-batch-size {PACKS} --seq-length {ROOM}"
    more = ["--calculate-per-token-loss", *size.split(), *(CP if cp > 1 else ())]
    return aligned(folder, "gpt-oss", f"packed-{cp}", *more)


def padded(folder: Path, name: str, cp: int, of: int) -> dict[str, Any]:
    """GPT-OSS on the samples of the packs for a context-parallel size, padded, on so many ranks."""
    size = f"--micro-batch-size 1 --global-batch-size {samples(folder, of)}"
    more = ["--calculate-per-token-loss", *size.split(), *(CP if cp > 1 else ())]
    return aligned(folder, "gpt-oss", name, *more)
