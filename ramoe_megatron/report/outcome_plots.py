"""Figures of what training did: accuracy, routing mass on the task experts, and what the gain goes with."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ramoe_megatron.report.inputs import RunInputs
from ramoe_megatron.report.style import (
    COLOURS,
    MARKERS,
    average,
    from_zero,
    language_axis,
    legend_below,
    method_style,
    offset,
    order,
    panels,
    plain,
    shade_zone,
    unique,
    whole_layers,
)
from ramoe_megatron.report.tables import correlation_text, label

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def accuracy(run: RunInputs, results: Mapping[str, Any]) -> "Figure | None":
    rows = results["by_language"]
    if not rows:
        return None
    tasks = unique(row["task"] for row in results["by_pair"])
    languages = order(run, (row["language"] for row in rows))
    figure, axes = panels(1 + len(tasks) if len(tasks) > 1 else 1, max(4.4, 1.2 + 0.5 * len(languages)), 2.7)
    groups = [("all tasks", rows)] + [(task, [r for r in results["by_pair"] if r["task"] == task]) for task in tasks]
    for axis, (title, own) in zip(axes, groups, strict=False):
        for place, method in enumerate(results["methods"]):
            found = {row["language"]: row for row in own if row["method"] == method}
            x = [languages.index(name) + offset(place, len(results["methods"])) for name in found]
            y = [100 * row["accuracy"] for row in found.values()]
            below = [max(0.0, 100 * (row["accuracy"] - row["low"])) for row in found.values()]
            above = [max(0.0, 100 * (row["high"] - row["accuracy"])) for row in found.values()]
            colour, marker = method_style(method, place)
            axis.errorbar(x, y, yerr=[below, above], fmt=marker, color=colour, ms=4, lw=1, label=plain(label(method)))
        language_axis(axis, languages)
        axis.set_ylim(-2, 102)
        axis.set_ylabel("right answers, %")
        axis.set_title(plain(title))
        axis.grid(axis="y", alpha=0.3)
    legend_below(figure, axes)
    return figure


def mass_layers(run: RunInputs, results: Mapping[str, Any]) -> "Figure | None":
    tasks = unique(row["task"] for row in results["mass"])
    if not tasks:
        return None
    figure, axes = panels(len(tasks), 4.4, 2.8, sharey=True)
    for axis, task in zip(axes, tasks, strict=True):
        shade_zone(axis, run)
        own = [row for row in results["mass"] if row["task"] == task]
        english = [row["mass"] for row in own if row["method"] == "base" and row["language"] == run.anchor]
        if english:
            curve = [average(layer) for layer in zip(*english, strict=True)]
            axis.plot(range(len(curve)), curve, color="black", ls="--", lw=1.5, label=f"{plain(run.anchor)}, base")
        for place, method in enumerate(results["methods"]):
            rows = [row["mass"] for row in own if row["method"] == method and row["language"] != run.anchor]
            if rows:
                curve = [average(layer) for layer in zip(*rows, strict=True)]
                colour, marker = method_style(method, place)
                name = f"targets, {plain(label(method))}"
                axis.plot(range(len(curve)), curve, color=colour, marker=marker, ms=4, label=name)
        whole_layers(axis)
        axis.set_ylabel("routing mass")
        axis.set_title(plain(task))
        axis.grid(axis="y", alpha=0.3)
    from_zero(axes)
    legend_below(figure, axes)
    return figure


def mass_languages(run: RunInputs, results: Mapping[str, Any]) -> "Figure | None":
    if not results["mass"]:
        return None
    languages = order(run, (row["language"] for row in results["mass"]))
    figure, (axis,) = panels(1, max(5.5, 1.5 + 0.6 * len(languages)), 2.8)
    for place, method in enumerate(results["methods"]):
        points = []
        for at, language in enumerate(languages):
            rows = [row for row in results["mass"] if row["method"] == method and row["language"] == language]
            if rows:
                mass = average([average(in_zone(run, row["mass"])) for row in rows])
                points.append((at + offset(place, len(results["methods"])), mass))
        colour, marker = method_style(method, place)
        axis.plot(
            [x for x, _ in points], [y for _, y in points], marker, color=colour, ms=5, label=plain(label(method))
        )
    language_axis(axis, languages)
    axis.set_ylabel("routing mass on task experts,\nmean over zone and tasks")
    from_zero([axis])
    axis.grid(axis="y", alpha=0.3)
    legend_below(figure, [axis])
    return figure


def in_zone(run: RunInputs, mass: Sequence[float]) -> Sequence[float]:
    """The layers of the alignment zone; all layers when there is none."""
    return mass if run.zone is None else mass[run.zone.first : run.zone.last + 1]


def ci_gain(run: RunInputs, results: Mapping[str, Any]) -> "Figure | None":
    points = results["ci_gain"]["points"]
    methods = unique(point["method"] for point in points)
    if not methods:
        return None
    found = {(c["method"], c["over"]): c for c in results["ci_gain"]["correlations"]}
    shown = []
    for method in methods:
        title = f"{label(method)}\n{correlation_text(found.get((method, 'base'), {}))}"
        shown.append((title, [point for point in points if point["method"] == method]))
    return scatter(shown, "gain", "ci_share", "ci share, %", "gain over base, points")


def transplant(run: RunInputs, results: Mapping[str, Any]) -> "Figure | None":
    changes = {
        (row["task"], row["language"]): row["transplant_change"]
        for row in (run.prediction or {}).get("rows", [])
        if row.get("transplant_change") is not None
    }
    points = [
        {**p, "change": changes[p["task"], p["language"]]}
        for p in results["ci_gain"]["points"]
        if p["method"] != "sft" and p["gain_over_sft"] is not None and (p["task"], p["language"]) in changes
    ]
    shown = [(label(m), [p for p in points if p["method"] == m]) for m in unique(p["method"] for p in points)]
    x_label = "change by transplanted English routing, points"
    return scatter(shown, "gain_over_sft", "change", x_label, "gain over SFT, points") if shown else None


def scatter(shown: "list[tuple[str, list[dict[str, Any]]]]", y: str, x: str, x_label: str, y_label: str) -> "Figure":
    """One panel a method; a point a task-language pair, coloured by task, named by language."""
    figure, axes = panels(len(shown), 4.4, 3.2, sharex=True, sharey=True)
    tasks = unique(point["task"] for _, points in shown for point in points)
    for axis, (title, points) in zip(axes, shown, strict=True):
        for place, task in enumerate(tasks):
            own = [point for point in points if point["task"] == task]
            colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
            across, up = [100 * p[x] for p in own], [100 * p[y] for p in own]
            axis.scatter(across, up, label=plain(task), color=colour, marker=marker, s=22)
            if len(points) > 30:  # names would cover each other
                continue
            for point, at in zip(own, zip(across, up, strict=True), strict=True):
                text: dict[str, Any] = {"xytext": (3, 3), "textcoords": "offset points", "fontsize": 7}
                axis.annotate(plain(point["language"]), at, **text)
        axis.axhline(0, color="#888888", lw=0.8)
        axis.set_title(plain(title))
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.grid(alpha=0.3)
    legend_below(figure, axes)
    return figure
