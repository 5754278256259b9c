"""What the layout tests measured, by parallel layout: printed at the end of a test run."""

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from layout_rows import Row

_noted: list[tuple[str, str, float]] = []


def note(name: str, error: float) -> None:
    """A relative error of the router gradients of a row, at one of its layers."""
    from layout_rows import ROWS

    _noted.append((layout(ROWS[name]), name, error))


def taken() -> list[tuple[str, str, float]]:
    """Layout, row and error of what was noted since the last call."""
    found = list(_noted)
    _noted.clear()
    return found


def table(errors: Iterable[tuple[str, str, float]]) -> list[str]:
    """One line for each layout: rows compared, and the worst of them."""
    groups: dict[str, dict[str, float]] = {}
    for label, name, error in errors:
        rows = groups.setdefault(label, {})
        rows[name] = max(error, rows.get(name, 0.0))
    width = max(map(len, groups))
    return [
        f"{label:<{width}}  {len(rows):>3} rows  {max(rows.values()):.1e}"
        for label, rows in sorted(groups.items())
    ]


def layout(row: "Row") -> str:
    """Such as "TP 2 x CP 2, packed, recompute full"."""
    flags = dict(itertools.pairwise([*row.flags, ""]))
    sizes = {"TP": 1, "CP": 1, "PP": 1}
    for flag, short in (("tensor-model", "TP"), ("context", "CP"), ("pipeline-model", "PP")):
        sizes[short] = int(flags.get(f"--{flag}-parallel-size", 1))
    sizes["DP"] = row.ranks // (sizes["TP"] * sizes["CP"] * sizes["PP"])
    parts = [f"{short} {size}" for short, size in sizes.items() if size > 1]
    if "--num-virtual-stages-per-pipeline-rank" in flags:
        parts.append("VPP 2")
    if "--expert-model-parallel-size" in flags:
        parts.append("EP 2" + (", ETP 1" if "--expert-tensor-parallel-size" in flags else ""))
    label = " x ".join(parts) or "one rank"
    if "--use-distributed-optimizer" in flags:
        label += ", distributed optimizer"
    if flags.get("--moe-token-dispatcher-type"):
        label += f", {flags['--moe-token-dispatcher-type']}"
    if "--ramoe-pack" in flags:
        label += ", packed"
    if "--recompute-granularity" in flags:
        label += f", recompute {flags['--recompute-granularity']}"
    precision = next((name.removeprefix("--") for name in ("--bf16", "--fp16") if name in flags), "")
    return f"{label} ({precision})" if precision else label
