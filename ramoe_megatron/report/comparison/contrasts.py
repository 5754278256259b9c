"""One method against another over several base models and seeds: what is the unit, and which interval says what.

- By seed: one difference per (base model, seed), Student's t over them by their spread within base models. It speaks of new
  seeds for these base models and says nothing of a new one, for which each base model's own difference stands beside it. p
  comes from here.
- By example: the same differences example by example, the standard error clustered by example id over languages, seeds and
  base models, which all answer the same facts. It speaks of new examples for these seeds and base models.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ramoe_megatron.report.inputs import Evaluation, ExampleKey
from ramoe_megatron.report.pairing import Pair, pair_up
from ramoe_megatron.statistics import clustered_difference, false_discovery, holm, stratified_difference

Row = dict[str, Any]

ALPHA = 0.05


def contrast(pairs: Sequence[Pair], keys: Collection[ExampleKey]) -> Row | None:
    """Mean difference over `pairs` on the examples `keys`, all in [-1, 1]; None where nothing is shared.

    Keys: change, low, high, p, n, bases (by seed), seeds_higher, seeds_lower, by_example (change, low, high, n), by_base.
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
    """Mean of differences that are one a base model and seed, Student's t within base models: change, low, high, p, n, bases."""
    return {**dataclasses.asdict(stratified_difference(by_base)), "bases": len(by_base)}


def unknown(row: Mapping[str, Any]) -> str:
    """Why a row of `spread` has no interval."""
    return "no spread over seeds, so no interval" if row["n"] > row["bases"] else "too few seeds for an interval"


def against(method: Sequence[Evaluation], reference: Sequence[Evaluation], keys: Collection[ExampleKey]) -> Row | None:
    """`contrast` of two methods' evaluations."""
    return contrast(pair_up(method, reference), keys)


def correct(rows: Sequence[Row]) -> None:
    """Put p_holm and p_bh into each row that has a p, over all of these rows as one family; None where there is no p."""
    tested = [row for row in rows if row.get("p") is not None]
    p = [row["p"] for row in tested]
    for row in rows:
        row["p_holm"] = row["p_bh"] = None
    for row, strict, discovery in zip(tested, holm(p), false_discovery(p), strict=True):
        row["p_holm"], row["p_bh"] = strict, discovery


def keys_of(evaluations: Iterable[Evaluation]) -> dict[ExampleKey, str]:
    """Every example and language that any of these answered, with its task."""
    return {key: task for evaluation in evaluations for key, task in evaluation.tasks.items()}


def direction(row: Mapping[str, Any] | None) -> str:
    """`above`, `below` or `holds zero`, of a row's interval; `unknown` where it has none."""
    if row is None or row["low"] is None or row["high"] is None:
        return "unknown"
    return "above" if row["low"] > 0 else "below" if row["high"] < 0 else "holds zero"
