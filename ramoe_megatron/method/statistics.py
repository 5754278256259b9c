"""Intervals and tests for the numbers that the artefacts report. All intervals are two-sided, 95 % unless said."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ramoe_megatron.errors import RamoeError

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Correlation:
    """Pearson correlation of `n` points."""

    r: float
    low: float
    """Lower end of the Fisher-z interval; -1 with three points, where that interval says nothing."""
    high: float
    """Upper end; +1 with three points."""
    p: float
    """Two-sided, against no correlation."""
    n: int


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean of paired differences."""

    change: float
    """Mean of after - before."""
    low: float | None
    """Lower end of the interval; None where the data cannot give one (a single pair, or no spread)."""
    high: float | None
    """Upper end, None likewise."""
    p: float | None
    """Two-sided, against no difference, None likewise."""
    n: int
    """Number of pairs."""


def wilson(correct: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson score interval of a proportion; (0, 1) when nothing was counted.

    Raises:
        RamoeError: unless 0 <= correct <= n.
    """
    if not 0 <= correct <= n:
        raise RamoeError(f"proportion: found {correct} of {n}, expected 0 <= correct <= n")
    if n == 0:
        return 0.0, 1.0
    interval = _stats().binomtest(correct, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def pearson(x: Sequence[float], y: Sequence[float], confidence: float = CONFIDENCE) -> Correlation | None:
    """Pearson correlation with its Fisher-z interval; None with fewer than three points or when one side is constant.

    Raises:
        RamoeError: when the two sides differ in length.
    """
    _same_length(x, y)
    if len(x) < 3 or max(x) == min(x) or max(y) == min(y):
        return None
    result = _stats().pearsonr(x, y)
    r = min(1.0, max(-1.0, float(result.statistic)))
    low, high = (float(end) for end in result.confidence_interval(confidence)) if len(x) > 3 else (-1.0, 1.0)
    # At |r| = 1 Fisher's z is infinite and the interval shrinks to the point itself.
    low, high = (r if math.isnan(low) else low), (r if math.isnan(high) else high)
    return Correlation(r=r, low=low, high=high, p=float(result.pvalue), n=len(x))


def paired_difference(after: Sequence[float], before: Sequence[float], confidence: float = CONFIDENCE) -> Difference:
    """Mean difference of paired measurements (one pair a seed, say), with Student's t interval and test.

    Pairs that all differ by the same non-zero amount have no spread to judge by: no interval is given, rather than one
    of width zero. Pairs that do not differ at all give (0, 0) and p = 1.

    Raises:
        RamoeError: without pairs, or when the two sides differ in length.
    """
    _same_length(after, before)
    differences = [a - b for a, b in zip(after, before, strict=True)]
    n = len(differences)
    if n == 0:
        raise RamoeError("paired difference: found no pairs, expected at least one")
    change = sum(differences) / n
    if not any(differences) and n > 1:
        return Difference(0.0, 0.0, 0.0, 1.0, n)
    if n == 1 or math.isclose(min(differences), max(differences), rel_tol=1e-9):
        return Difference(change, None, None, None, n)
    result = _stats().ttest_1samp(differences, 0.0)
    low, high = (float(end) for end in result.confidence_interval(confidence))
    return Difference(change, low, high, float(result.pvalue), n)


def clustered_difference(clusters: Mapping[str, Sequence[float]], confidence: float = CONFIDENCE) -> Difference:
    """Mean of paired differences that come in clusters (one example in several languages or seeds, say).

    Student's t with the standard error clustered by key and one degree of freedom less than there are clusters. With
    one value a cluster it is `paired_difference`, whose rules for data without spread hold here too.

    Raises:
        RamoeError: without any difference.
    """
    groups = [values for values in clusters.values() if values]
    n = sum(len(values) for values in groups)
    if n == 0:
        raise RamoeError("clustered difference: found no pairs, expected at least one")
    change = math.fsum(value for values in groups for value in values) / n
    if len(groups) == 1:
        return Difference(change, None, None, None, n)
    squares = math.fsum(math.fsum(value - change for value in values) ** 2 for values in groups)
    error = math.sqrt(len(groups) / (len(groups) - 1) * squares) / n
    if error <= 1e-9 * abs(change):
        return Difference(0.0, 0.0, 0.0, 1.0, n) if change == 0 else Difference(change, None, None, None, n)
    half = float(_stats().t.ppf((1 + confidence) / 2, len(groups) - 1)) * error
    p = float(2 * _stats().t.sf(abs(change) / error, len(groups) - 1))
    return Difference(change, change - half, change + half, p, n)


def paired_proportions(after: Sequence[bool], before: Sequence[bool], confidence: float = CONFIDENCE) -> Difference:
    """Difference of two proportions measured on the same examples.

    The interval adds half a count to each of the four outcomes (Agresti and Min, Statistics in Medicine 24, 2005), so
    that it keeps a width when no example changed; it is cut to [-1, 1]. p is the exact McNemar test.

    Raises:
        RamoeError: without pairs, or when the two sides differ in length.
    """
    _same_length(after, before)
    n = len(after)
    if n == 0:
        raise RamoeError("paired proportions: found no pairs, expected at least one")
    gained = sum(bool(a) and not b for a, b in zip(after, before, strict=True))
    lost = sum(bool(b) and not a for a, b in zip(after, before, strict=True))
    centre = (gained - lost) / (n + 2)
    variance = ((gained + lost + 1) / (n + 2) - centre**2) / (n + 2)
    half = float(_stats().norm.ppf((1 + confidence) / 2)) * math.sqrt(variance)
    p = float(_stats().binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return Difference((gained - lost) / n, max(-1.0, centre - half), min(1.0, centre + half), p, n)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (Scandinavian Journal of Statistics 6, 1979), in the order given.

    Rejecting what lies at or below 0.05 keeps the chance of any false rejection in the family at 5 %, whatever the
    dependence between the tests: methods that are all compared with the same runs are dependent.
    """
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=lambda place: p[place])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = highest
    return adjusted


def false_discovery(p: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's adjusted p-values, in the order given: the expected share of false rejections among all."""
    return [float(value) for value in _stats().false_discovery_control(p)] if p else []


def _stats() -> Any:
    """scipy.stats, imported when it is needed: every job reads artefacts, few compute an interval, and the import costs a second."""
    from scipy import stats

    return stats


def _same_length(x: Sequence[float], y: Sequence[float]) -> None:
    if len(x) != len(y):
        raise RamoeError(f"paired data: found {len(x)} and {len(y)} values, expected equally many")
