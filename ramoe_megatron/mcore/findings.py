"""What is checked before a job runs, and what was found: the lines of `ramoe doctor`."""

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
ANSWER = "RAMOE-CHECK "  # what begins the line of `jobs.check` that holds its answer
WRITTEN = "written by stage "  # what begins the text about a file that is still to come
LONGEST = 400  # characters of a reason that is not ours
MEGATRON = re.compile(r".*/(?=megatron/(core|training)/)")  # what is before a file of Megatron's packages


@dataclass(frozen=True)
class Finding:
    """One check and its outcome."""

    check: str
    """What was looked at."""
    state: State
    """ok; warning: the job starts, but perhaps not as meant; fatal: the job would fail."""
    found: str
    advice: str = ""
    """What to do; empty where nothing is."""


@dataclass(frozen=True)
class Line:
    """A job's command line, to be checked."""

    name: str
    job: str
    flags: Sequence[str]
    ranks: int = 1
    """Ranks per node."""
    nodes: int = 1
    coming: Mapping[str, str] = field(default_factory=dict)
    """Files and folders that an earlier stage is going to write -> its name: nothing is said against their absence."""


def attempt(check: str, look: Callable[[], str], advice: str) -> Finding:
    """ok with what `look` tells, or fatal with the reason why it failed (a call to exit included) and the advice."""
    try:
        return Finding(check, "ok", look())
    except (Exception, SystemExit) as error:
        return Finding(check, "fatal", reason(error), advice)


def reason(error: BaseException) -> str:
    """An error in a line. Our own texts are whole. Other errors have their class, the file and line in
    Megatron, and the expression that failed with its values."""
    from ramoe_megatron.errors import RamoeError

    text = " ".join(str(error).split())
    if isinstance(error, RamoeError):
        return text
    frames = list(_frames(error.__traceback__))
    in_megatron = [frame for frame in frames if MEGATRON.search(frame[0].filename)]
    where = ""
    if in_megatron:
        summary, _ = in_megatron[-1]
        where = f" in {MEGATRON.sub('', summary.filename)}, line {summary.lineno}"
    failed = _failed_expression(*(in_megatron or frames)[-1]) if in_megatron or (frames and not text) else ""
    told = f"{text} ({failed})" if text and failed else text or failed
    return f"{type(error).__name__}{where}: {told[:LONGEST]}"


def _frames(trace: TracebackType | None) -> Iterator[tuple[traceback.FrameSummary, Mapping[str, object]]]:
    """The frames of a traceback, outermost first, each with its local names."""
    for summary, (frame, _) in zip(traceback.extract_tb(trace), traceback.walk_tb(trace), strict=False):
        yield summary, frame.f_locals


def _failed_expression(summary: traceback.FrameSummary, names: Mapping[str, object]) -> str:
    """The expression that a frame stopped in, and the numbers, booleans and texts that it reads. Empty for a `raise`."""
    first, last = summary.lineno or 0, summary.end_lineno or 0
    lines = [linecache.getline(summary.filename, line).encode() for line in range(first, last + 1)]
    if not lines or summary.colno is None:
        return ""
    lines[-1] = lines[-1][: summary.end_colno]
    code = " ".join(b"".join([lines[0][summary.colno :], *lines[1:]]).decode().split())
    try:
        (statement,) = ast.parse(code).body
    except (SyntaxError, ValueError):  # a piece of a longer statement
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
    told = ", ".join(f"{name} is {value!r}" for name, value in values.items())
    return ast.unparse(expression) + (f", where {told}" if told else "")
