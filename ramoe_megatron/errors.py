"""The exception for errors in the input, and the note that passes its text to the launcher of a rank."""

import os
from pathlib import Path

NOTE_VARIABLE = "RAMOE_ERROR"  # environment variable with the path of the note, shared by the ranks of a node


class RamoeError(ValueError):
    """Invalid input. The text names the file, line or key, what was found, what was expected, and what to do.

    The command line and the jobs print the text without a traceback and exit with status 2.
    """


def note_error(text: str) -> bool:
    """Write the note for the launcher of this node, if there is one; False if the note already exists."""
    path = os.environ.get(NOTE_VARIABLE)
    if path:
        try:
            with open(path, "x", encoding="utf-8", errors="backslashreplace") as note:
                note.write(text)
        except FileExistsError:
            return False
    return True


def error_noted() -> bool:
    """Whether a rank of this node has written the note. Later failures are consequences of that error."""
    path = os.environ.get(NOTE_VARIABLE)
    return bool(path) and Path(str(path)).exists()
