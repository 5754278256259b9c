"""Starting ranks, following them, and leaving none behind, with real processes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ramoe_megatron.cli import main
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.recipe.console import RunConsole
from ramoe_megatron.recipe.launcher import Place, launch, python_command, rank_environment
from ramoe_megatron.recipe.manifest import Manifest
from ramoe_megatron.recipe.nodes import Leader, follow
from ramoe_megatron.recipe.output import Progress, parse_progress, relevant_lines
from ramoe_megatron.recipe.stage import Stage
from ramoe_megatron.recipe.stages import _Runner

# "gloo": a real process group; "deaf": ranks that ignore TERM and have to be killed (no torch needed for
# that).
RANKS = """
import os, signal, sys, time
rank, folder, manner = os.environ["RANK"], sys.argv[1], sys.argv[2]
if manner == "gloo":
    import torch.distributed as dist
    dist.init_process_group("gloo")
    dist.barrier()
else:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(f"{folder}/rank{rank}", "w").write(str(os.getpid()))
time.sleep(120)
"""
# Runs a launch in a process of its own, as `ramoe` does, so that it can be interrupted from outside.
DRIVER = """
import os, signal, sys
from pathlib import Path
from ramoe_megatron.recipe.launcher import launch, python_command, rank_environment
from ramoe_megatron.recipe.processes import stop_signals
# A shell that runs the tests in the background would make them inherit an ignored SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
with stop_signals():
    command = python_command(("ranks", sys.argv[1], sys.argv[2]), 2)
    launch(command, rank_environment(2, os.environ), Path(sys.argv[1]) / "log", grace=2)
"""


def wait_for(condition: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize(("number", "manner"), [(signal.SIGINT, "gloo"), (signal.SIGTERM, "deaf")])
def test_an_interrupted_launch_leaves_no_rank_behind(
    tmp_path: Path, number: signal.Signals, manner: str
) -> None:
    """torchrun starts ranks in new sessions, so ending its process group does not end the ranks."""
    (tmp_path / "ranks.py").write_text(RANKS)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", DRIVER, str(tmp_path), manner]
    driver = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    written = [tmp_path / f"rank{rank}" for rank in range(2)]
    wait_for(lambda: all(path.exists() and path.read_text() for path in written))
    ranks = [int(path.read_text()) for path in written]
    assert all(map(alive, ranks))
    driver.send_signal(number)
    driver.communicate(timeout=40)
    assert not any(map(alive, ranks))
    assert driver.returncode != 0


def test_processes_that_outlive_an_ordinary_end_are_ended(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; "
        "time.sleep(60)'], start_new_session=True); print(p.pid, flush=True)"
    )
    outcome = launch([sys.executable, "-c", code], os.environ, tmp_path / "log", grace=5)
    assert outcome.status == 0
    assert outcome.seconds < 30, "the orphan held the pipe open"
    assert not alive(int(outcome.last_lines[-1]))


def test_output_is_logged_in_full_and_progress_is_followed(tmp_path: Path) -> None:
    told = {"done": 3, "total": 7, "unit": "examples", "note": "es"}
    code = f"""
import json, sys
print("one")
print("RAMOE-PROGRESS " + json.dumps({told!r}))
print("two", file=sys.stderr)
sys.stdout.write("no newline at the end")
sys.exit(3)
"""
    seen: list[Progress] = []
    for _ in range(2):
        outcome = launch([sys.executable, "-c", code], os.environ, tmp_path / "logs" / "log", seen.append)
    assert outcome.status == 3
    assert seen == [Progress(3, 7, "examples", "es")] * 2
    text = (tmp_path / "logs" / "log").read_text()
    assert text.count("===") == 2, "a second attempt is appended under a header of its own"
    assert text.count("two") == 2 * 2  # once printed, once in the header's command
    assert outcome.last_lines[-1] == "no newline at the end"


ALONE = """
import sys
import torch.distributed as dist
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore import launch
launch.GRACE_SECONDS = 0.0
def main():
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise RamoeError("a.jsonl, line 3: no answer") if sys.argv[1] == "ours" else ValueError("a bug")
    dist.barrier()
