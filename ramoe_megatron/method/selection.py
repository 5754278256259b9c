"""Selection of the experts to train, from the use of each expert by each language.

Two published selections: RISE (arXiv 2604.03592) and ESFT (arXiv 2407.01906).
Shape suffixes: G languages, T target languages, L MoE layers, E routed experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ramoe_megatron.errors import RamoeError

REACHED = 1e-6
"""Tolerance for a share to reach ``top_p``, because scores are stored in float32."""


def zones(layers: int) -> Tensor:
    """The zone of each MoE layer: 0 (shallow), 1 (middle) or 2 (deep). int64 [L]

    The zones are cut at 37.5 % and 62.5 % of depth (arXiv 2604.03592). The middle of a layer decides its
    zone, and a middle exactly at a cut belongs to the middle zone (our reading).
    """
    depth = (torch.arange(layers) * 2 + 1) * 8  # in sixteenths of a layer: exact
    return (depth >= 6 * layers).long() + (depth > 10 * layers).long()


def specificity(frequency_GLE: Tensor, targets: Sequence[int]) -> Tensor:
    """RISE's score in the shallow and deep layers: ``S * (1 + 10 a)`` with ``S = a / mean over languages``.

    ``a`` is the target language's frequency (arXiv 2604.03592). With several target languages, the score is
    the mean of their scores (our reading). An expert that no language uses has score 0. float64 [L, E]
    """
    frequency_GLE = frequency_GLE.double()
    mean_LE = _ordered_mean(frequency_GLE)
    target_TLE = frequency_GLE[list(targets)]
    share_TLE = target_TLE / torch.where(mean_LE > 0, mean_LE, 1.0)
    return _ordered_mean(share_TLE * (1 + 10 * target_TLE))


def overlap(frequency_GLE: Tensor) -> Tensor:
    """RISE's score in the middle layers: ``O * (1 + 10 mean)`` with ``O = 1 / (1 + std / mean)``.

    ``mean`` and ``std`` are over languages (arXiv 2604.03592); ``std`` is that of a population. An expert
    that no language uses has score 0. float64 [L, E]
    """
    frequency_GLE = frequency_GLE.double()
    mean_LE = _ordered_mean(frequency_GLE)
    deviation_LE = _ordered_mean((frequency_GLE - mean_LE) ** 2).sqrt()
    # O as mean / (mean + std), which is finite at mean 0
    return mean_LE / torch.where(mean_LE > 0, mean_LE + deviation_LE, 1.0) * (1 + 10 * mean_LE)


def rise(
    frequency_GLE: Tensor, targets: Sequence[int], budget: int, split: Sequence[int] | None = None
) -> Tensor:
    """The experts that RISE trains (arXiv 2604.03592).

    RISE takes the experts of highest specificity in the shallow and deep layers, and the experts of highest
    overlap in the middle layers. Each zone has one ranking of all its (layer, expert) pairs; ties go to the
    lower pair.

    Args:
        frequency_GLE: top-k count / tokens of each language.
        targets: indices of the target languages.
        budget: number of (layer, expert) pairs to choose.
        split: number of shallow, middle and deep pairs. By default in proportion to the layers of each zone,
            with the largest remainders rounded up (our reading: the paper gives 44/32/52 of 128 and 2/11/3 of
            16).

    Returns:
        The chosen experts. bool [L, E]

    Raises:
        RamoeError: there is no target, or the layers cannot hold the budget or the split.
    """
    _, layers, experts = frequency_GLE.shape
    if not targets:
        raise RamoeError("RISE: no target language; expected at least one beside the anchor")
    if not 1 <= budget <= layers * experts:
        raise RamoeError(
            f"RISE: found a budget of {budget}, expected 1 to {layers * experts} "
            f"({layers} MoE layers x {experts} experts)"
        )
    zone_L = zones(layers)
    held = [int((zone_L == zone).sum()) for zone in range(3)]
    parts = _proportional(budget, held) if split is None else list(split)
    if (
        len(parts) != 3
        or sum(parts) != budget
        or any(not 0 <= part <= n * experts for part, n in zip(parts, held, strict=True))
    ):
        raise RamoeError(
            f"RISE: found the split {parts}, expected three numbers that sum to {budget}, at most "
            f"{[n * experts for n in held]}"
        )
    special_LE, shared_LE = specificity(frequency_GLE, targets), overlap(frequency_GLE)
    chosen_LE = torch.zeros(layers, experts, dtype=torch.bool)
    for zone, part in enumerate(parts):
        rows = (zone_L == zone).nonzero()[:, 0]
        score = (shared_LE if zone == 1 else special_LE)[rows].flatten()
        best = score.argsort(descending=True, stable=True)[:part]
        chosen_LE[rows[best // experts], best % experts] = True
    return chosen_LE


def esft(score_LE: Tensor, top_p: float) -> Tensor:
    """The experts that ESFT trains (arXiv 2407.01906).

    In each layer, ESFT takes experts in order of falling score until their share of the layer's total score
    reaches ``top_p``. Ties go to the lower expert.

    Args:
        score_LE: mean gate weight or token share of each expert, at least 0. Only ratios within a layer
            matter.
        top_p: share to reach, in (0, 1]; 1 takes every expert with a score above 0.

    Returns:
        The chosen experts; none in a layer in which all scores are 0. bool [L, E]

    Raises:
        RamoeError: ``top_p`` is out of range.
    """
    if not 0 < top_p <= 1:
        raise RamoeError(f"ESFT: found top-p {top_p}, expected above 0 and at most 1")
    score_LE = score_LE.double()
    if top_p == 1:
        return score_LE > 0
    order_LE = score_LE.argsort(dim=-1, descending=True, stable=True)
    sorted_LE = score_LE.gather(-1, order_LE)
    before_LE = sorted_LE.cumsum(-1) - sorted_LE
    needed_LE = (before_LE < (top_p - REACHED) * score_LE.sum(-1, keepdim=True)) & (sorted_LE > 0)
    return torch.zeros_like(needed_LE).scatter(-1, order_LE, needed_LE)


def _ordered_mean(values: Tensor) -> Tensor:
    """Mean over the first dimension. Permuting this dimension does not change a bit of the result."""
    return values.sort(dim=0).values.mean(dim=0)


def _proportional(budget: int, held: Sequence[int]) -> list[int]:
    """``budget`` in whole numbers proportional to ``held``, by largest remainder; ties go to the first."""
    total = sum(held)
    parts = [budget * n // total for n in held]
    by_remainder = sorted(range(len(held)), key=lambda zone: (-(budget * held[zone] % total), zone))
    for zone in by_remainder[: budget - sum(parts)]:
        parts[zone] += 1
    return parts
