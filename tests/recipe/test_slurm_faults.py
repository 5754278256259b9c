"""slurm/*.sbatch on a real two-node Slurm: training jobs that are warned, killed or lose a node, and resume.

The law: whatever happens to a training, each iteration's loss equals that of one uninterrupted run, which one
agent of torchrun started with the same number of ranks.
"""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_cluster import NODES, SlurmCluster, environment_of, processes, wait_for
from slurm_world import INTERVAL, ITERATIONS, MORE, ROOT, START, settings
from small_run import aligned_flags

Losses = dict[int, dict[str, str]]


@pytest.fixture(scope="module")
def reference(slurm_world: Path) -> Losses:
    """The uninterrupted run: two ranks of one torchrun."""
    return losses(torchrun(slurm_world, "one-agent", "--standalone", "--nproc-per-node", "2")[0])


def submit(cluster: SlurmCluster, world: Path, name: str, *options: str) -> tuple[int, Path]:
    """Submit a fine-tune on both nodes. Returns the job and its output file."""
    words = [
        "--nodes=2",
        "--output",
        str(world / f"{name}-%j.out"),
        *options,
        str(ROOT / "slurm" / "finetune.sbatch"),
    ]
    job = cluster.sbatch(*words, *MORE, **settings(world, world / "run", NAME=name, RAMOE=world / "ramoe"))
    return job, world / f"{name}-{job}.out"


