"""What a document is made of, whatever shows it: sections of sentences, tables of strings and named figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ramoe_megatron.report.tables import NONE, interval, number, p_text

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    columns: Sequence[str]
    """The first `names` are left-justified."""
    rows: Sequence[Sequence[str]]
    note: str = ""
    names: int = 1


@dataclass(frozen=True)
class Section:
    name: str
    title: str
    sentences: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[str] = ()
    absent: str = ""
    """What is said when every table is empty."""
    code: Sequence[str] = ()


def change(row: Row | None) -> str:
    """A difference with its interval, in points; a dash for None."""
    return NONE if row is None else interval(row, "change", "low", "high", signed=True)


def p_cells(row: Row | None, *names: str) -> list[str]:
    """A cell for each of the named p-values."""
    return [NONE if row is None else p_text(row[name]) for name in names]


def higher(row: Row | None) -> str:
    """`9 of 10`: pairs of base model and seed in which the difference lies above zero."""
    return NONE if row is None else f"{row['seeds_higher']} of {row['n']}"


def text(value: Any) -> str:
    """Anything as it is; a dash for None."""
    return NONE if value is None else str(value)


def mass_change(row: Row | None) -> str:
    """A difference of shares with its interval, not in points."""
    if row is None:
        return NONE
    ends = [] if row["low"] is None else [number(row[name], "+.4f") for name in ("low", "high")]
    return number(row["change"], "+.4f") + (f" [{', '.join(ends)}]" if ends else "")
