"""Task experts: experts that a task uses more often than general English text does (arXiv 2510.04694, eq. 3).

Shapes: G groups (tasks or general text), L MoE layers, E routed experts. MoE layers are numbered from 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ramoe_megatron.errors import RamoeError


class FrequencySum:
    """Accumulates the mean top-k frequency of each expert, in memory that does not grow with the data.

    When each rank holds a part of the data, all-reduce ``sums`` and ``sequences`` over the ranks.
    """

    def __init__(
        self, num_groups: int, num_moe_layers: int, num_experts: int, device: torch.device | str = "cpu"
    ) -> None:
        self.sums = torch.zeros(num_groups, num_moe_layers, num_experts, dtype=torch.float64, device=device)
        """Sum of count / tokens over sequences. [G, L, E]"""
        self.sequences = torch.zeros(num_groups, dtype=torch.int64, device=device)
        """Number of sequences. [G]"""

    def add(self, group: Tensor, counts: Tensor, tokens: Tensor) -> None:
        """Add n sequences, each as ``a_i = c_i / L_i`` (eq. 3): long and short sequences have equal weight.

        Args:
            group: the group of each sequence. int64 [n]
            counts: how often each expert was in the top-k over the selected tokens of a sequence. [n, L, E]
            tokens: number of selected tokens of each sequence; a sequence with 0 is left out. [n]
        """
        used = tokens > 0
        frequency = counts.double() / tokens.clamp_min(1).double()[:, None, None]
        self.sums.index_add_(0, group, frequency * used[:, None, None])
        self.sequences.index_add_(0, group, used.to(torch.int64))

    def mean(self) -> Tensor:
        """Mean frequency, float32 [G, L, E]. Each row sums to K; a group without sequences has zeros."""
        return (self.sums / self.sequences.clamp_min(1)[:, None, None]).float()


def delta(task_frequency: Tensor, general_frequency: Tensor) -> Tensor:
    """``Delta = mean_i(task) - mean_i(general English text)`` (eq. 3).

    Args:
        task_frequency: [..., L, E]
        general_frequency: [L, E]

    Returns:
        [..., L, E], in [-1, 1]. Every row sums to 0, because each frequency sums to K.
    """
    return task_frequency - general_frequency


@dataclass(frozen=True, slots=True)
class Tau:
    """Choose the experts with ``Delta > tau`` (eq. 3; the paper uses 0.25 to 0.5). A layer may have none."""

    tau: float

    def choose(self, delta: Tensor) -> Tensor:
        """Bool mask of the chosen experts, the shape of ``delta``."""
        return delta > self.tau

    def as_dict(self) -> dict[str, str | float]:
        """The ``rule`` entry of the expert file."""
        return {"name": "tau", "tau": self.tau}

    def __str__(self) -> str:
        return f"tau={self.tau:g}"


@dataclass(frozen=True, slots=True)
class TopM:
    """Choose the m experts with the largest ``Delta`` in every layer (our reading). Ties: the lower index."""

    m: int

    def choose(self, delta: Tensor) -> Tensor:
        """Bool mask of the chosen experts, the shape of ``delta``; raises RamoeError when m exceeds E."""
        if self.m > delta.shape[-1]:
            raise RamoeError(
                f"select: found top-m={self.m}, expected at most {delta.shape[-1]}, "
                "the number of experts in a layer"
            )
        # A stable sort, because topk does not define the order of equal values.
        order = delta.sort(dim=-1, descending=True, stable=True).indices[..., : self.m]
        return torch.zeros_like(delta, dtype=torch.bool).scatter(-1, order, True)

    def as_dict(self) -> dict[str, str | float]:
        """The ``rule`` entry of the expert file."""
        return {"name": "top-m", "m": self.m}

    def __str__(self) -> str:
        return f"top-m={self.m}"


Rule = Tau | TopM


def parse_rule(text: str) -> Rule:
    """The rule of ``--ramoe-select``: ``tau=0.3`` or ``top-m=4``.

    Raises:
        RamoeError: the text has another form, tau is outside [-1, 1), or m is below 1.
    """
    name, _, value = text.strip().partition("=")
    try:
        if name == "tau" and -1 <= float(value) < 1:
            return Tau(float(value))
        if name == "top-m" and int(value) >= 1:
            return TopM(int(value))
    except ValueError:
        pass
    raise RamoeError(
        f"select: found {text!r}, expected tau=X with X in [-1, 1), as in tau=0.3, or top-m=M, as in top-m=4"
    )


def rule_from(entry: Mapping[str, Any]) -> Rule:
    """The rule of an expert file's ``rule`` entry; raises RamoeError for an unknown rule."""
    name = str(entry.get("name"))
    return parse_rule(f"{name}={entry.get('m' if name == 'top-m' else name)}")


def task_experts(delta: Tensor, rule: Rule) -> Tensor:
    """Task experts by the rule, independently for each task and layer; bool [..., L, E], as ``delta``."""
    return rule.choose(delta)


def random_experts(mask: Tensor, seed: int) -> Tensor:
    """Random experts as a control: in each task and layer as many as ``mask`` has. bool [..., L, E]"""
    generator = torch.Generator().manual_seed(seed)
    rank = torch.rand(mask.shape, generator=generator).argsort(dim=-1).argsort(dim=-1)
    return rank < mask.sum(dim=-1, keepdim=True).cpu()


def empty_layers(mask: Tensor) -> list[int]:
    """MoE layers (0-based) in which a task has no expert; ``mask`` of this task is bool [L, E]."""
    return [layer for layer, found in enumerate(mask.any(dim=-1).tolist()) if not found]


def describe_empty(mask: Tensor, tasks: tuple[str, ...] | list[str], rule: Rule) -> list[str]:
    """One sentence for each task with layers without a chosen expert; ``mask`` is bool [G, L, E]."""
    sentences = []
    for task, mask_LE in zip(tasks, mask, strict=True):
        layers = empty_layers(mask_LE)
        if layers:
            listed = ", ".join(map(str, layers))
            sentences.append(
                f"task {task!r}: {rule} chooses no expert in {len(layers)} of {len(mask_LE)} MoE layers "
                f"({listed}). These layers are not aligned. To fill them, use a lower tau or top-m=M"
            )
    return sentences
