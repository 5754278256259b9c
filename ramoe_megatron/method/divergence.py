"""Divergence of routing between languages over depth, and the alignment zone (arXiv 2510.04694).

Shapes: L MoE layers, E routed experts. MoE layers are numbered from 0. Logarithms are natural.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ramoe_megatron.errors import RamoeError

UNDEFINED_BELOW = 1e-8
"""Below this denominator `hjs` is undefined for a pair: both distributions are then almost uniform."""

MIN_DEPTH = 0.2
"""Least depth of a U: how far its floor lies below its lower rim, as a share of that rim (our reading)."""


def hjs(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy-normalised JS divergence ``JSD(a, b) / (log E - (H(a) + H(b)) / 2)`` (arXiv 2510.04694).

    Args:
        a: distributions over experts. [..., E]
        b: distributions over experts, broadcast against ``a``. [..., E]

    Returns:
        The value, float64 [...] in [0, 1], and whether the value is defined, bool [...]. A value is undefined
        where the denominator is below 1e-8. An undefined value is 0; leave it out of means, and count it.
    """
    # float64: with near-uniform routing, numerator and denominator are both small differences of entropies.
    a, b = a.double(), b.double()
    mean_entropy = (_entropy(a) + _entropy(b)) / 2
    jsd = _entropy((a + b) / 2) - mean_entropy
    denominator = math.log(a.shape[-1]) - mean_entropy
    defined = denominator >= UNDEFINED_BELOW
    value = jsd / denominator.clamp_min(UNDEFINED_BELOW)
    return torch.where(defined, value.clamp(0.0, 1.0), 0.0), defined


def _entropy(q: Tensor) -> Tensor:
    return -torch.special.xlogy(q, q).sum(dim=-1)


@dataclass(frozen=True, slots=True)
class DivergenceRow:
    """One language at one MoE layer: a line of ``divergence.csv`` or ``divergence-by-task.csv``."""

    language: str
    moe_layer: int
    """MoE layer, counted from 0."""
    layer_number: int
    """Megatron's layer number, counted from 1."""
    divergence: float | None
    """Mean `hjs` over the defined pairs; None without a defined pair."""
    pairs: int
    """Pairs of parallel sequences in the mean."""
    undefined_pairs: int
    """Pairs of parallel sequences with an undefined `hjs`."""
    task: str | None = None
    """The task of the pairs; None for all tasks."""


