"""Pooled accuracies and paired differences: how seeds and examples are treated.

- An accuracy over several seeds is the mean over seeds. Its interval is Wilson's at the number of examples of one seed,
  not examples times seeds: seeds answer the same examples, so they do not add independent ones.
- A difference between two methods is paired: per seed and example, right minus right. Its interval is Student's t with
  the standard error clustered by example id, so that parallel rows and repeated seeds of one example count as one draw.
  It speaks of new examples for the seeds at hand; how many seeds agree in sign is given beside it.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from ramoe_megatron.method.statistics import wilson
from ramoe_megatron.report.inputs import Evaluation

Limit = float | None


@dataclass(frozen=True)
class Difference:
    """A mean paired difference in [-1, 1], its 95 % interval and p; those are None where the data cannot give them."""

    value: float
    low: float | None
    high: float | None
    p: float | None
    seeds_higher: int
    seeds_lower: int


def clustered_difference(clusters: Mapping[str, Sequence[float]]) -> tuple[float, Limit, Limit, Limit]:
    """(mean, low, high, p) of all values, 95 % Student's t interval with the standard error clustered by key.

    Variance of the mean: C/(C-1) * sum_c (sum_{i in c} (d_i - mean))^2 / N^2, with C - 1 degrees of freedom.
    """
    count = sum(len(values) for values in clusters.values())
    mean = math.fsum(value for values in clusters.values() for value in values) / count
    groups = len(clusters)
    if groups < 2:
        return mean, None, None, None
    squares = math.fsum(math.fsum(value - mean for value in values) ** 2 for values in clusters.values())
    error = math.sqrt(groups / (groups - 1) * squares) / count
    if error == 0.0:
        # All differences alike: none at all is what it is, any other constant leaves no spread to judge by.
        return (0.0, 0.0, 0.0, 1.0) if mean == 0.0 else (mean, None, None, None)
    half = float(stats.t.ppf(0.975, groups - 1)) * error
    return mean, mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / error, groups - 1))


def paired_change(
    method: Sequence[Evaluation], reference: Sequence[Evaluation], languages: Collection[str]
) -> Difference | None:
    """`method` minus `reference` over the (seed, example) that both answered; None when they share nothing.

    The base model has no seeds: it is paired with every seed of `method`.
    """
    by_seed = {evaluation.seed: evaluation for evaluation in reference}
    unseeded = reference[0] if reference and reference[0].method == "base" else None
    clusters: dict[str, list[float]] = defaultdict(list)
    signs = []
    for evaluation in method:
        other = unseeded or by_seed.get(evaluation.seed)
        if other is None:
            continue
        shared = [key for key in evaluation.examples if key[1] in languages and key in other.examples]
        if not shared:
            continue
        total = 0
        for key in shared:
            difference = int(evaluation.examples[key]) - int(other.examples[key])
            clusters[key[0]].append(difference)
            total += difference
        signs.append(total)
    if not clusters:
        return None
    return Difference(*clustered_difference(clusters), sum(s > 0 for s in signs), sum(s < 0 for s in signs))


def pooled(
    evaluations: Iterable[Evaluation], language: str | Collection[str], task: str | None = None
) -> dict[str, Any] | None:
    """Counts summed over seeds and rows, accuracy = correct / n, Wilson's interval at the examples of one seed.

    `language` is one or several, `task` None for all; None when nothing of it was evaluated.
    """
    languages = {language} if isinstance(language, str) else language
    n = correct = seeds = 0
    for evaluation in evaluations:
        rows = [row for row in evaluation.rows if row["language"] in languages and task in (None, row["task"])]
        n += sum(row["n"] for row in rows)
        correct += sum(row["correct"] for row in rows)
        seeds += bool(rows)
    if n == 0:
        return None
    low, high = wilson(round(correct / seeds), round(n / seeds))
    return {"n": n, "correct": correct, "seeds": seeds, "accuracy": correct / n, "low": low, "high": high}
