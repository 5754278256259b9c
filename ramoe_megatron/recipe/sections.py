"""The sections of a recipe, with the keys as in YAML (`max-new-tokens`).

`alignment`, `selection` and `steering` are the options of the jobs: the flags `--ramoe-NAME` with the same
names, types, defaults and rules.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    create_model,
    field_validator,
    model_validator,
)

from ramoe_megatron.mcore.align.options import RoutingAlignmentConfig
from ramoe_megatron.mcore.select.selective_options import SelectiveOptions
from ramoe_megatron.mcore.steer.steering_options import SteeringOptions

Scalar = bool | int | float | str
FlagValue = Scalar | list[Scalar] | None


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def _as_list(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_as_list)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


# Flags that the plan itself sets, each with the recipe key to use instead.
RESERVED_FLAGS = {
    "load": "checkpoint (a base model), or --out (the run folder)",
    "save": "--out (the run folder)",
    "pretrained-checkpoint": "checkpoint",
    "finetune": "checkpoint",
    "tensorboard-dir": "--out (the run folder)",
    "seed": "seed (data and base model) and seeds (fine-tuning)",
}


def _flags(flags: dict[str, FlagValue]) -> dict[str, FlagValue]:
    for name, value in flags.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            raise ValueError(
                f"{name!r} is not a flag name: write Megatron's flag without the leading dashes, "
                "such as num-layers"
            )
        if name in RESERVED_FLAGS:
            raise ValueError(f"{name} is set by the plan itself; use {RESERVED_FLAGS[name]}")
        if name.startswith("ramoe-"):
            raise ValueError(
                f"{name} is set by the plan itself; use the recipe's data, taxonomy, "
                "profile or alignment section"
            )
        if value == []:
            raise ValueError(f"{name} is an empty list; use null to leave the flag out")
        if str(value).lower() in ("yes", "no", "on", "off"):
            raise ValueError(f"{name} is {value!r}; write true for a bare flag, false to leave it out")
    return flags


Flags = Annotated[dict[str, FlagValue], AfterValidator(_flags)]


class Section(BaseModel):
    """A part of a recipe. Unknown keys are errors; keys are written with dashes."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, alias_generator=_kebab, use_attribute_docstrings=True
    )


_OF_BENCHMARK = ("source", "shots", "chat", "between", "splits", "limit")
"""Keys of `Data` that only a benchmark takes."""