launch.run_job(main)
"""


def test_an_error_that_one_rank_meets_alone_is_all_that_is_told_and_a_bug_is_told_in_full(
    tmp_path: Path,
) -> None:
    """The other rank's collective fails too, and torchrun alone would add a summary and exit with 1."""
    (tmp_path / "alone.py").write_text(ALONE)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    outcomes = {
        kind: launch(python_command(("alone", kind), 2), rank_environment(2, environment), tmp_path / kind)
        for kind in ("ours", "bug")
    }
    said = [
        line
        for line in outcomes["ours"].last_lines
        if "Warning" not in line and line.strip() and "warnings.warn" not in line
    ]
    assert outcomes["ours"].status == 2, said
    assert [line for line in said if "Gloo connected" not in line] == [
        "ramoe: error: (rank 1) a.jsonl, line 3: no answer"
    ]
    assert outcomes["bug"].status == 1
    text = "\n".join(outcomes["bug"].last_lines)
    assert "ValueError: a bug" in text
    assert "ChildFailedError" in text


def test_an_example_that_does_not_fit_ends_a_fine_tune_in_one_line(tmp_path: Path) -> None:
    from small_run import training_flags, write_world

    write_world(tmp_path)
    flags = training_flags(tmp_path, "--seq-length", "16")
    command = [sys.executable, "-m", "ramoe_megatron.cli", "finetune", "--ranks", "2", *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("ramoe: error:")]
    assert len(lines) == 1
    assert "examples are longer than --seq-length 16" in lines[0]
    for word in ("Traceback", "exitcode", "ChildFailedError", "building GPT model", "number of parameters"):
        assert word not in done.stderr + done.stdout, word


@given(
    st.integers(0, 10**6),
    st.integers(1, 10**6),
    st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), max_size=8),
)
def test_progress_lines_are_read_wherever_they_stand(done: int, total: int, note: str) -> None:
    line = "[default0]: RAMOE-PROGRESS " + json.dumps(
        {"done": done, "total": total, "unit": "rows", "note": note}
    )
    assert parse_progress(line) == Progress(done, total, "rows", note)
    assert parse_progress(line[:-1]) is None


def test_megatrons_iteration_line_is_progress() -> None:
    line = (
        " [2026-01-01 10:00:00.000000] iteration        5/     200 | consumed samples: "
        "          40 | elapsed time per iteration (ms): 311.2 | learning rate: "
        "1.000000E-03 | global batch size:     8 | lm loss: 3.141593E+00 | routing_alignment_loss: "
        "2.500000E-02 | loss scale: 1.0 | number of skipped iterations:   0 |"
    )
    expected = Progress(5, 200, "iterations", "lm loss 3.142, routing alignment loss 0.025")
    assert parse_progress(line) == expected
    assert parse_progress("validation loss at iteration 5 | lm loss value: 3.0") is None


def test_a_ramoe_error_is_what_is_told_of_a_failure() -> None:
    lines = [
        "Traceback (most recent call last):",
        "ramoe: error: data.jsonl:3: no answer",
        "  first five: a b",
        "RuntimeError: connection reset by peer",
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:",
    ]
    assert relevant_lines(lines) == (["data.jsonl:3: no answer", "  first five: a b"], True)


def test_without_one_it_is_the_exceptions_or_else_the_last_lines() -> None:
    noise = [
        "E1122 13:36 site-packages/torch/distributed/elastic/multiprocessing/api.py:1002] failed "
        "(exitcode: 1)",
        "Traceback (most recent call last):",
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ",
        "  exitcode  : 1 (pid: 3)",
    ]
    raised = ["[rank1]: ValueError: bad shape", "[rank0]: ValueError: bad shape"]
    assert relevant_lines(["start", *raised, *noise]) == (["ValueError: bad shape"], False)
    bare = ["[rank0]:     assert self.lr_warmup_steps < self.lr_decay_steps", "[rank0]: AssertionError"]
    told = "AssertionError at: assert self.lr_warmup_steps < self.lr_decay_steps"
    assert relevant_lines(["start", *bare, *noise]) == ([told], False)
    refused = "predict.py: error: unrecognized arguments: --x"
    assert relevant_lines(["usage: predict.py [-h]", refused, *noise]) == ([refused], False)
    assert relevant_lines(["start", "killed by the kernel", *noise]) == (
        ["start", "killed by the kernel"],
        False,
    )


