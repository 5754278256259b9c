"""Ending processes: signals that stop a run, ranks that are asked to save first, and leaving nothing behind."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Protocol

MARK = "RAMOE_LAUNCH"  # environment variable that all processes of a launch inherit


WARNING = signal.SIGUSR1  # what the Slurm scripts ask for some minutes before the time limit


_came: list[str] = []  # what has asked this process to end, the first first


class Stopped(KeyboardInterrupt):
    """A signal that stops a run: handled as Ctrl-C is. `args[0]` is its name."""

    @property
    def resumes(self) -> bool:
        """Whether it was the warning before a time limit: the same command is to go on."""
        return self.args == (WARNING.name,)


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """SIGTERM, SIGHUP and SIGUSR1 raise `Stopped`, so that the processes started here are ended on the way
    out.

    It names the first signal that came: after the warning, Slurm ends the nodes that are not done yet by a
    SIGTERM.
    """

    def stop(number: int, _frame: object) -> None:
        _came.append(signal.Signals(number).name)
        raise Stopped(_came[0])

    with _handling((signal.SIGTERM, signal.SIGHUP, WARNING), stop):
        yield


class SaveRequest:
    """SIGTERM and SIGUSR1, passed on to ranks that save a checkpoint and end by themselves
    (`--exit-signal-handler`).

    They go to the ranks, not to torchrun, which would give them 30 seconds and then kill them. Each rank is
    asked once, also one that starts only later: a second signal could meet it on its way out, its handler
    gone. A rank that has not set Megatron's handler yet just ends.
    """

    def __init__(self, mark: str) -> None:
        self.mark, self.asked, self.warned = mark, False, False
        self.leader = 0  # process id of what starts the ranks
        self._told: set[int] = set()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """While the ranks run."""

        def ask(number: int, _frame: object) -> None:
            self.asked, self.warned = True, self.warned or number == WARNING
            _came.append(signal.Signals(number).name)

        with _handling((signal.SIGTERM, WARNING), ask):
            yield

    def pass_on(self) -> bool:
        """Called now and then: sends SIGTERM to the ranks if a signal has come. True once all that were asked have ended."""
        if not self.asked:
            return False
        ranks = set(_ranks(self.mark, self.leader))
        _signal_each(sorted(ranks - self._told), signal.SIGTERM)
        self._told |= ranks
        return bool(self._told) and not ranks


@contextlib.contextmanager
def _handling(numbers: Sequence[signal.Signals], handler: Callable[[int, object], None]) -> Iterator[None]:
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, old in zip(numbers, before, strict=True):
            # A process that is asked to end does so with its own status: the node that ends first has Slurm
            # send SIGTERM to the others, also while Python, which takes its handlers back early, leaves.
            signal.signal(number, signal.SIG_IGN if _came else old)


def end_early() -> None:
    """Keep this process's own exit status from here on, whatever signal comes: a training ended early and on purpose."""
    _came.append("unfinished")


def ignore_warning() -> None:
    """In a child before it runs its program: Slurm signals every process of a step, and torchrun would die of SIGUSR1."""
    signal.signal(WARNING, signal.SIG_IGN)


class Started(Protocol):
    """A process that was started in a session of its own: `subprocess.Popen`, or the leader of a forked stage."""

    @property
    def pid(self) -> int: ...

    @property
    def stdout(self) -> IO[bytes] | None: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def terminate(self) -> None: ...


def end_processes(process: Started, mark: str, grace: float) -> None:
    """End the command and all that descends from it.

    torchrun starts each rank in a session of its own, so killing its process group would miss them: they are
    known by the mark that they inherit in their environment (Linux). What a forked stage forks has the
    environment of the process that it was forked from, and is known by its session.
    """
    if process.poll() is None:
        _signal_group(process.pid, signal.SIGTERM)
    elif not (left := _family(mark, process.pid)):
        return
    else:
        _signal_each(left, signal.SIGTERM)
    try:
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and (process.poll() is None or _family(mark, process.pid)):
            time.sleep(0.1)
    finally:  # also on a second Ctrl-C
        for _ in range(
            200
        ):  # again, for a process that was forking while the first round was read; a busy machine is slow to end one
            if process.poll() is None:
                _signal_group(process.pid, signal.SIGKILL)
            left = _family(mark, process.pid)
            _signal_each(left, signal.SIGKILL)
            if process.poll() is not None and not left:
                break
            time.sleep(0.05)


def _signal_group(leader: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)


def _signal_each(processes: Sequence[int], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def _family(mark: str, session: int) -> list[int]:
    """Living processes with the mark in their environment, or in the session."""
    return [number for number, _ in _family_with_variables(mark, session)]


def _ranks(mark: str, leader: int) -> list[int]:
    """Of those, the ranks that torchrun or a forked leader started, without what they started (loaders, the checkpoint's writers)."""
    family = _family_with_variables(mark, leader)
    inside = {
        n
        for n, variables in family
        if any(v.startswith(b"LOCAL_RANK=") for v in variables) or _parent(n) == leader
    }
    return [number for number in inside if _parent(number) not in inside]


def _family_with_variables(mark: str, session: int) -> list[tuple[int, list[bytes]]]:
    wanted, found = f"{MARK}={mark}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            state, _, _, its_session, *_ = _stat(int(folder.name))
        except OSError:
            continue
        if state != "Z" and (wanted in variables or int(its_session) == session):
            found.append((int(folder.name), variables))
    return found


def _parent(process: int) -> int:
    with contextlib.suppress(OSError):
        return int(_stat(process)[1])
    return 0


def _stat(process: int) -> list[str]:
    """State, parent and what follows in /proc/PID/stat."""
    return Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
