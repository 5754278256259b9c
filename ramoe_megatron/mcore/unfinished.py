"""A training that ended early and on purpose (a signal, a time limit), and how its launcher learns of it.

Megatron leaves such a training with exit status 0, as it leaves a finished one. So the ranks write a note to the file that the launcher
names in their environment, and the launcher ends with a status of its own: the same command goes on from the checkpoint.
"""

import os
from pathlib import Path

STATUS = 75  # EX_TEMPFAIL of sysexits.h: not an error, try again
VARIABLE = "RAMOE_UNFINISHED"  # environment variable: the file for the note


def tell_unfinished(note: str) -> None:
    """Leave the note for this node's launcher, if there is one; print it on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(f"ramoe: {note}", flush=True)
    if os.environ.get("LOCAL_RANK", "0") == "0" and (path := os.environ.get(VARIABLE)):
        Path(path).write_text(note, encoding="utf-8")
