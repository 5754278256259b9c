"""The JSON documents of a run as tables for the console."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from ramoe_megatron.method.steering import Steering
from ramoe_megatron.method.taxonomy import CATEGORIES
from ramoe_megatron.report.rendering import data, facts, flat, interval, mass, number, share, table


def taxonomy(path: Path, document: Mapping[str, Any]) -> RenderableType:
    """Counts and ci share by task, language and split."""
    told = {"anchor": document["anchor"], "checkpoint": document["checkpoint"], "data": data(document["data"])}
    if "anchors" in document:
        told["anchors"] = ", ".join(document["anchors"])
    return Group(
        facts(path, "ramoe-taxonomy", {**told, "written by": f"ramoe-megatron {document['package_version']}"}),
        taxonomy_pairs("taxonomy by task, target language and split", document["pairs"]),
    )


def anchors(path: Path, document: Mapping[str, Any]) -> RenderableType:
    """Which anchor language the examples of each task are pulled to, and what more than one brings."""
    names = document["anchors"]
    told = {"anchors": ", ".join(names), "taxonomy's anchor": document["anchor"], "checkpoint": document["checkpoint"]}
    told |= {"data": data(document["data"]), "written by": f"ramoe-megatron {document['package_version']}"}
    keys = ("none_right", "ci_first", "ci", "ci_gained")
    rows = [[r["task"], r["examples"], *(r["chosen"][name] for name in names), *(r[key] for key in keys)] for r in document["tasks"]]
    heads = ("task", "examples", *names, "none right", f"ci with {names[0]} alone", "ci", "ci gained")
    title = "examples by the anchor they are pulled to (the first where none is right), and ci rows of the taxonomy"
    return Group(facts(path, "ramoe-anchors", told), table(title, heads, rows, left=("task",)))


def taxonomy_pairs(title: str, pairs: Iterable[Mapping[str, Any]]) -> RenderableType:
    """The table of `summarise`."""
    rows = [
        [
            p["task"],
            p["language"],
            p["split"],
            p["n"],
            *(p[c] for c in CATEGORIES),
            interval(p, "ci_share", "ci_low", "ci_high"),
        ]
        for p in pairs
    ]
    heads = ("task", "language", "split", "n", *CATEGORIES, "ci share, %")
    return table(title, heads, rows, left=("task", "language", "split"))


def evaluation(path: Path, document: Mapping[str, Any]) -> RenderableType:
    """Accuracy and routing mass of one checkpoint."""
    told = {key: document[key] for key in ("method", "seed", "checkpoint", "split", "examples")}
    if "steering" in document:
        told["steering"] = setting(path, document["steering"])
    rows = [[r["task"], r["language"], r["n"], share(r["correct"], r["n"])] for r in document["rows"]]
    return Group(
        facts(path, "ramoe-evaluation", {**told, "data": data(document["data"])}),
        table("accuracy", ("task", "language", "n", "correct, %"), rows, left=("task", "language")),
        *mass(document["mass"], ("task", "language")),
    )


def prediction(path: Path, document: Mapping[str, Any]) -> RenderableType:
    """The go/no-go table, its verdict and its limits."""
    heads = (
        "task",
        "language",
        "n",
        "ci share, %",
        "divergence",
        "target, %",
        "with English routing, %",
        "change, points",
    )
    rows = [
        [
            r["task"],
            r["language"],
            r["n"],
            interval(r, "ci_share", "ci_low", "ci_high"),
            "-" if r["divergence"] is None else f"{r['divergence']:.3f}",
            interval(r, "target_accuracy"),
            interval(r, "transplant_accuracy"),
            interval(r, "transplant_change", "transplant_low", "transplant_high", sign="+"),
        ]
        for r in document["rows"]
    ]
    verdict = {key: flat(v) if isinstance(v, Mapping) else v for key, v in document["verdict"].items()}
    return Group(
        table(f"{path}: before training, 95 % intervals", heads, rows, left=("task", "language")),
        facts("verdict", "our reading", verdict),
        facts("limits", "what this cannot tell", {str(n): text for n, text in enumerate(document["limits"], 1)}),
    )


def steering(path: Path, document: Mapping[str, Any]) -> RenderableType:
    """The settings of steering that were tried, and the best."""
    told = {key: document[key] for key in ("anchor", "checkpoint", "split")}
    told |= {"data": data(document["data"]), "experts": data(document["experts"]), "best": setting(path, document["best"])}
    told |= {"left out": "\n".join(document["skipped"]) or None, "written by": f"ramoe-megatron {document['package_version']}"}
    rows = [
        [
            setting(path, r),
            r["experts"],
            r["n"],
            share(r["correct"], r["n"]),
            interval(r, "change", "low", "high", sign="+"),
            number(r["p"]),
            share(r["anchor_correct"], r["anchor_n"]),
        ]
        for r in document["settings"]
    ]
    heads = ("setting", "experts", "n", "correct, %", "change, points", "p", f"{document['anchor']}, %")
    return Group(facts(path, "ramoe-steering", told), table("settings tried, on the target languages", heads, rows, left=("setting",)))


def setting(path: Path, entry: Mapping[str, Any]) -> str:
    """A setting of steering in a line."""
    found = Steering.from_document(entry, path)
    return str(found) if found else "no steering"


def results(path: Path, document: Mapping[str, Any]) -> RenderableType:
    """Methods against each other."""
    told = {"recipe": document["recipe"], "anchor": document["anchor"]}
    told |= {key: ", ".join(map(str, document[key])) for key in ("methods", "seeds")}
    summary = [
        [
            r["method"],
            r["group"],
            interval(r, "accuracy", "low", "high"),
            interval(r, "change_vs_sft", "change_low", "change_high", sign="+"),
            number(r.get("p")),
        ]
        for r in document["summary"]
    ]
    rows = [
        [
            r["method"],
            "-" if r["seed"] is None else r["seed"],
            r["task"],
            r["language"],
            r["n"],
            interval(r, "accuracy", "low", "high"),
        ]
        for r in document["rows"]
    ]
    gain = document["ci_gain"]
    relation = f"ci share against gain: r = {number(gain.get('r'))} ({number(gain.get('low'))} to {number(gain.get('high'))})"
    return Group(
        facts(path, "ramoe-results", told),
        table(
            "summary",
            ("method", "group", "accuracy, %", "change vs SFT, points", "p"),
            summary,
            left=("method", "group"),
        ),
        Text(f"{relation}, {len(gain['points'])} points"),
        table(
            "accuracy by seed",
            ("method", "seed", "task", "language", "n", "accuracy, %"),
            rows,
            left=("method", "task", "language"),
        ),
        *mass(document["mass"], ("method", "seed", "task", "language")),
    )


def comparison(path: Path, document: Mapping[str, Any]) -> RenderableType:
    """Methods over seeds and base models: the headline, the claims, and the transplant test's hits."""
    told = {key: document[key] for key in ("reference", "main", "anchor", "split") if key in document}
    told |= {"base models": ", ".join(str(base["base"]) for base in document["bases"]), "methods": ", ".join(document["methods"])}
    p = ("p", "p_holm")
    headline = [
        [
            r["method"],
            r["outcomes"],
            interval(r, "accuracy", "low", "high"),
            interval(r["against"] or {}, "change", "low", "high", sign="+"),
            *(number((r["against"] or {}).get(name)) for name in p),
        ]
        for r in document["headline"]
    ]
    claims = [
        [r["claim"], r["method"], r["control"], interval(r, "change", "low", "high", sign="+"), *(number(r[n]) for n in p), r["verdict"]]
        for r in document["claims"]
    ]
    counts = ("up_up", "up_down", "down_up", "down_down", "ties")
    hits = [
        [r["level"], r["base"] or "all", r["task"] or "all", *(r[name] for name in counts), interval(r, "rate", "low", "high")]
        for r in document["transplant"]["hits"]
    ]
    change, corrected = f"change vs {document['reference']}, points", "p, Holm"
    heads = ("claim", "method", "control", "difference, points", "p", corrected, "verdict")
    levels = ("unit", "base model", "task")
    return Group(
        facts(path, "ramoe-comparison", told),
        table("target languages", ("method", "runs", "accuracy, %", change, "p", corrected), headline, left=("method",)),
        table("claims", heads, claims, left=("claim", "method", "control", "verdict")),
        table("transplant test/outcome", (*levels, *(name.replace("_", "/") for name in counts), "hits, %"), hits, left=levels),
    )
