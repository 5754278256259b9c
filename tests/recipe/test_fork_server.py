"""A forked stage equals one that torchrun starts: its environment, its end, its leftovers and its bytes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from slurm_cluster import wait_for
from small_run import training_flags, write_world

from ramoe_megatron.recipe.fork_server import ForkServer
from ramoe_megatron.recipe.launcher import Outcome, launch, python_command, rank_environment
from ramoe_megatron.recipe.output import relevant_lines

JOB = """
import json, multiprocessing, os, signal, subprocess, sys, time
from pathlib import Path
folder, manner = Path(sys.argv[1]), sys.argv[2]
rank = int(os.environ["RANK"])
def told():
    import random, resource, numpy, torch
    return {
        "argv": sys.argv[1:], "name": __name__, "folder": os.getcwd(), "path": sys.path[0],
        "stdin": sys.stdin.read(), "threads": torch.get_num_threads(),
        "variable": os.environ.get("OF_THIS_STAGE"), "ranks": os.environ["WORLD_SIZE"],
        "spawned as": sys.modules["__main__"].__spec__.name,
        "term": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
        "int": signal.getsignal(signal.SIGINT) == signal.default_int_handler,
        "child": signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL,
        "compiler": "torch._inductor" in sys.modules,
    }, {
        "draws": [random.random(), float(numpy.random.rand()), float(torch.rand(1))],
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
def spawned(queue):
    queue.put(os.environ["RANK"])
if __name__ == "__main__":
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    while not all((folder / f"pid{other}").exists() for other in (0, 1)):  # a test looks at both
        time.sleep(0.01)
    if manner == "tell":
        import atexit, torch
        from ramoe_megatron.mcore import router
        torch.distributed.init_process_group("gloo")
        rows = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(rows, os.environ["LOCAL_RANK"])
        queue = multiprocessing.get_context("spawn").Queue()
        child = multiprocessing.get_context("spawn").Process(target=spawned, args=(queue,))
        child.start()
        same, own = told()
        same |= {"rows": rows, "child's": queue.get()}
        (folder / f"told{rank}.json").write_text(json.dumps([same, own]))
        atexit.register(print, "left in order")
        torch.distributed.destroy_process_group()
    elif manner == "fail" and rank == 1:
        sys.exit("ramoe: error: rows.jsonl:3: no answer" if len(sys.argv) == 3 else int(sys.argv[3]))
    elif manner == "raise" and rank == 0:
        raise ValueError("bad shape")
    elif manner == "kill" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    elif manner == "leave":
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            (folder / f"pid{rank}").write_text(str(os.getpid()))
            time.sleep(100)
        while (folder / f"pid{rank}").read_text() == str(os.getpid()):
            time.sleep(0.01)
    elif manner == "save":
        from ramoe_megatron.mcore.unfinished import tell_unfinished
        def save(*_):
            tell_unfinished("unfinished: stopped after iteration 3")
            sys.exit(0)
        signal.signal(signal.SIGTERM, save)
        print("ready", flush=True)
        time.sleep(100)
    else:
        print("waits", flush=True)
        time.sleep(100)
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    (folder / "forked_job.py").write_text(JOB)
    return folder


@pytest.fixture(scope="module")
def environment(code: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(code), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer() as server:
        yield server


def run(
    server: ForkServer | None, environment: dict[str, str], folder: Path, *words: str, **more: object
) -> Outcome:
    """Run the job above on two ranks: forked, or by torchrun without a server."""
    folder.mkdir(exist_ok=True)
    command = ("forked_job", str(folder), *words)
    fork = partial(server.start, command, 2) if server else None
    return launch(
        python_command(command, 2),
        rank_environment(2, environment),
        folder / "log",
        fork=fork,
        grace=2,
        **more,
    )  # type: ignore[arg-type]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def pids(folder: Path) -> list[int]:
    return [int((folder / f"pid{rank}").read_text()) for rank in (0, 1)]


def test_a_forked_rank_finds_what_torchrun_gives_it(
    server: ForkServer, environment: dict[str, str], tmp_path: Path
) -> None:
    """Except for the threads: a second stage asks for another number than the first, and gets it."""
    assert run(server, environment, tmp_path / "first", "tell").status == 0
    given = environment | {"OMP_NUM_THREADS": "2", "OF_THIS_STAGE": "here"}
    forked, fresh = tmp_path / "forked", tmp_path / "fresh"
    outcomes = [run(made, given, folder, "tell") for made, folder in ((server, forked), (None, fresh))]
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes
    for rank in (0, 1):
        (same, own), (expected, others) = (
            json.loads((folder / f"told{rank}.json").read_text()) for folder in (forked, fresh)
        )
        assert same.pop("argv") == [str(forked), "tell"]
        assert expected.pop("argv") == [str(fresh), "tell"]
        assert same == expected
        assert not same["compiler"], "an import that takes as long as the rest of Megatron"
        assert (same["threads"], same["rows"], same["child's"]) == (2, ["0", "1"], str(rank))
        assert own["memory"] < 1.5 * others["memory"]
    first = json.loads((tmp_path / "first/told0.json").read_text())
    assert first[0]["threads"] == 1
    assert not set(first[1]["draws"]) & set(json.loads((forked / "told0.json").read_text())[1]["draws"]), (
        "each has its own seeds"
    )
    for folder, outcome in zip((forked, fresh), outcomes, strict=True):
        assert outcome.last_lines.count("left in order") == 2
        header = (folder / "log").read_text().splitlines()[0]
        assert (
            "-m ramoe_megatron.recipe.torchrun --standalone --nnodes 1 --nproc-per-node 2 "
            f"-m forked_job {folder} tell" in header
        )


@pytest.mark.parametrize(
    ("words", "status", "told", "mendable"),
    [
        (("fail",), 1, "rows.jsonl:3: no answer", True),
        (("fail", "2"), 2, "", False),
        (("raise",), 1, "ValueError: bad shape", False),
        (("kill",), 128 + signal.SIGKILL, "ramoe: rank 1 was ended by SIGKILL", False),
    ],
)
def test_a_rank_that_fails_ends_the_others_and_gives_its_status(
    server: ForkServer,
    environment: dict[str, str],
    tmp_path: Path,
    words: tuple[str, ...],
    status: int,
    told: str,
    mendable: bool,
) -> None:
    outcome = run(server, environment, tmp_path, *words)
    assert outcome.status == status
    text, found = relevant_lines(outcome.last_lines)
    assert found == mendable
    assert told in "\n".join(text)  # the other rank may write on its line
    wait_for(lambda: not any(map(alive, pids(tmp_path))), 60, "the end of killed processes")


def test_what_outlives_its_ranks_is_ended(
    server: ForkServer, environment: dict[str, str], tmp_path: Path
) -> None:
    """The process has the environment of the server, which has no mark, and ignores TERM."""
    assert run(server, environment, tmp_path, "leave").status == 0
    wait_for(lambda: not any(map(alive, pids(tmp_path))), 60, "the end of killed processes")


def test_an_interruption_ends_the_ranks_and_not_the_server(
    server: ForkServer, environment: dict[str, str], tmp_path: Path
) -> None:
    def interrupt() -> None:
        if (tmp_path / "log").read_text().count("waits") == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(server, environment, tmp_path, "wait", while_running=interrupt)
    wait_for(lambda: not any(map(alive, pids(tmp_path))), 60, "the end of killed processes")
    assert run(server, environment, tmp_path / "after", "tell").status == 0


def test_forked_ranks_are_asked_to_save(
    server: ForkServer, environment: dict[str, str], tmp_path: Path
) -> None:
    asked = []

    def ask() -> None:
        if not asked and (tmp_path / "log").read_text().count("ready") == 2:
            asked.append(os.kill(os.getpid(), signal.SIGTERM))

    outcome = run(server, environment, tmp_path, "save", "--exit-signal-handler", while_running=ask)
    assert (outcome.status, outcome.unfinished) == (75, "unfinished: stopped after iteration 3")


def test_the_server_ends_with_its_owner(environment: dict[str, str], tmp_path: Path) -> None:
    """Also when the owner is killed."""
    code = f"""
import os, time
from functools import partial
from ramoe_megatron.recipe.fork_server import ForkServer
server = ForkServer()
forked = server.start(("forked_job", {str(tmp_path)!r}, "fail", "0"), 2, dict(os.environ))
print(server._process.pid, flush=True)
time.sleep(100)
"""
    owner = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    assert owner.stdout
    process = int(owner.stdout.readline())
    assert alive(process)
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 60
    while alive(process):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(("ranks", "threads"), [(2, 1), (1, 2)])
def test_a_forked_training_ends_with_the_bytes_of_one_by_torchrun(
    server: ForkServer, environment: dict[str, str], tmp_path: Path, ranks: int, threads: int
) -> None:
    """Checkpoints and logs are equal, with dropout, on two data-parallel ranks, with other thread counts."""
    write_world(tmp_path)
    logs = []
    for made in (server, None):
        name = "forked" if made else "fresh"
        more = [
            "--hidden-dropout",
            "0.1",
            "--save",
            str(tmp_path / "saved"),
            "--save-interval",
            "2",
            "--train-iters",
            "2",
        ]
        command = ("ramoe_megatron.jobs.finetune", *training_flags(tmp_path, *more))
        fork = partial(made.start, command, ranks) if made else None
        given = rank_environment(ranks, environment | {"OMP_NUM_THREADS": str(threads)})
        outcome = launch(python_command(command, ranks), given, tmp_path / f"{name}.log", fork=fork)
        assert outcome.status == 0, outcome.last_lines[-20:]
        (tmp_path / "saved").rename(tmp_path / name)  # its path is in it
        logs.append(
            re.findall(r" iteration +\d.*?(learning rate:.*?grad norm: \S+)", "\n".join(outcome.last_lines))
        )
    assert logs[0] == logs[1]
    assert len(logs[0]) == 2
    files = [
        sorted(path.relative_to(folder) for path in folder.rglob("*.distcp"))
        for folder in (tmp_path / "forked", tmp_path / "fresh")
    ]
    assert files[0] == files[1] != []
    for name in files[0]:
        assert (tmp_path / "forked" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes(), name