def torchrun(world: Path, name: str, *agents: str) -> list[str]:
    """Output of plain torchrun agents that train as `submit` does.

    Each string of `agents` that starts with --nnodes is one agent.
    """
    flags = aligned_flags(
        world, "--ramoe-layers", "1-2", "--train-iters", str(ITERATIONS), "--expert-model-parallel-size", "2"
    )
    each = [words.split() for words in agents] if agents[0].startswith("--nnodes") else [list(agents)]
    command = [sys.executable, "-m", "torch.distributed.run"]
    started = [
        subprocess.Popen(
            [*command, *words, "-m", "ramoe_megatron.jobs.finetune", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for words in each
    ]
    said = [process.communicate(timeout=300)[0] for process in started]
    assert not any(process.returncode for process in started), said[0][-3000:]
    return said


def losses(text: str) -> Losses:
    """Iteration -> the values in Megatron's line. A repeated iteration must have the same values.

    The second line of a process holds the mean losses of its first two iterations, because Megatron keeps the
    sum of the first one. After a restart, only the gradient norm of that line is compared.
    """
    found: Losses = {}
    for attempt in text.split(START):
        lines = re.findall(r" iteration\s+(\d+)/\s*\d+ \|(.*)", attempt)
        for place, (number, line) in enumerate(lines):
            names = (
                "grad norm"
                if place == 1 and lines[0][0] != "1"
                else "lm loss|routing_alignment_loss|grad norm"
            )
            for name, value in re.findall(rf"({names}): (\S+)", line):
                first = found.setdefault(int(number), {}).setdefault(name, value)
                assert value == first, f"iteration {number}: {name} was {first}, then {value}"
    return found


def assert_same(found: Losses, reference: Losses) -> None:
    """Check for the same iterations, each with the same gradient norm and, where logged, the same losses."""
    assert found.keys() == reference.keys()
    for number, figures in found.items():
        assert figures.items() <= reference[number].items(), (
            f"iteration {number}: {figures}, uninterrupted {reference[number]}"
        )
        assert "grad norm" in figures
    assert sum("lm loss" in figures for figures in found.values()) > len(reference) - 5


def at_iteration(path: Path, number: int, attempt: int = 1) -> Callable[[], bool]:
    """Whether the `attempt`th start of a job has printed iteration `number` or a later one."""

    def reached() -> bool:
        text = path.read_text(errors="replace") if path.exists() else ""
        parts = text.split(START)
        return len(parts) > attempt and any(
            int(found) >= number for found in re.findall(r" iteration\s+(\d+)/\s*\d+ \|", parts[attempt])
        )

    return reached


def ranks_of(job: int) -> list[int]:
    """Process ids of a job's ranks, by rank."""
    found = {}
    for process, command in processes():
        variables = environment_of(process)
        if f"SLURM_JOB_ID={job}" in variables and "ramoe_megatron.jobs.finetune" in command:
            rank = next((v.partition("=")[2] for v in variables if v.startswith("RANK=")), None)
            if rank is not None:
                found[int(rank)] = process
    return [found[rank] for rank in sorted(found)]


def test_two_agents_of_torchrun_train_as_one_does(slurm_world: Path, reference: Losses) -> None:
    assert sorted(reference) == list(range(1, ITERATIONS + 1))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = f"--nnodes=2 --nproc-per-node=1 --master-addr=127.0.0.1 --master-port={port} --node-rank="
    said = torchrun(slurm_world, "two-agents", common + "0", common + "1")
    assert_same(losses("".join(said)), reference)


@pytest.mark.slurm
def test_slurm_warns_by_its_clock_and_status_75_goes_back_into_the_queue(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    """What the scripts rely on: the warning reaches the tasks before the limit, but not the batch script.

    Only status 75 is run again.
    """
    task = 'trap "exit 75" USR1 TERM; if [[ ${SLURM_RESTART_COUNT:-0} == 1 ]]; then exit $THEN; fi; '
    task += "for _ in {1..600}; do sleep 0.1; done"
    script = tmp_path / "clock.sbatch"
    script.write_text(
        f"#!/bin/bash\nset -euo pipefail\nsource {ROOT}/slurm/common.sh\nramoe_run bash -c "
        f"{shlex.quote(task)}\n"
    )
    words = [
        "--nodes=2",
        "--time=1",
        "--signal=USR1@45",
        "--requeue",
        "--open-mode=append",
        f"--output={tmp_path}/%j.out",
        str(script),
    ]
    jobs = [cluster.sbatch(*words, THEN=status) for status in ("0", "3")]
    assert cluster.wait(*jobs) == ["COMPLETED", "FAILED"], [
        (tmp_path / f"{job}.out").read_text() for job in jobs
    ]
    assert [cluster.job(job)["Restarts"] for job in jobs] == ["1", "1"]
    unending = cluster.sbatch(*words, THEN="0", MAX_REQUEUES="0")
    assert cluster.wait(unending) == ["FAILED"]
    assert "unfinished after 0 restarts" in (tmp_path / f"{unending}.out").read_text()


@pytest.mark.slurm
def test_nodes_that_end_at_once_with_75_end_their_step_with_75(cluster: SlurmCluster, tmp_path: Path) -> None:
    """When the first node ends, Slurm terminates the others, and their 75 must not become 143."""
    code = """
import os, pathlib, signal, sys, time
import ramoe_megatron.recipe.job  # what makes leaving slow
from ramoe_megatron.recipe.processes import stop_signals
here = pathlib.Path(sys.argv[1]) / os.environ["SLURM_STEP_ID"]
try:
    with stop_signals():
        here.mkdir(exist_ok=True)
        (here / os.environ["SLURM_PROCID"]).touch()
        while len(list(here.iterdir())) < 3:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGUSR1)
except KeyboardInterrupt:
    sys.exit(75)
"""
    task = shlex.join([sys.executable, "-c", code, str(tmp_path)])
    script = tmp_path / "ends.sbatch"
    body = f"for _ in {{1..6}}; do status=0; ramoe_on_nodes {task} || status=$?; echo status $status; done"
    script.write_text(f"#!/bin/bash\nset -euo pipefail\nsource {ROOT}/slurm/common.sh\n{body}\n")
    job = cluster.sbatch("--nodes=3", f"--output={tmp_path}/out", str(script))
    assert cluster.wait(job) == ["COMPLETED"]
    assert re.findall(r"status (\d+)", (tmp_path / "out").read_text()) == ["75"] * 6


@pytest.mark.slurm
def test_a_warned_training_saves_goes_back_into_the_queue_and_survives_a_lost_node(
    cluster: SlurmCluster, slurm_world: Path, reference: Losses
) -> None:
    """A warning as before a time limit; then a node dies with its processes, and a spare node replaces it."""
    job, out = submit(cluster, slurm_world, "warned")
    wait_for(at_iteration(out, 3), 900, "the first iterations", cluster.log)
    cluster.call("scancel", "--signal=USR1", str(job))
    wait_for(
        lambda: cluster.job(job)["Restarts"] == "1",
        900,
        "the job's way back into the queue",
        lambda: out.read_text()[-3000:],
    )
    text = out.read_text()
    stopped = re.search(r"stopped after iteration (\d+) of 60", text)
    assert stopped, text[-3000:]
    assert int(stopped[1]) == max(losses(text)), "what was trained is saved, to the iteration"
    wait_for(at_iteration(out, int(stopped[1]) + 1, attempt=2), 900, "the second attempt", cluster.log)
    second = out.read_text().split(START)[2]
    assert min(losses(second)) == int(stopped[1]) + 1, "goes on with the next iteration"
    lost = NODES[1]
    assert cluster.job(job)["NodeList"] == "0x7f[000002-000003]"
    cluster.kill_node(lost)
    wait_for(lambda: cluster.job(job)["Restarts"] == "2", 900, "Slurm's notice of the lost node", cluster.log)
    assert cluster.wait(job) == ["COMPLETED"], out.read_text()[-3000:]
    assert lost not in cluster.call("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]), (
        "it ended on the spare node"
    )
    assert_same(losses(out.read_text()), reference)
    cluster.start_node(lost)


@pytest.mark.slurm
def test_killed_ranks_end_the_job_and_the_next_one_goes_on_from_the_last_whole_checkpoint(
    cluster: SlurmCluster, slurm_world: Path, reference: Losses
) -> None:
    job, out = submit(cluster, slurm_world, "killed")
    wait_for(at_iteration(out, INTERVAL + 3), 900, "an iteration after the first checkpoint", cluster.log)
    os.kill(ranks_of(job)[1], signal.SIGKILL)
    assert cluster.wait(job, seconds=60) == ["FAILED"], "at once, not at the collectives' time limit"
    text = out.read_text()

    job, out = submit(cluster, slurm_world, "killed")
    saved = slurm_world / "run/checkpoints/killed"
    tracker, half = saved / "latest_checkpointed_iteration.txt", saved / f"iter_{2 * INTERVAL:07d}"
    wait_for(at_iteration(out, INTERVAL + 2), 900, "an iteration after the first checkpoint", cluster.log)
    rank = ranks_of(job)[0]  # found beforehand: a save takes a tenth of a second
    deadline = time.monotonic() + 900
    while not half.exists() or not any(half.iterdir()):
        assert time.monotonic() < deadline, out.read_text()[-3000:]
        time.sleep(0.002)
    os.kill(rank, signal.SIGKILL)
    assert tracker.read_text().strip() == str(INTERVAL), "it was killed while it saved"
    assert cluster.wait(job, seconds=60) == ["FAILED"]
    assert tracker.read_text().strip() == str(INTERVAL), "the half checkpoint is not the latest"
    text += out.read_text()

    job, out = submit(cluster, slurm_world, "killed")
    assert cluster.wait(job) == ["COMPLETED"], out.read_text()[-3000:]
    assert min(losses(out.read_text())) == INTERVAL + 1
    assert_same(losses(text + out.read_text()), reference)
