"""Runs the tables of `layout_rows` and the other jobs on one, two and four gloo ranks, each started once."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from broken_lines import FATAL, SOUND, broken_line, sound_line
from chat_rows import chat_rows, write_conversations
from doctor_world import write_faults
from layout_rows import LAYOUTS, PLACEMENTS, PROFILE_OF, ROWS, WORLDS, Row
from packed_rows import samples_of_first_packs
from small_run import (
    aligned_flags,
    alignment_flags,
    load_flags,
    offline_flags,
    profile_flags,
    run_table,
    training_flags,
    without_value,
    write_world,
)

from ramoe_megatron.artifacts.records import read_taxonomy
from ramoe_megatron.data.parallel import load_examples
from ramoe_megatron.data.sampler import order

HERE = Path(__file__).parent
REFERENCE, SCORING, STOCK_SCRIPT, MISUSE = (
    str(HERE / name) for name in ("reference_job.py", "scoring_job.py", "stock_gpt.py", "misused_gpt.py")
)
PADDED = ("--make-vocab-size-divisible-by", "100")  # the vocabulary of 384 tokens is padded to 400


def run_all(folder: Path) -> None:
    """Everything, into `folder`."""
    write_world(folder)
    write_faults(folder)
    write_placements(folder)
    write_conversations(folder)
    run_table(1, bases(folder), folder)
    parts: list[list[dict[str, Any]]] = [[], []]
    for place, row in enumerate([*jobs(folder), *finetuning(folder, 1), *refused(folder), *checked(folder)]):
        # the second needs the first
        parts[0 if row["name"] in ("through-one", "resumed-one") else place % 2].append(row)
    parts[1] += chat_rows(folder)  # each evaluation needs the training before it
    # two processes of one rank beside each other, on the two cores of a small machine
    with ThreadPoolExecutor() as pool:
        list(pool.map(run_table, (1, 1), parts, (folder, folder), ("ranks1-a", "ranks1-b")))
    run_table(2, [*finetuning(folder, 2), *jobs_in_layouts(folder)], folder)
    run_table(4, finetuning(folder, 4), folder)


def finetuning(folder: Path, ranks: int) -> list[dict[str, Any]]:
    rows = {name: row for name, row in ROWS.items() if row.ranks == ranks}
    return [
        *(
            {"name": name, "job": "finetune", "lm": row.lm, "argv": argv(folder, name, row)}
            for name, row in rows.items()
        ),
        *(
            {"name": name.replace("through", "resumed"), "job": "finetune", "argv": resumed(folder, name)}
            for name in rows
            if name.startswith("through-")
        ),
    ]


def argv(folder: Path, name: str, row: Row) -> list[str]:
    suffix = f"-{row.world}" if row.world else ""
    profiled = PROFILE_OF.get(row.world, row.world)
    alignment = (
        alignment_flags(folder, f"profile-{profiled}" if profiled else "profile") if row.aligned else []
    )
    if row.ci:
        alignment += ["--ramoe-taxonomy", str(folder / f"taxonomy-{row.ci}.jsonl")]
    saved = ["--save", str(folder / name), "--save-interval", "5"] if name.startswith(SAVED) else []
    start = [*load_flags(folder, f"base{suffix}"), *alignment, *saved, "--train-iters", str(row.steps)]
    flags = [
        str(samples_of_first_packs(folder, flag)) if flag.startswith("PACKED") else flag for flag in row.flags
    ]
    return training_flags(folder, *start, *flags, losses=row.losses)


SAVED = ("through-", "off-", "zero-")


def resumed(folder: Path, name: str) -> list[str]:
    """The run `name` from its checkpoint of step 5 on."""
    row = ROWS[name]
    start = ["--load", str(folder / name), "--ckpt-step", "5", "--train-iters", str(row.steps)]
    return training_flags(folder, *start, *alignment_flags(folder), *row.flags, losses=row.losses)


def bases(folder: Path) -> list[dict[str, Any]]:
    def base(name: str, *flags: str) -> dict[str, Any]:
        saved = ["--train-iters", "4", "--save", str(folder / name), "--save-interval", "4"]
        return {"name": name, "job": "finetune", "argv": training_flags(folder, *saved, *flags)}

    def profile(name: str, *flags: str) -> dict[str, Any]:
        return {"name": name, "job": "profile", "argv": profile_flags(folder, name, *flags)}

    return [
        base("base"),
        profile("profile"),
        profile(
            "profile-kept", *"--ramoe-priors-for ci --ramoe-priors-dtype bfloat16 --ramoe-layers 1-2".split()
        ),
        *(base(f"base-{world}", *flags) for world, flags in WORLDS.items()),
        *(
            profile(f"profile-{world}", "--load", str(folder / f"base-{world}"), *flags)
            for world, flags in WORLDS.items()
            if world not in PROFILE_OF
        ),
    ]


def write_placements(folder: Path) -> None:
    """A taxonomy for each of `PLACEMENTS`: the examples drawn there are ci, all others ii."""
    examples = load_examples([str(folder / "parallel.jsonl")], split="train")
    drawn = order(examples, len(examples), 7)
    rows = [json.loads(line) for line in (folder / "taxonomy.jsonl").read_text().splitlines()]
    for name, draws in PLACEMENTS.items():
        chosen = {(examples[drawn[draw]].id, examples[drawn[draw]].language) for draw in draws}
        placed = []
        for row in rows:
            ci = (row["id"], row["language"]) in chosen
            placed.append(
                row | {"english_correct": ci, "target_correct": False, "category": "ci" if ci else "ii"}
            )
        (folder / f"taxonomy-{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in placed))
        assert any(row.category == "ci" for row in read_taxonomy(folder / f"taxonomy-{name}.jsonl"))


def jobs(folder: Path) -> list[dict[str, Any]]:
    """The offline jobs, and training as other scripts do it."""
    script = str(HERE.parents[1] / "examples/pretrain_gpt.py")
    every = training_flags(folder, *load_flags(folder, "base-every"), *WORLDS["every"])
    return [
        {
            "name": "taxonomy",
            "job": "taxonomy",
            "argv": offline_flags(folder, "taxonomy", "--ramoe-split", "train,test"),
        },
        {"name": "reference", "job": REFERENCE, "argv": offline_flags(folder, "reference")},
        {
            "name": "reference-padded",
            "job": REFERENCE,
            "argv": offline_flags(folder, "reference-padded", *PADDED),
        },
        {"name": "scoring", "job": SCORING, "argv": scoring_flags(folder, "scoring")},
        {"name": "evaluate", "job": "evaluate", "argv": _evaluate(folder)},
        {"name": "predict", "job": "predict", "argv": _predict(folder)},
        {"name": "one", "job": "finetune", "argv": aligned_flags(folder)},
        {"name": "script", "job": script, "argv": aligned_flags(folder)},
        {"name": "one-every", "job": "finetune", "argv": every},
        {"name": "script-every", "job": script, "argv": every},
        stock(folder, "one"),
    ]


def stock(folder: Path, layout: str) -> dict[str, Any]:
    return {
        "name": f"stock-{layout}",
        "job": STOCK_SCRIPT,
        "argv": argv(folder, f"off-stock-{layout}", ROWS[f"off-{layout}"]),
    }


def jobs_in_layouts(folder: Path) -> list[dict[str, Any]]:
    return [
        stock(folder, "tp"),
        {
            "name": "reference-padded-tp",
            "job": REFERENCE,
            "argv": offline_flags(folder, "reference-padded-tp", *PADDED, *LAYOUTS["tp"][1]),
        },
        *(
            {
                "name": f"{job}-{layout}",
                "job": path,
                "argv": make(folder, f"{job}-{layout}", *LAYOUTS[layout][1]),
            }
            for layout in ("tp", "pp", "ep")
            for job, path, make in (
                ("profile", "profile", profile_flags),
                ("reference", REFERENCE, offline_flags),
                ("scoring", SCORING, scoring_flags),
            )
        ),
    ]


def scoring_flags(folder: Path, output: str, *more: str) -> list[str]:
    return offline_flags(folder, output, "--ramoe-split", "test", *more)


def refused(folder: Path) -> list[dict[str, Any]]:
    scratch = ("--pretrained-checkpoint", "", "--train-iters", "1")
    absent = str(folder / "nowhere")
    unevaluated = without_value(training_flags(folder), "--eval-interval")
    return [
        {
            "name": "other-model",
            "job": "finetune",
            "argv": aligned_flags(folder, "--num-experts", "4", *scratch),
        },
        {"name": "bad-layers", "job": "finetune", "argv": aligned_flags(folder, "--ramoe-layers", "2-9")},
        {"name": "bad-tokens", "job": "finetune", "argv": aligned_flags(folder, "--ramoe-tokens", "all")},
        {"name": "absent", "job": "taxonomy", "argv": [*offline_flags(folder, "x"), "--load", absent]},
        {
            "name": "other-shape",
            "job": "taxonomy",
            "argv": [*offline_flags(folder, "x"), "--hidden-size", "64"],
        },
        {
            "name": "short-limit",
            "job": "taxonomy",
            "argv": offline_flags(folder, "x", "--ramoe-max-new-tokens", "1"),
        },
        {"name": "warm-up", "job": "finetune", "argv": training_flags(folder, "--lr-warmup-iters", "5")},
        {"name": "unevaluated", "job": "finetune", "argv": unevaluated},
        {
            "name": "absent-base",
            "job": "finetune",
            "argv": training_flags(folder, "--pretrained-checkpoint", absent),
        },
        *(
            {
                "name": f"calls-{calls}",
                "job": MISUSE,
                "argv": aligned_flags(folder, "--model-calls", str(calls), "--train-iters", "1"),
            }
            for calls in (0, 2)
        ),
    ]


def checked(folder: Path) -> list[dict[str, Any]]:
    """Broken command lines, run ("broken-") and with --check ("checked-"); valid ones with --check."""
    rows = []
    for name in FATAL:
        line = broken_line(name, folder, 1)
        words = (
            [*line.flags, "--ramoe-output", str(folder / "unmade")]
            if line.job != "finetune"
            else list(line.flags)
        )
        place = name.replace(" ", "-")
        rows.append({"name": f"broken-{place}", "job": line.job, "argv": words})
        rows.append({"name": f"checked-{place}", "job": line.job, "argv": [*words, "--check"]})
    for kind in SOUND:
        line = sound_line(kind, folder)
        rows.append({"name": f"sound-{kind}", "job": line.job, "argv": [*line.flags, "--check"]})
    return rows


def _evaluate(folder: Path) -> list[str]:
    experts = str(folder / "profile/experts.safetensors")
    return offline_flags(
        folder, "evaluations", "--ramoe-split", "test", "--ramoe-experts", experts, "--ramoe-method", "base"
    )


def _predict(folder: Path) -> list[str]:
    profile = folder / "profile"
    files = [
        "--ramoe-experts",
        str(profile / "experts.safetensors"),
        "--ramoe-divergence-file",
        str(profile / "divergence.csv"),
    ]
    files += [
        "--ramoe-taxonomy",
        str(folder / "taxonomy.jsonl"),
        "--ramoe-layers",
        "1-2",
        "--ramoe-split",
        "test",
    ]
    return offline_flags(folder, "predict", *files)
