"""Starts the ranks of a job, follows their output, and leaves no process behind.

On one node, torchrun makes its own local rendezvous. On several nodes, `ramoe` runs once on each node, and
the environment gives the number of this node and the address of node 0 (`Place.from_environment`).
"""

import contextlib
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ramoe_megatron.errors import NOTE_VARIABLE, RamoeError
from ramoe_megatron.mcore.unfinished import STATUS, VARIABLE
from ramoe_megatron.recipe.output import Progress, parse_progress
from ramoe_megatron.recipe.processes import (
    MARK,
    SaveRequest,
    Started,
    end_early,
    end_processes,
    ignore_warning,
)

GRACE_SECONDS = 15.0  # between TERM and KILL
AGENT_SECONDS = 5.0  # in which torchrun ends after its ranks, unless it waits for the agent of another node


@dataclass(frozen=True)
class Place:
    """The place of this node among the nodes of a launch."""

    node: int = 0
    nodes: int = 1
    address: str = "localhost"
    port: int = 29500

    @classmethod
    def from_environment(cls, nodes: int, environment: Mapping[str, str]) -> "Place":
        """The place that NODE_RANK (or SLURM_NODEID, or GROUP_RANK), MASTER_ADDR and MASTER_PORT give.

        MASTER_PORT is 29500 by default. Raises RamoeError when several nodes are asked for and the
        environment does not say which one this is.
        """
        if nodes == 1:
            return cls()
        node = next(
            (
                environment[name]
                for name in ("NODE_RANK", "SLURM_NODEID", "GROUP_RANK")
                if environment.get(name)
            ),
            None,
        )
        address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT", "29500")
        if node is None or not address:
            raise RamoeError(
                f"{nodes} nodes, but the environment does not say which one this is: "
                "start the same command once on each node, with NODE_RANK (Slurm sets SLURM_NODEID) and "
                "with MASTER_ADDR, the name of node 0"
            )
        if not node.isdigit() or int(node) >= nodes or not port.isdigit():
            raise RamoeError(
                f"node rank {node} of {nodes} nodes and MASTER_PORT {port}: "
                f"expected a rank below {nodes} and a number"
            )
        return cls(int(node), nodes, address, int(port))

    def refuse_taken(self, *offsets: int) -> None:
        """Raise RamoeError if this is node 0 of several and cannot listen at a port MASTER_PORT + offset.

        The ranks meet at MASTER_PORT, the nodes of a recipe at the next port.
        """
        for port in (self.port + offset for offset in offsets if self.nodes > 1 and self.node == 0):
            try:
                # Only bound, not listening: another node may already try to connect.
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("", port))
            except (OSError, OverflowError) as error:
                raise self.taken(port, error) from error

    def taken(self, port: int, error: Exception) -> RamoeError:
        """The error about a port of node 0, with what to do."""
        which = "MASTER_PORT"
        if port != self.port:
            which += f" + 1, where the nodes of a recipe meet (MASTER_PORT is {self.port})"
        return RamoeError(
            f"port {port} of {self.address}, node 0, cannot be listened at ({error}). The port is {which}. "
            "Set MASTER_PORT to another number, the same on every node; "
            "`ramoe run` needs the port after it too"
        )


def python_command(command: Sequence[str], ranks: int, place: Place = Place()) -> list[str]:
    """The full command line of `command`, a module and its arguments. 0 ranks: one plain process."""
    if ranks == 0:
        return [sys.executable, "-m", *command]
    if place.nodes == 1:
        where = ["--standalone", "--nnodes", "1"]
    else:
        where = ["--nnodes", str(place.nodes), "--node-rank", str(place.node)]
        where += ["--master-addr", place.address, "--master-port", str(place.port)]
    torchrun = [sys.executable, "-m", "ramoe_megatron.recipe.torchrun"]
    return [*torchrun, *where, "--nproc-per-node", str(ranks), "-m", *command]


def rank_environment(ranks: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Environment of a launch: the cores are divided among the ranks, and output is not buffered.

    Variables that the user has set are kept.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if (
        given := environment.get("SLURM_CPUS_ON_NODE", "")
    ).isdigit():  # the job's share, where Slurm does not bind processes to it
        cores = min(cores, int(given))
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cores // max(1, ranks))),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron needs it for TP or CP on GPUs before Blackwell
        "PYTHONUNBUFFERED": "1",
    }
    return {**defaults, **environment}


@dataclass(frozen=True)
class Outcome:
    """How a launch ended.

    `unfinished` is the reason when a training ended early on purpose, else None. The status is then 75.
    """

    status: int
    """Exit status; 128 + N when signal N ended it."""
    last_lines: list[str]
    seconds: float
    unfinished: str | None = None


