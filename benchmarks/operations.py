"""Operations that alignment adds at the routers of a micro-batch: exact numbers, the same on any machine.

    torchrun --nproc-per-node N -m benchmarks.operations PRESET OUT.json [ROUNDS]

A stack of Megatron's routers runs forward and backward, as in a training step, with its losses over the real
tokens. Each option of the alignment is counted with one and with two aligned layers. The difference is what
another aligned layer adds. What is left is made once for a micro-batch, or once for a step, however many
layers are aligned.
"""

import functools
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import operations
from benchmarks.shapes import TINY
from benchmarks.world import TASKS, write_world
from ramoe_megatron.jobs.offline_job import ProgressLines
from ramoe_megatron.mcore.arguments import RoutingAlignmentConfig
from ramoe_megatron.mcore.cpu.backend import cpu_backend, cuda_absent, uncompiled
from ramoe_megatron.method.losses import DIVERGENCES

SCORES = ("softmax", "sigmoid", "sqrtsoftplus")
SHAPE = replace(TINY, layers=4, samples=4)


@dataclass(frozen=True)
class Case:
    """Options of the alignment, and the batch and layout that they run in."""

    divergence: str = "lumped-kl"
    target: str = "profile"
    tokens: str = "last"
    pooling: str = "sequence"
    packed: bool = False
    bf16: bool = False
    per_token: bool = False
    score: str = "softmax"
    layout: str = ""
    """"": one rank. "tp": two sequence-parallel ranks. "cp": two context-parallel ranks."""

    def __str__(self) -> str:
        words = [self.divergence, f"target {self.target}", f"{self.tokens} tokens"]
        words += ["by token"] * (self.pooling == "token") + ["packed"] * self.packed + ["bf16"] * self.bf16
        words += ["per-token loss"] * self.per_token + [self.score] * (self.score != "softmax")
        return ", ".join([*words, *([self.layout] if self.layout else [])])


def cases(ranks: int, few: bool = False) -> list[Case]:
    """Every divergence with every target, choice of tokens and pooling; then what changes the batch.

    Args:
        ranks: with two, a few cases in the layouts of two ranks too.
        few: in one rank's layout too, only the default options and what takes the most operations.
    """
    found = []
    for layout in ("", "tp", "cp") if ranks == 2 else ("",):
        pooled = [Case(tokens=tokens, layout=layout) for tokens in ("last", "prompt")]
        by_token = Case(tokens="all", pooling="token", layout=layout)
        paired = replace(pooled[0], target="paired")
        if few or layout:
            found += [pooled[0], paired, replace(paired, divergence="js"), replace(pooled[1], packed=True)]
            found += [replace(by_token, packed=True, score=score) for score in ("softmax", "sqrtsoftplus")]
            continue
        for divergence, target in itertools.product(DIVERGENCES, ("profile", "example", "paired")):
            found += [replace(one, divergence=divergence, target=target) for one in pooled]
            if target != "paired":  # refused by token
                found.append(replace(by_token, divergence=divergence, target=target))
        for base in (*pooled, by_token):
            changes: list[dict[str, Any]] = [{"packed": True}, {"per_token": True}, {"bf16": True}]
            changes += [{"score": score} for score in SCORES[1:]]
            changes += [{"score": SCORES[2], "packed": True}]
            found += [replace(base, **change) for change in changes]
    return found


class Routers(torch.nn.Module):
    """A chunk of Megatron's routers, one after another, as a model's MoE layers call them."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.transformer.moe.router import TopKRouter
        from megatron.core.transformer.transformer_config import TransformerConfig

        dtype = torch.bfloat16 if case.bf16 else torch.float32
        self.config = TransformerConfig(
            num_layers=SHAPE.layers,
            hidden_size=SHAPE.hidden,
            num_attention_heads=SHAPE.heads,
            num_moe_experts=SHAPE.experts,
            moe_router_topk=SHAPE.topk,
            moe_router_score_function=case.score,  # type: ignore[arg-type]
            moe_router_load_balancing_type="aux_loss",
            moe_aux_loss_coeff=0.01,
            moe_z_loss_coeff=0.001,
            add_bias_linear=False,
            bf16=case.bf16,
            params_dtype=dtype,
            calculate_per_token_loss=case.per_token,
            tensor_model_parallel_size=2 if case.layout == "tp" else 1,
            sequence_parallel=case.layout == "tp",
            context_parallel_size=2 if case.layout == "cp" else 1,
        )
        groups = ProcessGroupCollection.use_mpu_process_groups()
        self.routers = torch.nn.ModuleList(TopKRouter(self.config, groups) for _ in range(SHAPE.layers))
        for number, router in enumerate(self.routers, 1):
            router.set_layer_number(number)  # type: ignore[operator]

    def forward(self, hidden: Tensor) -> Tensor:
        """`hidden` [S, B, H] to the sum of the routers' probabilities."""
        return torch.stack([router(hidden)[0].sum() for router in self.routers]).sum()


