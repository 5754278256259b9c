"""Starts stages by forking one process that has imported torch and Megatron.

The imports are thereby paid once. `ForkServer` starts that process (`python -m
ramoe_megatron.recipe.fork_server`) when the first stage needs it. For each stage the process forks a leader
in a new session. The leader forks the ranks, keeps their store, and ends the other ranks when one fails, as
torchrun does. Stages are forked only without a CUDA device, because a fork must not inherit the state of the
driver.
"""

import contextlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Self

from ramoe_megatron.recipe.processes import MARK, ignore_warning

END_SECONDS = 30.0  # between TERM and KILL for the other ranks after a failure, as in torchrun
IMPORTED = (  # what most stages need, without the jobs: those run as __main__
    "ramoe_megatron.mcore.router",
    "ramoe_megatron.mcore.align.labels",
    "ramoe_megatron.mcore.offline.model",
    "ramoe_megatron.mcore.offline.routing",
    "ramoe_megatron.mcore.select.freeze",
    "ramoe_megatron.mcore.train.datasets",
    "ramoe_megatron.mcore.train.step",
    "megatron.core.datasets.helpers_cpp",
    "megatron.core.models.mimo",
    "megatron.core.tokenizers.text.models",
    "megatron.training.checkpointing",
    "megatron.training.training",
    "pyarrow.compute",
)


class Forked:
    """The leader of a forked stage, with the interface of `subprocess.Popen`. Its process id is also its
    session's."""

    def __init__(self, pid: int, status: IO[bytes], stdout: IO[bytes]) -> None:
        self.pid, self.stdout = pid, stdout
        self.returncode: int | None = None
        self._status = status

    def poll(self) -> int | None:
        """The exit status once the leader has ended, -N when signal N ended it; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("forked stage", timeout or 0)
            told = self._status.readline()
            self._status.close()
            # The leader was killed before it could report a status.
            self.returncode = int(told) if told else -signal.SIGKILL
        return self.returncode

    def terminate(self) -> None:
        """Ask the leader to end."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)