class DivergenceCurve:
    """Accumulates the mean `hjs` per task, language and layer, in memory that does not grow with the data.

    When each rank holds a part of the data, all-reduce ``sums`` over the ranks.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        languages: Sequence[str],
        num_moe_layers: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.tasks, self.languages = tuple(tasks), tuple(languages)
        shape = (len(self.languages), len(self.tasks), 3, num_moe_layers)
        self.sums = torch.zeros(shape, dtype=torch.float64, device=device)
        """[languages, tasks, (sum of values, defined pairs, undefined pairs), L]"""

    def add(self, language: str, task_N: Tensor, q_en: Tensor, q_tg: Tensor) -> None:
        """Add the pooled distributions of n parallel sequences, English and target language. [n, L, E] each

        Args:
            task_N: index into the tasks of each sequence. int64 [n]

        Raises:
            RamoeError: the curve does not have this language.
        """
        if language not in self.languages:
            raise RamoeError(
                f"divergence: found language {language!r}, expected one of {', '.join(self.languages)}"
            )
        value, defined = hjs(q_en, q_tg)
        counts = torch.stack([value, defined.double(), (~defined).double()], dim=1).to(self.sums.device)
        self.sums[self.languages.index(language)].index_add_(0, task_N.to(self.sums.device), counts)

    def rows(self, layer_numbers: Sequence[int]) -> list[DivergenceRow]:
        """The rows of ``divergence.csv``, over the pairs of all tasks.

        Args:
            layer_numbers: Megatron's number of each MoE layer.
        """
        return [
            row
            for language, sums in zip(self.languages, self.sums.sum(1), strict=True)
            for row in _rows(language, None, sums, layer_numbers)
        ]

    def rows_by_task(self, layer_numbers: Sequence[int]) -> list[DivergenceRow]:
        """The rows of ``divergence-by-task.csv``: as `rows`, for each task that has pairs in the language."""
        return [
            row
            for place, task in enumerate(self.tasks)
            for language, sums in zip(self.languages, self.sums[:, place], strict=True)
            if sums[1:].any()
            for row in _rows(language, task, sums, layer_numbers)
        ]


def _rows(language: str, task: str | None, sums: Tensor, layer_numbers: Sequence[int]) -> list[DivergenceRow]:
    return [
        DivergenceRow(
            language, layer, number, total / pairs if pairs else None, int(pairs), int(undefined), task
        )
        for layer, (number, (total, pairs, undefined)) in enumerate(
            zip(layer_numbers, sums.T.tolist(), strict=True)
        )
    ]


def mean_curve(rows: Iterable[DivergenceRow]) -> Tensor:
    """Divergence by MoE layer, [L] float64: the unweighted mean over the languages (our reading).

    A language without defined pairs at a layer is left out of that layer's mean. A layer without any defined
    pair gives NaN.
    """
    by_layer: dict[int, list[float]] = {}
    for row in rows:
        by_layer.setdefault(row.moe_layer, []).extend([] if row.divergence is None else [row.divergence])
    means = [sum(values) / len(values) if values else math.nan for _, values in sorted(by_layer.items())]
    return torch.tensor(means, dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class Zone:
    """The MoE layers to align, from ``first`` to ``last`` inclusive."""

    first: int
    last: int
    how: str
    """Where the zone comes from: "auto", or the range as the user wrote it."""
    reason: str
    """One sentence that explains the zone to the user."""


@dataclass(frozen=True, slots=True)
class NoZone:
    """The curve shows no zone; the user has to give a range of layers."""

    reason: str


def zone_from_curve(curve: Tensor) -> Zone | NoZone:
    """The alignment zone: the floor of the U that divergence forms over depth.

    The paper describes the U (arXiv 2510.04694). The rule below is our reading:

    1. Replace each inner layer by the median of itself and its two neighbours, so that one outlier has no
       effect.
    2. The bottom is the lowest layer. The rims are the highest values on either side of the bottom.
    3. The curve is a U when the bottom lies below the lower rim by more than 20 % of that rim (`MIN_DEPTH`).
       Otherwise the curve is flat, monotonic or inverted, and there is no zone.
    4. The zone is the run of layers around the bottom with values up to half-way between bottom and lower
       rim.

    Args:
        curve: divergence by MoE layer. [L]

    Returns:
        The zone, or the reason why there is no zone. Scaling the curve keeps the zone; mirroring the curve
        mirrors the zone.
    """
    values = [float(v) for v in curve.tolist()]
    missing = [layer for layer, value in enumerate(values) if not math.isfinite(value)]
    if missing:
        return NoZone(f"no defined divergence at MoE layer {', '.join(map(str, missing))}")
    if len(values) < 3:
        return NoZone(f"{len(values)} MoE layers are too few for a curve with two rims and a floor")
    inner = [sorted(values[i - 1 : i + 2])[1] for i in range(1, len(values) - 1)]
    smooth = [values[0], *inner, values[-1]]
    bottom = min(range(len(smooth)), key=smooth.__getitem__)
    left, right = max(smooth[: bottom + 1]), max(smooth[bottom:])
    rim, floor = min(left, right), smooth[bottom]
    if rim - floor <= MIN_DEPTH * rim:
        return NoZone(_why_not_a_u(smooth, left, right))
    level = floor + (rim - floor) / 2 * (1 + 1e-9)  # rounding must not separate equal layers
    first = last = bottom
    while smooth[first - 1] <= level:  # ends: both sides have a rim above the level
        first -= 1
    while smooth[last + 1] <= level:
        last += 1
    return Zone(
        first,
        last,
        "auto",
        f"floor of the divergence curve: {floor:.4f} at MoE layer {bottom}, rims {left:.4f} and {right:.4f}, "
        f"layers up to {level:.4f} taken",
    )


def _why_not_a_u(smooth: list[float], left: float, right: float) -> str:
    low, high = min(smooth), max(smooth)
    if high - low <= MIN_DEPTH * high:
        return f"the divergence curve is flat: {low:.4f} to {high:.4f} over depth"
    edges = max(smooth[0], smooth[-1])
    if high - edges > MIN_DEPTH * high:
        ends = f"{smooth[0]:.4f} and {smooth[-1]:.4f} at the ends"
        return f"the divergence curve is inverted: {high:.4f} inside, {ends}"
    side, what = ("last", "falls towards") if right < left else ("first", "rises from")
    values = f"{smooth[0]:.4f} to {smooth[-1]:.4f}"
    return f"the divergence curve {what} the {side} layer ({values}): it has one rim only"
