"""Progress of a run on the console: live on a terminal, plain lines elsewhere; the final table on both."""

import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from ramoe_megatron.recipe.output import Progress as JobProgress

PLAIN_INTERVAL = 30.0  # seconds between two progress lines of a stage, where there is no terminal


@dataclass
class _Shown:
    """A running stage, with its bar on a terminal or the time of its last printed line."""

    name: str
    last: float
    task: TaskID | None = None


class RunConsole:
    """Shows one run. As a context manager, it ends the live display also after an error."""

    def __init__(self, console: Console, stages: int) -> None:
        self.console, self.stages = console, stages
        self.live: Progress | None = None
        self._running: dict[int, _Shown] = {}
        if console.is_terminal:
            self.live = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[told]}"),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.stop()

    def skipped(self, place: int, name: str) -> None:
        """Report a stage that is skipped because its result is up to date."""
        self._say(f"[dim]{self._head(place, name)} is up to date[/dim]")

    def started(self, place: int, name: str, reason: str, resumes: bool) -> None:
        """Report that a stage starts, and why."""
        self._running[place] = _Shown(name, time.monotonic())
        why = f"{reason}; resumes where it stopped" if resumes else reason
        if self.live:
            text = f"{self._head(place, name)} [dim]{escape(why)}[/dim]"
            self._running[place].task = self.live.add_task(text, total=None, told="")
        else:
            self._say(f"{self._head(place, name)} runs ({escape(why)})")

    def progress(self, place: int, told: JobProgress) -> None:
        """Report how far a running stage is."""
        text, shown = (
            f"{told.done}/{told.total} {told.unit}{f' · {told.note}' if told.note else ''}",
            self._running[place],
        )
        if self.live and shown.task is not None:
            self.live.update(shown.task, completed=told.done, total=told.total, told=escape(text))
        elif time.monotonic() - shown.last >= PLAIN_INTERVAL:
            shown.last = time.monotonic()
            self._say(f"{self._head(place, shown.name)} {escape(text)}")

    def finished(self, place: int, name: str, seconds: float) -> None:
        """Report that a stage is done."""
        shown = self._running.pop(place)
        if self.live and shown.task is not None:
            self.live.remove_task(shown.task)
        self._say(f"{self._head(place, name)} [green]done[/green] in {_duration(seconds)}")

    def _head(self, place: int, name: str) -> str:
        return f"\\[{place:>{len(str(self.stages))}}/{self.stages}] {escape(name)}"

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False)


def tell_results(console: Console, results: dict[str, Any]) -> None:
    """Print the final table of a run."""
    from ramoe_megatron.report import rendering
    from ramoe_megatron.report.artefact_tables import summary_table

    console.print()
    console.print(rendering.console([summary_table(results)]))


def tell_report(console: Console, folder: Path) -> None:
    """Print where the report and the training curves are."""
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True, highlight=False)
    if (folder / "tensorboard").is_dir():
        console.print(
            f"curves: tensorboard --logdir {folder / 'tensorboard'}", soft_wrap=True, highlight=False
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
