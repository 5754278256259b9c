"""What the console shows of a run: stages and progress live on a terminal, plain lines elsewhere; the final table on
both."""

import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ramoe_megatron.recipe.output import Progress as JobProgress

PLAIN_INTERVAL = 30.0  # seconds between two progress lines of a stage, where there is no terminal


class RunConsole:
    """Shows one run. A context manager, so that the live display ends whatever happens."""

    def __init__(self, console: Console, stages: int) -> None:
        self.console, self.stages = console, stages
        self.live: Progress | None = None
        self._place, self._name, self._shown = 0, "", 0.0
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

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live:
            self.live.stop()

    def skipped(self, place: int, name: str) -> None:
        """A stage whose result stands."""
        self._say(f"[dim]{self._head(place, name)} stands[/dim]")

    def started(self, place: int, name: str, reason: str, resumes: bool) -> None:
        """A stage that begins, and why."""
        self._place, self._name, self._shown = place, name, time.monotonic()
        why = f"{reason}; goes on where it stopped" if resumes else reason
        if self.live:
            for task in list(self.live.task_ids):
                self.live.remove_task(task)
            self.live.add_task(f"{self._head(place, name)} [dim]{escape(why)}[/dim]", total=None, told="")
        else:
            self._say(f"{self._head(place, name)} runs ({escape(why)})")

    def progress(self, told: JobProgress) -> None:
        """How far the running stage is."""
        text = f"{told.done}/{told.total} {told.unit}{f' · {told.note}' if told.note else ''}"
        if self.live:
            self.live.update(self.live.task_ids[-1], completed=told.done, total=told.total, told=escape(text))
        elif time.monotonic() - self._shown >= PLAIN_INTERVAL:
            self._shown = time.monotonic()
            self._say(f"{self._head(self._place, self._name)} {escape(text)}")

    def finished(self, place: int, name: str, seconds: float) -> None:
        """A stage that is done."""
        for task in list(self.live.task_ids) if self.live else []:
            assert self.live
            self.live.remove_task(task)
        self._say(f"{self._head(place, name)} [green]done[/green] in {_duration(seconds)}")

    def results(self, folder: Path, results: dict[str, Any]) -> None:
        """The final table, and where everything is."""
        from ramoe_megatron.report.tables import summary_table

        self.console.print()
        self.console.print(summary_table(results))

    def report(self, folder: Path) -> None:
        """Where the report is."""
        self.console.print(f"report: {folder / 'report.html'}", soft_wrap=True, highlight=False)
        if (folder / "tensorboard").is_dir():
            self.console.print(f"curves: tensorboard --logdir {folder / 'tensorboard'}", soft_wrap=True, highlight=False)

    def _head(self, place: int, name: str) -> str:
        return f"\\[{place:>{len(str(self.stages))}}/{self.stages}] {escape(name)}"

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