def count(case: Case, folder: Path, layers: int) -> int:
    """Operations of a step of one micro-batch with `layers` aligned layers.

    The step ends with the sums of the log. The second step is counted: the first one sets things up.
    """
    from ramoe_megatron.mcore.align.attach import attach
    from ramoe_megatron.mcore.align.batch import routing_batch

    torch.manual_seed(1)
    chunk = Routers(case).train()
    metrics: Any = None
    if layers:
        attach(chunk, config(case, folder, layers))
        metrics = chunk.ramoe_alignment.metrics  # type: ignore[union-attr]
    micro = batch(case)
    rows, columns = micro["loss_mask"].shape[::-1]
    shape = (rows // (2 if case.layout else 1), columns, SHAPE.hidden)
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    hidden = torch.randn(shape, dtype=dtype, device=torch.cuda.current_device(), requires_grad=True)

    def step() -> None:
        with routing_batch(chunk, micro):
            total = chunk(hidden)
        total.backward()
        if metrics is not None:
            metrics.reduced()
            metrics.clear()

    step()
    return operations(step, cuda_absent())


@contextmanager
def process_groups(layout: str) -> Iterator[None]:
    """Megatron's process groups of a layout."""
    from megatron.core import parallel_state

    size = {"tensor_model_parallel_size": 2} if layout == "tp" else {}
    size |= {"context_parallel_size": 2} if layout == "cp" else {}
    parallel_state.initialize_model_parallel(**size)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def config(case: Case, folder: Path, layers: int) -> RoutingAlignmentConfig:
    """The alignment of a case in the first layers, with the files of `world.write_world`."""
    folder = folder / case.score
    return RoutingAlignmentConfig(
        coeff=1.0,
        experts=str(folder / "experts.safetensors"),
        priors=str(folder / f"priors.{case.tokens}.safetensors") if case.target == "example" else None,
        examples="all",
        layers=f"0-{layers - 1}",
        divergence=case.divergence,  # type: ignore[arg-type]
        target=case.target,  # type: ignore[arg-type]
        tokens=case.tokens,  # type: ignore[arg-type]
        pooling=case.pooling,  # type: ignore[arg-type]
    )


def batch(case: Case) -> dict[str, Tensor]:
    """A micro-batch of four samples, or a pack of them."""
    count, rows = SHAPE.samples, SHAPE.sequence
    generator = torch.Generator().manual_seed(0)
    found = {
        "prompt_length": torch.tensor([5, 3, 4, 6]),
        "length": torch.tensor([8, 7, 6, 8]),
        "loss_mask": torch.ones(count, rows),
        "ramoe_weight": torch.tensor([1.0, 0.0, 1.0, 1.0]),
        "ramoe_task": torch.arange(count) % len(TASKS),
    }
    if case.target == "example":
        target_BZE = torch.randn(count, SHAPE.layers, SHAPE.experts, generator=generator).softmax(-1)
        found["ramoe_target"] = target_BZE
    if case.packed:
        borders = torch.arange(0, rows + 1, rows // count)
        found |= {"loss_mask": torch.ones(rows), "start": borders[:-1], "sample_share": torch.tensor(0.25)}
        found |= {"cu_seqlens": borders.int()}
        found = {key: value[None] for key, value in found.items()}
    device = torch.cuda.current_device()
    return {key: value.to(device) for key, value in found.items()}


def measure(case: Case, folder: Path) -> dict[str, int]:
    """Operations that one aligned layer adds to a step, and that every micro-batch adds once.

    The latter includes what the log does once a step.
    """
    one, two = (count(case, folder, layers) for layers in (1, 2))
    return {"layer": two - one, "once": 2 * one - two - _without(_batch_alone(case), folder)}


def _batch_alone(case: Case) -> Case:
    """A case with the same operations where nothing is aligned."""
    return Case(
        packed=case.packed, bf16=case.bf16, per_token=case.per_token, score=case.score, layout=case.layout
    )


@functools.cache
def _without(case: Case, folder: Path) -> int:
    return count(case, folder, 0)


@contextmanager
def world() -> Iterator[Path]:
    """Megatron's process groups can be made in the body, and the files of an alignment are in the folder."""
    with tempfile.TemporaryDirectory() as name, uncompiled(), cpu_backend():
        for score in SCORES:
            write_world(Path(name) / score, SHAPE, 4, score)
        yield Path(name)


def main() -> None:
    """Count the cases of a preset on this number of ranks, and write OUT.json."""
    preset, out = sys.argv[1], Path(sys.argv[2])
    torch.distributed.init_process_group("gloo" if cuda_absent() else "nccl")
    with world() as folder:
        chosen = cases(torch.distributed.get_world_size(), few=preset == "tiny")
        progress, found = ProgressLines(len(chosen), "options"), {}
        for layout, group in itertools.groupby(chosen, key=lambda case: case.layout):
            with process_groups(layout):  # they take longer than the counting
                for case in group:
                    found[str(case)] = measure(case, folder)
                    progress(1)
    if torch.distributed.get_rank() == 0:
        out.write_text(json.dumps({"cases": found}, indent=1))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
