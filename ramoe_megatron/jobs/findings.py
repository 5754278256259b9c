"""What is checked before a job runs, and what was found: the lines of `ramoe doctor`."""

import linecache
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

State = Literal["ok", "warning", "fatal"]
STATES: tuple[State, ...] = ("ok", "warning", "fatal")  # from good to bad
ANSWER = "RAMOE-CHECK "  # what begins the line of `jobs.check` that holds its answer
WRITTEN = "written by stage "  # what begins the text about a file that is still to come
LONGEST = 400  # characters of a reason that is not ours


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
    """An error in a line: our own texts whole; others by their class, and a bare assert by its source."""
    from ramoe_megatron.errors import RamoeError

    text = " ".join(str(error).split())
    if isinstance(error, RamoeError):
        return text
    if not text and (frames := traceback.extract_tb(error.__traceback__)):
        text = linecache.getline(frames[-1].filename, frames[-1].lineno or 0).strip()
    return f"{type(error).__name__}: {text}"[:LONGEST]
