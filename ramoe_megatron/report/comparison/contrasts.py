"""Rows of comparison.json from evaluations: accuracy, paired differences, English, mass, claims."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.layers import parse_layers
from ramoe_megatron.report.comparison.costs import hours
from ramoe_megatron.report.comparison.study import (
    ALPHA,
    Row,
    Study,
    Values,
    average,
    correct,
    matched,
    spread,
)
from ramoe_megatron.report.inputs import RunInputs
from ramoe_megatron.report.pairing import pooled
from ramoe_megatron.report.run_results import ci_counts
from ramoe_megatron.report.vocabulary import direction


@dataclass(frozen=True)
class Claim:
    """A claim that a method does better than a control. It falls if the control does as well."""

    claim: str
    control: str
    method: str = "ra-moe"


CLAIMS = (
    Claim("task experts matter", "random-experts"),
    Claim("middle layers matter", "all-layers"),
    Claim("middle layers matter", "outside-zone"),
    Claim("the target's content matters", "ra-moe-shuffled"),
    Claim("direction matters", "reversed"),
)
VERDICTS = {"above": "supported", "below": "contradicted"}
UNCORRECTED = " before correction only"


def base_row(name: str, run: RunInputs) -> Row:
    """One base model: recipe, size, zone, seeds, steps, evaluated examples and their ci share."""
    train = run.recipe.get("train") or {}
    base = next(e for e in run.evaluations if e.method == "base")
    shape = run.experts.shape if run.experts is not None else None
    counts = list(ci_counts(run).values())
    command = re.match(r"# Written by `(.*)`", run.recipe_text)
    return {
        "base": name,
        "recipe": run.name,
        "command": command[1] if command else None,
        "seeds": sorted({e.seed for e in run.evaluations if e.seed is not None}),
        "steps": train.get("train-iters"),
        "batch": train.get("global-batch-size"),
        **_right("target", (row for row in base.rows if row["language"] != run.anchor)),
        **_right("anchor", (row for row in base.rows if row["language"] == run.anchor)),
        "ci_share": sum(ci for ci, _ in counts) / sum(n for _, n in counts) if counts else None,
        "layers": shape.num_moe_layers if shape else None,
        "experts": shape.num_experts if shape else None,
        "topk": shape.topk if shape else None,
        "zone": zone_of(run),
        "uniform_mass": _uniform_mass(run),
        "hours": hours(run),
        "package_version": (run.manifest or {}).get("package_version"),
    }


def _right(what: str, rows: Iterable[Row]) -> Row:
    right, n = (
        sum(counts) for counts in zip((0, 0), *((row["correct"], row["n"]) for row in rows), strict=True)
    )
    return {f"{what}_examples": n, f"{what}_accuracy": right / n if n else None}


def zone_of(run: RunInputs) -> tuple[int, int] | None:
    """First and last MoE layer that the recipe aligns; None for auto when the profile found no zone."""
    if run.experts is None:
        return None
    layers = str((run.recipe.get("alignment") or {}).get("layers") or "auto")
    try:
        return parse_layers(layers, run.experts.shape.num_moe_layers, run.experts.zone)
    except RamoeError:
        return None


def headline_rows(study: Study) -> list[Row]:
    """A row for each method: accuracy in the target languages, and its changes.

    `from_base` is the change from the base model, and `against` the change from the reference. The p of
    `against` is corrected over all methods.
    """
    rows = []
    for method, evaluations in study.by_method.items():
        counts = _accuracy(study, method, set(study.targets))
        if counts is None:
            continue
        seeds = {e.seed for e in evaluations if e.seed is not None}
        bases = {e.base for e in evaluations}
        against = None if method == "base" else study.against(method, study.reference, study.target_keys)
        row = {"method": method, "bases": len(bases), "seeds": len(seeds), **counts}
        rows.append(
            {**row, "from_base": study.against(method, "base", study.target_keys), "against": against}
        )
    correct([row["against"] for row in rows if row["against"] is not None])
    return rows


def _accuracy(study: Study, method: str, languages: Collection[str], task: str | None = None) -> Row | None:
    """Mean over base models and seeds, with Wilson's interval at the effective examples of one run."""
    found = pooled(study.by_method[method], languages, task)
    return found and {"outcomes": found.pop("seeds"), **found}


def cells_rows(study: Study) -> list[Row]:
    """A row for each method, task and target language; p is corrected over all rows."""
    rows = []
    for method in study.by_method:
        for (task, language), keys in study.target_cells.items():
            counts = _accuracy(study, method, {language}, task)
            if counts is not None:
                against = None if method == "base" else study.against(method, study.reference, keys)
                if against is not None:
                    del against["by_seed"]  # there are many cells, and each base model's change is enough
                rows.append(
                    {"method": method, "task": task, "language": language, **counts, "against": against}
                )
    correct([row["against"] for row in rows if row["against"] is not None])
    return rows


