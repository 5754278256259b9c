"""The measurements as tables."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from rich.table import Table

from benchmarks.measure import Ratio

TIME, MEMORY, SPEED = 1.02, 1.01, 0.97
"""Target ratios: maximum step time and peak memory of the base shape, and minimum profiling speed."""


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
    """Step time, peak memory and operations of each arm, beside stock Megatron's.

    The operations are those of a step beyond stock Megatron's, divided by the aligned layers.
    """
    table = Table(
        title=f"Training, against stock Megatron (targets: time <= {TIME}, memory <= {MEMORY})",
        title_justify="left",
    )
    columns = (
        "layers aligned",
        "step, ms",
        "ratio [95 %]",
        f"<= {TIME}",
        "activations, MB",
        "ratio",
        "all, MB",
        "ratio",
        f"<= {MEMORY}",
        "operations a layer",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "layers aligned" else "right")
    for result in results:
        table.add_section()
        table.add_row(f"[bold]{result['shape']['name']}[/bold]")
        stock = next(iter(result["arms"].values()))
        for number, (label, arm) in enumerate(result["arms"].items()):
            ratio, held = Ratio(**arm["time"]), arm["bytes"]
            cells = [
                str(ratio),
                verdict(ratio, TIME, at_most=True),
                f"{held['activations'] / 1e6:.1f}",
                f"{arm['activations']:.4f}",
            ]
            cells += [f"{(held['step'] + held['between']) / 1e6:.1f}", f"{arm['whole']:.4f}"]
            cells += ["met" if max(arm["activations"], arm["whole"]) <= MEMORY else "missed"]
            more = arm["operations"] - stock["operations"]
            cells += [f"+{more / arm['aligned']:.0f}" if arm["aligned"] else ""]
            if number == 0:
                cells = ["1", "", cells[2], "1", cells[4], "1", "", ""]
            table.add_row(label, f"{1000 * median(arm['seconds']):.0f}", *cells)
    return table


def decoding_table(result: dict[str, Any]) -> Table:
    """CPU and wall seconds of each way to answer and to score choices, beside the cached one."""
    table = Table(title="Answers and choices of a converted model, on one thread", title_justify="left")
    for column in ("way", "CPU, s", "wall, s", "CPU, ratio", "same answers"):
        table.add_column(column, justify="left" if column == "way" else "right")
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
    """Speed of each pass relative to the bare one, and its kept bytes, by tokens per sequence."""
    title = f"Forward passes over a checkpoint, against a bare one (target: speed >= {SPEED})"
    table = Table(title=title, title_justify="left")
    for column in ("tokens", "pass", "tokens/s", "speed, ratio [95 %]", f">= {SPEED}", "kept, bytes"):
        table.add_column(column, justify="left" if column == "pass" else "right")
    for length in result["lengths"].values():
        table.add_section()
        for number, (label, arm) in enumerate(length["passes"].items()):
            ratio = Ratio(**arm["speed"])
            tokens = f"{length['sequences']} sequences, {length['tokens']}" if number == 0 else ""
            cells = [str(ratio), verdict(ratio, SPEED, at_most=False)] if number else ["1", ""]
            table.add_row(tokens, label, f"{arm['tokens_per_second']:.0f}", *cells, f"{arm['kept_bytes']:,}")
    return table
