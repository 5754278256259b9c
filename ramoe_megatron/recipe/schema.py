"""What a recipe may say: one pydantic model a section, its keys written as in YAML (`max-new-tokens`).

`model`, `train`, `parallel`, `pretrain` and `tokenizer` hold Megatron's flags under Megatron's own names without the
leading dashes: `true` is a bare flag, `false` or `null` leaves the flag out, a list is several values.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeFloat, PositiveInt, field_validator, model_validator

from ramoe_megatron.recipe.launch_schema import Launch
from ramoe_megatron.recipe.section import FlagValue, Name, Names, Section

# What each built-in method changes in the recipe's `alignment`: SFT is a coefficient of zero, the control gets other
# examples' targets.
PRESETS: dict[str, dict[str, Any]] = {"sft": {"coeff": 0}, "ra-moe": {}, "ra-moe-shuffled": {"shuffle-targets": True}}
# Flags that the plan itself gives; each with the recipe key that is meant instead.
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
            raise ValueError(f"{name!r} is no flag name: write Megatron's flag without the leading dashes, such as num-layers")
        if name in RESERVED_FLAGS:
            raise ValueError(f"{name} is set by the plan itself; use {RESERVED_FLAGS[name]}")
        if name.startswith("ramoe-"):
            raise ValueError(f"{name} is set by the plan itself; use the recipe's data, taxonomy, profile or alignment section")
        if value == []:
            raise ValueError(f"{name} is an empty list; use null to leave the flag out")
    return flags


def _count_to_seeds(value: Any) -> Any:
    return list(range(1, value + 1)) if isinstance(value, int) and not isinstance(value, bool) else value


Flags = Annotated[dict[str, FlagValue], AfterValidator(_flags)]
class Data(Section):
    """Where the examples come from: exactly one of `world`, `sib200` and `files`."""

    world: dict[str, Any] | None = None
    """Settings of the embedded world (the fields of `ramoe_megatron.data.world.WorldConfig`); `{}` takes them all as
    they are."""
    sib200: dict[str, Any] | None = None
    """SIB-200 (the fields of `ramoe_megatron.data.sib200.SibConfig`): `source` is the folder of the languages."""
    files: Names | None = None
    """Parallel JSONL: files, folders, or a hub name."""
    general: Names | None = None
    """General English text for the expert profile (needed with `files`; the generated data bring their own)."""
    pretrain: Names | None = None
    """What the base model is trained on (with `files` and `pretrain`; the generated data bring their own)."""
    columns: dict[str, str] = {}
    """Field of the parallel format -> the files' own column."""
    weights: dict[str, NonNegativeFloat] = {}
    """Pattern TASK/LANGUAGE -> share of the fine-tuning samples; without it, seeded epochs over all examples."""
    pretrain_weights: dict[str, NonNegativeFloat] = {}
    """The same for the base model's training; without it, those that the generated data bring along."""
    anchor: str | None = None
    """The language whose routing is the target; "en" when left out ("eng_Latn" for SIB-200)."""
    languages: Names | None = None
    """Target languages; all that the data hold when left out."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("world", "sib200", "files") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of world, sib200 and files; found {', '.join(given) or 'none of them'}")
        if self.files is not None and not self.general:
            raise ValueError("files needs general: English text that the task experts are told apart from")
        if self.files is None and (self.general or self.pretrain):
            raise ValueError(f"general and pretrain belong to files; {given[0]} brings its own")
        if self.sib200 is not None and not isinstance(self.sib200.get("source"), str):
            raise ValueError("sib200 needs source: the folder of the languages, as downloaded")
        return self

    @property
    def anchor_language(self) -> str:
        """The anchor, resolved."""
        return self.anchor or str((self.sib200 or {}).get("anchor") or ("en" if self.sib200 is None else "eng_Latn"))


class Taxonomy(Section):
    """Scoring of every parallel example in the anchor and the target language."""

    max_new_tokens: PositiveInt = 16
    """Longest generated answer, in tokens."""
    splits: Names = ["train", "test"]
    """Splits to score."""


class Profile(Section):
    """Task experts, English patterns and the divergence curve."""

    select: Annotated[str, Field(pattern=r"^(tau=-?[0-9.]+|top-m=[0-9]+)$")] = "tau=0.3"
    """Rule of the task experts: tau=NUMBER or top-m=COUNT."""
    split: str = "train"
    """Split that the profile is measured on."""
    tokens: Literal["prompt", "response", "all", "last"] = "last"
    """Tokens that the saved priors pool (the divergence curve always pools all of a sequence)."""
    layers: str = "auto"
    """Alignment zone: auto (read off the divergence curve), FIRST-LAST or FRACTION-FRACTION."""
    save_priors: bool | None = None
    """Keep each example's English routing; by default exactly when a method's target is `example`."""


class Alignment(Section):
    """The alignment loss; the names are those of the `--ramoe-` flags."""

    coeff: NonNegativeFloat = 0.0
    divergence: Literal["lumped-kl", "mass", "kl", "js"] = "lumped-kl"
    target: Literal["profile", "example"] = "profile"
    layers: str = "auto"
    tokens: Literal["prompt", "response", "all", "last"] = "last"
    pooling: Literal["sequence", "token"] = "sequence"
    examples: Literal["ci", "ci+cc", "all"] = "ci"
    normalize: Literal["samples", "ci"] = "samples"
    shuffle_targets: bool = False
    """Control: English targets shuffled between the examples of a task."""


class Method(Section):
    """A fine-tuning run: a name, and what it changes in `alignment` and `train`."""

    name: Name
    """sft, ra-moe and ra-moe-shuffled have their meaning; any other name is the recipe's alignment with the changes
    given here."""
    alignment: Alignment = Alignment()
    """Only the keys that are given change anything."""
    train: Flags = {}

    @field_validator("name")
    @classmethod
    def _not_base(cls, name: str) -> str:
        if name == "base" or re.search(r"-seed\d+$", name):
            raise ValueError(f"a method cannot be called {name!r}: base and the ending -seedK name the run folder's own files")
        return name


class Evaluate(Section):
    """Accuracy before and after."""

    split: str = "test"
    max_new_tokens: PositiveInt | None = None
    """Longest generated answer, in tokens; the taxonomy's when left out."""