class Data(Section):
    """Where the examples come from: exactly one of `world`, `sib200`, `benchmark` and `files`."""

    world: dict[str, Any] | None = None
    """Settings of the embedded world: the fields of `ramoe_megatron.data.world.WorldConfig`. `{}` keeps every
    default."""
    sib200: dict[str, Any] | None = None
    """Settings of SIB-200: the fields of `ramoe_megatron.data.benchmarks.sib200.SibConfig`. `source` is the
    folder that holds a folder per language."""
    benchmark: str | list[dict[str, Any]] | None = None
    """Name of a published benchmark (`ramoe data --list`), or a list of several: sections with the fields of
    `ramoe_megatron.data.benchmarks.engine.BenchmarkConfig`. The next six keys are their defaults."""
    source: str | None = None
    """Benchmark: its folder as its authors publish it, or its name on the Hugging Face hub."""
    shots: NonNegativeInt = 0
    """Benchmark: number of answered examples before each question, from another split than "test"."""
    chat: bool = False
    """Benchmark: write chats (`messages`) instead of prompts and responses."""
    between: Literal["line", "space", "none"] = "line"
    """Benchmark: what is between prompt and response. It depends on the tokenizer (docs/data.md)."""
    splits: dict[str, float | str] = {}
    """Benchmark: split that it lacks -> share of the ids of "test", or another split that it has."""
    limit: PositiveInt | None = None
    """Benchmark: maximum number of ids in each split. Default: all."""
    files: Names | None = None
    """Parallel JSONL: files, folders, or the name of a data set on the Hugging Face hub."""
    general: Names | None = None
    """General English text for the expert profile. Required with `files`; generated data include it. Default
    with `benchmark`: its benchmarks of general text, or else names and lists from CLDR."""
    pretrain: Names | None = None
    """Text to train the base model on. Required with `files` or `benchmark`, and `pretrain`. Generated
    data include it."""
    columns: dict[str, str] = {}
    """Field of the parallel format -> column in the files."""
    weights: dict[str, NonNegativeFloat] = {}
    """Pattern TASK/LANGUAGE -> share of the fine-tuning samples. Default: seeded epochs over all examples."""
    pretrain_weights: dict[str, NonNegativeFloat] = {}
    """Pattern TASK/LANGUAGE -> share of the base model's training samples. Default: the shares of the
    generated data."""
    anchor: str | None = None
    """The language whose routing is the target. Default: "en", or "eng_Latn" with `sib200`."""
    languages: Names | None = None
    """Target languages. Default: all that the data contain."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        kinds = ("world", "sib200", "benchmark", "files")
        given = [name for name in kinds if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "give exactly one of world, sib200, benchmark and files; "
                f"found {', '.join(given) or 'none of them'}"
            )
        for name in _OF_BENCHMARK:
            if self.benchmark is None and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} belongs to benchmark; {given[0]} does not take it")
        if self.files is not None and not self.general:
            raise ValueError(
                "files needs general: general English text, against which the task experts are found"
            )
        if self.generates and (self.general or self.pretrain):
            raise ValueError(f"general and pretrain belong to files; {given[0]} brings its own")
        if self.sib200 is not None and not isinstance(self.sib200.get("source"), str):
            raise ValueError("sib200 needs source: the folder that holds a folder per language")
        return self

    @property
    def generates(self) -> bool:
        """Whether the run makes the data with a tokenizer and text to train a base model on."""
        return self.world is not None or self.sib200 is not None

    @property
    def benchmarks(self) -> list[dict[str, Any]]:
        """The options of each benchmark, with those of this section as defaults."""
        named = [{"benchmark": self.benchmark}] if isinstance(self.benchmark, str) else (self.benchmark or [])
        languages = [self.anchor_language, *self.languages] if self.languages else []
        own = {name: getattr(self, name) for name in _OF_BENCHMARK if getattr(self, name) is not None}
        return [{"languages": languages, **own, **entry} for entry in named]

    @property
    def anchor_language(self) -> str:
        """The anchor, with its default filled in."""
        return self.anchor or str(
            (self.sib200 or {}).get("anchor") or ("en" if self.sib200 is None else "eng_Latn")
        )


class OptionsSection(Section):
    """A section whose keys are the fields of an option dataclass."""

    made_of: ClassVar[type]

    def options(self, **files: str | None) -> Any:
        """The option dataclass of these keys and of the files that the plan names.

        Raises RamoeError by the dataclass's own rules.
        """
        names = {field.name for field in dataclasses.fields(self.made_of)}  # type: ignore[arg-type]
        return self.made_of(
            **{**{name: getattr(self, name) for name in type(self).model_fields if name in names}, **files}
        )


def _no_boolean(value: Any) -> Any:
    """Reject booleans, because true would pass as the number 1."""
    if isinstance(value, bool):
        raise ValueError("expected a number or a word")
    return value


def section_of(options: type, without: Collection[str] = ()) -> Any:
    """The section of an option dataclass, with a key for each field except those `without` a key, which name
    files."""
    hints = get_type_hints(options)
    keys: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        if field.name not in without:
            hint = hints[field.name]
            plain = hint is bool or bool in get_args(hint)
            keys[field.name] = (
                hint if plain else Annotated[hint, BeforeValidator(_no_boolean)],
                field.default,
            )
    made = create_model(f"{options.__name__}Section", __base__=OptionsSection, **keys)
    made.made_of = options  # type: ignore[attr-defined]
    return made


AlignmentKeys: Any = section_of(RoutingAlignmentConfig, without=("experts", "taxonomy", "priors"))
SelectionKeys: Any = section_of(SelectiveOptions, without=("usage",))
SteeringKeys: Any = section_of(SteeringOptions, without=("steering",))


class AlignmentSection(AlignmentKeys):
    """The alignment loss (`--ramoe-NAME`). The plan names the files. `layers: outside`, without a range,
    means the layers outside the recipe's own `layers`."""

    target: Literal["profile", "example", "paired"] = "example"
    """The routing that samples are aligned to (`--ramoe-target`): profile (the task's mean English pattern),
    example (the English view of the same example, as the model routed it before training) or paired (that
    view at the current weights)."""
    layer_weights: Literal["equal", "divergence"] = "equal"
    """divergence: weight the layers by the divergence curve of the profile (`--ramoe-layer-weights`)."""
    select_tokens: Literal["all", "prompt", "response", "last"] = "all"
    """Tokens of the task data that are counted to select the task experts. all is the paper's choice; the
    others are ours."""
    anchors: Names = []
    """Further anchor languages, in order of preference after data.anchor. Each example is pulled to the first
    one in which the model answers it correctly. Needs `target: example` (our own option)."""

    @field_validator("anchors")
    @classmethod
    def _name_folders(cls, anchors: list[str]) -> list[str]:
        if len(set(anchors)) < len(anchors):
            raise ValueError(f"names one twice: {', '.join(anchors)}")
        if odd := [name for name in anchors if not re.fullmatch(r"\w[\w.-]*", name)]:
            raise ValueError(
                f"{odd[0]!r} names a folder of the run: expected only letters, digits, _, . and -"
            )
        return anchors

    def options(self, **files: str | None) -> RoutingAlignmentConfig:
        """The flags of this alignment. Raises RamoeError by their own rules."""
        return super().options(**{"layer_weights": None, **files})


