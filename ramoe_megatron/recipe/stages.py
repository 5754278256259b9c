"""Runs the stages of a plan on this machine, in order or side by side where they are independent."""

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from rich.console import Console

from ramoe_megatron.artifacts.files import read_json
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.recipe.console import RunConsole, tell_report, tell_results
from ramoe_megatron.recipe.fork_server import Forked, ForkServer
from ramoe_megatron.recipe.launcher import Outcome, Place, launch, python_command, rank_environment
from ramoe_megatron.recipe.manifest import Manifest
from ramoe_megatron.recipe.megatron_flags import cuda_devices
from ramoe_megatron.recipe.nodes import Leader
from ramoe_megatron.recipe.output import relevant_lines
from ramoe_megatron.recipe.stage import Stage


class StageFailed(Exception):
    """A stage ended with an error. `text` is for the console, `status` for the shell."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.text, self.status = text, status


def run_stages(
    plan: Sequence[Stage],
    begin: int,
    end: int,
    manifest: Manifest,
    console: Console,
    force_first: bool = False,
    place: Place = Place(),  # noqa: B008 (frozen)
    leader: Leader | None = None,
    at_once: int = 1,
) -> None:
    """Run plan[begin:end], skipping each stage whose result is up to date.

    With `force_first`, the first stage runs in any case. With `at_once` above 1 (one node only), that many
    stages run side by side if none reads what another one writes; they share the cores. When a stage fails,
    the stages beside it finish and no other stage starts.

    Raises RamoeError when a stage's input is missing, and StageFailed when a stage fails.
    """
    forks = place.nodes == 1 and cuda_devices(os.environ) is None
    with RunConsole(console, len(plan)) as shown, ForkServer() as server:
        forced = plan[begin].name if force_first else None
        runner = _Runner(plan, manifest, shown, place, leader, forced, at_once, server if forks else None)
        if at_once == 1:
            for number, stage in enumerate(plan[begin:end], begin + 1):
                runner.run(number, stage)
        else:
            _run_at_once(runner, [*enumerate(plan[begin:end], begin + 1)], at_once)
    if plan[end - 1].name in ("results", "report"):
        tell_results(console, read_json(manifest.folder / "results.json"))
        if plan[end - 1].name == "report":
            tell_report(console, manifest.folder)


class _Runner:
    """The state that the stages of a run share. Its lock guards manifest and console, not the stages."""

    def __init__(
        self,
        plan: Sequence[Stage],
        manifest: Manifest,
        shown: RunConsole,
        place: Place,
        leader: Leader | None,
        forced: str | None,
        at_once: int,
        server: ForkServer | None,
    ) -> None:
        self.plan, self.manifest, self.shown, self.place = plan, manifest, shown, place
        self.leader, self.forced, self.at_once, self.server = leader, forced, at_once, server
        self.lock, self.stop = threading.RLock(), threading.Event()

    def run(self, number: int, stage: Stage, beside: int = 1) -> None:
        """Run one stage unless its result is up to date. `beside`: stages that share the cores, itself
        included."""
        with self.lock:
            if not self._begins(number, stage):
                return
        try:
            outcome = self._launch(number, stage, beside)
        except Exception:  # not for Ctrl-C: the record stays at "started", which means interrupted
            with self.lock:
                self.manifest.fail(stage)
            raise
        with self.lock:
            if outcome.unfinished:  # the record stays at "started", which means interrupted
                raise StageFailed(f"stage {stage.name} is unfinished: {outcome.unfinished}", outcome.status)
            if outcome.status:
                self.manifest.fail(stage)
                raise _failure(stage, self.manifest.folder, outcome.last_lines, outcome.status)
            self.manifest.finish(stage)
            self.shown.finished(number, stage.name, outcome.seconds)

    def _begins(self, number: int, stage: Stage) -> bool:
        reason = self.manifest.reason_to_run(stage)
        if stage.name == self.forced:
            reason = reason or "asked for by --from"
        if reason is None:
            self.shown.skipped(number, stage.name)
            return False
        check_inputs(stage, self.plan, self.manifest)
        resumes = self.manifest.start(stage)
        self.shown.started(number, stage.name, reason, resumes)
        return True

    def _launch(self, number: int, stage: Stage, beside: int) -> Outcome:
        if stage.ranks:
            self.place.refuse_taken(0)
        if self.leader:
            self.leader.announce(stage)

        def watch() -> None:
            if self.stop.is_set():
                raise KeyboardInterrupt
            if self.leader:
                self.leader.watch()

        def fork(environment: Mapping[str, str]) -> Forked | None:
            return self.server.start(stage.arguments(), stage.ranks, environment) if self.server else None

        return launch(
            python_command(stage.arguments(), stage.ranks, self.place),
            rank_environment(max(1, stage.ranks) * beside, os.environ),
            self.manifest.folder / stage.log,
            lambda told: self.shown.progress(number, told),
            watch,
            fork=fork if stage.ranks else None,
        )


def _run_at_once(runner: _Runner, stages: list[tuple[int, Stage]], at_once: int) -> None:
    """Start each stage, in the plan's order, once no waiting or running stage writes what it reads."""
    waiting, running = list(stages), dict[Future[None], Stage]()
    with ThreadPoolExecutor(at_once) as pool:
        try:
            while waiting or running:
                while len(running) < at_once and (ready := _ready(waiting, running.values())):
                    number, stage = ready[0]
                    waiting.remove(ready[0])
                    beside = min(at_once, len(running) + len(ready))
                    running[pool.submit(runner.run, number, stage, beside)] = stage
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[future]
                    future.result()
        except KeyboardInterrupt:
            # Not after a failure: leaving the pool waits for the stages that run beside the failed one.
            runner.stop.set()
            raise


def _ready(waiting: Sequence[tuple[int, Stage]], running: Iterable[Stage]) -> list[tuple[int, Stage]]:
    pending = {path for stage in running for path in (*stage.outputs, *stage.traces)}
    found = []
    for number, stage in waiting:
        if not pending.intersection(stage.inputs):
            found.append((number, stage))
        pending |= {*stage.outputs, *stage.traces}
    return found


def check_inputs(stage: Stage, plan: Sequence[Stage], manifest: Manifest, made: Sequence[Stage] = ()) -> None:
    """Raise RamoeError for an input that does not exist. `made`: stages that will have run before."""
    for path in stage.inputs:
        if path.exists() or path == stage.weights or any(path in other.outputs for other in made):
            continue
        maker = next((other.name for other in plan if path in other.outputs), None)
        what = f"run `--from {maker}`, which writes it" if maker else "restore it, or correct the recipe"
        raise RamoeError(f"{stage.name} reads {manifest.name(path)}, which does not exist: {what}")


def _failure(stage: Stage, folder: Path, lines: Sequence[str], status: int) -> StageFailed:
    text, mendable = relevant_lines(lines)
    body = "\n".join(f"  {line}" for line in text)
    where = f"  log: {folder / stage.log}"
    return StageFailed(
        f"stage {stage.name} failed (exit status {status}):\n{body}\n{where}",
        2 if status == 2 or mendable else 1,
    )
