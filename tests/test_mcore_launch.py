"""How a failed rank leaves: its error is told whichever rank met it, and its status is the job's."""

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore import launch
launch.GRACE_SECONDS = 0.0
atexit.register(print, "waited for others")
def main():
    {body}
launch.run_job(main)
"""


@pytest.mark.parametrize(
    ("rank", "body", "status", "told"),
    [
        ("0", "raise RamoeError('a.jsonl:3: no answer')", 2, "ramoe: error: a.jsonl:3: no answer\n"),
        ("3", "raise RamoeError('a.jsonl:3: no answer')", 2, "ramoe: error: (rank 3) a.jsonl:3: no answer\n"),
        ("1", "raise ValueError('x')", 1, "Traceback"),
        ("1", "from torch.distributed.checkpoint import CheckpointException as E; raise E('load', {})", 1, "Traceback"),
        ("1", "pass", 0, ""),
    ],
)
def test_every_rank_tells_its_error(rank: str, body: str, status: int, told: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM.format(body=body)]
    done = subprocess.run(command, env={"RANK": rank}, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    # a failed rank leaves at once: what Python does on its way out may wait for ranks that wait for it
    assert ("waited for others" in done.stdout) == (status == 0)
    assert done.stderr.endswith(told) if status == 2 else told in done.stderr
