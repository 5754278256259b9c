"""results.json: accuracies with intervals, paired differences, English retention, and ci share against gain."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from ramoe_megatron.artifacts.files import save_document
from ramoe_megatron.report.inputs import Evaluation, RunInputs, load_run
from ramoe_megatron.report.pairing import paired_change, pooled
from ramoe_megatron.statistics import pearson, wilson

NONE = "–"
LABELS = {
    "base": "base (before)",
    "sft": "SFT",
    "ra-moe": "RA-MoE (our reading)",
    "ra-moe-shuffled": "RA-MoE, shuffled targets (control)",
}


def build(run: RunInputs) -> dict[str, Any]:
    """The contents of results.json from what `run` holds."""
    anchor = run.anchor
    by_method = {m: [e for e in run.evaluations if e.method == m] for m in run.methods}
    rows = []
    for evaluation in sorted(run.evaluations, key=lambda e: (run.methods.index(e.method), e.seed or 0)):
        for row in evaluation.rows:
            low, high = wilson(row["correct"], row["n"])
            share = {"accuracy": row["correct"] / row["n"], "low": low, "high": high}
            counts = {name: row[name] for name in ("task", "language", "n", "correct")}
            rows.append({"method": evaluation.method, "seed": evaluation.seed, **counts, **share})
    by_language, by_pair = [], []
    for method, evaluations in by_method.items():
        for language in dict.fromkeys(row["language"] for row in rows):
            if found := pooled(evaluations, language=language):
                by_language.append({"method": method, "language": language, **found})
        for task, language in dict.fromkeys((row["task"], row["language"]) for row in rows):
            if found := pooled(evaluations, task=task, language=language):
                by_pair.append({"method": method, "task": task, "language": language, **found})
    return {
        "format": "ramoe-results",
        "version": 1,
        "recipe": run.name,
        "anchor": anchor,
        "split": run.evaluated_split(),
        "methods": run.methods,
        "seeds": sorted({e.seed for e in run.evaluations if e.seed is not None and e.method != "base"}),
        "rows": rows,
        "by_language": by_language,
        "by_pair": by_pair,
        "summary": _summary(by_method, anchor),
        "comparisons": _comparisons(by_method, anchor),
        "mass": [{"method": e.method, "seed": e.seed, **row} for e in run.evaluations for row in e.mass],
        "ci_gain": _ci_gain(by_pair, run),
    }


def collect(run_dir: Path) -> dict[str, Any]:
    """Build results.json from the run folder's evaluations and taxonomy, write it, and return it."""
    results = build(load_run(run_dir))
    save_document(Path(run_dir) / "results.json", "ramoe-results", results)
    return results


def _summary(by_method: Mapping[str, list[Evaluation]], anchor: str) -> list[dict[str, Any]]:
    summary = []
    for method, evaluations in by_method.items():
        for group in ("target", "english"):
            languages = {row["language"] for evaluation in evaluations for row in evaluation.rows}
            languages = languages & {anchor} if group == "english" else languages - {anchor}
            counts = pooled(evaluations, language=languages)
            if counts is None:
                continue
            sft, base = (paired_change(evaluations, by_method.get(name, []), languages) for name in ("sft", "base"))
            sft = None if method == "base" else sft
            summary.append(
                {
                    "method": method,
                    "group": group,
                    **counts,
                    "change_vs_sft": sft and sft.change,
                    "change_low": sft and sft.low,
                    "change_high": sft and sft.high,
                    "p": sft and sft.p,
                    "seeds_higher": sft and sft.seeds_higher,
                    "seeds_lower": sft and sft.seeds_lower,
                    "seeds_paired": sft and sft.seeds_paired,
                    "change_vs_base": base and base.change,
                    "change_vs_base_low": base and base.low,
                    "change_vs_base_high": base and base.high,
                }
            )
    return summary


def _comparisons(by_method: Mapping[str, list[Evaluation]], anchor: str) -> list[dict[str, Any]]:
    """The first method that is not SFT against every later one (its controls), on the target languages."""
    first, *others = [method for method in by_method if method not in ("base", "sft")] or [""]
    rows = []
    for other in others:
        languages = {row["language"] for evaluation in by_method[first] for row in evaluation.rows} - {anchor}
        if change := paired_change(by_method[first], by_method[other], languages):
            rows.append({"method": first, "reference": other, **dataclasses.asdict(change)})
    return rows


def ci_counts(run: RunInputs) -> dict[tuple[str, str], tuple[int, int]]:
    """ci examples and all examples of each (task, target language) on the evaluated split; on all splits when that one was not scored."""
    pairs = [p for p in (run.taxonomy or {}).get("pairs", []) if p["language"] != run.anchor]
    chosen = [p for p in pairs if p["split"] == run.evaluated_split()] or pairs
    counts: dict[tuple[str, str], tuple[int, int]] = defaultdict(lambda: (0, 0))
    for pair in chosen:
        ci, n = counts[pair["task"], pair["language"]]
        counts[pair["task"], pair["language"]] = ci + pair["ci"], n + pair["n"]
    return {key: count for key, count in counts.items() if count[1]}


def ci_shares(run: RunInputs) -> dict[tuple[str, str], float]:
    """ci share of each (task, target language), of the same examples."""
    return {key: ci / n for key, (ci, n) in ci_counts(run).items()}


