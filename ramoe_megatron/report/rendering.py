"""The tables and phrases that `inspect` puts artefacts into; texts are shown as they are, never read as markup."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ramoe_megatron.artifacts.tensors import ModelShape
from ramoe_megatron.method.divergence import NoZone, Zone
from ramoe_megatron.statistics import wilson

LAYER_HEADS = ("MoE layer (from 0)", "layer_number")
"""Place among the MoE layers, and Megatron's own number (from 1)."""

NONE = "-"


def table(title: str, heads: Sequence[str], rows: Iterable[Sequence[object]], left: Sequence[str] = ()) -> Group:
    """A title and a table whose columns are numbers, right-justified, but those named in ``left``."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    for head in heads:
        name = head in ("task", "language", "method")  # a name that is folded cannot be read
        made.add_column(Text(head), justify="left" if head in left else "right", overflow="fold", no_wrap=name)
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    return Group(Text(title, style="bold"), made)  # not the table's own title, which folds at the table's width


def facts(title: object, kind: str, told: Mapping[str, object]) -> Group:
    """Names and values, one a line."""
    made = Table(show_header=False)
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in told.items():
        made.add_row(Text(name), Text(NONE if value is None else str(value)))
    return Group(Text(f"{title}: {kind}", style="bold"), made)


def interval(row: Mapping[str, Any], value: str, low: str = "", high: str = "", sign: str = "") -> str:
    """``46.2 [43.1, 49.3]`` in per cent or points from the named entries; a dash where there is no value."""
    if row.get(value) is None:
        return NONE
    text = f"{100 * row[value]:{sign}.1f}"
    ends = [row.get(low), row.get(high)]
    if None in ends:
        return text
    return text + " [" + ", ".join(f"{100 * end:{sign}.1f}" for end in ends if end is not None) + "]"


def share(correct: int, n: int) -> str:
    """A proportion in per cent with its Wilson interval; a dash when nothing was counted."""
    low, high = wilson(correct, n)
    return interval({"share": correct / n if n else None, "low": low, "high": high}, "share", "low", "high")


def number(value: float | None) -> str:
    """Three significant digits; a dash for None."""
    return NONE if value is None else f"{value:.3g}"


def shape(found: ModelShape) -> str:
    """The model's shape in a line."""
    return (
        f"{found.num_moe_layers} MoE layers, {found.num_experts} experts, top-{found.topk}, {found.score_function} "
        f"scores, hidden size {found.hidden_size}"
    )


def zone(found: Zone | NoZone, layer_numbers: Sequence[int]) -> str:
    """The zone in both numberings, or why there is none."""
    if isinstance(found, NoZone):
        return f"none ({found.reason})"
    return (
        f"MoE layers {found.first} to {found.last} (layer_number {layer_numbers[found.first]} to "
        f"{layer_numbers[found.last]}), {found.how}: {found.reason}"
    )


def data(entries: Iterable[Mapping[str, str]]) -> str:
    """The files read, with the start of their digests."""
    return "\n".join(f"{entry['path']} (sha256 {entry['sha256'][:12]}...)" for entry in entries) or NONE


def flat(entries: Mapping[str, Any]) -> str:
    """``a 1, b (c 2)``."""
    parts = []
    for name, value in entries.items():
        if isinstance(value, Mapping):
            parts.append(f"{name} ({flat(value)})")
        else:
            parts.append(f"{name.replace('_', ' ')} {number(value) if isinstance(value, float) else value}")
    return ", ".join(parts) or NONE


def mass(entries: Sequence[Mapping[str, Any]], keys: tuple[str, ...]) -> list[RenderableType]:
    """Routing mass by MoE layer, one row an entry; no table without entries."""
    if not entries:
        return []
    heads = (*keys, *(str(layer) for layer in range(len(entries[0]["mass"]))))
    rows = [[*("-" if e[k] is None else e[k] for k in keys), *(f"{m:.3f}" for m in e["mass"])] for e in entries]
    title = "routing mass on the task experts, by MoE layer (from 0; layer_number is in the expert file)"
    return [table(title, heads, rows, left=keys)]
