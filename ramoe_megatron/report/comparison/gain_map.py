"""A map of where alignment helps: comparisons of several worlds, by what is known before training.

A world is what the methods of one comparison share: the data, the model and the head start of the anchor
language. What alignment adds is always the difference of two methods that train on the same samples.
"""

import dataclasses
import functools
import itertools
import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ramoe_megatron.artifacts.files import atomic_write_text, load_document, package_version, save_document
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.report.comparison.study import Row, correct
from ramoe_megatron.report.plots import legend_below, mark_style, panels, plain, save_all
from ramoe_megatron.report.rendering import (
    Bullets,
    Code,
    Figure,
    PageSection,
    Part,
    Table,
    html_page,
    markdown,
)
from ramoe_megatron.report.vocabulary import (
    NONE,
    Record,
    correlation,
    count,
    direction,
    number,
    p_value,
    points,
    seeds_higher,
)
from ramoe_megatron.statistics import clustered_difference, correlation_entries

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

BANDS = (0.0, 0.1, 0.2, 0.3, 0.4, 1.0)
"""Limits of the bands of ci share, as shares. A band holds its lower limit."""
MAP_LIMITS = (
    "The interval over seeds is Student's t by the spread within base models. It covers new seeds for these "
    "base models, not a new base model.",
    "The interval of a band is clustered by base model, with one degree of freedom less than there are base "
    "models, and covers new base models of these worlds. A band with few base models has a wide interval, or "
    "none. The bands are not corrected for their number.",
    "Pairs of task and language with a large ci share are the ones with most room for any training. So read "
    "what alignment adds beside what training adds without it.",
)
CAPTION = (
    "What alignment adds to the same training without it, by the base model's ci share of the pair of task "
    "and language. Marks: mean over pairs in the band; bars: 95 % interval, clustered by base model."
)


def gain_map(comparisons: Mapping[str, Record], command: str = "") -> Row:
    """The contents of map.json.

    Args:
        comparisons: name of a world -> the contents of its comparison.json.
        command: the command line that makes the map, to be quoted.

    Raises:
        RamoeError: a comparison has no method that aligns beside one that trains alike without.
    """
    worlds, rows, cells = [], [], []
    for world, c in comparisons.items():
        if not c.get("added"):
            raise RamoeError(
                f"{world}: the comparison has no method that aligns beside one that trains on the same "
                "samples without, or an earlier version wrote it: add such a method, or run its `ramoe "
                "compare` again"
            )
        shown = ("base", "target_accuracy", "anchor_accuracy", "ci_share", "layers", "experts", "topk")
        worlds += [{"world": world, **{name: base[name] for name in shown}} for base in c["bases"]]
        from_base = {row["method"]: row["from_base"] for row in c["headline"]}
        anchor = {row["method"]: row["from_base"] for row in c["english"]}
        for row in sorted(c["added"], key=lambda row: -(row["examples"] or float("inf"))):
            changes = {
                "beside_from_base": from_base.get(row["beside"]),
                "anchor_from_base": anchor.get(row["method"]),
            }
            rows.append({"world": world, **row, "added": row["added"] and {**row["added"]}, **changes})
        cells += [{"world": world, **cell} for cell in _cells(c)]
    correct([row["added"] for row in rows if row["added"] is not None])
    methods = list(dict.fromkeys(row["method"] for row in rows))
    bands = [band for method in methods for band in _bands(cells, method)]
    correlations = []
    for method in methods:
        own = [cell for cell in cells if cell["method"] == method]
        shares, gains = ([cell[name] for cell in own] for name in ("ci_share", "added"))
        found = correlation_entries(shares, gains, [f"{cell['world']}/{cell['base']}" for cell in own])
        correlations.append({"method": method, **found})
    return {
        "package_version": package_version(),
        "command": command,
        "worlds": worlds,
        "rows": rows,
        "bands": bands,
        "correlations": correlations,
        "cells": cells,
    }


def _cells(c: Record) -> list[Row]:
    """What training and alignment add to each (method, base, task, language), means over its seeds."""
    shown = ("method", "base", "task", "language", "ci_share")
    found: dict[tuple[str, ...], Row] = {
        (point["method"], point["base"], point["task"], point["language"]): point
        for point in c["ci_gain"]["points"]
    }
    cells = []
    for row in c["added"]:
        for (method, *place), point in found.items():
            beside = found.get((row["beside"], *place))
            if method == row["method"] and beside is not None:
                before = beside["over_base"]
                changes = {"trained": before, "added": point["over_base"] - before}
                cells.append({**{name: point[name] for name in shown}, **changes})
    return cells


