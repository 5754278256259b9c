"""Tells the launcher that a training ended early on purpose (a signal, a time limit).

Megatron ends such a training with exit status 0, like a finished training. So the ranks write a note to a
file that the launcher names in their environment, and the launcher exits with status 75. The same command
then continues from the checkpoint.
"""

import os
from pathlib import Path

STATUS = 75  # EX_TEMPFAIL of sysexits.h: not an error, try again
VARIABLE = "RAMOE_UNFINISHED"  # environment variable: the file for the note


def tell_unfinished(note: str) -> None:
    """Write the note for this node's launcher, if there is a launcher, and print it on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(f"ramoe: {note}", flush=True)
    if os.environ.get("LOCAL_RANK", "0") == "0" and (path := os.environ.get(VARIABLE)):
        Path(path).write_text(note, encoding="utf-8")
