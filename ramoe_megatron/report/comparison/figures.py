"""Figures of the comparison: methods against the reference, cells, ci share and gain, divergence and gap."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ramoe_megatron.report.comparison.study import ALPHA
from ramoe_megatron.report.plots import (
    COLOURS,
    by_method,
    gap_axes,
    gap_curve,
    legend_below,
    mark_style,
    panels,
    plain,
    save_all,
    scatter,
)
from ramoe_megatron.report.vocabulary import NONE, UNTRAINED, Record, correlation, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTIONS = {
    "forest": (
        "Change of target accuracy against {reference}. Black: mean over pairs of base model and seed with "
        "Student's 95 % interval by the spread within base models; grey band: the interval over examples, "
        "for these seeds; small marks: the mean of each base model. ‡: trains nothing, and the spread is "
        "that of {reference} alone."
    ),
    "cells": (
        "{main} minus {reference}, points, by task and target language: mean over base models and seeds. A "
        "star: p at most 0.05 after Holm's correction over all cells of all methods; a dagger: at most 0.05 "
        "without it, which one cell in twenty is by chance."
    ),
    "ci": (
        "Each point is a task and target language of one base model; the gain is accuracy after minus "
        "before, mean over seeds. Where the ci share is large there is more room for any training: what "
        "{main} shares with {reference} is headroom. r is within base models."
    ),
    "gap": (
        "Pearson's r over target languages of routing divergence and the base model's gap to the anchor "
        "language, by layer, with Fisher's 95 % interval. Black: within base models. Shaded: the alignment "
        "zone, where all base models have one."
    ),
}


def marked(row: Record, text: str) -> str:
    """`text`, a difference from the reference, with a mark if the method of this row trains nothing."""
    return f"{text} {UNTRAINED}" if row["seeds"] == 0 and text != NONE else text


def plot_comparison(c: Record, folder: Path) -> dict[str, Path]:
    """Draw every figure that has content: name -> PNG."""
    return save_all(folder, {name: functools.partial(draw, c) for name, draw in COMPARISON_FIGURES.items()})


def forest_figure(c: Record) -> "Figure | None":
    rows = [row for row in c["headline"] if row["against"] is not None]
    if not rows:
        return None
    figure, (axis,) = panels(1, 8.0, 1.3 + 0.4 * len(rows))
    axis.use_sticky_edges = False  # otherwise the longest band would end at the frame
    names = [base["base"] for base in c["bases"]]
    several = len(names) > 1
    marks: dict[str, dict[str, Any]] = {name: {**mark_style(at), "ms": 4.5} for at, name in enumerate(names)}
    for place, row in enumerate(rows):
        found, examples = row["against"], row["against"]["by_example"]
        if examples["low"] is not None:
            low, high = 100 * examples["low"], 100 * examples["high"]
            axis.barh(place + 0.1, high - low, left=low, height=0.76, color="#DDDDDD", zorder=1)
        if found["low"] is not None:
            axis.plot(
                [100 * found["low"], 100 * found["high"]], [place, place], color="black", lw=1.6, zorder=2
            )
        axis.plot(100 * found["change"], place, "D", color="black", ms=5, zorder=4)
        for base in found["by_base"] if several else []:
            # Below the line, apart from it.
            height = place + 0.17 + 0.21 * names.index(base["base"]) / (len(names) - 1)
            axis.plot(100 * base["change"], height, ls="", zorder=3, **marks[base["base"]])
    axis.plot([], [], "D-", color="black", ms=5, lw=1.6, label="mean over seeds, 95 %")
    axis.plot([], [], color="#DDDDDD", lw=7, label="over examples, 95 %")
    for name in names if several else []:
        axis.plot([], [], ls="", label=plain(name), **marks[name])
    axis.axvline(0, color="#555555", lw=0.9, zorder=1)
    axis.set_yticks(range(len(rows)), [plain(marked(row, row["method"])) for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlabel(f"target accuracy minus {plain(c['reference'])}, points")
    axis.grid(axis="x", alpha=0.3)
    legend_below(figure, [axis])
    return figure


def cells_figure(c: Record) -> "Figure | None":
    found = {
        (row["task"], row["language"]): row["against"]
        for row in c["cells"]
        if row["method"] == c["main"] and row["against"]
    }
    if not found:
        return None
    tasks, languages = c["tasks"], c["languages"]
    limit = max(100 * abs(row["change"]) for row in found.values()) or 1.0
    figure, (axis,) = panels(1, max(4.4, 2.0 + 0.72 * len(languages)), 1.3 + 0.42 * len(tasks))
    grid = [
        [100 * found[t, g]["change"] if (t, g) in found else float("nan") for g in languages] for t in tasks
    ]
    image = axis.imshow(grid, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
    for (task, language), row in found.items():
        star = "*" if _low(row["p_holm"]) else "†" if _low(row["p"]) else ""
        dark = abs(100 * row["change"]) > 0.65 * limit
        text = number(100 * row["change"], "+.1f") + star
        at = languages.index(language), tasks.index(task)
        axis.text(*at, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    axis.set_xticks(
        range(len(languages)),
        [plain(name) for name in languages],
        rotation=90 if sum(map(len, languages)) > 50 else 0,
    )
    axis.set_yticks(range(len(tasks)), [plain(name) for name in tasks])
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    figure.colorbar(image, ax=axis, label="points")
    return figure


def _low(p: float | None) -> bool:
    return p is not None and p <= ALPHA


def comparison_ci_figure(c: Record) -> "Figure | None":
    found = {(row["method"], row["over"]): row for row in c["ci_gain"]["correlations"] if row["base"] is None}
    points = by_method(c["ci_gain"]["points"])
    methods = [method for method in (c["reference"], c["main"]) if method in points]
    shown = [
        (f"{method}\n{correlation(found.get((method, 'base'), {}))}", points[method]) for method in methods
    ]
    return scatter(shown, "over_base", "ci_share", "ci share, %", "gain over base, points") if shown else None


def comparison_gap_figure(c: Record) -> "Figure | None":
    rows = [row for row in c.get("divergence_gap", {}).get("correlations", []) if row["r"] is not None]
    if not rows:
        return None
    figure, (axis,) = panels(1, 7.5, 3.4)
    zones = {tuple(base["zone"] or ()) for base in c["bases"]}
    if len(zones) == 1 and (zone := zones.pop()):
        axis.axvspan(zone[0] - 0.5, zone[1] + 0.5, color="#F0E442", alpha=0.35, lw=0, zorder=0)
    pairs = [row for row in rows if row.get("unit") == "pairs" and row["base"] is None]
    rows = [row for row in rows if row.get("unit", "languages") == "languages"]
    names = [base["base"] for base in c["bases"]]
    for at, name in enumerate(names if len(names) > 1 else []):
        own = [row for row in rows if row["base"] == name]
        layers, values = ([row[side] for row in own] for side in ("layer", "r"))
        axis.plot(layers, values, ms=4, label=plain(name), **mark_style(at))
    gap_curve(axis, [row for row in rows if row["base"] is None], "black", "within base models")
    gap_curve(axis, pairs, COLOURS[len(names) % len(COLOURS)], "tasks within languages")
    gap_axes(axis)
    return figure


COMPARISON_FIGURES = {
    "forest": forest_figure,
    "cells": cells_figure,
    "ci": comparison_ci_figure,
    "gap": comparison_gap_figure,
}
