"""results.json: accuracies with intervals, paired differences, English retention, ci share against gain."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ramoe_megatron.artifacts.files import save_document
from ramoe_megatron.report.divergence_gap import gap_correlations, gap_points, split_by_unit
from ramoe_megatron.report.inputs import Evaluation, RunInputs, load_run
from ramoe_megatron.report.pairing import paired_change, pooled
from ramoe_megatron.statistics import pearson, wilson


def results_of(run: RunInputs) -> dict[str, Any]:
    """The contents of results.json for `run`."""
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
        "divergence_gap": _divergence_gap(run),
    }


def collect(run_dir: Path) -> dict[str, Any]:
    """Make results.json from the evaluations and the taxonomy of a run folder, write it, and return it."""
    results = results_of(load_run(run_dir))
    save_document(Path(run_dir) / "results.json", "ramoe-results", results)
    return results


def _divergence_gap(run: RunInputs) -> dict[str, Any]:
    points = gap_points(run)
    languages, pairs = split_by_unit(points)
    within = gap_correlations(pairs, [point["language"] for point in pairs])
    return {"layers": gap_correlations(languages), "pairs": within, "points": points}


def _summary(by_method: Mapping[str, list[Evaluation]], anchor: str) -> list[dict[str, Any]]:
    summary = []
    for method, evaluations in by_method.items():
        for group in ("target", "english"):
            languages = {row["language"] for evaluation in evaluations for row in evaluation.rows}
            languages = languages & {anchor} if group == "english" else languages - {anchor}
            counts = pooled(evaluations, language=languages)
            if counts is None:
                continue
            sft, base = (
                paired_change(evaluations, by_method.get(name, []), languages) for name in ("sft", "base")
            )
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
    """The first method that is not SFT against every later method (its controls), on the target languages."""
    first, *others = [method for method in by_method if method not in ("base", "sft")] or [""]
    rows = []
    for other in others:
        languages = {row["language"] for evaluation in by_method[first] for row in evaluation.rows} - {anchor}
        if change := paired_change(by_method[first], by_method[other], languages):
            rows.append({"method": first, "reference": other, **dataclasses.asdict(change)})
    return rows


def ci_counts(run: RunInputs) -> dict[tuple[str, str], tuple[int, int]]:
    """(task, target language) -> number of ci examples and of all examples, on the evaluated split.

    All splits are counted when the evaluated split was not scored.
    """
    pairs = [p for p in (run.taxonomy or {}).get("pairs", []) if p["language"] != run.anchor]
    chosen = [p for p in pairs if p["split"] == run.evaluated_split()] or pairs
    counts: dict[tuple[str, str], tuple[int, int]] = defaultdict(lambda: (0, 0))
    for pair in chosen:
        ci, n = counts[pair["task"], pair["language"]]
        counts[pair["task"], pair["language"]] = ci + pair["ci"], n + pair["n"]
    return {key: count for key, count in counts.items() if count[1]}


def ci_shares(run: RunInputs) -> dict[tuple[str, str], float]:
    """(task, target language) -> ci share of the same examples."""
    return {key: ci / n for key, (ci, n) in ci_counts(run).items()}


def _ci_gain(by_pair: list[dict[str, Any]], run: RunInputs) -> dict[str, Any]:
    """Pearson's r of ci share with each method's gain over base and over SFT, over task-language pairs."""
    shares = ci_shares(run)
    accuracy = {(row["method"], row["task"], row["language"]): row["accuracy"] for row in by_pair}
    points, correlations = [], []
    for method in [m for m in run.methods if m != "base"]:
        for (task, language), share in shares.items():
            own, base, sft = (accuracy.get((m, task, language)) for m in (method, "base", "sft"))
            if own is None or base is None:
                continue
            point = {
                "task": task,
                "language": language,
                "method": method,
                "ci_share": share,
                "gain": own - base,
            }
            points.append({**point, "gain_over_sft": None if sft is None else own - sft})
        own_points = [p for p in points if p["method"] == method]
        for over, key in (("base", "gain"), ("sft", "gain_over_sft")):
            if not (method == "sft" and over == "sft"):
                usable = [(p["ci_share"], p[key]) for p in own_points if p[key] is not None]
                correlations.append(
                    {"method": method, "over": over, "n": len(usable), **_correlation(usable)}
                )
    first = next((c for c in correlations if c["method"] != "sft"), next(iter(correlations), {}))
    return {
        "method": first.get("method"),
        **{name: first.get(name) for name in ("r", "low", "high", "p", "n")},
        "correlations": correlations,
        "points": points,
    }


def _correlation(pairs: Sequence[tuple[float, float]]) -> dict[str, float | None]:
    """r with its interval and p; all None for fewer than three points or a constant side."""
    found = pearson([x for x, _ in pairs], [y for _, y in pairs])
    return {name: getattr(found, name, None) for name in ("r", "low", "high", "p")}