class ForkServer:
    """Starts jobs by forking. A context manager: the forking process ends with it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._link: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._link:
            self._link.close()
        if self._process:
            self._process.kill()  # it may still be importing
            self._process.wait()

    def start(self, command: Sequence[str], ranks: int, environment: Mapping[str, str]) -> Forked | None:
        """Start `ranks` ranks of a command: a module or the path of a script, and its arguments.

        Returns:
            The leader, whose `stdout` receives the output. None where a stage cannot be forked: a CUDA device
                is present, the imports failed, or the forking process has ended.
        """
        with self._lock, tempfile.TemporaryFile() as request, contextlib.ExitStack() as ends:
            if self._process is None:
                self._start(environment)
            if self._link is None:
                return None
            asked = {
                "command": list(command),
                "ranks": ranks,
                "environment": dict(environment),
                "folder": os.getcwd(),
            }
            request.write(json.dumps(asked).encode())
            request.seek(0)
            out, out_end = os.pipe()
            status, status_end = os.pipe()
            for end in (out_end, status_end):
                ends.callback(os.close, end)
            with contextlib.suppress(BrokenPipeError):
                socket.send_fds(self._link, [b"."], [request.fileno(), out_end, status_end])
        told, output = os.fdopen(status, "rb", buffering=0), os.fdopen(out, "rb", buffering=0)
        if leader := told.readline():
            return Forked(int(leader), told, output)
        told.close()
        output.close()
        return None

    def _start(self, environment: Mapping[str, str]) -> None:
        link, other = socket.socketpair()
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(other.fileno())],
                # The process belongs to no launch.
                env={name: value for name, value in environment.items() if name != MARK},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
                start_new_session=True,
                preexec_fn=ignore_warning,
            )
        self._link = link
        if not link.recv(1):
            link.close()
            self._link = None


def main(link: socket.socket) -> Sequence[str] | None:
    """Import, then fork for each request.

    Returns the command to run in each forked rank, and None at the end.
    """
    from ramoe_megatron.mcore.compat import import_early
    from ramoe_megatron.mcore.cpu.backend import cuda_absent

    if not cuda_absent():
        return None
    import_early(IMPORTED)
    sys.stdout.flush()  # otherwise each fork would print what the imports left in the buffer
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the leaders
    link.send(b".")
    while True:
        message, descriptors, _, _ = socket.recv_fds(link, 1, 3)
        if not message:
            return None
        if os.fork() == 0:
            link.close()
            return _lead(*descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _lead(request: int, output: int, status: int) -> Sequence[str]:
    """Fork the ranks and wait for them. Returns in the ranks only."""
    import torch

    os.setsid()
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    # Also where a shell ignores SIGINT, as in torchrun.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with os.fdopen(request) as file:
        asked = json.load(file)
    for place in (1, 2):
        os.dup2(output, place)
    os.close(output)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    os.write(status, f"{os.getpid()}\n".encode())
    with socket.create_server(("127.0.0.1", 0)) as server:
        port, ranks = server.getsockname()[1], dict[int, int]()
        for rank in range(asked["ranks"]):
            if (child := os.fork()) == 0:
                server.close()
                os.close(status)
                return _as_rank(asked, rank, port)
            ranks[child] = rank
        # The rendezvous of the ranks. Made after the forks, because the store has a thread.
        store = torch.distributed.TCPStore(
            "127.0.0.1",
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(minutes=5),
            master_listen_fd=server.detach(),
        )
    ended = _follow(ranks)
    del store
    os.write(status, f"{ended}\n".encode())
    os._exit(0)


def _as_rank(asked: Mapping[str, Any], rank: int, port: int) -> Sequence[str]:
    """Give this process the environment of a rank that torchrun started."""
    import numpy
    import torch

    ranks = str(asked["ranks"])
    os.environ |= {
        **dict.fromkeys(("RANK", "LOCAL_RANK", "ROLE_RANK"), str(rank)),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), ranks),
        **{
            "GROUP_RANK": "0",
            "GROUP_WORLD_SIZE": "1",
            "ROLE_NAME": "default",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        },
        **{"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": str(port)},
        **{"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0"},
    }
    threads = int(os.environ["OMP_NUM_THREADS"])
    if torch.get_num_threads() != threads:  # torch read the variable at its import
        torch.set_num_threads(threads)
    numpy.random.seed()  # as a new process does; Python reseeds its own generator at a fork
    torch.default_generator.seed()
    return asked["command"]


class _Terminated(Exception):
    pass


def _follow(ranks: dict[int, int]) -> int:
    """Wait for the ranks (process id -> rank).

    Returns 0, or the status of the first rank that failed, -N when signal N ended it.
    """

    def stop(*_: object) -> None:
        raise _Terminated

    signal.signal(signal.SIGTERM, stop)
    failed = 0
    try:
        while ranks and not failed:
            child, how = os.waitpid(-1, 0)
            rank, failed = ranks.pop(child), os.waitstatus_to_exitcode(how)
            if failed < 0:
                print(
                    f"ramoe: rank {rank} was ended by {signal.Signals(-failed).name}",
                    file=sys.stderr,
                    flush=True,
                )
    except _Terminated:
        failed = -signal.SIGTERM
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _end(ranks)
    return failed


def _end(ranks: dict[int, int]) -> None:
    for number, seconds in ((signal.SIGTERM, END_SECONDS), (signal.SIGKILL, END_SECONDS)):
        for child in ranks:
            os.kill(child, number)
        deadline = time.monotonic() + seconds
        while ranks and time.monotonic() < deadline:
            child, _ = os.waitpid(-1, os.WNOHANG)
            ranks.pop(child, None)
            time.sleep(0 if child else 0.05)


def _run(command: Sequence[str]) -> None:
    """Do what `python -m MODULE ARGUMENTS` or `python SCRIPT ARGUMENTS` does."""
    name, *words = command
    script = name.endswith(".py")
    sys.path[0] = str(Path(name).resolve().parent) if script else os.getcwd()
    sys.argv = [name, *words]
    if script:
        runpy.run_path(name, run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    if given := main(socket.socket(fileno=int(sys.argv[1]))):
        _run(given)