def test_the_reason_may_stand_in_the_output_of_another_node() -> None:
    """Node 0 is ended once another node has failed, often before its own ranks raise."""
    here, there = ["start", "warnings.warn("], ["start", "[rank1]: ValueError: bad shape"]
    assert relevant_lines(here, ["start"], there) == (["ValueError: bad shape"], False)
    assert relevant_lines(there, ["ramoe: error: other"]) == (["ValueError: bad shape"], False)
    assert relevant_lines(here, ["start"]) == (here, False)


def test_of_a_killed_rank_the_signal_is_told_but_not_that_of_those_which_torchrun_ended_after_it() -> None:
    summary = [
        "E1122 13:36 site-packages/torch/distributed/elastic/multiprocessing/api.py:1002] failed "
        "(exitcode: -9)",
        "Failures:",
        "[1]:",
        "  rank      : 0 (local_rank: 0)",
        "  exitcode  : -15 (pid: 8)",
        "  traceback : Signal 15 (SIGTERM) received by PID 8",
        "-----",
        "Root Cause (first observed failure):",
        "[0]:",
        "  rank      : 1 (local_rank: 1)",
        "  exitcode  : -9 (pid: 9)",
        "  traceback : Signal 9 (SIGKILL) received by PID 9",
    ]
    told = ["RuntimeError: Connection closed by peer", "rank 1 was ended by SIGKILL"]
    assert relevant_lines(["[rank0]: RuntimeError: Connection closed by peer", *summary]) == (told, False)


def test_an_agent_whose_ranks_ended_early_does_not_wait_for_other_nodes(tmp_path: Path) -> None:
    """No signal came here: it reached the ranks of another node, and all ranks have saved and ended."""
    rank = "from ramoe_megatron.mcore.unfinished import tell_unfinished; tell_unfinished('stopped early')"
    agent = (
        "import os, pathlib, subprocess, sys, time\n"
        f"rank = [sys.executable, '-c', {rank!r}]\n"
        "subprocess.run(rank, env=os.environ | {'LOCAL_RANK': '0'}, check=True)\n"
        "time.sleep(60)\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
    )
    waited = tmp_path / "waited"
    outcome = launch([sys.executable, "-c", agent, str(waited)], dict(os.environ), tmp_path / "log")
    assert (outcome.status, outcome.unfinished) == (75, "stopped early")
    assert not waited.exists()


def test_cores_are_shared_out_and_what_the_user_set_stays() -> None:
    cores = len(os.sched_getaffinity(0))
    assert rank_environment(cores, {})["OMP_NUM_THREADS"] == "1"
    assert rank_environment(1, {})["OMP_NUM_THREADS"] == str(cores)
    assert rank_environment(10 * cores, {})["OMP_NUM_THREADS"] == "1"
    assert rank_environment(2, {"OMP_NUM_THREADS": "7", "X": "y"})["OMP_NUM_THREADS"] == "7"
    assert rank_environment(1, {"SLURM_CPUS_ON_NODE": "1"})["OMP_NUM_THREADS"] == "1"
    assert rank_environment(1, {"SLURM_CPUS_ON_NODE": str(10 * cores)})["OMP_NUM_THREADS"] == str(cores)


def test_a_node_is_known_by_its_environment_and_its_absence_is_told() -> None:
    assert Place.from_environment(1, {"NODE_RANK": "5"}) == Place()
    found = Place.from_environment(2, {"SLURM_NODEID": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "4000"})
    assert found == Place(1, 2, "n1", 4000)
    command = python_command(("module", "--x"), 4, found)
    assert "--standalone" not in command
    assert command[command.index("--node-rank") + 1] == "1"
    for environment in (
        {},
        {"NODE_RANK": "1"},
        {"NODE_RANK": "2", "MASTER_ADDR": "n1"},
        {"MASTER_ADDR": "n1"},
    ):
        with pytest.raises(RamoeError, match="node"):
            Place.from_environment(2, environment)