def english_rows(study: Study) -> list[Row]:
    """Accuracy in the anchor language, and its changes from the base model and from the reference."""
    rows = []
    for method in study.by_method:
        counts = _accuracy(study, method, {study.anchor})
        if counts is not None:
            from_base = study.against(method, "base", study.anchor_keys)
            against = None if method == "base" else study.against(method, study.reference, study.anchor_keys)
            rows.append({"method": method, **counts, "from_base": from_base, "against": against})
    return rows


def mass_rows(study: Study) -> list[Row]:
    """Share of the router's probability on the task experts at the last prompt token.

    The mean is over the zone (all layers when there is none), tasks and target languages. `anchor` is the
    same mean in the anchor language.
    """
    values = {method: _masses(study, method, anchor=False) for method in study.by_method}
    rows = []
    for method, own in values.items():
        if not own:
            continue
        pairs = {} if method == study.reference else matched(own, values.get(study.reference, {}))
        against = spread({base: [a - b for a, b in both] for base, both in pairs.items()}) if pairs else None
        there = list(_masses(study, method, anchor=True).values())
        rows.append(
            {
                "method": method,
                "mass": average(list(own.values())),
                "anchor": average(there) if there else None,
                "against": against,
            }
        )
    return rows


def _uniform_mass(run: RunInputs) -> float | None:
    """`mass` if every expert had the same probability: the share of task experts among the experts."""
    tasks = {task for e in run.evaluations for task in e.tasks.values()}
    if run.experts is None or not (
        own := [place for place, task in enumerate(run.experts.tasks) if task in tasks]
    ):
        return None
    first, last = zone_of(run) or (0, -1)
    return float(run.experts.expert_mask[own][:, first : last + 1 or None].float().mean())


def _masses(study: Study, method: str, anchor: bool) -> Values:
    found = {}
    for e in study.by_method[method]:
        first, last = zone_of(study.runs[e.base]) or (0, -1)
        shares = [
            average(r["mass"][first : last + 1 or None])
            for r in e.mass
            if (r["language"] == study.anchor) == anchor
        ]
        if shares:
            found[e.base, e.seed] = average(shares)
    return dict(sorted(found.items(), key=lambda item: (item[0][0], item[0][1] or 0)))


def claims_rows(study: Study, asked: Sequence[Claim]) -> list[Row]:
    """The method minus each control that was run. p is corrected over them, and the verdict needs both."""
    rows = []
    for claim in asked:
        found = study.against(claim.method, claim.control, study.target_keys)
        if found is not None:
            rows.append({"claim": claim.claim, "method": claim.method, "control": claim.control, **found})
    correct(rows)
    return [{**row, "verdict": claim_verdict(row)} for row in rows]


def claim_verdict(row: Mapping[str, Any]) -> str:
    """The reading of a claim's interval and corrected p.

    It is supported, contradicted, either of these before correction only, or not shown.
    """
    word = VERDICTS.get(direction(row))
    if word is None:
        return "not shown"
    return word if row["p_holm"] is not None and row["p_holm"] <= ALPHA else word + UNCORRECTED


def zero_rows(study: Study, off: str) -> list[Row]:
    """Whether coefficient 0 left the results equal to the reference's, for each base model and seed.

    `outcomes_equal`: every example that both answered has the same outcome. `weights_equal`: None when no
    digest was recorded.
    """
    reference = {(e.base, e.seed): e for e in study.by_method.get(study.reference, [])}
    rows = []
    for e in sorted(study.by_method.get(off, []), key=lambda e: (e.base, e.seed or 0)):
        other = reference.get((e.base, e.seed))
        if other is None:
            continue
        digests = (e.weights_sha256, other.weights_sha256)
        differing = sum(
            e.examples.get(key) != other.examples.get(key)
            for key in e.examples.keys() | other.examples.keys()
        )
        rows.append(
            {
                "base": e.base,
                "seed": e.seed,
                "outcomes_equal": differing == 0,
                "differing": differing,
                "weights_equal": None if None in digests else digests[0] == digests[1],
            }
        )
    return rows


def counts_table(study: Study) -> Row:
    """Right answers by method, base model, seed and cell, from which every p-value can be computed.

    `cells` names the task and language of each place in `n` and `correct`. For each base model and seed, the
    difference of two methods is the difference of their right answers, divided by the n of the cells.
    """
    rows = []
    for method, evaluations in study.by_method.items():
        for e in sorted(evaluations, key=lambda e: (e.base, e.seed or 0)):
            own = [[e.examples[key] for key in keys if key in e.examples] for keys in study.by_cell.values()]
            rows.append(
                {
                    "method": method,
                    "base": e.base,
                    "seed": e.seed,
                    "n": list(map(len, own)),
                    "correct": list(map(sum, own)),
                }
            )
    return {"cells": [{"task": task, "language": language} for task, language in study.by_cell], "rows": rows}
