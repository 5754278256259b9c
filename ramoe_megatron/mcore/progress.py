"""Progress lines of the jobs. `ramoe run` turns them into a progress bar."""

import json
from collections.abc import Callable

from ramoe_megatron.mcore.launch import is_rank_0

LONG = 10_000
"""Fewer rows of training data are read and tokenised in seconds, without progress lines."""


class ProgressLines:
    """Prints a job's progress on rank 0, or on any rank that works for its whole node."""

    def __init__(self, total: int, unit: str, on_any_rank: bool = False) -> None:
        self.done, self.total, self.unit = 0, total, unit
        self.on_any_rank = on_any_rank
        self.note = ""

    def __call__(self, count: int) -> None:
        """Add `count` finished units and print the progress."""
        self.done += count
        if self.on_any_rank or is_rank_0():
            line = {
                "done": min(self.done, self.total),
                "total": self.total,
                "unit": self.unit,
                "note": self.note,
            }
            print(f"RAMOE-PROGRESS {json.dumps(line)}", flush=True)


def progress_lines(total: int, unit: str) -> Callable[[int], None]:
    """The progress of a rank that reads or tokenises data for its node; silent for few rows."""
    return ProgressLines(total, unit, on_any_rank=True) if total > LONG else lambda count: None
