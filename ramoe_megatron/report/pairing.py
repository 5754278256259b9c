"""Pooled accuracies and paired differences: how seeds and examples are treated.

- An accuracy over several seeds is the mean over seeds. Its interval is Wilson's at the effective number of
  examples of
  one seed: seeds answer the same examples, so they do not add independent ones, and the parallel rows of one
  example in several languages are a cluster.
- A difference between two methods is paired: per seed and example, right minus right. Its interval is
  Student's t with
  the standard error clustered by example id, so that parallel rows and repeated seeds of one example count as
  one draw. It speaks of new examples for the seeds at hand; how many seeds agree in sign is given beside it.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ramoe_megatron.report.inputs import Evaluation, ExampleKey
from ramoe_megatron.statistics import clustered_difference, effective_size, wilson


@dataclass(frozen=True)
class SeededDifference:
    """A mean paired difference in [-1, 1], its 95 % interval and p; those are None where the data cannot give
    them."""

    change: float
    low: float | None
    high: float | None
    p: float | None
    seeds_higher: int
    seeds_lower: int
    seeds_paired: int


@dataclass(frozen=True)
class Pair:
    """Two methods' answers of one base model and seed to the same examples."""

    base: str
    seed: int | None
    differences: dict[ExampleKey, int]
    """Right minus right: -1, 0 or 1, for every example and language that both answered."""

    def mean(self, keys: Collection[ExampleKey]) -> float | None:
        """Mean difference over those of `keys` that both answered; None without any."""
        own = [self.differences[key] for key in keys if key in self.differences]
        return sum(own) / len(own) if own else None


def pair_up(method: Sequence[Evaluation], reference: Sequence[Evaluation]) -> list[Pair]:
    """`method` minus `reference` for each base model and seed that both have, in the order of base and seed.

    An outcome without a seed (the base model, a method that trains nothing) is paired with every seed of the
    other.
    """
    found: dict[tuple[str, int | None], tuple[Evaluation, Evaluation]] = {}
    for own in method:
        for other in reference:
            if own.base == other.base and (own.seed == other.seed or None in (own.seed, other.seed)):
                found[own.base, other.seed if own.seed is None else own.seed] = own, other
    return [
        Pair(
            base,
            seed,
            {k: int(own.examples[k]) - int(other.examples[k]) for k in own.examples if k in other.examples},
        )
        for (base, seed), (own, other) in sorted(
            found.items(), key=lambda item: (item[0][0], item[0][1] or 0)
        )
    ]


def paired_change(
    method: Sequence[Evaluation], reference: Sequence[Evaluation], languages: Collection[str]
) -> SeededDifference | None:
    """`method` minus `reference` over the (seed, example) that both answered; None when they share
    nothing."""
    clusters: dict[str, list[float]] = defaultdict(list)
    signs = []
    for pair in pair_up(method, reference):
        shared = {key: value for key, value in pair.differences.items() if key[1] in languages}
        for key, difference in shared.items():
            clusters[key[0]].append(difference)
        signs += [sum(shared.values())] * bool(shared)
    if not clusters:
        return None
    found = clustered_difference(clusters)
    higher, lower = sum(sign > 0 for sign in signs), sum(sign < 0 for sign in signs)
    return SeededDifference(found.change, found.low, found.high, found.p, higher, lower, len(signs))


def pooled(
    evaluations: Iterable[Evaluation], language: str | Collection[str], task: str | None = None
) -> dict[str, Any] | None:
    """Counts summed over seeds and rows, accuracy = correct / n, Wilson's interval at the effective examples
    of one seed.

    `language` is one or several, `task` None for all; None when nothing of it was evaluated. `effective`: how
    many independent examples would say as much as the rows of one seed, which are clustered by example id.
    """
    languages = {language} if isinstance(language, str) else language
    runs: list[dict[str, list[bool]]] = []
    for evaluation in evaluations:
        clusters: dict[str, list[bool]] = defaultdict(list)
        for key, right in evaluation.examples.items():
            if key[1] in languages and (task is None or evaluation.tasks[key] == task):
                clusters[key[0]].append(right)
        runs += [clusters] * bool(clusters)
    if not runs:
        return None
    n, correct = (sum(of(own) for run in runs for own in run.values()) for of in (len, sum))
    effective = effective_size(runs)
    low, high = wilson(effective * correct / n, effective)
    counts = {"n": n, "correct": correct, "seeds": len(runs), "accuracy": correct / n}
    return {**counts, "low": low, "high": high, "effective": effective}
