"""Intervals and tests for the numbers that the artefacts report. All intervals are two-sided at 95 %."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

from ramoe_megatron.errors import RamoeError

LEVEL = 0.975
"""Quantile of the upper end of every interval."""


@dataclass(frozen=True, slots=True)
class Correlation:
    """Pearson correlation of `n` points."""

    r: float
    low: float
    """Lower end of the Fisher-z interval; -1 when there are too few points for an interval."""
    high: float
    """Upper end; +1 when there are too few points."""
    p: float
    """Two-sided p-value against no correlation."""
    n: int


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean of paired differences."""

    change: float
    """Mean of after - before."""
    low: float | None
    """Lower end of the interval; None when the data have too few pairs or no spread."""
    high: float | None
    """Upper end; None in the same cases."""
    p: float | None
    """Two-sided p-value against no difference; None in the same cases."""
    n: int
    """Number of pairs."""


def wilson(correct: float, n: float) -> tuple[float, float]:
    """Wilson score interval of a proportion (JASA 22, 1927); (0, 1) when nothing was counted.

    The counts need not be whole numbers, because effective sample sizes seldom are.

    Raises:
        RamoeError: unless 0 <= correct <= n.
    """
    if not 0 <= correct <= n:
        raise RamoeError(f"proportion: found {correct:g} of {n:g}, expected 0 <= correct <= n")
    if n == 0:
        return 0.0, 1.0
    z, share = NormalDist().inv_cdf(LEVEL), correct / n
    centre, half = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    low, high = ((centre + side * half) / (1 + z**2 / n) for side in (-1, 1))
    # Without rounding where an end is known exactly.
    return (0.0 if correct == 0 else low), (1.0 if correct == n else high)


def effective_size(runs: Iterable[Mapping[str, Sequence[float]]]) -> float:
    """Number of independent rows that determine a proportion as precisely as the clustered rows of one run.

    It is p (1 - p) divided by the variance of p clustered by key. Both are computed with each run's p and
    summed over runs (Kott and Carr, Journal of Official Statistics 13, 1997; Korn and Graubard, Survey
    Methodology 24, 1998). The variance has no correction for few clusters, so that one row per cluster gives
    the number of rows. The result is the mean number of rows when the variance is 0, and never above that
    number.

    Args:
        runs: for each run (a seed, for example), its outcomes, 0 or 1, by cluster. A cluster is one example
            in several languages.
    """
    sizes, variances, clustered_variances = [], [], []
    for clusters in runs:
        n = sum(map(len, clusters.values()))
        p = sum(map(sum, clusters.values())) / n
        sizes.append(n)
        variances.append(p * (1 - p) / n)
        clustered_variances.append(
            math.fsum((sum(values) - len(values) * p) ** 2 for values in clusters.values()) / n**2
        )
    rows = sum(sizes) / len(sizes) if sizes else 0.0
    independent, clustered = math.fsum(variances), math.fsum(clustered_variances)
    return rows * independent / clustered if clustered > independent else rows


def pearson(
    x: Sequence[float], y: Sequence[float], groups: Sequence[str] | None = None
) -> Correlation | None:
    """Pearson correlation with its Fisher-z interval.

    With `groups`, it is the correlation within groups: each group's mean is subtracted, and each group except
    one costs a degree of freedom, as in the partial correlation given the group. A single group changes
    nothing.

    Returns:
        None when a side is constant or fewer than three points are left.

    Raises:
        RamoeError: the sides differ in length.
    """
    _same_length(x, y)
    places: dict[str, list[int]] = defaultdict(list)
    for place, group in enumerate(groups if groups is not None else [""] * len(x)):
        places[group].append(place)
    degrees = len(x) - len(places) - 1
    sides = [[[side[place] for place in own] for own in places.values()] for side in (x, y)]
    if degrees < 1 or any(_constant(side) for side in sides):
        return None
    r = float(
        _stats().pearsonr(*([value for own in side for value in _centred(own)] for side in sides)).statistic
    )
    r = min(1.0, max(-1.0, r))
    if abs(r) == 1:  # Fisher's z is infinite, and the interval shrinks to the point itself
        return Correlation(
            r=r, low=r if degrees > 1 else -1.0, high=r if degrees > 1 else 1.0, p=0.0, n=len(x)
        )
    half = NormalDist().inv_cdf(LEVEL) / math.sqrt(degrees - 1) if degrees > 1 else math.inf
    p = float(2 * _stats().t.sf(abs(r) * math.sqrt(degrees / (1 - r**2)), degrees))
    return Correlation(
        r=r, low=math.tanh(math.atanh(r) - half), high=math.tanh(math.atanh(r) + half), p=p, n=len(x)
    )


def correlation_entries(
    x: Sequence[float], y: Sequence[float], groups: Sequence[str] | None = None
) -> dict[str, Any]:
    """`pearson` as entries r, low, high, p and n of a table's row; without a correlation only n is known."""
    found = pearson(x, y, groups)
    return asdict(found) if found else {**dict.fromkeys(("r", "low", "high", "p")), "n": len(x)}


