"""Rows of training data against the seconds and the memory of a start: the first, and a second one.

python -m benchmarks.data [--rows N ...] [--ranks N] [--out FOLDER]

Of each size, rows in eight languages are written as JSONL, with taxonomy and priors of their ids. A start
reads all inputs of a training with alignment to each example's English routing (`check_data`), and makes
Megatron's data sets (`dataset_provider`). The first start makes the rows' store and their tokens; the ranks
of the second start map them. Memory is what a rank's anonymous memory (RssAnon) grows by from the parsed
flags on: what the interpreter, torch and Megatron take is not in it.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.conversion import anonymous
from benchmarks.measure import environment
from benchmarks.shapes import HALF, TINY, training_flags
from benchmarks.world import TASKS, text, write_world
from ramoe_megatron.artifacts.priors import Priors
from ramoe_megatron.artifacts.records import write_taxonomy
from ramoe_megatron.artifacts.tensors import ModelShape
from ramoe_megatron.data.parallel import write_rows
from ramoe_megatron.method.categories import TaxonomyRow

SIZES = (10_000, 100_000, 1_000_000)
LANGUAGES = ("en", "ar", "de", "hi", "sw", "th", "tr", "zh")
LETTERS = (60, 16)  # of prompt and response, 3 bytes each
POOL = 4096  # texts of each length, from which the rows are drawn
TARGET_SECONDS, TARGET_MB = 15.0, 150.0  # of a second start with a million rows


def main() -> None:
    """Measure every size, and print and write one line of figures for each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=SIZES, help="default: %(default)s")
    parser.add_argument("--ranks", type=int, default=2, help="of the second start (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/data"))
    parser.add_argument("--start", action="store_true", help="be one rank, which starts on the data in --out")
    options = parser.parse_args()
    if options.start:
        print(json.dumps(start(options.out)))
        return
    found = []
    for rows in options.rows:
        folder = options.out / str(rows)
        shutil.rmtree(folder, ignore_errors=True)
        size = write(folder, rows)
        (first,) = started(folder, 1)
        later = started(folder, options.ranks)
        found.append({"rows": rows, "MB of JSONL": size / 1e6, "first": first, "second": later})
        shutil.rmtree(folder)
        print(table_line(found[-1]), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "data.json").write_text(json.dumps(found, indent=1))


def table_line(found: dict[str, Any]) -> str:
    """The figures of one size, in words."""
    second = {key: max(rank[key] for rank in found["second"]) for key in found["second"][0]}
    kept = "met" if second["seconds"] <= TARGET_SECONDS and second["MB"] <= TARGET_MB else "missed"
    return (
        f"{found['rows']:>9,} rows ({found['MB of JSONL']:.0f} MB): "
        f"first start {found['first']['seconds']:.1f} s ({found['first']['CPU seconds']:.1f} s of CPU); "
        f"second start {second['seconds']:.1f} s ({second['CPU seconds']:.1f} s of CPU), "
        f"{second['MB']:.0f} MB a rank; target of a million rows, 15 s and 150 MB: {kept}"
    )


def write(folder: Path, rows: int) -> int:
    """Write the rows and the files of stages 1 and 2 for them. Returns the bytes of the rows."""
    write_world(folder, TINY, examples=2)
    generator = random.Random(0)
    count = rows // len(LANGUAGES)
    ids = [f"{TASKS[number % 2]}/{number}" for number in range(count)]

    pools = [[text(generator, letters) for _ in range(POOL)] for letters in LETTERS]

    def row(id_: str, language: str) -> dict[str, str]:
        prompt, response = map(generator.choice, pools)
        fields = {"id": id_, "language": language, "task": id_.partition("/")[0], "split": "train"}
        return fields | {"prompt": prompt, "response": response, "answer": response}

    path = folder / "parallel.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for id_ in ids:
            file.write(write_rows(row(id_, language) for language in LANGUAGES))
    outcomes = (
        TaxonomyRow(id_, id_.partition("/")[0], language, "train", number % 3 > 0, number % 2 > 0)
        for number, id_ in enumerate(ids)
        for language in LANGUAGES[1:]
    )
    write_taxonomy(folder / "taxonomy.jsonl", outcomes)
    shape = ModelShape(TINY.layers, TINY.experts, TINY.topk, "softmax", TINY.hidden)
    priors = torch.full((count, TINY.layers, TINY.experts), 1 / TINY.experts)
    Priors.save(
        folder / "priors.last.safetensors", ids, priors, tokens="last", shape=shape, checkpoint="benchmark"
    )
    return path.stat().st_size


def started(folder: Path, ranks: int) -> list[dict[str, float]]:
    """The figures of processes that start at the same time, as the ranks of a node do."""
    command = [sys.executable, "-m", "benchmarks.data", "--start", "--out", str(folder)]
    own = environment(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    processes = [subprocess.Popen(command, env=own, stdout=subprocess.PIPE, text=True) for _ in range(ranks)]
    answers = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("\n".join(answers))
    return [json.loads(answer.splitlines()[-1]) for answer in answers]


def start(folder: Path) -> dict[str, float]:
    """Start as a rank does, from the parsed flags to the data sets. Seconds, CPU seconds and MB."""
    from ramoe_megatron.mcore.arguments import add_arguments
    from ramoe_megatron.mcore.launch import megatron_arguments
    from ramoe_megatron.mcore.train.datasets import dataset_provider, new_inputs

    shape, config = TINY, HALF.config(folder)
    own = ["--seq-length", "128", "--data-cache-path", str(folder / "cache"), "--ramoe-coeff", "1"]
    own += ["--ramoe-target", "example", "--ramoe-layers", config.layers]
    for name in ("experts", "taxonomy", "priors"):
        own += [f"--ramoe-{name}", str(getattr(config, name))]
    sys.argv[1:] = [*training_flags(shape, folder, 1), *own]
    with megatron_arguments(add_arguments, trains=True) as args:
        before, began, used = anonymous(os.getpid()), time.monotonic(), cpu()
        inputs = new_inputs(args)
        train = dataset_provider([len(inputs.examples), 0, 0])[0]
        for sample in range(64):
            train[sample]
        return {
            "seconds": time.monotonic() - began,
            "CPU seconds": cpu() - used,
            "MB": (anonymous(os.getpid()) - before) / 1e6,
        }


def cpu() -> float:
    """CPU seconds of this process and of those that it has waited for."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


if __name__ == "__main__":
    main()
