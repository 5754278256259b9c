"""Stages side by side: what may run at once, what waits, and what remains after a failure or Ctrl-C.

Stages are real processes.
"""

import dataclasses
import io
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from bench import Bench
from rich.console import Console

from ramoe_megatron.recipe.fork_server import ForkServer
from ramoe_megatron.recipe.manifest import Manifest, locked
from ramoe_megatron.recipe.processes import Stopped, stop_signals
from ramoe_megatron.recipe.stages import StageFailed, run_stages

# A stage ends once its partner has begun: two that wait for each other end only if they run at once.
PARTNERS = """
import sys, time
from pathlib import Path
name, output, *partners = sys.argv[1:]
here = Path(__file__).parent
(here / f"began-{name}").touch()
until = time.monotonic() + 60
while any(not (here / f"began-{partner}").exists() for partner in partners):
    if time.monotonic() > until:
        sys.exit(f"{name} waited in vain")
    time.sleep(0.05)
if (here / f"fail-{name}").exists():
    sys.exit(3)
if (here / f"linger-{name}").exists():
    time.sleep(1)
Path(output).write_text(name)
"""


def run(bench: Bench, at_once: int, partners: dict[str, list[str]] | None = None) -> Manifest:
    """Run the plan of `Bench`. If given, stages that wait for partners replace the sums."""
    plan = bench.plan()
    if partners is not None:
        (bench.code / "partners.py").write_text(PARTNERS)
        plan = [
            stage.__class__(
                **vars(stage)
                | {"command": ("partners", stage.name, str(stage.outputs[0]), *partners.get(stage.name, []))}
            )
            for stage in plan
        ]
    with locked(bench.folder):
        manifest = Manifest(bench.folder, "bench")
        manifest.write()
        shown = io.StringIO()
        try:
            run_stages(plan, 0, len(plan), manifest, Console(file=shown, width=200), at_once=at_once)
        finally:
            bench.shown = shown.getvalue()
    return manifest


@pytest.mark.parametrize("at_once", [2, 3, 8])
def test_the_results_are_those_of_one_after_another(bench: Bench, at_once: int) -> None:
    manifest = run(bench, at_once)
    assert {name: (bench.folder / f"{name}.txt").read_text() for name in "abcd"} == {
        "a": "10",
        "b": "30",
        "c": "60",
        "d": "50",
    }
    assert {entry.state for entry in manifest.stages.values()} == {"done"}
    run(bench, at_once)
    assert bench.shown.count("is up to date") == 4


def test_stages_that_wait_for_no_other_run_at_once(bench: Bench) -> None:
    run(bench, 2, {"b": ["d"], "d": ["b"]})
    assert (bench.folder / "c.txt").read_text() == "c"


def test_a_stage_waits_for_what_it_reads(bench: Bench) -> None:
    (bench.code / "linger-a").touch()
    run(bench, 4, {})
    order = [
        line.split()[1]
        for line in bench.shown.splitlines()
        if "] " in line and ("done" in line or "runs" in line)
    ]
    assert order.index("a") == 0
    assert (
        bench.shown.index("a done")
        < bench.shown.index("b runs")
        < bench.shown.index("b done")
        < bench.shown.index("c runs")
    )


def test_what_runs_beside_a_failed_stage_ends_and_nothing_else_begins(bench: Bench) -> None:
    (bench.code / "fail-b").touch()
    (bench.code / "linger-d").touch()
    with pytest.raises(StageFailed, match="stage b failed"):
        run(bench, 2, {"b": ["d"], "d": ["b"]})
    states = {name: entry.state for name, entry in Manifest(bench.folder, "bench").stages.items()}
    assert states == {"a": "done", "b": "failed", "d": "done"}


def test_a_signal_ends_all_that_run(bench: Bench) -> None:
    def stop() -> None:
        until = time.monotonic() + 60
        while not all((bench.code / f"began-{name}").exists() for name in "bd") and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    with stop_signals():
        threading.Thread(target=stop).start()
        with pytest.raises(Stopped):
            run(bench, 2, {"b": ["never"], "d": ["never"]})
    states = {name: entry.state for name, entry in Manifest(bench.folder, "bench").stages.items()}
    assert states == {"a": "done", "b": "started", "d": "started"}
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if _reads(path, str(bench.folder))]
    assert not left


@pytest.mark.parametrize("devices", [None, 1])
def test_a_stage_with_ranks_is_forked_only_where_there_is_no_cuda_device(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, devices: int | None
) -> None:
    """Otherwise torchrun starts it, and also when the server returns None."""
    asked = []

    def start(server: ForkServer, command: Sequence[str], ranks: int, environment: Mapping[str, str]) -> None:
        asked.append((list(command), ranks))

    # None: torchrun takes over, as after a server that has ended.
    monkeypatch.setattr(ForkServer, "start", start)
    monkeypatch.setattr("ramoe_megatron.recipe.stages.cuda_devices", lambda environment: devices)
    stage = dataclasses.replace(bench.plan()[0], ranks=1)
    with locked(bench.folder):
        manifest = Manifest(bench.folder, "bench")
        manifest.write()
        run_stages([stage], 0, 1, manifest, Console(file=io.StringIO(), width=200))
    assert (bench.folder / "a.txt").read_text() == "10"
    assert asked == ([] if devices else [(list(stage.command), 1)])


def _reads(path: Path, word: str) -> bool:
    try:
        return word in path.read_text() and path.parent.name != str(os.getpid())
    except OSError:
        return False
