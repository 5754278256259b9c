"""`ramoe run --launcher slurm`: one Slurm job for each stage.

A stage's job starts after the jobs of the stages whose results it reads. RUN/slurm/STAGE.sbatch is the script
of a stage's job, RUN/slurm/STAGE.json holds what `recipe.job` runs in it, and RUN/slurm.json maps each stage
to its job.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ramoe_megatron.artifacts.files import atomic_write_text, load_document, save_document
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.recipe import slurm
from ramoe_megatron.recipe.manifest import Entry, Manifest
from ramoe_megatron.recipe.schema import Recipe
from ramoe_megatron.recipe.stage import Stage


def links(stages: Sequence[Stage], manifest: Manifest, force_first: bool) -> dict[str, list[str]]:
    """The stages to submit, each with the submitted stages that it waits for: those that write what it reads.

    A stage with an up-to-date result is left out, unless a stage that it reads from runs again. In that case
    its job checks whether what it reads has changed.
    """
    found: dict[str, list[str]] = {}
    makers: dict[Path, str] = {}
    for place, stage in enumerate(stages):
        after = sorted({makers[path] for path in stage.inputs if path in makers})
        if after or manifest.reason_to_run(stage) or (force_first and place == 0):
            found[stage.name] = after
            makers |= dict.fromkeys(stage.outputs, stage.name)
    return found


def submit_chain(
    stages: Sequence[Stage],
    after: Mapping[str, Sequence[str]],
    recipe: Recipe,
    manifest: Manifest,
    console: Console,
    forced: str | None,
) -> None:
    """Write and submit the jobs of the stages in `after`, the result of `links`.

    Args:
        forced: name of the stage that runs even if its result is up to date.

    Raises:
        RamoeError: sbatch refused a job; the message is sbatch's. The jobs submitted before it are cancelled.
    """
    folder, jobs = manifest.folder, dict[str, int]()
    (folder / "logs").mkdir(exist_ok=True)  # Slurm does not make it, and the job would end without a message
    try:
        for stage in (stage for stage in stages if stage.name in after):
            path = _path(folder, stage.name)
            body = {"recipe": recipe.name, "stage": stage.document(), "forced": stage.name == forced}
            save_document(path.with_suffix(".json"), "ramoe-stage", body)
            atomic_write_text(path, slurm.script(stage, recipe, folder))
            waits = [jobs[name] for name in after[stage.name]]
            jobs[stage.name] = slurm.sbatch(path, waits)
            _save(folder, recipe.name, jobs)
            waiting = f" after {', '.join(map(str, waits))}" if waits else ""
            console.print(f"{jobs[stage.name]}  {stage.name}{waiting}", soft_wrap=True, highlight=False)
    except BaseException:
        try:
            slurm.cancel(jobs.values())
        except RamoeError as error:
            console.print(
                f"the jobs submitted so far could not be cancelled: {error}",
                soft_wrap=True,
                highlight=False,
                markup=False,
            )
        raise
    done = len(stages) - len(after)
    up_to_date = f", {done} stages are up to date" if done else ""
    console.print(
        f"{len(jobs)} jobs submitted{up_to_date}. Follow them with: ramoe status {folder}",
        soft_wrap=True,
        highlight=False,
    )


def tell(
    stages: Sequence[Stage],
    after: Mapping[str, Sequence[str]],
    recipe: Recipe,
    manifest: Manifest,
    console: Console,
) -> None:
    """The dry run: print the scripts and the commands that would submit them."""
    for stage in stages:
        if stage.name not in after:
            console.print(f"[bold]{stage.name}[/bold]: up to date", soft_wrap=True, highlight=False)
            continue
        console.print(
            f"[bold]{stage.name}[/bold]: {_path(manifest.folder, stage.name)}",
            soft_wrap=True,
            highlight=False,
        )
        waits = (
            [f"--dependency=afterok:{':'.join(f'<{name}>' for name in after[stage.name])}"]
            if after[stage.name]
            else []
        )
        words = ["sbatch", "--parsable", *waits, str(_path(manifest.folder, stage.name))]
        console.print(f"  {' '.join(words)}", soft_wrap=True, highlight=False, markup=False)
        console.print(
            f"  runs: {shlex.join(('python', '-m', *stage.arguments()))}",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
        console.print(
            slurm.script(stage, recipe, manifest.folder), soft_wrap=True, highlight=False, markup=False
        )


def submitted(folder: Path) -> dict[str, int]:
    """Stage -> id of its last submitted job, in the order of submission. Empty without a chain."""
    path = folder / "slurm.json"
    return dict(load_document(path, "ramoe-slurm")["jobs"]) if path.exists() else {}


def live(folder: Path, entries: Mapping[str, Entry]) -> dict[int, slurm.Queued]:
    """The jobs of this folder's chain that are in Slurm's queue.

    Slurm is not asked about a job whose stage is recorded as done. It is asked about a failed job, which may
    be queued again after its node was lost.

    Raises RamoeError where Slurm has to be asked and does not answer.
    """
    jobs = submitted(folder)
    done = {
        stage
        for stage, job in jobs.items()
        if (e := entries.get(stage)) and e.job == str(job) and e.state == "done"
    }
    return slurm.queue(job for stage, job in jobs.items() if stage not in done)


def forget(folder: Path) -> None:
    """Remove slurm.json once none of its jobs is in the queue. A later local run does not belong to that
    chain."""
    (folder / "slurm.json").unlink(missing_ok=True)


def refuse_live(folder: Path, manifest: Manifest) -> None:
    """Raise RamoeError while jobs of an earlier `ramoe run --launcher slurm` of this folder are queued."""
    try:
        jobs = live(folder, manifest.stages)
    except RamoeError as error:
        raise RamoeError(
            f"{folder / 'slurm.json'} names jobs that may still be in a queue, and Slurm cannot be asked: "
            f"{error}. If they have ended, remove that file"
        ) from error
    if jobs:
        named = ", ".join(f"{job} ({stage})" for stage, job in submitted(folder).items() if job in jobs)
        raise RamoeError(
            f"{folder} has jobs in Slurm's queue: {named}. Wait for them (ramoe status {folder}), "
            f"or take them out: scancel {' '.join(map(str, jobs))}"
        )


def read_stage(folder: Path, name: str) -> tuple[Stage, dict[str, Any]]:
    """The stage of a job, and all of RUN/slurm/STAGE.json.

    Raises RamoeError when the file is absent, has another format or is incomplete.
    """
    path = _path(folder, name).with_suffix(".json")
    document = load_document(path, "ramoe-stage")
    try:
        return Stage.from_document(document["stage"]), document
    except (KeyError, TypeError) as error:
        raise RamoeError(
            f"{path}: the description of the stage is incomplete ({error}): submit the recipe again"
        ) from error


def _path(folder: Path, name: str) -> Path:
    return folder / "slurm" / f"{name.replace('/', '-')}.sbatch"


def _save(folder: Path, recipe: str, jobs: Mapping[str, int]) -> None:
    save_document(folder / "slurm.json", "ramoe-slurm", {"recipe": recipe, "jobs": dict(jobs)})
