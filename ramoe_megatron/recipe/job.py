"""`python -m ramoe_megatron.recipe.job RUN STAGE`: what each node of a stage's Slurm job runs.

Each node first checks itself (`recipe.doctor_environment`). Node 0 then checks whether the stage's result is
up to date, and leads the stage; the other nodes start their ranks when node 0 asks (`recipe.nodes`). The
ranks check the command line and the inputs at their start, before the model is built. Exit status 75 means
that the stage stopped before the time limit and has to be started again. Exit status 2 means an error that
the user has to correct.
"""

import os
import sys
from pathlib import Path

from rich.console import Console

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.unfinished import STATUS
from ramoe_megatron.recipe.chain import read_stage
from ramoe_megatron.recipe.doctor import findings_table
from ramoe_megatron.recipe.doctor_environment import environment_findings
from ramoe_megatron.recipe.launcher import Place
from ramoe_megatron.recipe.manifest import Manifest, locked
from ramoe_megatron.recipe.nodes import Leader, follow
from ramoe_megatron.recipe.processes import Stopped, stop_signals
from ramoe_megatron.recipe.stage import Stage
from ramoe_megatron.recipe.stages import StageFailed, run_stages

LOCK_SECONDS = 120.0  # how long a requeued job waits for its first attempt, which may still hold the lock


def main(arguments: list[str]) -> int:
    """Run the stage on this node. Returns the exit status."""
    folder, name = Path(arguments[0]), arguments[1]
    try:
        with stop_signals():
            return _run(folder, name)
    except RamoeError as error:
        print(f"ramoe: error: {error}", file=sys.stderr, flush=True)
        return 2
    except StageFailed as failure:
        print(f"ramoe: {failure.text}", file=sys.stderr, flush=True)
        return failure.status
    except Stopped as stop:
        print(f"ramoe: stopped by {stop}", file=sys.stderr, flush=True)
        return STATUS if stop.resumes else 130


def _run(folder: Path, name: str) -> int:
    stage, document = read_stage(folder, name)
    place = Place.from_environment(stage.nodes if stage.ranks else 1, os.environ)
    console = Console(width=160, force_terminal=False)
    if place.node > 0:
        _examine(stage, place, folder, console)
        return follow(place, folder)
    with locked(folder / ".locks", name.replace("/", "-"), LOCK_SECONDS):
        manifest, forced = Manifest(folder, document["recipe"]), bool(document.get("forced"))
        if forced or manifest.reason_to_run(stage):
            _examine(stage, place, folder, console)
        with Leader(place) as leader:
            run_stages([stage], 0, 1, manifest, console, forced, place, leader)
    return 0


def _examine(stage: Stage, place: Place, folder: Path, console: Console) -> None:
    """Check this node, and raise RamoeError when a finding is fatal.

    Node 0 prints the findings; other nodes print them only when one is fatal.
    """
    try:
        found = environment_findings(max(1, stage.ranks), place.nodes, folder, os.environ)
    except Stopped as stop:
        if stop.resumes:  # requeued, the job would be warned at its start every time
            raise RamoeError(
                "the job was warned of its time limit before the stage began: "
                "raise time, or lower signal, under launch.slurm.sbatch"
            ) from stop
        raise
    fatal = [finding for finding in found if finding.state == "fatal"]
    if place.node == 0 or fatal:
        console.print(findings_table(found))
    if fatal:
        first = f"{fatal[0].check}: {fatal[0].found}"
        raise RamoeError(
            f"{first} ({stage.name} was not started on node {place.node}; "
            "the table above lists every finding)"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
