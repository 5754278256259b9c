"""The figures of a run, each a PNG in RUN/plots/, and what all figures share.

The colours are those of Okabe and Ito. A marker, line style or hatch repeats each distinction that a colour
makes.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from ramoe_megatron.artifacts.files import atomic_write
from ramoe_megatron.report.inputs import RunInputs
from ramoe_megatron.report.rendering import DPI
from ramoe_megatron.report.vocabulary import correlation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A8A00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
LAYER_AXIS = "MoE layer (0-based)"
METHOD_STYLE = {
    "base": ("#555555", "o"),
    "sft": ("#0072B2", "s"),
    "ra-moe": ("#D55E00", "^"),
    "ra-moe-shuffled": ("#009E73", "D"),
}
CATEGORY_STYLE = {
    "cc": ("both right (cc)", "#0072B2", ""),
    "ci": ("English right, target wrong (ci)", "#E69F00", "//"),
    "ic": ("target right, English wrong (ic)", "#56B4E9", ".."),
    "ii": ("both wrong (ii)", "#BBBBBB", ""),
}


# --- what all figures share ---


@contextmanager
def pyplot() -> Iterator[None]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings: dict[Any, Any] = {
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.axisbelow": True,
        "hatch.linewidth": 0.5,
    }
    plain_frame: dict[Any, Any] = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
    with plt.rc_context(settings | plain_frame):
        yield
    plt.close("all")


def panels(count: int, width: float, height: float, **options: Any) -> "tuple[Figure, list[Axes]]":
    """A grid of `count` panels of this size in inches: two in a row, or three when there are three."""
    import matplotlib.pyplot as plt

    columns = 3 if count == 3 else min(2, count)
    rows = -(-count // columns)
    size = (min(width * columns, 10.5), height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
    figure.get_layout_engine().set(h_pad=0.09, hspace=0.04)  # type: ignore[union-attr]
    flat = list(axes.flat)
    for spare in flat[count:]:
        spare.set_visible(False)
    for axis in flat[:count]:
        # Each panel shows its axis labels, so that it can be read alone.
        axis.tick_params(labelbottom=True, labelleft=True)
    return figure, flat[:count]


def plain(text: str) -> str:
    """Escape dollar signs, between which matplotlib would read text as mathematics."""
    return str(text).replace("$", r"\$")


def method_style(method: str, place: int) -> tuple[str, str]:
    return METHOD_STYLE.get(
        method, (COLOURS[(place + 3) % len(COLOURS)], MARKERS[(place + 3) % len(MARKERS)])
    )


def mark_style(place: int) -> dict[str, Any]:
    """Colour and marker of the series at this place."""
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}


def shade_zone(axis: "Axes", run: RunInputs) -> None:
    if run.zone is not None:
        style: dict[str, Any] = {"color": "#F0E442", "alpha": 0.35, "lw": 0, "zorder": 0}
        axis.axvspan(run.zone.first - 0.5, run.zone.last + 0.5, label="alignment zone", **style)


def from_zero(axes: "Sequence[Axes]") -> None:
    """Let axes that share a scale reach from zero to a little above the highest line.

    Call this after all lines are drawn: an earlier limit would cut off later lines.
    """
    heights = [np.asarray(line.get_ydata(), dtype=float) for axis in axes for line in axis.get_lines()]
    highest = max((float(height.max()) for height in heights if height.size), default=1.0)
    axes[0].set_ylim(0, 1.08 * highest)


def whole_layers(axis: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set_xlabel(LAYER_AXIS)


def unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def language_order(run: RunInputs, languages: Iterable[str]) -> list[str]:
    """The anchor first, then as in the data."""
    return sorted(unique(languages), key=lambda language: language != run.anchor)


def offset(place: int, count: int) -> float:
    return (place - (count - 1) / 2) * 0.7 / max(count, 1)


def language_axis(axis: "Axes", languages: Sequence[str]) -> None:
    names = [plain(name) for name in languages]
    axis.set_xticks(range(len(names)), names, rotation=90 if sum(map(len, names)) > 50 else 0)
    axis.set_xlim(-0.6, len(names) - 0.4)


def legend_below(figure: "Figure", axes: "Sequence[Axes]") -> None:
    handles = {
        name: handle for axis in axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    columns = min(4, len(handles))
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=columns, fontsize=8
    )


# --- after training ---


def accuracy_figure(run: RunInputs, results: Mapping[str, Any]) -> "Figure | None":
    rows = results["by_language"]
    if not rows:
        return None
    tasks = unique(row["task"] for row in results["by_pair"])
    languages = language_order(run, (row["language"] for row in rows))
    figure, axes = panels(1 + len(tasks) if len(tasks) > 1 else 1, max(4.4, 1.2 + 0.5 * len(languages)), 2.7)
    groups = [("all tasks", rows)] + [
        (task, [r for r in results["by_pair"] if r["task"] == task]) for task in tasks
    ]
    for axis, (title, own) in zip(axes, groups, strict=False):
        for place, method in enumerate(results["methods"]):
            found = {row["language"]: row for row in own if row["method"] == method}
            x = [languages.index(name) + offset(place, len(results["methods"])) for name in found]
            y = [100 * row["accuracy"] for row in found.values()]
            below = [max(0.0, 100 * (row["accuracy"] - row["low"])) for row in found.values()]
            above = [max(0.0, 100 * (row["high"] - row["accuracy"])) for row in found.values()]
            colour, marker = method_style(method, place)
            axis.errorbar(
                x, y, yerr=[below, above], fmt=marker, color=colour, ms=4, lw=1, label=plain(method)
            )
        language_axis(axis, languages)
        axis.set(ylim=(-2, 102), ylabel="right answers, %", title=plain(title))
        axis.grid(axis="y", alpha=0.3)
    legend_below(figure, axes)
    return figure


def mass_layers_figure(run: RunInputs, results: Mapping[str, Any]) -> "Figure | None":
    tasks = unique(row["task"] for row in results["mass"])
    if not tasks:
        return None
    figure, axes = panels(len(tasks), 4.4, 2.8, sharey=True)
    for axis, task in zip(axes, tasks, strict=True):
        shade_zone(axis, run)
        own = [row for row in results["mass"] if row["task"] == task]
        english = [row["mass"] for row in own if row["method"] == "base" and row["language"] == run.anchor]
        if english:
            curve = [fmean(layer) for layer in zip(*english, strict=True)]
            axis.plot(
                range(len(curve)), curve, color="black", ls="--", lw=1.5, label=f"{plain(run.anchor)}, base"
            )
        for place, method in enumerate(results["methods"]):
            rows = [row["mass"] for row in own if row["method"] == method and row["language"] != run.anchor]
            if rows:
                curve = [fmean(layer) for layer in zip(*rows, strict=True)]
                colour, marker = method_style(method, place)
                name = f"targets, {plain(method)}"
                axis.plot(range(len(curve)), curve, color=colour, marker=marker, ms=4, label=name)
        whole_layers(axis)
        axis.set(ylabel="routing mass", title=plain(task))
        axis.grid(axis="y", alpha=0.3)
    from_zero(axes)
    legend_below(figure, axes)
    return figure


def mass_languages_figure(run: RunInputs, results: Mapping[str, Any]) -> "Figure | None":
    if not results["mass"]:
        return None
    languages = language_order(run, (row["language"] for row in results["mass"]))
    figure, (axis,) = panels(1, max(5.5, 1.5 + 0.6 * len(languages)), 2.8)
    for place, method in enumerate(results["methods"]):
        own: dict[str, list[float]] = {}
        for row in results["mass"]:
            if row["method"] == method:
                own.setdefault(row["language"], []).append(fmean(in_zone(run, row["mass"])))
        x = [languages.index(language) + offset(place, len(results["methods"])) for language in own]
        colour, marker = method_style(method, place)
        axis.plot(x, list(map(fmean, own.values())), marker, color=colour, ms=5, label=plain(method))
    language_axis(axis, languages)
    axis.set_ylabel("routing mass on task experts,\nmean over zone and tasks")
    from_zero([axis])
    axis.grid(axis="y", alpha=0.3)
    legend_below(figure, [axis])
    return figure


def in_zone(run: RunInputs, mass: Sequence[float]) -> Sequence[float]:
    """The mass in the layers of the alignment zone; in all layers when there is none."""
    return mass if run.zone is None else mass[run.zone.first : run.zone.last + 1]


def ci_gain_figure(run: RunInputs, results: Mapping[str, Any]) -> "Figure | None":
    found = {c["method"]: c for c in results["ci_gain"]["correlations"] if c["over"] == "base"}
    shown = [
        (f"{method}\n{correlation(found.get(method, {}))}", points)
        for method, points in by_method(results["ci_gain"]["points"]).items()
    ]
    return scatter(shown, "gain", "ci_share", "ci share, %", "gain over base, points") if shown else None


def by_method(points: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Points of ci share and gain, grouped by their method."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for point in points:
        found.setdefault(point["method"], []).append(point)
    return found


def transplant_figure(run: RunInputs, results: Mapping[str, Any]) -> "Figure | None":
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
    shown = list(by_method(points).items())
    x_label = "change by transplanted English routing, points"
    return scatter(shown, "gain_over_sft", "change", x_label, "gain over sft, points") if shown else None


def scatter(
    shown: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], y: str, x: str, x_label: str, y_label: str
) -> "Figure":
    """One panel for each method and one point for each task-language pair, coloured by task, named by
    language."""
    figure, axes = panels(len(shown), 4.4, 3.2, sharex=True, sharey=True)
    tasks = unique(point["task"] for _, points in shown for point in points)
    for axis, (title, points) in zip(axes, shown, strict=True):
        for place, task in enumerate(tasks):
            own = [point for point in points if point["task"] == task]
            across, up = [100 * p[x] for p in own], [100 * p[y] for p in own]
            axis.scatter(across, up, label=plain(task), **mark_style(place), s=22)
        axis.axhline(0, color="#888888", lw=0.8)
        axis.set(title=plain(title), xlabel=x_label, ylabel=y_label)
        axis.margins(0.08)  # room for the names
        axis.grid(alpha=0.3)
    legend_below(figure, axes)
    figure.draw_without_rendering()  # sets the common scale and size of the panels
    for axis, (_, points) in zip(axes, shown, strict=True):
        if len(points) <= 30:  # more names would cover each other
            name_points(axis, [(100 * p[x], 100 * p[y], plain(p["language"])) for p in points])
    return figure


def name_points(axis: "Axes", points: Sequence[tuple[float, float, str]]) -> None:
    """Write names beside points, each on the first side where it covers no mark and no earlier name."""
    scale = 72 / axis.figure.dpi  # pixels in typographic points
    marks = [scale * axis.transData.transform((x, y)) for x, y, _ in points]
    taken = [(x - 2.5, y - 2.5, x + 2.5, y + 2.5) for x, y in marks]
    for (across, up), (x, y, name) in zip(marks, points, strict=True):
        width = 4.8 * len(name)
        places = [(right, above) for right in (3, -3 - width) for above in (3, -9)]
        boxes = [
            (across + right, up + above, across + right + width, up + above + 7) for right, above in places
        ]
        free = [
            all(a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3] for b in taken) for a in boxes
        ]
        at = free.index(True) if any(free) else 0
        taken.append(boxes[at])
        axis.annotate(name, (x, y), xytext=places[at], textcoords="offset points", fontsize=7)


# --- before training ---


def divergence_figure(run: RunInputs, results: Mapping[str, Any]) -> "Figure | None":
    if not run.divergence:
        return None
    figure, (axis,) = panels(1, 7.5, 3.6)
    shade_zone(axis, run)
    for place, language in enumerate(unique(row.language for row in run.divergence)):
        rows = [row for row in run.divergence if row.language == language and row.divergence is not None]
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4, "label": plain(language)}
        line = LINES[place // len(COLOURS) % len(LINES)]
        axis.plot([row.moe_layer for row in rows], [row.divergence or 0.0 for row in rows], line, **style)
    whole_layers(axis)
    axis.set_ylabel(f"divergence from {plain(run.anchor)} routing\n(0: the same, 1: nothing in common)")
    from_zero([axis])
    axis.grid(axis="y", alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def gap_figure(run: RunInputs, results: Mapping[str, Any]) -> "Figure | None":
    gap = results.get("divergence_gap", {})
    rows, pairs = gap.get("layers", []), gap.get("pairs", [])
    if not any(row["r"] is not None for row in (*rows, *pairs)):
        return None
    figure, (axis,) = panels(1, 7.5, 3.2)
    shade_zone(axis, run)
    gap_curve(axis, rows, "black", "languages")
    gap_curve(axis, pairs, COLOURS[0], "tasks within languages")
    gap_axes(axis)
    return figure


def gap_curve(axis: "Axes", rows: Sequence[Mapping[str, Any]], colour: str, label: str) -> None:
    """Draw r of divergence and gap over the layers, with its interval, if it is known anywhere."""
    known = [row for row in rows if row["r"] is not None]
    if not known:
        return
    layers = [row["layer"] for row in known]
    low, high = ([row[end] for row in known] for end in ("low", "high"))
    axis.fill_between(layers, low, high, color=colour, alpha=0.15, lw=0)
    axis.plot(layers, [row["r"] for row in known], "o-", color=colour, ms=4, label=label)


def gap_axes(axis: "Axes") -> None:
    """The axes of `gap_curve`."""
    axis.axhline(0, color="#555555", lw=0.9)
    whole_layers(axis)
    axis.set_ylim(-1.05, 1.05)
    axis.set_ylabel("r of divergence and gap")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def taxonomy_figure(run: RunInputs, results: Mapping[str, Any]) -> "Figure | None":
    pairs = shown_pairs(run)
    if not pairs:
        return None
    tasks = unique(pair["task"] for pair in pairs)
    tallest = max(sum(pair["task"] == task for pair in pairs) for task in tasks)
    figure, axes = panels(len(tasks), 4.6, 0.8 + 0.27 * tallest)
    for axis, task in zip(axes, tasks, strict=True):
        own = [pair for pair in pairs if pair["task"] == task]
        left = [0.0] * len(own)
        for name, (meaning, colour, hatch) in CATEGORY_STYLE.items():
            shares = [100 * pair[name] / pair["n"] for pair in own]
            style: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.6}
            bars = axis.barh(range(len(own)), shares, left=left, label=meaning, **style)
            if name == "ci":
                box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
                texts = [f"{share:.0f}" if share >= 8 else "" for share in shares]
                for text in axis.bar_label(bars, texts, label_type="center", fontsize=7.5):
                    text.set_bbox(box if text.get_text() else None)
            left = [a + b for a, b in zip(left, shares, strict=True)]
        axis.set_yticks(range(len(own)), [f"{plain(pair['language'])}  n={pair['n']}" for pair in own])
        axis.invert_yaxis()
        axis.set(xlim=(0, 100), title=plain(task), xlabel="share of examples, %")
    legend_below(figure, axes)
    return figure


def shown_pairs(run: RunInputs) -> list[dict[str, Any]]:
    """The taxonomy of the evaluated split, or of the first split when that split was not scored."""
    pairs = [
        pair for pair in (run.taxonomy or {}).get("pairs", []) if pair["language"] != run.anchor and pair["n"]
    ]
    split = run.evaluated_split()
    if pairs and split not in {pair["split"] for pair in pairs}:
        split = pairs[0]["split"]
    return [pair for pair in pairs if pair["split"] == split]


def experts_figure(run: RunInputs, results: Mapping[str, Any]) -> "Figure | None":
    if run.experts is None:
        return None
    delta, chosen = run.experts.delta.float().numpy(), run.experts.expert_mask.bool().numpy()
    _, layers, count = delta.shape
    figure, axes = panels(len(run.experts.tasks), min(7.0, 2.2 + 0.14 * count), min(6.0, 1.5 + 0.2 * layers))
    limit = max(float(abs(delta).max()), 1e-6)
    for task, axis in enumerate(axes):
        image = axis.imshow(
            delta[task], cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
        )
        rows, columns = chosen[task].nonzero()
        size = max(4.0, 900 / max(count, 4 * layers))
        axis.scatter(columns, rows, s=size, marker="o", color="black", edgecolor="white", lw=0.6)
        if run.zone is not None:
            for edge in (run.zone.first - 0.5, run.zone.last + 0.5):
                axis.axhline(edge, color="black", lw=1, ls="--")
        title = f"{plain(run.experts.tasks[task])}: {int(chosen[task].sum())} chosen"
        axis.set(title=title, xlabel="expert (0-based)", ylabel=LAYER_AXIS)
        axis.locator_params(axis="y", integer=True)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("delta: top-k frequency on the task\nminus general English, per token")
    return figure


FIGURES: "dict[str, Callable[[RunInputs, Mapping[str, Any]], Figure | None]]" = {
    "accuracy": accuracy_figure,
    "mass_layers": mass_layers_figure,
    "mass_languages": mass_languages_figure,
    "ci_gain": ci_gain_figure,
    "transplant": transplant_figure,
    "taxonomy": taxonomy_figure,
    "divergence": divergence_figure,
    "gap": gap_figure,
    "experts": experts_figure,
}


def plot_all(run: RunInputs, results: Mapping[str, Any]) -> dict[str, Path]:
    """Draw every figure with inputs: name -> PNG. The old PNG of a figure without inputs is removed."""
    return save_all(
        run.root / "plots", {name: functools.partial(draw, run, results) for name, draw in FIGURES.items()}
    )


def save_all(folder: Path, figures: "Mapping[str, Callable[[], Figure | None]]") -> dict[str, Path]:
    """Draw and write each figure: name -> PNG. The old PNG of a figure without content is removed."""
    drawn: dict[str, Path] = {}
    for name, draw in figures.items():
        path = folder / f"{name}.png"
        with pyplot():
            figure = draw()
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            with atomic_write(path) as temporary:
                # The format is named because the temporary file's ending is not .png.
                figure.savefig(
                    temporary, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None}
                )
            drawn[name] = path
    return drawn