def launch(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    while_running: Callable[[], None] | None = None,
    grace: float = GRACE_SECONDS,
    fork: Callable[[Mapping[str, str]], Started | None] | None = None,
) -> Outcome:
    """Run a full command line to its end.

    The output goes to the end of `log`, or to the terminal without
    one.

    Every process that descends from the command is ended after an exception, after Ctrl-C and after an
    ordinary end: TERM, then KILL after `grace` seconds. A second Ctrl-C kills at once. `while_running` is
    called about twice a second. `fork` starts the same command in the given environment without the cost of
    the imports, or returns None where it cannot; it needs a log.

    The status is 2 when a rank has reported an error to the user (`RamoeError`); torchrun and the other ranks
    then print nothing more.

    A command with Megatron's --exit-signal-handler is not ended by SIGTERM or SIGUSR1: its ranks are asked to
    save (`SaveRequest`).
    """
    mark = uuid.uuid4().hex
    started = time.monotonic()
    lines: deque[str] = deque(maxlen=5000)
    saving = SaveRequest(mark)
    saves = "--exit-signal-handler" in command

    ended = 0.0

    def ranks_have_ended() -> bool:
        """Whether the ranks were asked to save and have ended, or have ended early without a request here.

        A signal may reach another node alone, or this node after its ranks have saved and ended.
        """
        nonlocal ended
        if note.is_file() and not saving.ranks():
            ended = ended or time.monotonic()
        return saving.pass_on() or bool(ended and time.monotonic() - ended > AGENT_SECONDS)

    def watch() -> None:
        if ranks_have_ended() and process.poll() is None:
            process.terminate()  # torchrun would wait for minutes for the agents of other nodes
        if while_running and not saving.asked:
            while_running()

    with (
        _opened(log) as sink,
        tempfile.TemporaryDirectory() as scratch,
        saving.listening() if saves else contextlib.nullcontext(),
    ):
        note = Path(scratch) / "unfinished"
        if sink:
            sink.write(f"=== {time.strftime('%Y-%m-%d %H:%M:%S')}  {' '.join(command)}\n".encode())
        marked = {**environment, MARK: mark, VARIABLE: str(note), NOTE_VARIABLE: str(Path(scratch) / "error")}
        process = (fork(marked) if fork else None) or subprocess.Popen(
            command,
            env=marked,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if sink else None,
            stderr=subprocess.STDOUT if sink else None,
            start_new_session=True,
            preexec_fn=ignore_warning,
        )
        saving.leader = process.pid
        try:
            for line in _lines(process, sink, watch):
                lines.append(line)
                if on_progress and (progress := parse_progress(line)):
                    on_progress(progress)
            status = process.wait()
            status = 128 - status if status < 0 else status  # as a shell reports a signal
        finally:
            end_processes(process, mark, grace)
            if process.stdout:
                process.stdout.close()
        unfinished = note.read_text(encoding="utf-8") if note.is_file() else None
        if unfinished:
            end_early()
    if saving.warned and not unfinished and status:
        lines.append(
            "ramoe: asked to save before an iteration was done: raise the time limit; "
            "it must leave time between the start and the warning"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    return Outcome(STATUS if unfinished else status, list(lines), time.monotonic() - started, unfinished)


@contextlib.contextmanager
def _opened(log: Path | None) -> Iterator[IO[bytes] | None]:
    if log is None:
        yield None
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab", buffering=0) as sink:
        yield sink


def _lines(process: Started, sink: IO[bytes] | None, while_running: Callable[[], None]) -> Iterator[str]:
    """Lines of output until the process has ended, even if a grandchild keeps the pipe open."""
    with selectors.DefaultSelector() as selector:
        if process.stdout:
            os.set_blocking(process.stdout.fileno(), False)
            selector.register(process.stdout, selectors.EVENT_READ)
        rest, at_end = b"", process.stdout is None
        while True:
            ended = process.poll() is not None
            if at_end:
                if ended:
                    break
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
            elif selector.select(0.0 if ended else 0.5) and process.stdout and sink:
                chunk = os.read(process.stdout.fileno(), 1 << 16)
                at_end = not chunk
                sink.write(chunk)
                *whole, rest = (rest + chunk).replace(b"\r", b"\n").split(b"\n")
                yield from (line.decode(errors="replace") for line in whole)
            elif ended:
                break
            while_running()
        if rest:
            yield rest.decode(errors="replace")
