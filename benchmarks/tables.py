"""The measurements as tables."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from rich.table import Table

from benchmarks.measure import Ratio

TIME, MEMORY, SPEED = 1.02, 1.01, 0.97
"""Target ratios: most CPU time of a step, most peak memory of the base shape, least profiling speed."""
AT_MOST = 40
"""Target: operations of an aligned layer in a micro-batch."""


def machine_line(machine: dict[str, Any]) -> str:
    """The machine on one line."""
    device = machine["gpu"] or f"{machine['cores']} cores of {machine['cpu']}"
    versions = ", ".join(
        f"{name} {machine[name]}"
        for name in ("torch", "megatron-core", "transformer-engine")
        if machine[name]
    )
    return f"{device}; {machine['ranks']} rank(s) of {machine['threads']} thread(s); {versions}"


def verdict(ratio: Ratio, target: float, at_most: bool) -> str:
    """Whether the whole interval lies on one side of the target."""
    if ratio.high <= target if at_most else ratio.low >= target:
        return "met"
    return "missed" if (ratio.low > target if at_most else ratio.high < target) else "open"


def training_table(results: Sequence[dict[str, Any]]) -> Table:
    """Operations, CPU time and peak memory of each arm's step, beside stock Megatron's."""
    table = Table(
        title=f"Training, against stock Megatron (targets: CPU time <= {TIME}, memory <= {MEMORY})",
        title_justify="left",
        caption="operations and bytes are exact; wall time depends on what else runs on the machine",
    )
    columns = (
        "layers aligned",
        "operations",
        "more",
        "CPU, ms",
        "ratio [95 %]",
        f"<= {TIME}",
        "activations, MB",
        "ratio",
        "all, MB",
        "ratio",
        f"<= {MEMORY}",
        "wall, ms",
    )
    for column in columns:
        _add(table, column, words=column == "layers aligned")
    for result in results:
        table.add_section()
        table.add_row(f"[bold]{result['shape']['name']}[/bold]")
        stock = next(iter(result["arms"].values()))
        for number, (label, arm) in enumerate(result["arms"].items()):
            ratio, held = Ratio(**arm["cpu"]["ratio"]), arm["bytes"]
            cells = [f"{arm['operations']}", f"+{arm['operations'] - stock['operations']}"]
            cells += [milliseconds(arm["cpu"]), str(ratio), verdict(ratio, TIME, at_most=True)]
            cells += [f"{held['activations'] / 1e6:.1f}", f"{arm['activations']:.4f}"]
            cells += [f"{(held['step'] + held['between']) / 1e6:.1f}", f"{arm['whole']:.4f}"]
            cells += ["met" if max(arm["activations"], arm["whole"]) <= MEMORY else "missed"]
            if number == 0:
                cells = [cells[0], "", cells[2], "1", "", cells[5], "1", cells[7], "1", ""]
            table.add_row(label, *cells, milliseconds(arm["wall"]))
    return table


def operations_table(result: dict[str, Any]) -> Table:
    """Operations at the routers for each option: of one aligned layer, and of each micro-batch."""
    found = result["cases"]
    table = Table(
        title=f"Operations of alignment (target: a layer <= {AT_MOST})",
        title_justify="left",
        caption="forward and backward; the same on any machine",
    )
    for column in ("options", "of an aligned layer", f"<= {AT_MOST}", "of a micro-batch"):
        _add(table, column, words=column == "options")
    for options, counts in found.items():
        met = "met" if counts["layer"] <= AT_MOST else "missed"
        table.add_row(options, f"{counts['layer']}", met, f"{counts['once']}")
    return table


def decoding_table(result: dict[str, Any]) -> Table:
    """CPU and wall seconds of each way to answer and to score choices, beside the cached one."""
    table = Table(title="Answers and choices of a converted model, on one thread", title_justify="left")
    for column in ("way", "CPU, s", "wall, s", "CPU, ratio", "same answers"):
        _add(table, column, words=column == "way")
    for kind in ("answers", "choices"):
        table.add_section()
        first = None
        for way, rounds in result[kind].items():
            cpu, wall = (median(each) for each in zip(*rounds, strict=True))
            first = first or cpu
            same = result["equal"].get(way) if kind == "answers" else None
            cells = ["" if same is None else f"{same} of {result['task']['answers']}"]
            table.add_row(way, f"{cpu:.2f}", f"{wall:.2f}", f"{cpu / first:.2f}", *cells)
    table.add_section()
    for tokens, (cpu, wall) in result["growth"].items():
        table.add_row(f"cached, {tokens} tokens", f"{cpu:.2f}", f"{wall:.2f}", "", "")
    return table


def profiling_table(result: dict[str, Any]) -> Table:
    """Speed of each pass relative to the bare one, operations and bytes, by tokens per sequence."""
    title = f"Forward passes over a checkpoint, against a bare one (target: speed by CPU time >= {SPEED})"
    table = Table(title=title, title_justify="left")
    columns = ("tokens", "pass", "operations", "peak, MB", "kept, bytes", "tokens/s of CPU", "speed [95 %]")
    for column in (*columns, f">= {SPEED}", "wall, speed"):
        _add(table, column, words=column == "pass")
    for length in result["lengths"].values():
        table.add_section()
        for number, (label, arm) in enumerate(length["passes"].items()):
            ratio, wall = Ratio(**arm["cpu"]["ratio"]), Ratio(**arm["wall"]["ratio"])
            tokens = f"{length['sequences']} sequences, {length['tokens']}" if number == 0 else ""
            cells = [f"{arm['operations']}", f"{arm['peak_bytes'] / 1e6:.1f}", f"{arm['kept_bytes']:,}"]
            cells += [f"{length['tokens'] / median(arm['cpu']['seconds']):.0f}"]
            cells += (
                [str(ratio), verdict(ratio, SPEED, at_most=False), str(wall)] if number else ["1", "", ""]
            )
            table.add_row(tokens, label, *cells)
    return table


def _add(table: Table, column: str, words: bool) -> None:
    """Add a column of numbers, or of words, which are never broken."""
    table.add_column(column, justify="left" if words else "right", no_wrap=words)


def milliseconds(time: dict[str, Any]) -> str:
    """The median of the seconds of `time`."""
    return f"{1000 * median(time['seconds']):.0f}"
