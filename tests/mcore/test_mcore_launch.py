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
        (
            "1",
            "from torch.distributed.checkpoint import CheckpointException as E; raise E('load', {})",
            1,
            "Traceback",
        ),
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


def test_what_the_checkpoint_writers_report_through_is_forked_and_lives_as_long_as_its_rank() -> None:
    """The queue of Megatron's checkpoint writers survives a SIGTERM to the group, and ends with its rank.

    Without our fork, the first save would spawn the queue.
    """
    code = """
import multiprocessing, os, signal, sys
from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue
from ramoe_megatron.mcore.launch import fork_writer_queue
signal.signal(signal.SIGTERM, lambda *_: None)  # as Megatron's --exit-signal-handler does
fork_writer_queue()
queue, (child,) = get_write_results_queue(), multiprocessing.active_children()
os.kill(child.pid, signal.SIGTERM)
queue.put({"a": 1})
print(queue.get(timeout=60), type(child).__name__, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    # its end: it holds the pipe that is read here to the last
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "{'a': 1} ForkProcess", done.stderr
