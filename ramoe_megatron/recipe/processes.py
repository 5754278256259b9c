"""Ending processes: signals that stop a run, and leaving nothing behind."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

MARK = "RAMOE_LAUNCH"  # environment variable that all processes of a launch inherit


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP: handled as Ctrl-C is."""


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Stopped`, so that the processes started here are ended on the way out."""

    def stop(number: int, _frame: object) -> None:
        raise Stopped(signal.Signals(number).name)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def end_processes(process: subprocess.Popen[bytes], mark: str, grace: float) -> None:
    """End the command and all that descends from it.

    torchrun starts each rank in a session of its own, so killing its process group would miss them; every descendant
    is known by the mark that it inherits in its environment (Linux), besides the group.
    """
    if process.poll() is None:
        _signal_group(process.pid, signal.SIGTERM)
    elif not (left := _marked(mark)):
        return
    else:
        _signal_each(left, signal.SIGTERM)
    try:
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and (process.poll() is None or _marked(mark)):
            time.sleep(0.1)
    finally:  # also on a second Ctrl-C
        for _ in range(50):  # again, for a process that was forking while the first round was read
            if process.poll() is None:
                _signal_group(process.pid, signal.SIGKILL)
            left = _marked(mark)
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


def _marked(mark: str) -> list[int]:
    """Living processes with the mark in their environment."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
            state = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z" and wanted in environment.split(b"\0"):
            found.append(int(folder.name))
    return found