class SelectionSection(SelectionKeys):
    """Which weights are trained (`--ramoe-NAME`). All others are frozen."""


class SteeringSection(SteeringKeys):
    """Routing steering at inference (`--ramoe-NAME`; arXiv 2510.04694)."""

    search: bool = False
    """Search tau, strength and layers (the ranges in `zones`) on the validation split, instead of fixing
    them."""
    zones: Names | None = None
    """With `search`: ranges of layers to try, such as [auto, 0.25-0.75]. Default: only `steer-layers`."""

    @model_validator(mode="after")
    def _searched(self) -> Self:
        if self.zones and not self.search:
            raise ValueError(
                "steering.zones is a list for the search: set steering.search, or give steer-layers instead"
            )
        return self


WARNING_SECONDS = 300  # between the warning and the time limit, for saving a checkpoint
KINDS = (
    "data",
    "pretrain",
    "convert",
    "taxonomy",
    "profile",
    "priors",
    "anchors",
    "predict",
    "steer",
    "finetune",
    "evaluate",
    "results",
    "report",
)
RANKED = ("pretrain", "taxonomy", "profile", "priors", "predict", "steer", "finetune", "evaluate")
"""Kinds of stages that start ranks of Megatron."""


def _refuse_unknown(given: Iterable[str], kinds: Sequence[str], told: str) -> None:
    """Raise ValueError for a name that is none of the kinds."""
    if unknown := sorted(set(given) - set(kinds)):
        raise ValueError(f"{unknown[0]!r} {told}; expected one of {', '.join(kinds)}")


# Options of sbatch that a stage's job sets itself, each with what to do instead.
_OWN = "leave it out"
RESERVED_SBATCH = {
    **dict.fromkeys(
        (
            "dependency",
            "kill-on-invalid-dep",
            "parsable",
            "output",
            "open-mode",
            "requeue",
            "no-requeue",
            "job-name",
        ),
        _OWN,
    ),
    **dict.fromkeys(("array", "wrap", "chdir", "hold", "clusters"), _OWN),
    "nodes": "use launch.nodes",
    "ntasks-per-node": "one task a node starts launch.ranks-per-node ranks",
    "ntasks": "one task a node starts launch.ranks-per-node ranks",
}