def _bands(cells: Iterable[Record], method: str) -> list[Row]:
    rows = []
    for low, high in itertools.pairwise(BANDS):
        clusters: dict[str, dict[str, list[float]]] = {
            "trained": defaultdict(list),
            "added": defaultdict(list),
        }
        for cell in cells:
            inside = low <= cell["ci_share"] < high or cell["ci_share"] == high == 1
            if cell["method"] == method and inside:
                for name, own in clusters.items():
                    own[f"{cell['world']}/{cell['base']}"].append(cell[name])
        if clusters["added"]:
            told = {name: dataclasses.asdict(clustered_difference(own)) for name, own in clusters.items()}
            rows.append({"method": method, "from": low, "to": high, "bases": len(clusters["added"]), **told})
    return rows


def write_map(files: Sequence[Path], out: Path, document: Path | None = None) -> Path:
    """Write map.json, map.html, map.md and map-plots/ under `out`; returns the page's path.

    Args:
        files: comparison.json files or their folders, one a world. The world's name is its folder's, or the
            file's stem if that is not comparison.
        document: a second place for the Markdown document, with its data beside it as .json.

    Raises:
        RamoeError: a file is missing or no comparison, two worlds have one name, or as `gain_map`.
    """
    comparisons: dict[str, Record] = {}
    for given in files:
        file = given / "comparison.json" if given.is_dir() else given
        name = file.stem if file.stem != "comparison" else file.resolve().parent.name
        if name in comparisons:
            raise RamoeError(f"{file}: found a second world named {name!r}: rename its folder or file")
        comparisons[name] = load_document(file, "ramoe-comparison")
    words = [str(file) if not file.is_absolute() else file.name for file in files]
    found = gain_map(comparisons, shlex.join(["ramoe", "map", *words]))
    for path in (out / "map.md", *([document] if document else [])):
        save_document(path.with_suffix(".json"), "ramoe-map", found)
        atomic_write_text(path, map_markdown(found, path.with_suffix(".json").name))
    plots = save_all(out / "map-plots", {"bands": functools.partial(bands_figure, found)})
    page = out / "map.html"
    atomic_write_text(page, html_page(TITLE, "map", map_findings(found), map_sections(found, plots=plots)))
    return page


# --- the document ---

TITLE = "Where alignment helps"


def map_markdown(m: Record, data: str) -> str:
    """The document as Markdown. `data` is the name of the file with the map's data."""
    findings = PageSection("findings", "What came out", [Bullets(map_findings(m))])
    return markdown(TITLE, [findings, *map_sections(m, data)])


def map_findings(m: Record) -> list[str]:
    """For each method, in which bands of ci share alignment adds something, and the correlation with it."""
    told = []
    correlations = {row["method"]: row for row in m["correlations"]}
    for method in correlations:
        clear = [
            f"{points(row['added'])} at {_band(row)} % ci"
            for row in m["bands"]
            if row["method"] == method and direction(row["added"]) in ("above", "below")
        ]
        worlds = [row for row in m["rows"] if row["method"] == method]
        up, down = (sum(direction(row["added"]) == side for row in worlds) for side in ("above", "below"))
        examples = f" ({_examples(worlds[0])} examples of each task)" if worlds[0]["examples"] else ""
        told.append(
            f"{method}{examples}: alignment adds accuracy in {up} of {count(len(worlds), 'world')} and takes "
            f"it in {down}, by the interval over seeds. By band of ci share: "
            f"{'; '.join(clear) or 'nothing is shown'}. ci share against what it adds: "
            f"{correlation(correlations[method])}."
        )
    return told


