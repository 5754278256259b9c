"""The keys of a recipe: one pydantic model for each section, with the keys as in YAML (`max-new-tokens`).

`model`, `train`, `parallel`, `pretrain` and `tokenizer` hold Megatron's flags under Megatron's names without
the leading dashes. `true` is a bare flag, `false` or `null` leaves the flag out, and a list is several
values.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.select.selective_options import READS_USAGE
from ramoe_megatron.recipe.methods import Method
from ramoe_megatron.recipe.sections import (
    AlignmentSection,
    Data,
    Flags,
    FlagValue,
    Launch,
    Name,
    Names,
    Section,
    SelectionSection,
    SteeringSection,
)

RULE = r"^(tau=-?[0-9.]+|top-m=[0-9]+)$"
KEYS = {
    f"--ramoe-{key.alias}": f"{section}.{key.alias}"
    for section, kind in (
        ("alignment", AlignmentSection),
        ("selection", SelectionSection),
        ("steering", SteeringSection),
    )
    for key in kind.model_fields.values()
}
"""Flag -> key of a recipe with the same meaning."""


def _count_to_seeds(value: Any) -> Any:
    return (
        list(range(1, value + 1)) or [value]
        if isinstance(value, int) and not isinstance(value, bool)
        else value
    )


class Taxonomy(Section):
    """Scoring of every parallel example in the anchor and the target languages."""

    max_new_tokens: PositiveInt | None = None
    """Maximum length of a generated answer in tokens, its end token included. Default: 16, or the length of
    the longest gold answer if that is larger."""
    splits: Names = ["train", "test"]
    """Splits to score."""


class Profile(Section):
    """Task experts, English routing patterns and the divergence curve."""

    select: Annotated[str, Field(pattern=RULE)] = "tau=0.3"
    """Rule that selects the task experts: tau=NUMBER or top-m=COUNT."""
    split: str = "train"
    """Split on which the profile is measured."""
    tokens: Literal["prompt", "response", "all", "last"] | None = None
    """Tokens over which the saved priors are pooled. Default: those that the methods need. The divergence
    curve always pools over all tokens of a sequence."""
    layers: str = "auto"
    """Alignment zone: auto (from the divergence curve), FIRST-LAST or FRACTION-FRACTION."""
    experts: str | None = None
    """Expert file of another run. Alignment and steering use it instead of this run's own file, to test
    transfer between sets of languages."""
    save_priors: bool | None = None
    """Save each example's English routing. Default: only if a method's target is `example`."""
    priors_for: Literal["all", "ci"] = "all"
    """Examples and layers of the saved English routing. all: every example and MoE layer. ci: only examples
    that are right in English, in the zone's layers. This is all that the methods read, unless one aligns
    other layers or examples, refreshes the taxonomy, or has several anchors."""
    priors_dtype: Literal["float32", "bfloat16"] = "float32"
    """Numbers of the saved English routing. bfloat16 halves the file."""


class Evaluate(Section):
    """Accuracy before and after fine-tuning."""

    split: str = "test"
    """Split on which accuracy is measured."""
    max_new_tokens: PositiveInt | None = None
    """Maximum length of a generated answer in tokens, its end token included. Default: the taxonomy's value.
    """


class Grid(Section):
    """Settings of a method to try."""

    lr: list[PositiveFloat] = []
    """Learning rates. Default: those of `tune`."""
    coeff: list[PositiveFloat] = []
    """Coefficients of the alignment loss. Default: those of `tune`."""


class Tune(Section):
    """How `ramoe compare` chooses the settings of each trained method on a validation split before it
    compares. `ramoe run` refuses a recipe with this section."""

    lr: Annotated[list[PositiveFloat], Field(min_length=1)]
    """Learning rates to try."""
    coeff: list[PositiveFloat] = []
    """Coefficients to try, for the methods that align. Default: each method's own coefficient."""
    methods: dict[str, Grid] = {}
    """Method -> a grid of its own, such as the coefficients of a method whose loss has another scale."""
    budget: PositiveInt
    """Trials of each method. From a larger grid they are drawn at random; a smaller one is refused, because
    every method gets the same number of trials."""
    split: str = "validation"
    """Split on which the trials are compared. The comparison itself must use another one."""
    seeds: Annotated[list[int], Field(min_length=1)] = [101]
    """Seeds of the trials' fine-tuning runs. The comparison must use others."""
    bases: list[int] = []
    """Seeds of the data and base models of the trials. The comparison must use others. Required with
    `pretrain`."""


