"""Divergence of routing between languages over depth, and the alignment zone read off it (arXiv 2510.04694).

L MoE layers, E routed experts. Layers are 0-based places among the MoE layers. Natural logarithm.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ramoe_megatron.errors import RamoeError

UNDEFINED_BELOW = 1e-8
"""Denominators of `hjs` below this make a pair undefined (both distributions uniform)."""

MIN_DEPTH = 0.2
"""How far the floor of the curve must lie below its lower rim, as a share of that rim, to count as a U: our reading."""


def hjs(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy-normalised JS divergence ``JSD(a, b) / (log E - (H(a) + H(b)) / 2)`` (arXiv 2510.04694).

    Args:
        a: distributions over experts. [..., E]
        b: likewise, broadcast against ``a``. [..., E]

    Returns:
        The value, [...], float64 in [0, 1], and whether it is defined, [...] bool. It is undefined where the
        denominator is below 1e-8: the value is 0 there, to be left out and counted.
    """
    # float64: near-uniform routing leaves a small difference of entropies both above and below the line.
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
    """One language at one MoE layer: a line of ``divergence.csv``."""

    language: str
    moe_layer: int
    """0-based place among the MoE layers."""
    layer_number: int
    """Megatron's own, 1-based."""
    divergence: float | None
    """Mean `hjs` over the defined pairs; None when there is none."""
    pairs: int
    """Parallel sequences that went into the mean."""
    undefined_pairs: int
    """Parallel sequences left out."""


class DivergenceCurve:
    """Sums for the mean `hjs` per language and layer; their size does not grow with the data.

    Ranks that each saw a part of the data add up their ``sums`` (an all-reduce of one tensor).
    """

    def __init__(
        self, languages: Sequence[str], num_moe_layers: int, device: torch.device | str = "cpu"
    ) -> None:
        self.languages = tuple(languages)
        self.sums = torch.zeros(len(self.languages), 3, num_moe_layers, dtype=torch.float64, device=device)
        """[languages, (sum of values, defined pairs, undefined pairs), L]"""

    def add(self, language: str, q_en: Tensor, q_tg: Tensor) -> None:
        """Add n parallel sequences: pooled distributions of the English and the target view, [n, L, E] each.

        Raises:
            RamoeError: for a language that the curve was not made for.
        """
        if language not in self.languages:
            raise RamoeError(
                f"divergence: found language {language!r}, expected one of {', '.join(self.languages)}"
            )
        value, defined = hjs(q_en, q_tg)
        counts = torch.stack([value.sum(0), defined.sum(0).double(), (~defined).sum(0).double()])
        self.sums[self.languages.index(language)] += counts.to(self.sums.device)

    def rows(self, layer_numbers: Sequence[int]) -> list[DivergenceRow]:
        """The lines of ``divergence.csv``; ``layer_numbers[l]`` is Megatron's number of MoE layer l."""
        rows = []
        for language, (total, pairs, undefined) in zip(self.languages, self.sums.tolist(), strict=True):
            for layer, number in enumerate(layer_numbers):
                mean = total[layer] / pairs[layer] if pairs[layer] else None
                rows.append(
                    DivergenceRow(language, layer, number, mean, int(pairs[layer]), int(undefined[layer]))
                )
        return rows


def mean_curve(rows: Iterable[DivergenceRow]) -> Tensor:
    """Divergence by MoE layer, [L] float64: the unweighted mean over the languages (our reading).

    A language without defined pairs at a layer does not count there; a layer without any language gives NaN.
    """
    by_layer: dict[int, list[float]] = {}
    for row in rows:
        by_layer.setdefault(row.moe_layer, []).extend([] if row.divergence is None else [row.divergence])
    means = [sum(values) / len(values) if values else math.nan for _, values in sorted(by_layer.items())]
    return torch.tensor(means, dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class Zone:
    """The MoE layers to align, first and last included."""

    first: int
    last: int
    how: str
    """Where it comes from: "auto", or the range as the user gave it."""
    reason: str
    """One sentence for a reader."""


@dataclass(frozen=True, slots=True)
class NoZone:
    """The curve shows no zone; aligning needs an explicit range."""

    reason: str


def zone_from_curve(curve: Tensor) -> Zone | NoZone:
    """The floor of the U that divergence makes over depth (arXiv 2510.04694 states the U, the rule is our reading).

    1. Each inner layer is replaced by the median of itself and its neighbours, so that one odd layer decides nothing.
    2. The bottom is the lowest layer, the rims are the highest values on either side of it.
    3. It is a U when the lower rim stands above the bottom by more than 20 % of its height (`MIN_DEPTH`). Otherwise the
       curve is flat, falls or rises throughout, or is inverted, and there is no zone.
    4. The zone is the run of layers around the bottom that lie no higher than half-way from bottom to lower rim.

    Args:
        curve: divergence by MoE layer. [L]

    Returns:
        The zone, or why there is none. Scaling the curve does not change it, mirroring the curve mirrors it.
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
    level = floor + (rim - floor) / 2 * (1 + 1e-9)  # so that rounding does not part equal layers
    first = last = bottom
    while smooth[first - 1] <= level:  # stops inside: a rim above the level stands on either side
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
        return f"the divergence curve is inverted: {high:.4f} inside, {smooth[0]:.4f} and {smooth[-1]:.4f} at the ends"
    side, what = ("last", "falls towards") if right < left else ("first", "rises from")
    return f"the divergence curve {what} the {side} layer ({smooth[0]:.4f} to {smooth[-1]:.4f}): it has one rim only"
