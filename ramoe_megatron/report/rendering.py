"""The parts of a report (text, tables, figures, code), and three ways to show them: console, page, Markdown.

Text from the data is shown literally and never read as markup.
"""

import base64
import datetime
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import jinja2
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from ramoe_megatron.artifacts.files import package_version
from ramoe_megatron.report.vocabulary import NONE, number

CellValue = str | int | float | None
DPI = 144
"""Dots per inch of the figures."""
NAME_WIDTH = 32
"""Columns of names up to this many characters are not folded, because folded names are hard to read."""


@dataclass(frozen=True)
class Table:
    kind: ClassVar[str] = "table"
    heads: Sequence[str]
    """Empty for a table of names and values."""
    rows: Sequence[Sequence[CellValue]]
    title: str = ""
    left: Sequence[int] = (0,)
    """Columns of words, left-justified. The others hold numbers."""
    note: str = ""
    """How to read the table, shown below it."""
    absent: str = ""
    """Text shown instead of a table without rows."""
    folded: bool = False
    """On a page, the table is shown when its title is clicked."""

    @property
    def cells(self) -> list[list[str]]:
        """The rows as text."""
        return [[_cell_text(value) for value in row] for row in self.rows]

    @property
    def long(self) -> list[int]:
        """Columns of words that may be folded."""
        return [place for place in self.left if any(len(row[place]) > NAME_WIDTH for row in self.cells)]


@dataclass(frozen=True)
class Bullets:
    kind: ClassVar[str] = "bullets"
    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    kind: ClassVar[str] = "code"
    lines: Sequence[str]


@dataclass(frozen=True)
class Figure:
    """A PNG, shown only on pages."""

    kind: ClassVar[str] = "figure"
    caption: str
    path: Path | None
    title: str = ""
    absent: str = ""

    @property
    def data(self) -> bytes:
        return self.path.read_bytes() if self.path is not None else b""

    @property
    def base64(self) -> str:
        return base64.b64encode(self.data).decode("ascii")

    @property
    def width(self) -> int:
        """Width in CSS pixels (96 per inch) at the size that the figure was drawn for.

        Bytes 16 to 20 of a PNG hold its width.
        """
        return int(struct.unpack(">I", self.data[16:20])[0] * 96 // DPI)


@dataclass(frozen=True)
class Links:
    """Links to other pages, shown only on pages."""

    kind: ClassVar[str] = "links"
    text: str
    targets: Mapping[str, str]
    """Shown name -> address relative to the page."""


Part = str | Table | Bullets | Code | Figure | Links
"""A string is a paragraph."""


@dataclass(frozen=True)
class PageSection:
    name: str
    title: str
    parts: Sequence[Part] = field(default_factory=list)


def facts_table(title: str, entries: Mapping[str, CellValue]) -> Table:
    """Names and values, one pair in each row."""
    return Table((), list(entries.items()), title, left=(0, 1))


def _cell_text(value: CellValue) -> str:
    return NONE if value is None else number(value) if isinstance(value, float) else str(value)


# --- console ---


def console(parts: Iterable[Part]) -> RenderableType:
    """The parts that a console can show, one below the other."""
    shown: list[RenderableType] = []
    for part in parts:
        if isinstance(part, str):
            shown.append(Text(part))
        elif isinstance(part, Table):
            shown.append(_console_table(part))
        elif isinstance(part, Bullets):
            shown += [Text(f"- {item}") for item in part.items]
        elif isinstance(part, Code):
            shown += [Text(line) for line in part.lines]
    return Group(*shown)


def console_sections(sections: Iterable[PageSection]) -> RenderableType:
    """Sections under their titles."""
    return Group(*(Group(Text(f"\n{s.title}", style="bold"), console(s.parts)) for s in sections))


def _console_table(table: Table) -> RenderableType:
    title = [Text(table.title, style="bold")] if table.title else []
    if not table.rows:
        return Group(*title, Text(table.absent or NONE))
    shown = RichTable(box=SIMPLE_HEAD, pad_edge=False, show_header=bool(table.heads))
    for place in range(len(table.rows[0])):
        words = place in table.left
        head = Text(table.heads[place]) if table.heads else ""
        fits = words and place not in table.long
        shown.add_column(head, justify="left" if words else "right", overflow="fold", no_wrap=fits)
    for row in table.cells:
        shown.add_row(*map(Text, row))
    return Group(*title, shown, *([Text(table.note)] if table.note else []))


# --- Markdown ---


def markdown(title: str, sections: Iterable[PageSection]) -> str:
    """A document in GitHub's Markdown."""
    blocks = [f"# {_escaped(title)}"]
    for section in sections:
        blocks += [f"## {_escaped(section.title)}", *map(_markdown_part, section.parts)]
    return "\n\n".join(filter(None, blocks)) + "\n"


def _markdown_part(part: Part) -> str:
    if isinstance(part, str):
        return _escaped(part)
    if isinstance(part, Bullets):
        return "\n".join(f"- {_escaped(item)}" for item in part.items)
    if isinstance(part, Code):
        return "```bash\n" + "\n".join(part.lines) + "\n```" if part.lines else ""
    if not isinstance(part, Table):
        return ""
    title = [f"### {_escaped(part.title)}"] if part.title else []
    if not part.rows:
        return "\n\n".join([*title, _escaped(part.absent)])
    rule = ["---" if place in part.left else "---:" for place in range(len(part.cells[0]))]
    lines = [part.heads or [""] * len(rule), *part.cells]
    rows = ["| " + " | ".join(map(_escaped, line)) + " |" for line in lines]
    shown = "\n".join([rows[0], f"| {' | '.join(rule)} |", *rows[1:]])
    return "\n\n".join([*title, shown, _escaped(part.note)]).rstrip()


def _escaped(text: str) -> str:
    """Escape text so that it is neither markup nor a new column."""
    return re.sub(r"([\\|<*`])", r"\\\1", " ".join(str(text).split()))


# --- page ---


def html_page(title: str, kind: str, summary: Sequence[str], sections: Sequence[PageSection]) -> str:
    """One self-contained page: figures are embedded, nothing is loaded from elsewhere, and text is escaped.

    `kind` is the kind of page, such as "report". `summary` holds sentences set apart at the top.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    values: dict[str, Any] = {"title": title, "kind": kind, "summary": summary, "sections": sections}
    made = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z")
    return environment.get_template("page.html").render(version=package_version(), made=made, **values)
