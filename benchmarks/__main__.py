"""Runs the benchmarks one after another, each in a new process group, and prints the measurements.

python -m benchmarks [--shape cpu|gpu|tiny] [--rounds N] [--ranks N] [--out FOLDER]
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.measure import environment, torchrun
from benchmarks.parity import write_converted
from benchmarks.shapes import DECODED, PRESETS
from benchmarks.tables import (
    decoding_table,
    machine_line,
    operations_table,
    profiling_table,
    training_table,
)
from benchmarks.world import write_world
from ramoe_megatron.recipe.launcher import launch
from ramoe_megatron.recipe.output import Progress

DECODING_ROUNDS = 3


def main() -> None:
    """Measure every shape of a preset. The figures are in OUT/NAME.json, with the logs beside them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--shape", choices=PRESETS, default="cpu")
    parser.add_argument(
        "--rounds", type=int, default=21, help="measured steps of each arm (default: %(default)s)"
    )
    parser.add_argument("--ranks", type=int, default=1, help="data-parallel ranks (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    if options.shape != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 140)
    # Counted on two ranks where the CPU can stand for them, so that the parallel layouts are in it.
    ranks = options.ranks if options.shape == "gpu" else max(2, options.ranks)
    counted = measured("operations", options.shape, [options.shape], options, ranks)
    console.print(operations_table(counted))
    trained, profiled = [], None
    with tempfile.TemporaryDirectory() as name:
        for shape in PRESETS[options.shape]:
            folder = Path(name) / shape.name
            write_world(folder, shape)
            console.print(f"{shape.name}: {shape}")
            arguments = [options.shape, shape.name, str(folder)]
            trained.append(measured("training", shape.name, arguments, options))
            if profiled is None:  # only the first shape, whose weights were saved
                profiled = measured("profiling", shape.name, arguments, options)
        decoded = None
        if task := DECODED.get(options.shape):
            folder = Path(name) / task.shape.name
            write_world(folder, task.shape)
            write_converted(folder, task.shape)
            console.print(f"{task.shape.name}: {task}")
            arguments = [options.shape, task.shape.name, str(folder)]
            one = argparse.Namespace(out=options.out, ranks=1, rounds=min(options.rounds, DECODING_ROUNDS))
            decoded = measured("decoding", task.shape.name, arguments, one)
    assert profiled is not None
    console.print(
        "", machine_line(trained[0]["machine"]), training_table(trained), profiling_table(profiled), sep="\n"
    )
    if decoded:
        console.print("", decoding_table(decoded), sep="\n")
    console.print(f"figures and logs: {options.out}")


def measured(
    module: str, shape: str, arguments: list[str], options: argparse.Namespace, ranks: int | None = None
) -> dict[str, Any]:
    """Run one benchmark under torchrun, and return what it wrote.

    Args:
        ranks: by default those of the options.
    """
    ranks = ranks or options.ranks
    out, log = (options.out / f"{module}-{shape}.{ending}" for ending in ("json", "log"))
    command = torchrun(module, ranks, *arguments, str(out.resolve()), str(options.rounds))
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    log.unlink(missing_ok=True)
    print(f"{module} of shape {shape}: starts (log: {log})", file=sys.stderr, flush=True)
    status = launch(command, threads_of(threads), log, Shown(f"{module} of shape {shape}")).status
    if status:
        # The report of torchrun, which follows, is left out.
        told = log.read_text().split("torch/distributed/elastic")[0].splitlines()[-20:]
        raise SystemExit(
            "\n".join(
                [
                    *told,
                    f"benchmarks: {module} of shape {shape} ended with status {status}; the whole log: {log}",
                ]
            )
        )
    return json.loads(out.read_text())


def threads_of(count: int) -> dict[str, str]:
    """The environment of a rank with so many threads. Waiting threads sleep, so CPU time is work alone."""
    return environment(OMP_NUM_THREADS=str(count), OMP_WAIT_POLICY="passive")


class Shown:
    """Prints to stderr how far a benchmark is: what it measures, the round, and the estimated time left."""

    def __init__(self, what: str, interval: float = 5.0) -> None:
        """`interval`: minimum seconds between two lines. The first and the last round always have a line."""
        self.what, self.interval = what, interval
        self.first = self.last = 0.0

    def __call__(self, told: Progress) -> None:
        """Report that a round has ended."""
        now = time.monotonic()
        if told.done == 1:
            self.first = now
        elif told.done < told.total and now - self.last < self.interval:
            return
        self.last = now
        estimate = ""
        if told.done > 1:
            left = (now - self.first) / (told.done - 1) * (told.total - told.done)
            estimate = f", about {left / 60:.1f} min left" if left >= 60 else f", about {left:.0f} s left"
        print(f"{self.what}: {told.done} of {told.total} {told.unit}{estimate}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
