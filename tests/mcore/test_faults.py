"""The launcher and the log of a training without Slurm that saves on request, resumes, and then hangs."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm_cluster import environment_of, processes, wait_for
from small_run import ALONE, training_flags, write_world

from ramoe_megatron.recipe.output import relevant_lines

ITERATIONS = 400


class Training:
    """`ramoe finetune --ranks 2` in a process of its own."""

    def __init__(self, folder: Path, name: str, *more: str) -> None:
        flags = training_flags(
            folder, "--train-iters", str(ITERATIONS), "--expert-model-parallel-size", "2", *more, losses=ALONE
        )
        flags += [
            "--save",
            str(folder / "out"),
            "--load",
            str(folder / "out"),
            "--save-interval",
            "100",
            "--exit-signal-handler",
        ]
        self.log = folder / f"{name}.log"
        command = [sys.executable, "-m", "ramoe_megatron.cli", "finetune", "--ranks", "2", *flags]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def iterations(self) -> list[int]:
        return [int(number) for number in re.findall(r" iteration\s+(\d+)/", self.text)]

    def until_it_trains(self) -> None:
        wait_for(lambda: self.iterations() or self.process.poll() is not None, 120, "an iteration")
        assert self.process.poll() is None, self.text[-3000:]

    def rank(self, number: int) -> int:
        """Process id of a rank."""
        return next(
            process
            for process, command in processes()
            if "jobs.finetune" in command and {f"RANK={number}",
                                               "LOCAL_WORLD_SIZE=2"} <= environment_of(process)
            and str(self.log.parent) in command
        )  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


def test_a_terminated_training_saves_and_goes_on_and_a_hung_rank_is_named(world: Path) -> None:
    """SIGTERM to the launcher reaches the ranks, not torchrun.

    Then rank 1 is stopped, and the other rank waits `--distributed-timeout-minutes`.
    """
    first = Training(world, "first")
    first.until_it_trains()
    first.process.send_signal(signal.SIGTERM)
    assert first.process.wait(90) == 75
    done = max(first.iterations())
    assert 0 < done < 100, "before the first regular save"
    assert f"ramoe: unfinished: stopped after iteration {done} of {ITERATIONS}" in first.text
    assert (world / "out/latest_checkpointed_iteration.txt").read_text() == str(done)

    second = Training(world, "second", "--distributed-timeout-minutes", "1")
    second.until_it_trains()
    assert second.iterations()[0] == done + 1
    hung = second.rank(1)
    os.kill(hung, signal.SIGSTOP)
    started = time.monotonic()
    ended = second.process.poll
    wait_for(
        lambda: "there is no sign of" in second.text or ended() is not None,
        150,
        "the message",
        lambda: second.text[-3000:],
    )
    assert time.monotonic() - started > 50, "it waited for the configured minute"
    os.kill(hung, signal.SIGKILL)  # torchrun would give a stopped rank half a minute
    assert second.process.wait(60) not in (0, 75)
    told = "\n".join(relevant_lines(second.text.splitlines())[0])
    assert re.search(r"finetune: a collective failed on rank 0 .*no sign of rank 1 \(node 0\)", told), told
