"""`ramoe status RUN`: the state of each stage, from the run folder and from Slurm's queue."""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import filelock
from rich.markup import escape
from rich.table import Table

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.recipe import chain, slurm
from ramoe_megatron.recipe.manifest import Entry, Manifest
from ramoe_megatron.recipe.output import parse_progress, relevant_lines
from ramoe_megatron.recipe.stage import log_of

TAIL = 1 << 16  # bytes read at the end of a log
COLOURS = {
    "done": "green",
    "running": "cyan",
    "failed": "red",
    "interrupted": "yellow",
    "cancelled": "yellow",
}


@dataclass(frozen=True)
class StageStatus:
    """How far one stage is."""

    name: str
    state: str
    """done, running, waiting, requeued, failed, interrupted, cancelled, not run, unknown, or a state of
    Slurm's, such as suspended."""
    job: str = ""
    nodes: str = ""
    progress: str = ""
    """Such as "37/72 iterations"."""
    line: str = ""
    """The last line of the log, or why the stage waits."""


def run_status(folder: Path) -> list[StageStatus]:
    """The stages that ran or were submitted: first those of the chain in its order, then the others.

    Raises RamoeError when `folder` is no run folder. Where Slurm cannot be asked, a job is "unknown" unless
    it is recorded as done.
    """
    if not (folder / "manifest.json").is_file():
        raise RamoeError(
            f"{folder} holds no manifest.json, so it is no run folder: give the --out of `ramoe run`"
        )
    entries = Manifest(folder, None).stages
    jobs = chain.submitted(folder)
    try:
        queue: Mapping[int, slurm.Queued] | None = chain.live(folder, entries)
    except RamoeError:
        queue = None
    held = _held(folder)
    names = dict.fromkeys([*jobs, *entries])
    return [_stage(folder, name, entries.get(name), jobs.get(name), queue, held) for name in names]


def _held(folder: Path) -> bool:
    """Whether a local `ramoe run` is running in the folder."""
    lock = filelock.FileLock(folder / ".lock", fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return True
    except OSError:  # a folder of another user
        return False
    lock.release()
    return False


def _stage(
    folder: Path,
    name: str,
    entry: Entry | None,
    job: int | None,
    queue: Mapping[int, slurm.Queued] | None,
    held: bool,
) -> StageStatus:
    queued = queue.get(job) if job is not None and queue is not None else None
    # A record from before this job does not describe it.
    ours = entry is not None and (job is None or entry.job == str(job))
    lines = _tail(folder / log_of(name)) if entry else []
    progress, line = _told(lines)
    # Megatron prints the iterations on its last rank, which may be on another node.
    if entry and not progress:
        progress = next((told for other in _on_other_nodes(folder, name) if (told := _told(other)[0])), "")
    number = str(job) if job is not None else (entry.job if entry and entry.job else "")
    nodes = queued.nodes if queued and queued.nodes else (entry.nodes if entry and entry.nodes else "")
    if queued and queued.state == "PENDING":
        state = "requeued" if ours and entry and entry.state == "started" else "waiting"
        return StageStatus(
            name, state, number, "", progress if state == "requeued" else "", _WHY.get(queued.why, queued.why)
        )
    if queued and not (ours and entry and entry.state == "done"):
        running = queued.state in ("RUNNING", "COMPLETING", "CONFIGURING")
        return StageStatus(
            name, "running" if running else queued.state.lower(), number, nodes, progress, line
        )
    if queue is None and not (ours and entry and entry.state == "done"):
        return StageStatus(name, "unknown", number, nodes, progress, "Slurm cannot be asked from here")
    if entry is None or not ours:
        if (
            entry
            and entry.state == "done"
            and (folder / log_of(name).with_suffix(f".slurm-{job}.out")).exists()
        ):
            # The job found the result up to date.
            return StageStatus(name, "done", number, nodes, progress, line)
        return _without_record(folder, name, job)
    if entry.state == "started":
        return StageStatus(name, "running" if held else "interrupted", number, nodes, progress, line)
    if entry.state == "failed":
        line = " ".join(relevant_lines(lines, *_on_other_nodes(folder, name))[0][:2])
    return StageStatus(name, entry.state, number, nodes, progress, line)


_WHY = {
    "None": "submitted",
    "Dependency": "waits for the stages before it",
    "DependencyNeverSatisfied": "a stage before it failed",
    "BeginTime": "goes back into the queue; starts soon",
    "Resources": "waits for nodes",
    "Priority": "waits for its turn",
}


def _without_record(folder: Path, name: str, job: int | None) -> StageStatus:
    """A stage that never began: its job ended before (`ramoe doctor` found a fault), or never started."""
    if job is None:
        return StageStatus(name, "not run")
    path = folder / log_of(name).with_suffix(f".slurm-{job}.out")
    said = [line for line in _tail(path) if line.strip()]
    if said:
        return StageStatus(
            name, "failed", str(job), line=next((line for line in said if "ramoe: error" in line), said[-1])
        )
    return StageStatus(
        name,
        "cancelled",
        str(job),
        line="never started: a stage before it failed, or the job was taken out of the queue",
    )


def _told(lines: list[str]) -> tuple[str, str]:
    """The last progress and the last other line in the end of a log."""
    progress, other = "", ""
    for line in lines:
        if told := parse_progress(line):
            progress = f"{told.done}/{told.total} {told.unit}{f', {told.note}' if told.note else ''}"
        elif line.strip():
            other = line.strip()
    return progress, other


def _on_other_nodes(folder: Path, name: str) -> Iterator[list[str]]:
    """The end of the log of each node but the first, the last node first. Read only when asked for."""
    logs = (folder / "logs").glob(f"{log_of(name).stem}.node-*.log")
    return map(_tail, sorted(logs, reverse=True))


def _tail(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        lines = deque(file.read().decode(errors="replace").splitlines(), 400)
    # The header of the last attempt.
    start = max((place for place, line in enumerate(lines) if line.startswith("=== ")), default=-1)
    return list(lines)[start + 1 :]


def status_table(stages: list[StageStatus]) -> Table:
    """The table that `ramoe status` prints."""
    table = Table(box=None, pad_edge=False, expand=True)
    for heading in ("stage", "state", "job", "nodes"):
        table.add_column(heading, no_wrap=True)
    table.add_column("progress", no_wrap=True, overflow="ellipsis", max_width=40)
    table.add_column("last line", no_wrap=True, overflow="ellipsis", ratio=1)
    for s in stages:
        colour = COLOURS.get(s.state, "dim")
        table.add_row(
            s.name, f"[{colour}]{s.state}[/{colour}]", s.job, s.nodes, escape(s.progress), escape(s.line)
        )
    return table