def _named(value: Any) -> Any:
    return [{"name": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value


class Recipe(Section):
    """One experiment, from data to report."""

    name: Name
    seed: int = 1
    """Seed of the generated data and of the base model's training."""
    checkpoint: str | None = None
    """Megatron checkpoint of the base model; or give `pretrain`."""
    model: Flags
    train: Flags
    """Flags of the fine-tuning runs."""
    parallel: Flags = {}
    pretrain: Flags | None = None
    """Flags of the base model's training, on top of `train`; or give `checkpoint`."""
    tokenizer: Flags | None = None
    """Tokenizer flags; by default the SentencePiece model of the generated data."""
    data: Data
    taxonomy: Taxonomy = Taxonomy()
    profile: Profile = Profile()
    alignment: Alignment = Alignment()
    methods: Annotated[list[Method], BeforeValidator(_named), Field(min_length=1)]
    seeds: Annotated[list[int], BeforeValidator(_count_to_seeds), Field(min_length=1)] = [1]
    """Seeds of the fine-tuning runs; a single number n means 1 to n."""
    evaluate: Evaluate = Evaluate()
    launch: Launch = Launch()

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.checkpoint is None) == (self.pretrain is None):
            found = "neither" if self.checkpoint is None else "both"
            raise ValueError(f"give one of checkpoint (a base model) and pretrain (flags to train one); found {found}")
        if self.data.files is not None:
            if self.tokenizer is None:
                raise ValueError("data.files needs tokenizer: Megatron's flags, such as tokenizer-type and tokenizer-model")
            if self.pretrain is not None and not self.data.pretrain:
                raise ValueError("pretrain with data.files needs data.pretrain: the files to train the base model on")
        for what, values in (("methods", [method.name for method in self.methods]), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{what} names one twice: {', '.join(map(str, values))}")
        for method in self.methods:
            alignment = self.alignment_of(method)
            if method.name in ("ra-moe", "ra-moe-shuffled") and alignment.coeff == 0:
                raise ValueError(f"method {method.name} needs a coefficient: set alignment.coeff above 0 (0 is the method sft)")
            if alignment.shuffle_targets and alignment.target != "example":
                raise ValueError(f"method {method.name} shuffles per-example targets: set alignment.target to example")
            if alignment.coeff and alignment.target == "example" and alignment.tokens != self.profile.tokens:
                raise ValueError(
                    f"method {method.name} aligns the tokens {alignment.tokens!r} to priors that pool {self.profile.tokens!r}: "
                    "set profile.tokens to the same"
                )
        return self

    def alignment_of(self, method: Method) -> Alignment:
        """The recipe's alignment with the method's own changes."""
        changes = {**PRESETS.get(method.name, {}), **method.alignment.model_dump(by_alias=True, exclude_unset=True)}
        return Alignment.model_validate({**self.alignment.model_dump(by_alias=True), **changes})

    def train_of(self, method: Method) -> dict[str, FlagValue]:
        """The recipe's training flags with the method's own changes."""
        return {**self.train, **method.train}

    def pretrain_flags(self) -> dict[str, FlagValue]:
        """Flags of the base model's training: `train` with `pretrain` on top."""
        return {**self.train, **(self.pretrain or {})}