def _named(value: Any) -> Any:
    return (
        [{"name": item} if isinstance(item, str) else item for item in value]
        if isinstance(value, list)
        else value
    )


HUGGING_FACE = "hf:"
"""Begins the `checkpoint` of a recipe that is a Hugging Face folder."""


class Recipe(Section):
    """One experiment, from data to report."""

    name: Name
    """Name of the experiment, and of its run folder `runs/NAME`."""
    seed: int = 1
    """Seed of the generated data and of the base model's training."""
    checkpoint: str | None = None
    """Megatron checkpoint of the base model, or hf:FOLDER, a Hugging Face folder that is converted first.
    Give either this key or `pretrain`."""
    model: Flags
    """Megatron's flags of the model. With `checkpoint`, the flags that it was trained with. With hf:FOLDER,
    the folder's own flags, changed by those given here."""
    train: Flags
    """Megatron's flags of the fine-tuning runs."""
    parallel: Flags = {}
    """Megatron's flags of the parallel layout. A change of the layout reruns nothing."""
    pretrain: Flags | None = None
    """Megatron's flags of the base model's training, in addition to `train`. Give either this key or
    `checkpoint`."""
    tokenizer: Flags | None = None
    """Megatron's flags of the tokenizer. Default: the SentencePiece model of the generated data."""
    data: Data
    """Where the examples come from."""
    taxonomy: Taxonomy = Taxonomy()
    """How the base model is scored before fine-tuning."""
    profile: Profile = Profile()
    """How task experts, English routing and the zone are found."""
    alignment: AlignmentSection = AlignmentSection()
    """The alignment loss of the methods that align."""
    selection: SelectionSection = SelectionSection()
    """Budget and share for the methods that train only selected experts."""
    steering: SteeringSection = SteeringSection()
    """Settings of the methods that steer."""
    methods: Annotated[list[Method], BeforeValidator(_named), Field(min_length=1)]
    """Methods to compare: names that `ramoe methods` lists, or sections with a `name` and changes."""
    seeds: Annotated[list[int], BeforeValidator(_count_to_seeds), Field(min_length=1)] = [1]
    """Seeds of the fine-tuning runs. A single number n means 1 to n."""
    evaluate: Evaluate = Evaluate()
    """How the results are measured."""
    tune: Tune | None = None
    """Settings to try for each method before a comparison."""
    launch: Launch = Launch()
    """Nodes, ranks, and how they are started."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.checkpoint is None) == (self.pretrain is None):
            found = "neither" if self.checkpoint is None else "both"
            raise ValueError(
                f"give one of checkpoint (a base model) and pretrain (flags to train one); found {found}"
            )
        if not self.data.generates:
            given = "data.files" if self.data.files is not None else "data.benchmark"
            if self.tokenizer is None:
                raise ValueError(
                    f"{given} needs tokenizer: Megatron's flags, such as tokenizer-type and tokenizer-model"
                )
            if self.pretrain is not None and not self.data.pretrain:
                raise ValueError(
                    f"pretrain with {given} needs data.pretrain: the files to train the base model on"
                )
        for what, values in (("methods", [method.name for method in self.methods]), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{what} names one twice: {', '.join(map(str, values))}")
        if self.launch.at_once > 1 and (self.launch.nodes > 1 or self.train.get("exit-signal-handler")):
            raise ValueError("launch.at-once is for one node, and without exit-signal-handler: set it to 1")
        if self.selection.train != "all" or self.steering.steer is not None:
            raise ValueError(
                "selection.train and steering.steer belong to a method: "
                "name a method that has them (router-only, steering-soft), "
                "or give them in the method's own section"
            )
        if low := [seed for seed in self.seeds if seed < 1]:
            raise ValueError(f"seeds: found {low[0]}, expected whole numbers from 1, as Megatron requires")
        names = [method.name for method in self.methods]
        for method in self.methods:
            self._check_method(method, names)
        if self.tune is not None:
            self._check_tune(self.tune, names)
        return self

    def _check_tune(self, tune: Tune, names: Sequence[str]) -> None:
        if both := sorted({*tune.seeds} & {*self.seeds}):
            raise ValueError(
                f"tune.seeds and seeds both have {', '.join(map(str, both))}: tune on seeds that the "
                "comparison does not use"
            )
        if tune.split == self.evaluate.split:
            raise ValueError(
                f"tune.split and evaluate.split are both {tune.split!r}: tune on a split that the comparison "
                "does not use"
            )
        if unknown := [name for name in tune.methods if name not in names]:
            raise ValueError(
                f"tune.methods: {', '.join(unknown)} is no method of this recipe ({', '.join(names)})"
            )
        if self.pretrain is not None and not tune.bases:
            raise ValueError(
                "tune.bases is missing: give seeds of base models to tune on, such as [101], which the "
                "comparison does not use"
            )
        if self.pretrain is None and tune.bases:
            raise ValueError("tune.bases needs pretrain: checkpoint gives one base model; leave it out")

    def _check_method(self, method: Method, names: Sequence[str]) -> None:
        alignment, selection, told = (
            self.alignment_of(method),
            self.selection_of(method),
            f"method {method.name}",
        )
        if method.presets and method.aligns and alignment.coeff == 0 and "coeff-zero" not in method.presets:
            raise ValueError(
                f"{told} needs a coefficient: set alignment.coeff above 0 (a coefficient of 0 is the "
                "method sft)"
            )
        if (
            method.aligns
            and alignment.coeff
            and alignment.target == "example"
            and self.profile.tokens not in (None, alignment.tokens)
        ):
            raise ValueError(
                f"{told} aligns the tokens {alignment.tokens!r} to priors that pool "
                f"{self.profile.tokens!r}: leave profile.tokens out, or give it the same value"
            )
        if alignment.target == "example" and self.profile.save_priors is False:
            raise ValueError(
                f"{told} aligns to per-example targets, which are the priors, "
                "but profile.save-priors is false: leave it out"
            )
        if alignment.target == "example" and self.profile.priors_for == "ci":
            reads_more = {
                "examples: all": alignment.examples == "all",
                f"layers: {alignment.layers}": alignment.layers != "auto",
                "refresh-interval": alignment.refresh_interval is not None,
                "anchors": bool(alignment.anchors),
            }
            if more := [key for key, reads in reads_more.items() if reads]:
                raise ValueError(
                    f"{told} reads priors beyond those of profile.priors-for: ci "
                    f"({', '.join(more)}): leave profile.priors-for out"
                )
        if alignment.select_tokens != "all" and self.profile.experts is not None:
            raise ValueError(
                f"{told} asks for experts of the tokens {alignment.select_tokens!r}, "
                "which this run's profile finds, but profile.experts gives the file of another run: "
                "leave out one of the two"
            )
        if alignment.anchors:
            self._check_anchors(alignment, told)
        if alignment.layers.startswith(("outside:all", "outside:outside")):
            raise ValueError(
                f"{told} takes the layers outside alignment.layers, which is "
                f"{alignment.layers.removeprefix('outside:')!r}: set alignment.layers to auto or to a range"
            )
        try:
            self._check_options(alignment, selection)
        except RamoeError as error:
            raise ValueError(f"{told}: {in_keys(str(error))}") from error
        if method.on is not None and (method.on not in names or self.method(method.on).steered):
            raise ValueError(
                f"{told} acts on {method.on!r}, which is no method of this recipe that trains: "
                "name one that is"
            )

    def _check_options(self, alignment: AlignmentSection, selection: SelectionSection) -> None:
        """Raise RamoeError for an alignment or selection that the fine-tune itself would reject."""
        files = {name: f"{name} of the run" for name in ("experts", "taxonomy", "priors")}
        usage = "usage of the run" if selection.train in READS_USAGE else None
        alignment.options(**files).refuse_unread_rule(selection.options(usage=usage).train)

    def _check_anchors(self, alignment: AlignmentSection, told: str) -> None:
        anchor, names = self.data.anchor_language, ", ".join(alignment.anchors)
        if alignment.target != "example":
            one = {
                "profile": "the profile has one pattern a task",
                "paired": "a sample has one view beside it",
            }[alignment.target]
            raise ValueError(
                f"{told} aligns to several anchors ({names}), but {one}, that of {anchor!r}: "
                "set alignment.target to example, or give alignment.anchors only in the sections of other "
                "methods"
            )
        if alignment.refresh_interval is not None:
            raise ValueError(
                f"{told} aligns to several anchors ({names}), but a refresh scores {anchor!r} alone: "
                "leave out alignment.anchors or alignment.refresh-interval"
            )
        if anchor in alignment.anchors:
            raise ValueError(
                f"{told}: alignment.anchors follow data.anchor, which is {anchor!r}: "
                f"remove {anchor!r} from alignment.anchors"
            )
        absent = [
            name for name in alignment.anchors if self.data.languages and name not in self.data.languages
        ]
        if absent:
            raise ValueError(
                f"{told}: alignment.anchors {', '.join(absent)} not in data.languages "
                f"({', '.join(self.data.languages or [])}), so no example is scored in them: add them there"
            )

    def method(self, name: str) -> Method:
        """The method with this name."""
        return next(method for method in self.methods if method.name == name)

    def presets_of(self, name: str) -> list[str]:
        """The named methods that a method of this recipe combines; none for the base model."""
        return next((method.presets for method in self.methods if method.name == name), [])

    def alignment_of(self, method: Method, seed: int = 1) -> AlignmentSection:
        """The recipe's alignment with the method's own changes, for the fine-tuning run with this seed."""
        return method.alignment_of(self.alignment, seed)

    def selection_of(self, method: Method) -> SelectionSection:
        """Which weights the method trains."""
        return method.selection_of(self.selection)

    def steering_of(self, method: Method) -> SteeringSection:
        """How the method steers at inference."""
        return method.steering_of(self.steering)

    def train_of(self, method: Method) -> dict[str, FlagValue]:
        """The recipe's training flags with the method's own changes.

        Target paired doubles both batch sizes: half of the places are views, so every method trains on the
        same samples. With coefficient 0 nothing is paired, and nothing is doubled.
        """
        flags = {**self.train, **method.train}
        alignment = self.alignment_of(method)
        if alignment.target == "paired" and alignment.coeff > 0:
            for name in ("micro-batch-size", "global-batch-size"):
                if isinstance(flags.get(name), int):
                    flags[name] = 2 * flags[name]  # type: ignore[operator]
        return flags

    def pretrain_flags(self) -> dict[str, FlagValue]:
        """Flags of the base model's training: `train`, overridden by `pretrain`."""
        return {**self.train, **(self.pretrain or {})}


def in_keys(text: str) -> str:
    """An error about a job's options with the flags replaced by the recipe's keys."""
    return re.sub(r"--ramoe-[a-z-]+", lambda flag: KEYS.get(flag[0], flag[0]), text)
