"""The one exception whose text is meant for the user, and the note that tells a rank's launcher of it."""

import os
from pathlib import Path

NOTE_VARIABLE = "RAMOE_ERROR"  # environment variable: the file for the note, one for the ranks of a node


class RamoeError(ValueError):
    """Bad input: the text names the file, line or key, what was found, what was expected, and what to do.

    The command line and the jobs print the text without a traceback and exit with status 2.
    """


def note_error(text: str) -> bool:
    """Leave the text for this node's launcher, if there is one; False when another rank has left one."""
    path = os.environ.get(NOTE_VARIABLE)
    if path:
        try:
            with open(path, "x", encoding="utf-8", errors="backslashreplace") as note:
                note.write(text)
        except FileExistsError:
            return False
    return True


def error_noted() -> bool:
    """Whether a rank of this node has left a note: what fails after it follows from that error."""
    path = os.environ.get(NOTE_VARIABLE)
    return bool(path) and Path(str(path)).exists()
