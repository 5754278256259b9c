"""What a recipe may say of its methods: the alignment loss, which weights train, steering at inference, and their combinations."""

import difflib
import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from ramoe_megatron.recipe.catalogue import METHODS, merged
from ramoe_megatron.recipe.section import Flags, Name, Names, Section

RULE = r"^(tau=-?[0-9.]+|top-m=[0-9]+)$"
BY_SHARE = ("esft-gate", "esft-token")


class Alignment(Section):
    """The alignment loss; the names are those of the `--ramoe-` flags."""

    coeff: NonNegativeFloat = 0.0
    select: Annotated[str, Field(pattern=RULE)] | None = None
    """Task experts anew by this rule, tau=NUMBER or top-m=COUNT; the profile's own when left out."""
    select_tokens: Literal["all", "prompt", "response", "last"] = "all"
    """Tokens of the task data whose counts choose the task experts; all is the paper's, the others are our own."""
    divergence: Literal["lumped-kl", "mass", "kl", "js"] = "lumped-kl"
    target: Literal["profile", "example", "paired"] = "profile"
    missing_priors: Literal["refuse", "skip"] = "refuse"
    layers: str = "auto"
    """auto, all, FIRST-LAST, FRACTION-FRACTION, outside:LAYERS; outside alone is outside: and the recipe's own layers."""
    layer_weights: Literal["equal", "divergence"] = "equal"
    """divergence: by the profile's divergence curve."""
    coeff_warmup_iters: NonNegativeInt = 0
    coeff_decay: Literal["constant", "cosine"] = "constant"
    coeff_unit: Literal["absolute", "lm-loss"] = "absolute"
    tokens: Literal["prompt", "response", "all", "last"] = "last"
    pooling: Literal["sequence", "token"] = "sequence"
    examples: Literal["ci", "ci+cc", "all"] = "ci"
    normalize: Literal["samples", "ci"] = "samples"
    refresh_interval: PositiveInt | None = None
    """Iterations between two refreshes of the taxonomy; none when left out."""
    refresh_examples: PositiveInt = 512
    shuffle_targets: bool = False
    """Control: English targets shuffled between the examples of a task."""
    random_experts: bool = False
    """Control: random experts in the place of the task experts."""
    reverse: bool = False
    """Control: the English view is pulled to the target language's routing."""
    anchors: Names = []
    """Further anchor languages after data.anchor, in this order: each example is pulled to the first that the model answers it correctly in
    (target: example; our own)."""

    @field_validator("anchors")
    @classmethod
    def _name_folders(cls, anchors: list[str]) -> list[str]:
        if len(set(anchors)) < len(anchors):
            raise ValueError(f"names one twice: {', '.join(anchors)}")
        if odd := [name for name in anchors if not re.fullmatch(r"\w[\w.-]*", name)]:
            raise ValueError(f"{odd[0]!r} would name a folder of the run: expected letters, digits, _, . and -")
        return anchors


class Selection(Section):
    """Which weights train; the rest is frozen."""

    train: Literal["all", "routers", "task-experts", "rise", "esft-gate", "esft-token"] = "all"
    budget: PositiveInt | None = None
    """rise: number of (layer, expert) pairs (the paper: 128 of Qwen3-30B-A3B's 6144, 16 of Phi-3.5-MoE's 512)."""
    split: Annotated[list[NonNegativeInt], Field(min_length=3, max_length=3)] | None = None
    """rise: how many of them are shallow, middle and deep (the paper: 44, 32, 52 and 2, 11, 3); by the layers of each when left out."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """esft-gate, esft-token: share of the score that the chosen experts of a layer hold."""

    @property
    def by_share(self) -> bool:
        """Whether experts are chosen up to a share of the score."""
        return self.train in BY_SHARE

    @property
    def reads_usage(self) -> bool:
        """Whether the choice is read off the profile's usage.safetensors."""
        return self.train == "rise" or self.by_share


class Steering(Section):
    """Routing steering at inference (arXiv 2510.04694)."""

    kind: Literal["none", "soft", "hard"] = "none"
    strength: float = 0.5
    """soft: in standard deviations of a token's logits."""
    layers: str = "auto"
    tau: Annotated[float, Field(ge=-1, lt=1)] | None = None
    """Task experts anew, by this threshold; the profile's own when left out."""
    search: bool = False
    """Search tau, strength and the layers (those of `zones`) on the validation split instead."""
    zones: Names | None = None
    """search: ranges of layers to try, such as [auto, 0.25-0.75]; `layers` alone when left out."""

    @model_validator(mode="after")
    def _searched(self) -> Self:
        if self.zones and not self.search:
            raise ValueError("steering.zones are what a search tries: set steering.search, or give layers")
        return self


