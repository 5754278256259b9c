"""The recipe's `launch`: with how many ranks the stages run, and what Slurm is asked for."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, PositiveInt, field_validator, model_validator

from ramoe_megatron.recipe.section import FlagValue, Names, Section

WARNING_SECONDS = 300  # between the warning signal and the time limit: time for a checkpoint
KINDS = (
    "data", "pretrain", "taxonomy", "profile", "priors", "anchors", "predict", "steer", "finetune", "evaluate", "results", "report",
)  # fmt: skip
# Options of sbatch that a stage's job sets itself; each with what is meant instead.
_OWN = "leave it out"
RESERVED_SBATCH = {
    **dict.fromkeys(("dependency", "kill-on-invalid-dep", "parsable", "output", "open-mode", "requeue", "no-requeue", "job-name"), _OWN),
    **dict.fromkeys(("array", "wrap", "chdir", "hold", "clusters"), _OWN),
    "nodes": "use launch.nodes",
    "ntasks-per-node": "one task a node starts launch.ranks-per-node ranks",
    "ntasks": "one task a node starts launch.ranks-per-node ranks",
}


def _sbatch(options: dict[str, FlagValue]) -> dict[str, FlagValue]:
    for name, value in options.items():
        if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
            raise ValueError(f"{name!r} is no option of sbatch: write its long name without the leading dashes, such as partition")
        if name in RESERVED_SBATCH:
            raise ValueError(f"{name} is set by the job itself; {RESERVED_SBATCH[name]}")
        if name == "signal" and not re.fullmatch(r"USR1@[0-9]+", str(value)):
            raise ValueError(f"signal: expected USR1@SECONDS, the warning that makes a job save before its time limit; found {value!r}")
        if isinstance(value, list):
            raise ValueError(f"{name}: expected one value, as sbatch takes it; found a list")
    return options


def _seconds(time: FlagValue) -> int | None:
    """A time limit as sbatch takes it (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S), in seconds; None for what is no number, such as UNLIMITED."""
    days, _, rest = str(time).rpartition("-")
    if not re.fullmatch(r"\d*", days) or not re.fullmatch(r"\d+(:\d+){0,2}", rest):
        return None
    parts = [int(part) for part in rest.split(":")]
    # after days, hours come first; without, a single number is minutes, and two are minutes and seconds
    hours, minutes, seconds = [*parts, 0, 0][:3] if days else {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return (int(days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds


SbatchOptions = Annotated[dict[str, FlagValue], AfterValidator(_sbatch)]


class Slurm(Section):
    """What `--launcher slurm` asks Slurm for, one job a stage."""

    sbatch: SbatchOptions = {}
    """Options of sbatch by their long names without the dashes, such as partition, account, time, gpus-per-node."""
    stages: dict[str, SbatchOptions] = {}
    """Kind of stage (`finetune`) -> options that differ for it."""

    @field_validator("stages")
    @classmethod
    def _kinds(cls, stages: dict[str, Any]) -> dict[str, Any]:
        if unknown := sorted(set(stages) - set(KINDS)):
            raise ValueError(f"{unknown[0]!r} is no kind of stage; expected one of {', '.join(KINDS)}")
        return stages

    @model_validator(mode="after")
    def _time_to_work(self) -> Self:
        for kind in KINDS:
            options = {**self.sbatch, **self.stages.get(kind, {})}
            limit, warning = _seconds(options.get("time")), int(str(options.get("signal", f"USR1@{WARNING_SECONDS}")).partition("@")[2])
            if limit is not None and limit <= warning:
                raise ValueError(
                    f"a {kind} job with the time limit {options['time']} would be warned at its start: signal is USR1@{warning}, "
                    f"{warning} s before the limit; raise time, or lower signal"
                )
        return self

    setup: list[str] = []
    """Shell lines at the start of each job, such as `module load cuda`."""
    python: str | None = None
    """Python on the nodes (in the container); by default the one that submits."""
    container_image: str | None = None
    """Image for pyxis/enroot (`srun --container-image`)."""
    container_mounts: Names = []
    """HOST:INSIDE pairs; the run folder and the data need their host paths inside too."""


class Launch(Section):
    """The processes that every Megatron stage is started with."""

    ranks_per_node: PositiveInt = 1
    nodes: PositiveInt = 1
    launcher: Literal["local", "slurm"] = "local"
    """local: here, one stage after another; slurm: one job a stage, submitted as a chain."""
    at_once: PositiveInt = 1
    """local: stages that run side by side where none waits for another, such as the fine-tunes. They share the cores (GPUs are not dealt
    out: with GPUs, leave it at 1)."""
    slurm: Slurm = Slurm()
    batch_tokens: PositiveInt | None = None
    """Tokens of a micro-batch on one rank, in the stages that score; the jobs' own default when left out."""
