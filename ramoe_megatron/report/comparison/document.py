"""experiment.md: the comparison as a Markdown document."""

import re
from collections.abc import Sequence
from pathlib import Path

from ramoe_megatron.artifacts.files import atomic_write_text
from ramoe_megatron.report.comparison.findings import findings
from ramoe_megatron.report.comparison.view import sections
from ramoe_megatron.report.comparison.words import LIMITS, Comparison
from ramoe_megatron.report.sections import Section, Table
from ramoe_megatron.report.tables import label


def write_document(comparison: Comparison, path: Path) -> None:
    """Write the comparison as Markdown, whole or not at all."""
    atomic_write_text(path, document(comparison))


def title(c: Comparison) -> str:
    names = dict.fromkeys(base["recipe"] for base in c["bases"])
    return f"{label(c['main'])} and its controls against {label(c['reference'])}: {', '.join(names)}"


def document(c: Comparison) -> str:
    """The text: title, what came out, a section a table, how it was made, limits."""
    parts = [f"# {escape(title(c))}", "## What came out", *(f"- {escape(told)}" for told in findings(c)), ""]
    for section in sections(c):
        parts += _section(section)
    parts += ["## How this was made", _made(c), *code([c["command"]] if c["command"] else [])]
    parts += ["## Limits", *(f"- {escape(limit.format(reference=label(c['reference'])))}" for limit in LIMITS)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(f"\n{part}\n" if part.startswith("#") else part for part in parts)).lstrip("\n") + "\n"


def _made(c: Comparison) -> str:
    folders = ", ".join(base["base"] for base in c["bases"])
    return escape(
        f"By ramoe-megatron {c['package_version']}, from the run folders {folders}. Every figure and sentence comes from comparison.json, "
        "which is made of the folders' evaluations, taxonomy, prediction, expert file, manifest and logs; none is written by hand.\n"
    )


def _section(section: Section) -> list[str]:
    parts = [f"## {escape(section.title)}", *(f"{escape(told)}\n" for told in section.sentences)]
    for table in section.tables:
        parts += markdown(table) if table.rows else [f"{escape(section.absent)}\n"]
    return parts + code(section.code)


def markdown(table: Table) -> list[str]:
    """A table in GitHub's form, its note below."""
    rule = ["---" if place < table.names else "---:" for place in range(len(table.columns))]
    lines = [_line([escape(cell) for cell in table.columns]), _line(rule)]
    lines += [_line([escape(cell) for cell in row]) for row in table.rows]
    return ["\n".join(lines) + "\n", f"{escape(table.note)}\n" if table.note else ""]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def code(lines: Sequence[str]) -> list[str]:
    """A block of commands; nothing without any."""
    return ["```bash\n" + "\n".join(lines) + "\n```\n"] if lines else []


def escape(text: str) -> str:
    """Names from data are shown as they are: neither markup nor another column."""
    return re.sub(r"([\\|<*`])", r"\\\1", " ".join(str(text).split()))
