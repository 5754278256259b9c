"""Ends processes: signals that stop a run, requests to save first, and the end of a launch's processes."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Protocol

MARK = "RAMOE_LAUNCH"  # environment variable that all processes of a launch inherit
WARNING = signal.SIGUSR1  # the Slurm scripts ask for it some minutes before the time limit

_came: list[str] = []  # signals that asked this process to end, in order


class Stopped(KeyboardInterrupt):
    """A signal that stops a run, handled as Ctrl-C is. `args[0]` is its name."""

    @property
    def resumes(self) -> bool:
        """Whether the signal was the warning before a time limit. The same command should then resume."""
        return self.args == (WARNING.name,)


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """Make SIGTERM, SIGHUP and SIGUSR1 raise `Stopped`, so that every started process is ended.

    `Stopped` names the first signal. After the warning, Slurm also sends SIGTERM to the nodes that are not
    done.
    """

    def stop(number: int, _frame: object) -> None:
        _came.append(signal.Signals(number).name)
        raise Stopped(_came[0])

    with _handling((signal.SIGTERM, signal.SIGHUP, WARNING), stop):
        yield


class SaveRequest:
    """Passes SIGTERM and SIGUSR1 on to ranks that save a checkpoint and end (`--exit-signal-handler`).

    The signals go to the ranks and not to torchrun, which would kill the ranks after 30 seconds. Each rank is
    asked once, also a rank that starts later: a second signal could reach it while it exits, when its handler
    is gone. A rank that has not yet set Megatron's handler just ends.
    """

    def __init__(self, mark: str) -> None:
        self.mark, self.asked, self.warned = mark, False, False
        self.leader = 0  # process id of the process that starts the ranks
        self._told: set[int] = set()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals while the ranks run."""

        def ask(number: int, _frame: object) -> None:
            self.asked, self.warned = True, self.warned or number == WARNING
            _came.append(signal.Signals(number).name)

        with _handling((signal.SIGTERM, WARNING), ask):
            yield

    def ranks(self) -> set[int]:
        """The process ids of the ranks that run."""
        return set(_ranks(self.mark, self.leader))

    def pass_on(self) -> bool:
        """Send SIGTERM to the ranks if a signal has come; the launcher calls this regularly.

        Returns True once all ranks that were asked have ended.
        """
        if not self.asked:
            return False
        ranks = self.ranks()
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
            # After the first node has ended, Slurm sends SIGTERM to the others. This process must still end
            # with its own status, also during its exit, when Python has already removed its handlers.
            signal.signal(number, signal.SIG_IGN if _came else old)


def end_early() -> None:
    """Keep this process's exit status whatever signal comes now: a training ended early on purpose."""
    _came.append("unfinished")


def ignore_warning() -> None:
    """Ignore the warning in a child before it runs its program.

    Slurm signals every process of a step, and SIGUSR1 would end torchrun.
    """
    signal.signal(WARNING, signal.SIG_IGN)


class Started(Protocol):
    """A process in a session that it leads: `subprocess.Popen`, or the leader of a forked stage."""

    @property
    def pid(self) -> int: ...

    @property
    def stdout(self) -> IO[bytes] | None: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def terminate(self) -> None: ...


def end_processes(process: Started, mark: str, grace: float) -> None:
    """End the command and all its descendants.

    torchrun starts each rank in a new session, so killing its process group would miss the ranks. They are
    found by the mark that they inherit in their environment (Linux). Forked ranks have the environment of the
    forking process instead, and are found by their session.
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
        # Repeated, because a process may fork while the list is read, and a busy machine ends one slowly.
        for _ in range(200):
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
    """The processes of a family that are ranks, without those that ranks start, such as data loaders."""
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
    """State, parent and the following fields of /proc/PID/stat."""
    return Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