def _ci_gain(by_pair: list[dict[str, Any]], run: RunInputs) -> dict[str, Any]:
    """Pearson's r of ci share with the gain over base, and over SFT, of each method, over task-language pairs."""
    shares = ci_shares(run)
    accuracy = {(row["method"], row["task"], row["language"]): row["accuracy"] for row in by_pair}
    points, correlations = [], []
    for method in [m for m in run.methods if m != "base"]:
        for (task, language), share in shares.items():
            own, base, sft = (accuracy.get((m, task, language)) for m in (method, "base", "sft"))
            if own is None or base is None:
                continue
            point = {"task": task, "language": language, "method": method, "ci_share": share, "gain": own - base}
            points.append({**point, "gain_over_sft": None if sft is None else own - sft})
        own_points = [p for p in points if p["method"] == method]
        for over, key in (("base", "gain"), ("sft", "gain_over_sft")):
            if not (method == "sft" and over == "sft"):
                usable = [(p["ci_share"], p[key]) for p in own_points if p[key] is not None]
                correlations.append({"method": method, "over": over, "n": len(usable), **_correlation(usable)})
    first = next((c for c in correlations if c["method"] != "sft"), next(iter(correlations), {}))
    return {
        "method": first.get("method"),
        **{name: first.get(name) for name in ("r", "low", "high", "p", "n")},
        "correlations": correlations,
        "points": points,
    }


def _correlation(pairs: Sequence[tuple[float, float]]) -> dict[str, float | None]:
    """All None where r is undefined: fewer than three points, or one side constant."""
    found = pearson([x for x, _ in pairs], [y for _, y in pairs])
    return {name: getattr(found, name, None) for name in ("r", "low", "high", "p")}


def label(method: str) -> str:
    return LABELS.get(method, method)


def number(value: float, form: str) -> str:
    """Formatted, with a true minus sign: a hyphen could end a line."""
    return f"{value:{form}}".replace("-", "−")


def interval(row: Mapping[str, Any], value: str, low: str, high: str, signed: bool = False) -> str:
    """`46.2 [43.1, 49.3]`, in per cent or percentage points; a dash where there is no value."""
    if row.get(value) is None:
        return NONE
    form = "+.1f" if signed else ".1f"
    if row.get(low) is None or row.get(high) is None:
        return number(100 * row[value], form)
    return f"{number(100 * row[value], form)} [{number(100 * row[low], form)}, {number(100 * row[high], form)}]"


def correlation_text(found: Mapping[str, Any]) -> str:
    """`r = 0.70 [0.34, 0.88], n = 18`, or that r is undefined."""
    if found.get("r") is None:
        return "r undefined"
    r, low, high = (number(found[name], ".2f") for name in ("r", "low", "high"))
    return f"r = {r} [{low}, {high}], n = {found['n']}"


def summary_rows(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row of display strings a method, for the page; keys as in `COLUMNS`."""
    groups = {(row["method"], row["group"]): row for row in results["summary"]}
    shown = []
    for method in results["methods"]:
        target, english = groups.get((method, "target"), {}), groups.get((method, "english"), {})
        change = {} if method == "sft" else target
        kept = {} if method == "base" else english
        shown.append(
            {
                "method": label(method),
                "target": interval(target, "accuracy", "low", "high"),
                "change": interval(change, "change_vs_sft", "change_low", "change_high", signed=True),
                "seeds": NONE
                if change.get("change_vs_sft") is None
                else f"{change['seeds_higher']} higher, {change['seeds_lower']} lower",
                "english": interval(english, "accuracy", "low", "high"),
                "retention": interval(kept, "change_vs_base", "change_vs_base_low", "change_vs_base_high", signed=True),
            }
        )
    return shown


COLUMNS = {
    "method": "method",
    "target": "target languages, %\N{NO-BREAK SPACE}right",
    "change": "change against SFT, points",
    "seeds": "seeds against SFT",
    "english": "English, %\N{NO-BREAK SPACE}right",
    "retention": "English, change from base, points",
}


def summary_table(results: Mapping[str, Any]) -> Table:
    """The table that `ramoe run` ends with; it fits eighty columns, so methods go by their names in the recipe."""
    seeds = ", ".join(map(str, results["seeds"])) or "none"
    caption = "[95 % interval]; seeds: with more right answers than SFT's; English: (change from base, points)"
    table = Table(
        title=f"{escape(results['recipe'])}: right answers, seeds {seeds}",
        caption=caption,
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading in ("method", "target, %", "against SFT, points", "seeds", "English, %"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    groups = {(row["method"], row["group"]): row for row in results["summary"]}
    for method in results["methods"]:
        target, english = groups.get((method, "target"), {}), groups.get((method, "english"), {})
        change = {} if method == "sft" else target
        kept = interval({} if method == "base" else english, "change_vs_base", "", "", signed=True)
        table.add_row(
            escape(method),
            escape(interval(target, "accuracy", "low", "high")),
            escape(interval(change, "change_vs_sft", "change_low", "change_high", signed=True)),
            NONE if change.get("change_vs_sft") is None else f"{change['seeds_higher']} of {change['seeds_paired']}",
            interval(english, "accuracy", "", "") + ("" if kept == NONE else f" ({kept})"),
        )
    return table


def p_text(value: float | None) -> str:
    """A p-value in a cell."""
    return NONE if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"