NODE = """
import os, sys
from pathlib import Path
from ramoe_megatron.recipe.launcher import Place, launch, python_command, rank_environment
from ramoe_megatron.recipe.nodes import Leader, follow
from ramoe_megatron.recipe.stage import Stage
place, folder = Place.from_environment(2, os.environ), Path(sys.argv[1])
if place.node > 0:
    follow(place, folder, patience=30)
else:
    with Leader(place, patience=30) as leader:
        for name in ("one", "two"):
            stage = Stage(name, ("job", str(folder / name)), {}, ranks=1)
            leader.announce(stage)
            outcome = launch(python_command(stage.command, 1, place), rank_environment(1, os.environ),
                             folder / stage.log, while_running=leader.watch)
            assert outcome.status == 0, outcome.last_lines
"""
JOB = """
import os, sys
open(f"{sys.argv[1]}-{os.environ['RANK']}", "w").write(os.environ["WORLD_SIZE"])
"""


def free_port_pair() -> int:
    while True:
        with socket.create_server(("", 0)) as first:
            port = first.getsockname()[1]
            try:
                with socket.create_server(("", port + 1)):
                    return port
            except OSError:
                continue


def test_two_nodes_run_each_stage_together(tmp_path: Path) -> None:
    """Two processes act as two nodes. torchrun numbers the ranks of both together in every stage."""
    (tmp_path / "job.py").write_text(JOB)
    port = free_port_pair()
    common = {**os.environ, "PYTHONPATH": str(tmp_path), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    nodes = [
        subprocess.Popen(
            [sys.executable, "-c", NODE, str(tmp_path)],
            env={**common, "NODE_RANK": str(node)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in (1, 0)
    ]
    for node in nodes:
        _, errors = node.communicate(timeout=90)
        assert node.returncode == 0, errors
    assert {path.name: path.read_text() for path in tmp_path.glob("*-[01]")} == dict.fromkeys(
        ["one-0", "one-1", "two-0", "two-1"], "2"
    )


@pytest.mark.parametrize("offset", [0, 1])  # where the ranks meet, and where the nodes of a recipe do
def test_a_port_that_is_taken_is_told_before_anything_starts(tmp_path: Path, offset: int) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        place = Place(0, 2, "n0", port - offset)
        told = f"port {port} of n0, .*Set MASTER_PORT to another number"
        with pytest.raises(RamoeError, match=told), Leader(place, patience=0.01):
            pass
        if offset == 0:
            environment = {"NODE_RANK": "0", "MASTER_ADDR": "n0", "MASTER_PORT": str(port)}
            result = CliRunner(env=environment).invoke(
                main, ["finetune", "--nodes", "2", "--", "--num-layers", "2"]
            )
            assert result.exit_code == 2
            assert re.match(f"ramoe: error: {told}", result.stderr)
            stage = Stage("a", ("job", "--x"), {}, ranks=1)
            runner = _Runner(
                [stage], Manifest(tmp_path, "r"), RunConsole(Console(), 1), place, None, None, 1, None
            )
            with pytest.raises(RamoeError, match=told):
                runner.run(1, stage)
        for other in (Place(1, 2, "n0", port), Place(0, 1, "n0", port)):
            other.refuse_taken(0, 1)


def test_a_node_that_meets_another_program_is_told(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as server, ThreadPoolExecutor() as pool:
        pool.submit(lambda: server.accept()[0].sendall(b"SSH-2.0\r\n"))
        port = server.getsockname()[1] - 1
        with pytest.raises(RamoeError, match=f"port {port + 1} of localhost.*another program answers there"):
            follow(Place(1, 2, "localhost", port), tmp_path, patience=5)
