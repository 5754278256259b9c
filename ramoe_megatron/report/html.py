"""report.html: one self-contained page. Figures are embedded, nothing is loaded from elsewhere, text is escaped."""

import base64
import datetime
import importlib.metadata
import platform
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from ramoe_megatron.artifacts.files import atomic_write_text, package_version
from ramoe_megatron.report import words
from ramoe_megatron.report.inputs import RunInputs, load_run
from ramoe_megatron.report.plots import FIGURES, plot_all
from ramoe_megatron.report.profile_plots import shown_pairs
from ramoe_megatron.report.tables import COLUMNS, NONE, collect, interval, label, summary_rows

BEFORE = ("taxonomy", "divergence", "experts")
CONTENTS = {
    "results": "Results",
    "before": "Before training",
    "prediction": "Go or no-go",
    "limits": "Limits",
    "settings": "Settings",
    "files": "Stages and files",
}
PACKAGES = ("megatron-core", "torch", "transformer-engine", "datasets", "sentencepiece", "numpy", "babel")
DPI = 144


def write_report(run_dir: Path) -> Path:
    """Write results.json, plots/*.png and report.html under `run_dir`; returns the page's path.

    Raises:
        RamoeError: no such folder, or a file in it is malformed.
    """
    results = collect(run_dir)
    run = load_run(run_dir)
    page = run.root / "report.html"
    atomic_write_text(page, render(run, results, plot_all(run, results)))
    return page


def render(run: RunInputs, results: Mapping[str, Any], plots: Mapping[str, Path]) -> str:
    """The page as text; a section whose inputs are missing names the stage that makes them."""
    pairs = shown_pairs(run)
    split = pairs[0]["split"] if pairs else ""
    figures = [_figure(name, run, results, plots.get(name), split) for name in FIGURES]
    prediction = run.prediction or {}
    stages = (run.manifest or {}).get("stages", {})
    return fill(
        "report.html",
        name=run.name,
        contents=CONTENTS.items(),
        summary=words.summary(run, results),
        columns=COLUMNS,
        table=summary_rows(results) if results["summary"] else [],
        methods=[label(method) for method in results["methods"]],
        pairs=_pairs(results),
        after=[figure for figure in figures if figure["name"] not in BEFORE],
        before=[figure for figure in figures if figure["name"] in BEFORE],
        prediction=[_prediction(row) for row in prediction.get("rows", [])],
        verdict=words.verdict(prediction.get("verdict") or {}),
        prediction_limits=prediction.get("limits", []),
        limits=words.LIMITS,
        recipe=run.recipe_text,
        versions=_versions(),
        stages=[{"name": name, **_stage(entry)} for name, entry in stages.items()],
        files=sorted(_files(stages).items()),
    )


def fill(template: str, **values: Any) -> str:
    """One of templates/, all of which extend page.html, with `values`; what it names and is not given is an error."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template(template)
    made = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z")
    return found.render(version=package_version(), made=made, **values)


def embedded(path: Path | None) -> dict[str, Any]:
    """A PNG's `image` in base64 and its `width` in CSS pixels; empty and 0 without one."""
    data = path.read_bytes() if path is not None else b""
    return {
        "image": base64.b64encode(data).decode("ascii"),
        # Bytes 16 to 20 of a PNG are its width; shown at the size it was drawn for (96 CSS pixels an inch).
        "width": struct.unpack(">I", data[16:20])[0] * 96 // DPI if data else 0,
    }


def _figure(name: str, run: RunInputs, results: Mapping[str, Any], path: Path | None, split: str) -> dict[str, Any]:
    return {
        "name": name,
        "title": words.TITLES[name],
        "caption": words.caption(name, run, results, split),
        "made_by": words.MADE_BY[name],
        **embedded(path),
    }


def _pairs(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = {(row["method"], row["task"], row["language"]): row for row in results["by_pair"]}
    rows = []
    for task, language in dict.fromkeys((row["task"], row["language"]) for row in results["by_pair"]):
        own = [found.get((method, task, language), {}) for method in results["methods"]]
        n = next(row["n"] // row["seeds"] for row in own if row)
        cells = [interval(row, "accuracy", "low", "high") for row in own]
        rows.append({"task": task, "language": language, "n": n, "cells": cells})
    return rows


def _prediction(row: Mapping[str, Any]) -> dict[str, Any]:
    divergence = row.get("divergence")
    return {
        **{key: row[key] for key in ("task", "language", "n")},
        "ci": interval(row, "ci_share", "ci_low", "ci_high"),
        "divergence": NONE if divergence is None else f"{divergence:.3f}",
        "accuracy": interval(row, "target_accuracy", "", ""),
        "transplant": interval(row, "transplant_accuracy", "", ""),
        "change": interval(row, "transplant_change", "transplant_low", "transplant_high", signed=True),
    }


def _versions() -> dict[str, str]:
    """What is installed where the report is made, which `ramoe run` makes with the same Python as the stages."""
    versions = {"ramoe-megatron": package_version(), "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _stage(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"state": entry.get("state", NONE), "ranks": entry.get("ranks") or 1, "ended": entry.get("ended") or NONE}


def _files(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Every file that a stage read or wrote, with its digest; what a stage wrote wins over what another one read."""
    read = {path: digest for entry in stages.values() for path, digest in entry.get("inputs", {}).items() if digest}
    return read | {path: digest for entry in stages.values() for path, digest in entry.get("outputs", {}).items()}