def stratified_difference(strata: Mapping[str, Sequence[float]]) -> Difference:
    """Mean of all paired differences, with Student's t from the spread within strata.

    A stratum holds the seeds of a base model, for example. The strata are taken as fixed, so differences
    between them do not count as an error of the mean. The deviation is pooled over the strata. The degrees of
    freedom are the number of pairs minus the number of strata. With one stratum this is the paired t-test.

    No interval is given when the pairs differ equally within every stratum, or when each stratum has a single
    pair: there is no spread to estimate. Pairs that do not differ at all give (0, 0) and p = 1.

    Raises:
        RamoeError: there are no pairs.
    """
    groups = [list(values) for values in strata.values() if values]
    values = [value for own in groups for value in own]
    n, degrees = len(values), len(values) - len(groups)
    if n == 0:
        raise RamoeError("paired difference: found no pairs, expected at least one")
    squares = math.fsum(value**2 for own in groups for value in _centred(own))
    error = math.sqrt(squares / degrees / n) if degrees else 0.0
    return _student(math.fsum(values) / n, error, degrees, n, max(map(abs, values)))


def clustered_difference(clusters: Mapping[str, Sequence[float]]) -> Difference:
    """Mean of paired differences in clusters, such as one example in several languages or seeds.

    Student's t uses the standard error clustered by key, and one degree of freedom less than there are
    clusters. With one value per cluster the result is `stratified_difference` of one stratum, whose rules for
    data without spread apply here too.

    Raises:
        RamoeError: there are no differences.
    """
    groups = [values for values in clusters.values() if values]
    n = sum(len(values) for values in groups)
    if n == 0:
        raise RamoeError("clustered difference: found no pairs, expected at least one")
    change = math.fsum(value for values in groups for value in values) / n
    squares = math.fsum(math.fsum(value - change for value in values) ** 2 for values in groups)
    error = math.sqrt(len(groups) / (len(groups) - 1) * squares) / n if len(groups) > 1 else 0.0
    return _student(change, error, len(groups) - 1, n, abs(change))


def paired_proportions(after: Sequence[bool], before: Sequence[bool]) -> Difference:
    """Difference of two proportions measured on the same examples.

    The interval adds half a count to each of the four outcomes (Agresti and Min, Statistics in Medicine 24,
    2005). It therefore has a width when no example changed. It is cut to [-1, 1]. p is from the exact McNemar
    test.

    Raises:
        RamoeError: there are no pairs, or the two sides differ in length.
    """
    _same_length(after, before)
    n = len(after)
    if n == 0:
        raise RamoeError("paired proportions: found no pairs, expected at least one")
    gained = sum(bool(a) and not b for a, b in zip(after, before, strict=True))
    lost = sum(bool(b) and not a for a, b in zip(after, before, strict=True))
    centre = (gained - lost) / (n + 2)
    variance = ((gained + lost + 1) / (n + 2) - centre**2) / (n + 2)
    half = float(_stats().norm.ppf(LEVEL)) * math.sqrt(variance)
    p = float(_stats().binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return Difference((gained - lost) / n, max(-1.0, centre - half), min(1.0, centre + half), p, n)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (Scandinavian Journal of Statistics 6, 1979), in the given order.

    Rejecting every value of at most 0.05 keeps the probability of any false rejection in the family at 5 %,
    for any dependence between the tests. Methods that are all compared with the same runs are dependent.
    """
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=lambda place: p[place])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = highest
    return adjusted


def false_discovery(p: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's adjusted p-values, in the given order. They bound the expected share of false
    rejections among all rejections."""
    return [float(value) for value in _stats().false_discovery_control(p)] if p else []


def fisher(table: Sequence[Sequence[int]]) -> float | None:
    """Two-sided p of Fisher's exact test of association in a 2 x 2 table; None when a margin is 0."""
    margins = [*map(sum, table), *map(sum, zip(*table, strict=True))]
    return float(_stats().fisher_exact(table).pvalue) if all(margins) else None


def _student(change: float, error: float, degrees: int, n: int, scale: float) -> Difference:
    """Student's interval and test, without an interval when there are no degrees of freedom or no spread.

    A spread below rounding, relative to `scale`, counts as none.
    """
    if degrees and scale == error == 0:
        return Difference(0.0, 0.0, 0.0, 1.0, n)
    if not degrees or error <= 1e-9 * scale:
        return Difference(change, None, None, None, n)
    half = float(_stats().t.ppf(LEVEL, degrees)) * error
    return Difference(
        change, change - half, change + half, float(2 * _stats().t.sf(abs(change) / error, degrees)), n
    )


def _centred(values: Sequence[float]) -> list[float]:
    mean = math.fsum(values) / len(values)
    return [value - mean for value in values]


def _constant(groups: Sequence[Sequence[float]]) -> bool:
    """Whether no group has a spread beyond rounding."""
    return all(max(own) - min(own) <= 1e-12 * max(map(abs, own)) for own in groups)


def _stats() -> Any:
    """scipy.stats, imported at the first use: the import costs a second, and few jobs compute an interval."""
    from scipy import stats

    return stats


def _same_length(x: Sequence[float], y: Sequence[float]) -> None:
    if len(x) != len(y):
        raise RamoeError(f"paired data: found {len(x)} and {len(y)} values, expected equally many")
