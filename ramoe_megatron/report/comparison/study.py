"""The evaluations of several run folders, and the difference of two methods over base models and seeds.

A difference has two intervals with different meanings. By seed: one difference for each (base model, seed),
with Student's t from their spread within base models. This interval covers new seeds for these base models,
and not a new base model: for that, read each base model's own difference. p comes from this interval. By
example: the same differences for each example, with a standard error clustered by example id over languages,
seeds and base models, which all answer the same facts. This interval covers new examples for these seeds and
base models.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ramoe_megatron.report.inputs import Evaluation, ExampleKey, RunInputs
from ramoe_megatron.report.pairing import Pair, pair_up
from ramoe_megatron.statistics import clustered_difference, false_discovery, holm, stratified_difference

Row = dict[str, Any]
ALPHA = 0.05
"""Level of the corrected tests."""
Cell = tuple[str, str]
"""(task, language)"""

Values = dict[tuple[str, int | None], float]
"""A number for each (base model, seed). seed is None where nothing is trained."""


@dataclass(frozen=True)
class Study:
    runs: Mapping[str, RunInputs]
    """Run folders by label, one for each base model."""
    by_method: Mapping[str, list[Evaluation]]
    """In the order that tables show."""
    anchor: str
    reference: str
    main: str

    @cached_property
    def keys(self) -> dict[ExampleKey, str]:
        return keys_of(e for evaluations in self.by_method.values() for e in evaluations)

    @cached_property
    def by_cell(self) -> dict[Cell, list[ExampleKey]]:
        """Examples by task and language, sorted."""
        cells: dict[Cell, list[ExampleKey]] = defaultdict(list)
        for key, task in sorted(self.keys.items()):
            cells[task, key[1]].append(key)
        return dict(sorted(cells.items()))

    @cached_property
    def target_cells(self) -> dict[Cell, list[ExampleKey]]:
        return {cell: keys for cell, keys in self.by_cell.items() if cell[1] != self.anchor}

    @cached_property
    def target_keys(self) -> list[ExampleKey]:
        return [key for keys in self.target_cells.values() for key in keys]

    @cached_property
    def anchor_keys(self) -> list[ExampleKey]:
        return [key for cell, keys in self.by_cell.items() if cell[1] == self.anchor for key in keys]

    @property
    def targets(self) -> list[str]:
        return sorted({language for _, language in self.target_cells})

    @property
    def tasks(self) -> list[str]:
        return sorted({task for task, _ in self.by_cell})

    @property
    def others(self) -> list[str]:
        """Every method except the reference and the base model."""
        return [method for method in self.by_method if method not in ("base", self.reference)]

    @cached_property
    def _pairs(self) -> dict[tuple[str, str], list[Pair]]:
        return {}

    def pairs(self, method: str, other: str) -> list[Pair]:
        if (method, other) not in self._pairs:
            self._pairs[method, other] = pair_up(
                self.by_method.get(method, []), self.by_method.get(other, [])
            )
        return self._pairs[method, other]

    def against(self, method: str, other: str, keys: list[ExampleKey]) -> Row | None:
        """`method` minus `other` on these examples; None for equal methods or without shared examples."""
        return None if method == other else contrast(self.pairs(method, other), keys)


def matched(own: Values, other: Values) -> dict[str, list[tuple[float, float]]]:
    """Pairs of numbers with the same base model and seed, by base model.

    A number without a seed is paired with every seed of the other.
    """
    found = {}
    for (base, seed), value in own.items():
        for (other_base, other_seed), beside in other.items():
            if base == other_base and (seed == other_seed or None in (seed, other_seed)):
                found[base, other_seed if seed is None else seed] = value, beside
    pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for base, seed in sorted(found, key=lambda key: (key[0], key[1] or 0)):
        pairs[base].append(found[base, seed])
    return pairs


def contrast(pairs: Sequence[Pair], keys: Collection[ExampleKey]) -> Row | None:
    """Mean difference over `pairs` on the examples `keys`, in [-1, 1]; None when nothing is shared.

    Keys: change, low, high, p, n, bases (by seed), seeds_higher, seeds_lower, by_example (change, low, high,
    n), by_base.
    """
    seeds: list[tuple[str, int | None, float]] = []
    clusters: dict[str, list[float]] = defaultdict(list)
    for pair in pairs:
        mean = pair.mean(keys)
        if mean is None:
            continue
        seeds.append((pair.base, pair.seed, mean))
        for key in keys:
            if key in pair.differences:
                clusters[key[0]].append(pair.differences[key])
    if not seeds:
        return None
    examples = clustered_difference(dict(sorted(clusters.items())))
    by_base: dict[str, list[float]] = defaultdict(list)
    for base, _, mean in seeds:
        by_base[base].append(mean)
    values = [mean for _, _, mean in seeds]
    return {
        **spread(by_base),
        "seeds_higher": sum(value > 0 for value in values),
        "seeds_lower": sum(value < 0 for value in values),
        "by_example": {name: getattr(examples, name) for name in ("change", "low", "high", "n")},
        "by_base": [{"base": base, **spread({base: own})} for base, own in by_base.items()],
        "by_seed": [{"base": base, "seed": seed, "change": mean} for base, seed, mean in seeds],
    }


def spread(by_base: Mapping[str, Sequence[float]]) -> Row:
    """Mean of one difference for each base model and seed, with Student's t within base models.

    Keys: change, low, high, p, n, bases.
    """
    return {**dataclasses.asdict(stratified_difference(by_base)), "bases": len(by_base)}


def correct(rows: Sequence[Row]) -> None:
    """Add p_holm and p_bh to each row with a p, over all these rows as one family; None without a p."""
    tested = [row for row in rows if row.get("p") is not None]
    p = [row["p"] for row in tested]
    for row in rows:
        row["p_holm"] = row["p_bh"] = None
    for row, strict, discovery in zip(tested, holm(p), false_discovery(p), strict=True):
        row["p_holm"], row["p_bh"] = strict, discovery


def keys_of(evaluations: Iterable[Evaluation]) -> dict[ExampleKey, str]:
    """Every example and language that any of these evaluations answered, with its task."""
    return {key: task for evaluation in evaluations for key, task in evaluation.tasks.items()}


def average(values: Sequence[float]) -> float:
    """Mean."""
    return sum(values) / len(values)
