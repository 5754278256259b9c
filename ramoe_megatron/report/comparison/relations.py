"""What goes with gain and gap: ci share and its headroom, the transplant test's sign, routing divergence."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from ramoe_megatron.report.comparison.study import Cell, Row, Study
from ramoe_megatron.report.divergence_gap import gap_correlations, gap_points, split_by_unit
from ramoe_megatron.report.run_results import ci_shares
from ramoe_megatron.statistics import correlation_entries, fisher, wilson

SIGNS = {1: "up", -1: "down"}


def ci_gain_rows(study: Study) -> Row:
    """Points of (base, task, language), and Pearson's r of ci share with each method's gain.

    The gain is over base and over the reference. The reference's own gain over base also has a row: it is the
    part of r that is headroom, which any training would use. With `base` None, r is within base models, so
    that differences between base models do not affect it.
    """
    points: list[Row] = []
    for name, run in study.runs.items():
        for (task, language), share in sorted(ci_shares(run).items()):
            for method in [m for m in study.by_method if m != "base"]:
                gains = [
                    _gain(study, method, other, name, (task, language)) for other in ("base", study.reference)
                ]
                if gains[0] is not None:
                    point = {
                        "base": name,
                        "task": task,
                        "language": language,
                        "method": method,
                        "ci_share": share,
                    }
                    points.append({**point, "over_base": gains[0], "over_reference": gains[1]})
    correlations = []
    for method in [m for m in study.by_method if m != "base"]:
        for over in ("base", "reference") if method != study.reference else ("base",):
            for base in [None, *study.runs]:
                usable = [
                    p
                    for p in points
                    if p["method"] == method and p[f"over_{over}"] is not None and base in (None, p["base"])
                ]
                x, y = ([p[side] for p in usable] for side in ("ci_share", f"over_{over}"))
                numbers = correlation_entries(x, y, [p["base"] for p in usable])
                correlations.append({"method": method, "over": over, "base": base, **numbers})
    return {"correlations": correlations, "points": points}


def _gain(study: Study, method: str, other: str, base: str, cell: Cell) -> float | None:
    """Mean paired difference of one base model on one task and language, over its seeds."""
    if method == other:
        return None
    found = [
        pair.mean(study.by_cell.get(cell, [])) for pair in study.pairs(method, other) if pair.base == base
    ]
    means = [value for value in found if value is not None]
    return sum(means) / len(means) if means else None


def divergence_gap_rows(study: Study) -> Row:
    """Points of `gap_points` with their base model, and Pearson's r of divergence and gap for each layer.

    Of the unit "languages", r is over languages; of "pairs", it is over pairs of task and language, within
    languages. With `base` None, r is within base models too. Layers are compared by their number, so base
    models of another depth have rows of their own alone.
    """
    points = [{"base": name, **point} for name, run in study.runs.items() for point in gap_points(run)]
    correlations = []
    for base in [None, *study.runs]:
        languages, pairs = split_by_unit([point for point in points if base in (None, point["base"])])
        within = [f"{point['base']}/{point['language']}" for point in pairs]
        for unit, own, groups in (
            ("languages", languages, [point["base"] for point in languages]),
            ("pairs", pairs, within),
        ):
            correlations += [{"unit": unit, "base": base, **row} for row in gap_correlations(own, groups)]
    return {"correlations": correlations, "points": points}


def transplant_rows(study: Study) -> Row:
    """Sign of the transplant test against the sign of the main method minus the reference, at three levels.

    `pairs` are (base, task, language). `tasks` are (base, task), with languages weighted by their number of
    examples. `bases` are the base models. `hits` counts each level, for each base model and for all.
    """
    units: list[Row] = []
    for name, run in study.runs.items():
        for row in (run.prediction or {}).get("rows", []):
            gain = _gain(study, study.main, study.reference, name, (row["task"], row["language"]))
            if row.get("transplant_change") is not None and gain is not None:
                n = len(study.by_cell[row["task"], row["language"]])
                unit = {"base": name, "task": row["task"], "language": row["language"], "n": n}
                units.append({**unit, "transplant": row["transplant_change"], "gain": gain})
    levels = {
        "pairs": [_with_outcome(unit) for unit in units],
        "tasks": _merged(units, ("base", "task")),
        "bases": _merged(units, ("base",)),
    }
    rows = []
    for level, own in levels.items():
        rows.append({"level": level, "base": None, "task": None, **sign_hits(own)})
        if level != "bases":
            rows += [
                {"level": level, "base": b, "task": None, **sign_hits(u for u in own if u["base"] == b)}
                for b in _unique(own, "base")
            ]
    for base, task in dict.fromkeys((unit["base"], unit["task"]) for unit in units):
        one = [unit for unit in levels["pairs"] if (unit["base"], unit["task"]) == (base, task)]
        rows.append({"level": "pairs", "base": base, "task": task, **sign_hits(one)})
    return {**levels, "hits": rows if units else []}


def sign_hits(units: Iterable[Row]) -> Row:
    """Counts of predicted and observed signs. Ties are counted separately and left out of n.

    rate has Wilson's interval. `expected` is the rate that the margins alone would give: where nearly all
    signs are equal, guessing is often right too. p is from Fisher's exact test of association of the two
    signs, which keeps the margins fixed. It is None when a margin is zero.
    """
    counts = dict.fromkeys(("up_up", "up_down", "down_up", "down_down", "ties"), 0)
    for unit in units:
        counts[unit["outcome"]] += 1
    n = sum(counts.values()) - counts["ties"]
    right = counts["up_up"] + counts["down_down"]
    if not n:
        return {**counts, "n": 0, "hits": 0, **dict.fromkeys(("rate", "low", "high", "p", "expected"))}
    low, high = wilson(right, n)
    predicted, observed = counts["up_up"] + counts["up_down"], counts["up_up"] + counts["down_up"]
    expected = (predicted * observed + (n - predicted) * (n - observed)) / n**2
    p = fisher([[counts["up_up"], counts["up_down"]], [counts["down_up"], counts["down_down"]]])
    return {
        **counts,
        "n": n,
        "hits": right,
        "rate": right / n,
        "low": low,
        "high": high,
        "p": p,
        "expected": expected,
    }


def _with_outcome(unit: Row) -> Row:
    # The means are of whole counts, so a difference from zero by rounding only is a tie.
    signs = [
        0 if abs(value) < 1e-12 else 1 if value > 0 else -1 for value in (unit["transplant"], unit["gain"])
    ]
    return {**unit, "outcome": "ties" if 0 in signs else "_".join(SIGNS[sign] for sign in signs)}


def _merged(units: Sequence[Row], by: tuple[str, ...]) -> list[Row]:
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for unit in units:
        groups[tuple(unit[key] for key in by)].append(unit)
    rows = []
    for key, own in groups.items():
        n = sum(unit["n"] for unit in own)
        means = {name: sum(unit["n"] * unit[name] for unit in own) / n for name in ("transplant", "gain")}
        rows.append(_with_outcome({**dict(zip(by, key, strict=True)), "n": n, **means}))
    return rows


def _unique(rows: Iterable[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))
