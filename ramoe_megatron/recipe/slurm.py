"""What a recipe needs of Slurm: the script of a stage's job, and calls of sbatch, squeue and scancel."""

import importlib.resources
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.recipe.schema import Recipe
from ramoe_megatron.recipe.sections import WARNING_SECONDS, FlagValue
from ramoe_megatron.recipe.stage import Stage

ASKING_SECONDS = 60.0  # a busy controller may be slow to answer


def script(stage: Stage, recipe: Recipe, folder: Path) -> str:
    """The batch script of a stage's job: sbatch's options, settings, `slurm_job.sh`, and one command for each
    node."""
    slurm = recipe.launch.slurm
    name = stage.name.replace("/", "-")
    options: dict[str, FlagValue] = {
        "job-name": f"{recipe.name}.{name}",
        "nodes": stage.nodes if stage.ranks else 1,
        "ntasks-per-node": 1,
        "output": f"{str(folder / 'logs' / name).replace('%', '%%')}.slurm-%j.out",
        "open-mode": "append",
        "requeue": True,
        "kill-on-invalid-dep": "yes",
        "signal": f"USR1@{WARNING_SECONDS}",
        **{
            key: value
            for key, value in {**slurm.sbatch, **slurm.stages.get(stage.kind, {})}.items()
            if stage.ranks or not _of_gpus(key)
        },
    }
    settings = {"RUN": str(folder), "STAGE": stage.name, "PYTHON": slurm.python or sys.executable}
    settings |= {"CONTAINER_IMAGE": slurm.container_image} if slurm.container_image else {}
    settings |= {"CONTAINER_MOUNTS": ",".join(slurm.container_mounts)} if slurm.container_mounts else {}
    return "\n".join(
        [
            "#!/bin/bash",
            f"# Stage {stage.name} of {folder}, written by `ramoe run --launcher slurm`.",
            *(f"#SBATCH {word}" for word in _words(options)),
            "set -euo pipefail",
            *(
                [
                    "set +u  # scripts of module and conda may use unset variables",
                    *slurm.setup,
                    "set -u",
                ]
                if slurm.setup
                else []
            ),
            "",
            *(f"{key}={shlex.quote(value)}" for key, value in settings.items()),
            "",
            importlib.resources.files("ramoe_megatron.recipe")
            .joinpath("slurm_job.sh")
            .read_text(encoding="utf-8"),
            "ramoe_print RUN STAGE PYTHON",
            'ramoe_run "$PYTHON" -m ramoe_megatron.recipe.job "$RUN" "$STAGE"',
            "",
        ]
    )


def _of_gpus(option: str) -> bool:
    """Whether an option requests a resource that a stage without ranks does not use."""
    return "gpu" in option or option in ("gres", "exclusive", "tres-per-task")


def _words(options: Mapping[str, FlagValue]) -> list[str]:
    return [
        f"--{name}" if value is True else f"--{name}={shlex.quote(str(value))}"
        for name, value in options.items()
        if value is not None and value is not False
    ]


def sbatch(path: Path, after: Sequence[int]) -> int:
    """Submit a script that starts once all jobs in `after` have ended with success. Returns the job's id.

    Raises RamoeError with sbatch's message.
    """
    dependency = [f"--dependency=afterok:{':'.join(map(str, after))}"] if after else []
    said = _ask(["sbatch", "--parsable", *dependency, str(path)], _outside(os.environ))
    return int(said.split(";")[0])


def _outside(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without the variables of a surrounding job or torchrun, which sbatch would pass to the
    new job."""
    kept = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
    own = (
        "MASTER_ADDR",
        "MASTER_PORT",
        "NODE_RANK",
        "GROUP_RANK",
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
    )
    return {
        name: value
        for name, value in environment.items()
        if name in kept or not (name.startswith("SLURM_") or name in own)
    }


def cancel(jobs: Iterable[int]) -> None:
    """Take jobs out of the queue. Raises RamoeError with scancel's message."""
    if words := [str(job) for job in jobs]:
        _ask(["scancel", *words])


@dataclass(frozen=True)
class Queued:
    """A job in the queue: its state (PENDING, RUNNING, COMPLETING, ...), Slurm's reason why it waits, and its
    name."""

    state: str
    nodes: str
    why: str
    name: str = ""


def queue(jobs: Iterable[int]) -> dict[int, Queued]:
    """The given jobs that are still in the queue. Raises RamoeError where Slurm cannot be asked."""
    wanted = {int(job) for job in jobs}
    if not wanted:
        return {}
    # The whole queue is listed: with --jobs, squeue fails once Slurm has forgotten one of the jobs.
    said = _ask(["squeue", "--noheader", "--format=%i|%T|%N|%r|%j"])
    rows = (line.strip().split("|", 4) for line in said.splitlines() if line.strip())
    return {int(job): Queued(*told) for job, *told in rows if job.isdigit() and int(job) in wanted}


def _ask(words: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    if shutil.which(words[0]) is None:
        raise RamoeError(
            f"{words[0]} is not installed here: run this on a machine that submits to Slurm, "
            "or without --launcher slurm"
        )
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=ASKING_SECONDS, check=False, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise RamoeError(
            f"{words[0]} did not answer within {ASKING_SECONDS:.0f} s: is Slurm's controller up (`scontrol "
            "ping`)?"
        ) from error
    if done.returncode:
        reason = done.stderr.strip() or f"exit status {done.returncode}"
        raise RamoeError(f"{shlex.join(words)}: {reason}")
    return done.stdout