def _sbatch(options: dict[str, FlagValue]) -> dict[str, FlagValue]:
    for name, value in options.items():
        if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
            raise ValueError(
                f"{name!r} is not an option of sbatch: write its long name without the leading dashes, "
                "such as partition"
            )
        if name in RESERVED_SBATCH:
            raise ValueError(f"{name} is set by the job itself; {RESERVED_SBATCH[name]}")
        if name == "signal" and not re.fullmatch(r"USR1@[0-9]+", str(value)):
            raise ValueError(
                "signal: expected USR1@SECONDS, the warning that makes a job save before its time limit; "
                f"found {value!r}"
            )
        if isinstance(value, list):
            raise ValueError(f"{name}: expected one value, as sbatch takes it; found a list")
    return options


def _seconds(time: FlagValue) -> int | None:
    """A time limit in seconds, from sbatch's formats M, M:S, H:M:S, D-H, D-H:M and D-H:M:S.

    None for a value that is no number, such as UNLIMITED.
    """
    days, _, rest = str(time).rpartition("-")
    if not re.fullmatch(r"\d*", days) or not re.fullmatch(r"\d+(:\d+){0,2}", rest):
        return None
    parts = [int(part) for part in rest.split(":")]
    # After days, hours come first. Without days, one number is minutes, and two are minutes and seconds.
    hours, minutes, seconds = (
        [*parts, 0, 0][:3] if days else {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    )
    return (int(days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds


SbatchOptions = Annotated[dict[str, FlagValue], AfterValidator(_sbatch)]


class Slurm(Section):
    """Resources that `--launcher slurm` requests. Each stage is one job."""

    sbatch: SbatchOptions = {}
    """Options of sbatch by their long names without dashes, such as partition, account, time, gpus-per-node.
    """
    stages: dict[str, SbatchOptions] = {}
    """Kind of stage, such as `finetune` -> options that differ for it."""

    @field_validator("stages")
    @classmethod
    def _kinds(cls, stages: dict[str, Any]) -> dict[str, Any]:
        _refuse_unknown(stages, KINDS, "is not a kind of stage")
        return stages

    @model_validator(mode="after")
    def _time_to_work(self) -> Self:
        for kind in KINDS:
            options = {**self.sbatch, **self.stages.get(kind, {})}
            limit, warning = (
                _seconds(options.get("time")),
                int(str(options.get("signal", f"USR1@{WARNING_SECONDS}")).partition("@")[2]),
            )
            if limit is not None and limit <= warning:
                raise ValueError(
                    f"a {kind} job with the time limit {options['time']} would be warned at its start: "
                    f"signal is USR1@{warning}, {warning} s before the limit; raise time, or lower signal"
                )
        return self

    setup: list[str] = []
    """Shell lines that each job runs first, such as `module load cuda`."""
    python: str | None = None
    """Python on the nodes, or in the container. Default: the Python that submits."""
    container_image: str | None = None
    """Image for pyxis/enroot (`srun --container-image`)."""
    container_mounts: Names = []
    """HOST:INSIDE pairs. The run folder and the data must have the same paths inside as on the host."""


class Launch(Section):
    """The processes of every Megatron stage."""

    ranks_per_node: PositiveInt = 1
    """Ranks on each node."""
    ranks: dict[str, PositiveInt] = {}
    """Stage kind, such as pretrain -> ranks on each node of its stages, in place of `ranks-per-node`."""
    nodes: PositiveInt = 1
    """Number of nodes."""
    launcher: Literal["local", "slurm"] = "local"
    """local: run the stages here, one after another. slurm: submit a chain of jobs, one for each stage."""
    at_once: PositiveInt = 1
    """With `launcher: local`, how many independent stages, such as fine-tuning runs, run side by side. They
    share the cores. GPUs are not divided among them: with GPUs, leave it at 1."""
    slurm: Slurm = Slurm()
    """Settings of `launcher: slurm`."""
    batch_tokens: PositiveInt | None = None
    """Tokens of a micro-batch on one rank in the stages that score. Default: the jobs' own default."""

    @field_validator("ranks")
    @classmethod
    def _with_ranks(cls, ranks: dict[str, int]) -> dict[str, int]:
        _refuse_unknown(ranks, RANKED, "is no kind of stage with ranks")
        return ranks

    def ranks_of(self, kind: str) -> int:
        """Ranks on each node of the stages of a kind."""
        return self.ranks.get(kind, self.ranks_per_node)
