"""Pooled accuracies and paired differences: how seeds and examples are treated.

- An accuracy over several seeds is the mean over seeds. Its interval is Wilson's at the number of examples of one seed,
  not examples times seeds: seeds answer the same examples, so they do not add independent ones.
- A difference between two methods is paired: per seed and example, right minus right. Its interval is Student's t with
  the standard error clustered by example id, so that parallel rows and repeated seeds of one example count as one draw.
  It speaks of new examples for the seeds at hand; how many seeds agree in sign is given beside it.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ramoe_megatron.method.statistics import clustered_difference, wilson
from ramoe_megatron.report.inputs import Evaluation


@dataclass(frozen=True)
class SeededDifference:
    """A mean paired difference in [-1, 1], its 95 % interval and p; those are None where the data cannot give them."""

    change: float
    low: float | None
    high: float | None
    p: float | None
    seeds_higher: int
    seeds_lower: int


def paired_change(
    method: Sequence[Evaluation], reference: Sequence[Evaluation], languages: Collection[str]
) -> SeededDifference | None:
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
    found = clustered_difference(clusters)
    higher, lower = sum(sign > 0 for sign in signs), sum(sign < 0 for sign in signs)
    return SeededDifference(found.change, found.low, found.high, found.p, higher, lower)


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