class Method(Section):
    """A run to compare: a name, and what it changes in the recipe's sections."""

    name: Name
    """A name of `ramoe methods` has its meaning; any other, with at least one change, is the recipe's alignment with the changes."""
    preset: list[str] | None = None
    """Named methods that this one combines, such as [ra-moe, esft-token]; by default its own name."""
    alignment: Alignment = Alignment()
    """Only the keys that are given change anything; so in the other sections."""
    selection: Selection = Selection()
    steering: Steering = Steering()
    on: str | None = None
    """Steering: the trained method whose checkpoints are steered; the base model when left out."""
    train: Flags = {}

    @field_validator("name")
    @classmethod
    def _not_base(cls, name: str) -> str:
        if name == "base" or re.search(r"-seed\d+$", name):
            raise ValueError(f"a method cannot be called {name!r}: base and the ending -seedK name the run folder's own files")
        return name

    @model_validator(mode="after")
    def _presets(self) -> Self:
        for name in self.preset or []:
            if name not in METHODS:
                raise ValueError(f"method {self.name}: no preset {name!r}; expected names of `ramoe methods`: {', '.join(METHODS)}")
        if self.model_fields_set == {"name"} and not self.presets:
            near = difflib.get_close_matches(self.name, METHODS, n=1)
            own = f"expected {', '.join(METHODS)}, or a method of your own with a preset or a section"
            meant = f"did you mean {near[0]}?" if near else own
            raise ValueError(f"methods: {self.name!r} is no name of `ramoe methods`, and it changes nothing: {meant}")
        if self.presets and self.steered and (len(self.presets) > 1 or not METHODS[self.presets[0]].steering):
            raise ValueError(f"method {self.name}: steering acts at inference; name the trained method that it acts on by `on`")
        if self.on is not None and not self.steered:
            raise ValueError(f"method {self.name}: only a steering method acts `on` another one")
        if self.steered and (found := {"train", "alignment", "selection"} & self.model_fields_set):
            raise ValueError(f"method {self.name}: steering trains nothing, so {', '.join(sorted(found))} has no meaning")
        self._refuse_absorbed()
        self._refuse_unread()
        return self

    def _refuse_absorbed(self) -> None:
        """Of two losses, or of all weights and some, one would be dropped without a word."""
        losses = [name for name in self.presets if METHODS[name].kind == "method" and METHODS[name].alignment is not None]
        if len(losses) > 1:
            raise ValueError(f"method {self.name}: {' and '.join(losses)} do not combine: each is a loss of its own")
        if "sft" in self.presets and len(self.presets) > 1:
            raise ValueError(f"method {self.name}: sft is all weights and no further loss, so it combines with nothing: leave it out")

    def _refuse_unread(self) -> None:
        """Raise ValueError for a key of this method that nothing would read."""
        train, steering = self.selection_of(Selection()).train, self.steering_of(Steering())
        share = train in BY_SHARE
        unread = {
            "selection.budget": ("budget", self.selection, train != "rise", "selection.train: rise"),
            "selection.split": ("split", self.selection, train != "rise", "selection.train: rise"),
            "selection.top-p": ("top_p", self.selection, not share, f"selection.train: {' or '.join(BY_SHARE)}"),
            "steering.strength": ("strength", self.steering, steering.kind == "hard" or steering.search, "soft steering without a search"),
            "steering.tau": ("tau", self.steering, steering.search, "steering without a search"),
        }
        for key, (field, section, unused, by) in unread.items():
            if unused and field in section.model_fields_set:
                raise ValueError(f"method {self.name}: {key} is read by {by} alone: remove it")

    @property
    def presets(self) -> list[str]:
        """The named methods that this one combines; none for a name of the recipe's own."""
        return self.preset if self.preset is not None else [self.name] if self.name in METHODS else []

    @property
    def steered(self) -> bool:
        """Whether this is steering at inference, and nothing is trained."""
        return bool(merged(self.presets, "steering")) or self.steering.kind != "none"

    @property
    def aligns(self) -> bool:
        """Whether the alignment's flags are given (with coefficient 0 they change nothing)."""
        own = "alignment" in self.model_fields_set
        return not self.steered and (own or not self.presets or merged(self.presets, "alignment") is not None)

    def alignment_of(self, given: Alignment) -> Alignment:
        """The recipe's alignment with the changes of the presets, and then the method's own."""
        if not self.aligns:
            trained = self.selection_of(Selection()).train == "task-experts"  # which experts these are, the alignment's section says
            return Alignment.model_validate(given.model_dump(by_alias=True, include={"select", "select_tokens"} if trained else set()))
        changed = _changed(given, merged(self.presets, "alignment") or {}, self.alignment)
        if changed.layers == "outside":
            return changed.model_copy(update={"layers": f"outside:{given.layers}"})
        return changed

    def selection_of(self, given: Selection) -> Selection:
        """Likewise which weights train: the recipe's budget and share for the methods that need one."""
        changes = {"train": "all", **(merged(self.presets, "selection") or {})}
        chosen = _changed(given, changes, self.selection)
        unused = {"budget": chosen.train != "rise", "split": chosen.train != "rise", "top_p": not chosen.by_share}
        return chosen.model_copy(update={key: None for key, idle in unused.items() if idle})

    @model_serializer(mode="wrap")
    def _what_was_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the defaults of its sections: read again, they would pass for changes."""
        written = handler(self)
        for key in ("alignment", "selection", "steering"):  # a null that is given takes the recipe's value back
            written[key] = getattr(self, key).model_dump(by_alias=True, exclude_unset=True)
        return {key: value for key, value in written.items() if value not in ({}, None)}

    def steering_of(self, given: Steering) -> Steering:
        """Likewise the steering."""
        return _changed(given, merged(self.presets, "steering") or {}, self.steering)


def _changed[Part: Section](given: Part, preset: dict[str, Any], own: Part) -> Part:
    changes = {**preset, **own.model_dump(by_alias=True, exclude_unset=True)}
    return type(given).model_validate({**given.model_dump(by_alias=True), **changes})
