"""Task experts: those that a task uses more than general English text does (arXiv 2510.04694, eq. 3).

G groups (the tasks, or the general text), L MoE layers, E routed experts. Layers are 0-based places among the MoE
layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ramoe_megatron.errors import RamoeError


class FrequencySum:
    """Sums for the top-k frequency of each expert, a mean over sequences; their size does not grow with the data.

    Ranks that each saw a part of the data add up ``sums`` and ``sequences`` (two all-reduces).
    """

    def __init__(
        self, num_groups: int, num_moe_layers: int, num_experts: int, device: torch.device | str = "cpu"
    ) -> None:
        self.sums = torch.zeros(num_groups, num_moe_layers, num_experts, dtype=torch.float64, device=device)
        """Sum over sequences of count / tokens. [G, L, E]"""
        self.sequences = torch.zeros(num_groups, dtype=torch.int64, device=device)
        """Sequences added. [G]"""

    def add(self, group: Tensor, counts: Tensor, tokens: Tensor) -> None:
        """Add n sequences: ``a_i = c_i / L_i`` each (eq. 3), so that a long sequence weighs no more than a short one.

        Args:
            group: the group of each sequence. int64 [n]
            counts: how often each expert stood in the top-k over the sequence's selected tokens. [n, L, E]
            tokens: number of selected tokens of each sequence; a sequence with none is left out. [n]
        """
        used = tokens > 0
        frequency = counts.double() / tokens.clamp_min(1).double()[:, None, None]
        self.sums.index_add_(0, group, frequency * used[:, None, None])
        self.sequences.index_add_(0, group, used.to(torch.int64))

    def mean(self) -> Tensor:
        """Mean frequency per group, float32 [G, L, E]; each row sums to K. A group without sequences gives zeros."""
        return (self.sums / self.sequences.clamp_min(1)[:, None, None]).float()


def delta(task_frequency: Tensor, general_frequency: Tensor) -> Tensor:
    """``Delta = mean_i(task) - mean_i(general English text)`` (eq. 3).

    Args:
        task_frequency: [..., L, E]
        general_frequency: [L, E]

    Returns:
        [..., L, E], in [-1, 1]; every row sums to zero, since each frequency sums to K.
    """
    return task_frequency - general_frequency


@dataclass(frozen=True, slots=True)
class Tau:
    """Expert k of layer l is chosen iff ``Delta_k > tau`` (eq. 3; 0.25 to 0.5 in the paper). Layers may stay empty."""

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
    """The m experts of largest ``Delta`` in every layer, whatever its size: our reading. Ties go to the lower index."""

    m: int

    def choose(self, delta: Tensor) -> Tensor:
        """Bool mask of the chosen experts, the shape of ``delta``; raises RamoeError when m exceeds E."""
        if self.m > delta.shape[-1]:
            raise RamoeError(
                f"select: found top-m={self.m}, expected at most {delta.shape[-1]}, the experts of a layer"
            )
        # sort, not topk: only a stable sort promises which of equal values comes first.
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
        RamoeError: for another form, a tau outside [-1, 1) or an m below 1.
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
    """The rule of an expert file's ``rule`` entry; raises RamoeError for an unknown one."""
    name = str(entry.get("name"))
    return parse_rule(f"{name}={entry.get('m' if name == 'top-m' else name)}")


def task_experts(delta: Tensor, rule: Rule) -> Tensor:
    """Task experts by the rule, each task and layer on its own; bool, the shape of ``delta`` [..., L, E]."""
    return rule.choose(delta)


def random_experts(mask: Tensor, seed: int) -> Tensor:
    """A control: as many experts in each task and layer as `mask` has, drawn at random from all; bool, its shape [..., L, E]."""
    generator = torch.Generator().manual_seed(seed)
    rank = torch.rand(mask.shape, generator=generator).argsort(dim=-1).argsort(dim=-1)
    return rank < mask.sum(dim=-1, keepdim=True).cpu()


def empty_layers(mask: Tensor) -> list[int]:
    """MoE layers (0-based) in which one task has no expert; ``mask`` is bool [L, E]."""
    return [layer for layer, found in enumerate(mask.any(dim=-1).tolist()) if not found]


def describe_empty(mask: Tensor, tasks: tuple[str, ...] | list[str], rule: Rule) -> list[str]:
    """One sentence for each task that the rule leaves without experts in some layer; ``mask`` is bool [G, L, E]."""
    sentences = []
    for task, mask_LE in zip(tasks, mask, strict=True):
        layers = empty_layers(mask_LE)
        if layers:
            listed = ", ".join(map(str, layers))
            sentences.append(
                f"task {task!r}: {rule} chooses no expert in {len(layers)} of {len(mask_LE)} MoE layers ({listed}); "
                f"nothing is aligned there. A lower tau or top-m=M fills them"
            )
    return sentences
