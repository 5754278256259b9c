"""Findings of the checks before a job runs, which `ramoe doctor` prints."""

import ast
import linecache
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

State = Literal["ok", "warning", "fatal"]
STATES: tuple[State, ...] = ("ok", "warning", "fatal")  # from good to bad
ANSWER = "RAMOE-CHECK "  # prefix of the output line of `jobs.check` that holds the findings
WRITTEN = "written by stage "  # prefix of the finding about a file that is not written yet
LONGEST = 400  # maximum number of characters of an error text from another library
MEGATRON = re.compile(r".*/(?=megatron/(core|training)/)")  # the path in front of Megatron's packages


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    """Name of the check."""
    state: State
    """ok; warning (the job would run, but perhaps not as intended); or fatal (the job would fail)."""
    found: str
    advice: str = ""
    """What to do. Empty if there is nothing to do."""


@dataclass(frozen=True)
class Line:
    """A job's command line that is to be checked."""

    name: str
    job: str
    flags: Sequence[str]
    ranks: int = 1
    """Ranks per node."""
    nodes: int = 1
    coming: Mapping[str, str] = field(default_factory=dict)
    """File or folder that an earlier stage will write -> name of that stage. These files may be missing."""


def attempt(check: str, look: Callable[[], str], advice: str) -> Finding:
    """Run `look`. The finding is ok with the text that `look` returns, or fatal if it raises or exits."""
    try:
        return Finding(check, "ok", look())
    except (Exception, SystemExit) as error:
        return Finding(check, "fatal", reason(error), advice)


def reason(error: BaseException) -> str:
    """Describe an error in one line.

    A RamoeError keeps its whole text. Other errors are described by their text, the expression that failed
    with its values, and their class. An error in Megatron also has Megatron's file and line.
    """
    from ramoe_megatron.errors import RamoeError

    text = " ".join(str(error).split())
    if isinstance(error, RamoeError):
        return text
    frames = list(_frames(error.__traceback__))
    in_megatron = [frame for frame in frames if MEGATRON.search(frame[0].filename)]
    failed = _failed_expression(*(in_megatron or frames)[-1]) if in_megatron or (frames and not text) else ""
    detail = f"{text} ({failed})" if text and failed else text or failed
    name = type(error).__name__
    if not in_megatron:
        return f"{name}: {detail[:LONGEST]}"
    summary, _ = in_megatron[-1]
    # Last, because a table may cut the line short
    return f"{detail[:LONGEST]} ({name} in {MEGATRON.sub('', summary.filename)}, line {summary.lineno})"


def _frames(trace: TracebackType | None) -> Iterator[tuple[traceback.FrameSummary, Mapping[str, object]]]:
    """The frames of a traceback, outermost first, each with its local variables."""
    for summary, (frame, _) in zip(traceback.extract_tb(trace), traceback.walk_tb(trace), strict=False):
        yield summary, frame.f_locals


def _failed_expression(summary: traceback.FrameSummary, names: Mapping[str, object]) -> str:
    """The expression at which a frame stopped, with the numbers, booleans and strings that it reads.

    Empty when the frame stopped at a `raise`.
    """
    first, last = summary.lineno or 0, summary.end_lineno or 0
    lines = [linecache.getline(summary.filename, line).encode() for line in range(first, last + 1)]
    if not lines or summary.colno is None:
        return ""
    lines[-1] = lines[-1][: summary.end_colno]
    code = " ".join(b"".join([lines[0][summary.colno :], *lines[1:]]).decode().split())
    try:
        (statement,) = ast.parse(code).body
    except (SyntaxError, ValueError):  # a part of a longer statement
        return ""
    if not isinstance(statement, ast.Assert | ast.Expr):
        return ""
    expression = statement.test if isinstance(statement, ast.Assert) else statement.value
    values = {}
    for node in ast.walk(expression):
        found: object = node
        if isinstance(node, ast.Name):
            found = names.get(node.id, node)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found = getattr(names.get(node.value.id), node.attr, node)
        if found is None or isinstance(found, bool | int | float | str):
            values[ast.unparse(node)] = found
    listed = ", ".join(f"{name} is {value!r}" for name, value in values.items())
    return ast.unparse(expression) + (f", where {listed}" if listed else "")