def map_sections(
    m: Record, data: str = "map.json", plots: Mapping[str, Path] | None = None
) -> list[PageSection]:
    """All sections in reading order, from the contents of map.json alone."""
    figure: list[Part] = [Figure(CAPTION, path) for path in (plots or {}).values()]
    made = f"By ramoe-megatron {m['package_version']}, from the comparisons alone. Every number is in {data}."
    return [
        PageSection("worlds", "The worlds, before fine-tuning", [_worlds_table(m)]),
        PageSection("added", "What alignment adds", [_added_table(m)]),
        PageSection("bands", "By ci share", [*figure, _bands_table(m)]),
        PageSection("made", "How this was made", [made, Code([m["command"]] if m["command"] else [])]),
        PageSection("limits", "Limits", [Bullets(MAP_LIMITS)]),
    ]


def _worlds_table(m: Record) -> Table:
    rows = []
    for row in m["worlds"]:
        target, anchor = row["target_accuracy"], row["anchor_accuracy"]
        lead = None if target is None or anchor is None else anchor - target
        shares = (
            number(None if x is None else 100 * x, ".1f") for x in (target, anchor, lead, row["ci_share"])
        )
        model = f"{row['layers']} x {row['experts']}, top-{row['topk']}" if row["layers"] else NONE
        rows.append((row["world"], row["base"], model, *shares))
    heads = ("world", "base model", "MoE layers x experts", "target right, %", "anchor right, %")
    return Table((*heads, "head start, points", "ci share, %"), rows, left=(0, 1, 2))


def _added_table(m: Record) -> Table:
    rows = []
    for row in m["rows"]:
        added = row["added"]
        names = (row["world"], row["method"], row["beside"], _examples(row))
        changes = (points(row["beside_from_base"]), points(added), points(added and added["by_example"]))
        tests = (p_value(added and added["p_holm"]), seeds_higher(added))
        rows.append((*names, *changes, *tests, points(row["anchor_from_base"])))
    heads: tuple[str, ...] = ("world", "method", "without alignment", "examples of each task")
    heads += ("training alone, points", "alignment adds, points", "over examples", "p, Holm")
    heads += ("seeds higher", "anchor language, points")
    note = (
        "Training alone: change from the base model of the method without alignment, in the target "
        "languages. Alignment adds: difference between the two methods, which train on the same samples; its "
        "interval is over seeds, and Holm's correction over all rows. Anchor language: change of the aligned "
        "method from the base model. Examples: ids of each task, in every target language."
    )
    return Table(heads, rows, left=(0, 1, 2), note=note)


def _bands_table(m: Record) -> Table:
    rows = [
        (
            *(row["method"], _band(row), row["added"]["n"], row["bases"]),
            *(points(row[name]) for name in ("trained", "added")),
            p_value(row["added"]["p"]),
        )
        for row in m["bands"]
    ]
    heads = ("method", "ci share, %", "pairs", "base models", "training alone, points")
    note = (
        "Pairs of task and language by the base model's ci share. Mean over pairs, with a "
        "95 % interval that is clustered by base model."
    )
    return Table((*heads, "alignment adds, points", "p"), rows, note=note)


def _examples(row: Record) -> str:
    return "all" if row["examples"] is None else str(row["examples"])


def _band(row: Record) -> str:
    return f"{100 * row['from']:.0f} to {100 * row['to']:.0f}"


def _end(row: Record, end: str) -> float:
    """An end of the interval, or the value itself without an interval."""
    return float(row["change"] if row[end] is None else row[end])


def bands_figure(m: Record) -> "Drawing | None":
    figure, (axis,) = panels(1, 7.5, 3.4)
    methods = list(dict.fromkeys(row["method"] for row in m["bands"]))
    for at, method in enumerate(methods):
        own = [row for row in m["bands"] if row["method"] == method]
        across = [BANDS.index(row["from"]) + 0.12 * (at - (len(methods) - 1) / 2) for row in own]
        up = [100 * row["added"]["change"] for row in own]
        ends = [
            [abs(100 * _end(row["added"], end) - y) for row, y in zip(own, up, strict=True)]
            for end in ("low", "high")
        ]
        axis.errorbar(across, up, yerr=ends, ls="", ms=5, lw=1.2, label=plain(method), **mark_style(at))
    axis.axhline(0, color="#555555", lw=0.9)
    limits = [_band({"from": low, "to": high}) for low, high in itertools.pairwise(BANDS)]
    axis.set_xticks(range(len(limits)), limits)
    axis.set(xlabel="ci share, %", ylabel="alignment adds, points")
    axis.grid(axis="y", alpha=0.3)
    legend_below(figure, [axis])
    return figure
