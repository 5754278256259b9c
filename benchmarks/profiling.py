"""One shape's forward passes: bare, with the profile job's routing, and with Megatron's routing trace.

    torchrun --nproc-per-node N -m benchmarks.profiling PRESET SHAPE FOLDER OUT.json ROUNDS

The three passes alternate. All run `OfflineModel.run` over the same sequences, of the shape's length and of
four times this length. Megatron 0.19 starts the tracer of `--moe-routing-trace-path` only in its training
loop. This benchmark starts it in the same way, in its forward-only mode: one record for each layer and
forward pass, with the top-k indices of every token, without the router's distribution and logits.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Ratio, Seconds, alternate, machine, operations, peak_memory, timed
from benchmarks.shapes import PRESETS, Shape, profiling_flags
from benchmarks.world import sequences
from ramoe_megatron.data.encode import Encoded
from ramoe_megatron.jobs.offline_job import ProgressLines
from ramoe_megatron.mcore.launch import run_job

BARE, OURS, TRACE = "bare forward pass", "profile (all that the job keeps)", "Megatron's routing trace"
WARM_UP = 2
SEQUENCES = 2
"""Sequences of the benchmark, in micro-batches of the shape."""


class Passes:
    """The three passes over one set of sequences."""

    def __init__(self, model: Any, encoded: list[Encoded], folder: Path) -> None:
        self.model, self.encoded, self.folder = model, encoded, folder
        self.kept_bytes = {BARE: 0}

    def bare(self) -> None:
        """The bare forward passes."""
        for group in self.model.groups([len(sequence.ids) for sequence in self.encoded]):
            self.model.run(self.encoded, group, None)

    def ours(self) -> None:
        """With the frequencies and pooled distributions of every sequence."""
        from ramoe_megatron.mcore.offline.routing import sequence_routing

        routing = sequence_routing(self.model, self.encoded)
        kept = [*routing.frequency_NLE.values(), *routing.pooled_NLE.values()]
        self.kept_bytes[OURS] = sum(tensor.nbytes for tensor in kept)

    def trace(self) -> None:
        """With Megatron's tracer, including writing its file."""
        with tracer(self.model.chunks, self.folder) as active:
            self.bare()
            active.flush()
            self.kept_bytes[TRACE] = Path(active.output_path).stat().st_size


@contextmanager
def tracer(chunks: Any, folder: Path) -> Iterator[Any]:
    """Megatron's tracer on the routers of a model."""
    from megatron.core.transformer.moe.router_trace import RouterTracer

    with tempfile.TemporaryDirectory(dir=folder) as place:
        active = RouterTracer(place, max_steps=sys.maxsize, rank=torch.distributed.get_rank())
        active.register_hooks(chunks)
        try:
            yield active
        finally:
            active.remove_hooks()


def main() -> None:
    """Measure the shape that the command line names, and write OUT.json."""
    preset, name, folder, out, rounds = (
        sys.argv[1],
        sys.argv[2],
        Path(sys.argv[3]),
        Path(sys.argv[4]),
        int(sys.argv[5]),
    )
    shape = next(shape for shape in PRESETS[preset] if shape.name == name)
    from ramoe_megatron.jobs.offline_job import offline_job
    from ramoe_megatron.mcore.cpu.backend import cuda_absent

    sys.argv = [sys.argv[0], *profiling_flags(shape, folder)]
    with offline_job() as (args, _, options):
        from ramoe_megatron.mcore.offline.model import OfflineModel

        model = OfflineModel(args, options.batch_tokens)
        # The longer sequences show the kept bytes. They take four times as long, so they get fewer rounds.
        lengths = {
            f"{factor}x": measure(model, shape, folder, factor, turns)
            for factor, turns in ((1, rounds), (4, -(-rounds // 3)))
        }
        result = {
            "machine": machine(cuda_absent()),
            "description": str(shape),
            "rounds": rounds,
            "lengths": lengths,
        }
        if torch.distributed.get_rank() == 0:
            out.write_text(json.dumps({**result, "shape": asdict(shape)}, indent=1))


def measure(model: Any, shape: Shape, folder: Path, factor: int, rounds: int) -> dict[str, Any]:
    """All three passes at `factor` times the shape's sequence length.

    Returns seconds, speed relative to the bare pass, operations, and bytes at the peak and kept.
    """
    from ramoe_megatron.mcore.cpu.backend import cuda_absent

    encoded = sequences(model.tokenizer, SEQUENCES * shape.samples * model.dp, factor * shape.sequence)
    tokens = sum(len(sequence.ids) - 1 for sequence in encoded)
    passes = Passes(model, encoded, folder)
    arms = {BARE: passes.bare, OURS: passes.ours, TRACE: passes.trace}
    unit = f"rounds of {len(arms)} passes at {factor * shape.sequence} tokens a sequence"
    progress = ProgressLines(WARM_UP + rounds, unit)
    turns = {label: partial(timed, arm) for label, arm in arms.items()}
    found = alternate(turns, rounds, WARM_UP, progress)
    on_cpu = cuda_absent()
    counts = {label: operations(arm, on_cpu) for label, arm in arms.items()}
    peaks = {label: peak_memory(arm, on_cpu) for label, arm in arms.items()}

    def speed(label: str, time: str) -> dict[str, Any]:
        own, bare = ([getattr(one, time) for one in found[name]] for name in (label, BARE))
        return {"seconds": own, "ratio": asdict(Ratio.of(bare, own))}

    return {
        "sequences": len(encoded),
        "tokens": tokens,
        "passes": {
            label: {
                **{time: speed(label, time) for time in Seconds._fields},
                "operations": counts[label],
                "peak_bytes": peaks[label],
                "kept_bytes": passes.kept_bytes[label],
            }
            for label in arms
        },
    }


if __name__ == "__main__":
    run_job(main)
