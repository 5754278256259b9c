"""The methods of a recipe: the named methods, and the combinations of them that a recipe may declare."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from ramoe_megatron.mcore.select.selective_options import READ_BY
from ramoe_megatron.recipe.sections import (
    AlignmentSection,
    Flags,
    Name,
    Section,
    SelectionSection,
    SteeringSection,
)


@dataclass(frozen=True)
class MethodEntry:
    """One named method."""

    kind: Literal["method", "control"]
    trains: str
    adds: str
    """What it adds to the training loss beside cross-entropy and load balancing, or what it does instead."""
    source: str
    reading: str
    """Our choice where the source states nothing or something else."""
    alignment: Mapping[str, Any] | None = None
    """Changes to the recipe's `alignment`. None: the method aligns nothing."""
    selection: Mapping[str, Any] = field(default_factory=dict)
    """Changes to `selection`."""
    steering: Mapping[str, Any] = field(default_factory=dict)
    """Changes to `steering`. A method with such changes is not trained."""


PLAIN: dict[str, Any] = {
    "coeff-unit": "absolute",
    "coeff-decay": "constant",
    "coeff-warmup-iters": 0,
    "layer-weights": "equal",
    "refresh-interval": None,
    "anchors": [],
    "select": None,
    "select-tokens": "all",
}
"""Options that no paper has. The presets of papers reset them, because a recipe's own schedule would change
the meaning of a published coefficient."""
RUN_SEED = "the seed of the run"
"""Value of a key that each fine-tuning run replaces by its own seed."""
ALL = "all weights"
RA_MOE = "coefficient x divergence of the ci examples' routing from English routing, in the middle layers"
METHODS: dict[str, MethodEntry] = {
    "sft": MethodEntry(
        kind="method",
        trains=ALL,
        adds="nothing",
        source="plain supervised fine-tuning",
        reading="nothing",
    ),
    "ra-moe": MethodEntry(
        kind="method",
        trains=ALL,
        adds=RA_MOE,
        source="arXiv 2605.28306",
        reading="the paper does not state divergence (lumped KL), target, tokens, pooling, coefficient and "
        "normaliser; each is an option",
        alignment={},
    ),
    "ra-moe-wide": MethodEntry(
        kind="method",
        trains=ALL,
        adds="coefficient x divergence of the ci and cc examples' routing from the example's own English "
        "routing, over all experts, in all layers",
        source="ours, from docs/results/headroom.md",
        reading="all of it: each part did better there than the one that it replaces",
        alignment={"divergence": "kl", "target": "example", "layers": "all", "examples": "ci+cc"},
    ),
    "sara": MethodEntry(
        kind="method",
        trains=ALL,
        adds="1.5 x JS(anchor prior || pooled routing), mean over the zone",
        source="arXiv 2606.25821",
        reading=(
            "stated: symmetric JS, 1.5, prompt and response pooled, constant anchor priors, "
            "examples that are correct in the anchor. Ours: only these examples are aligned, "
            "while all examples train, as in the other methods; the mean is over all samples of the "
            "batch, and a sample without a prior counts 0"
        ),
        alignment={
            "coeff": 1.5,
            "divergence": "js",
            "target": "example",
            "tokens": "all",
            "pooling": "sequence",
            "examples": "ci+cc",
            "normalize": "samples",
            "missing-priors": "skip",
            **PLAIN,
        },
    ),
    "xlr": MethodEntry(
        kind="method",
        trains=ALL,
        adds=(
            "KL(English || target) of the mean-pooled routing of parallel text, "
            "at the start as large as the LM loss"
        ),
        source="arXiv 2610.01921",
        reading=(
            "stated: KL, gradient through the target side only, middle layers, parity at the start. Ours: "
            "the direction of the KL; the English view runs beside each sample without a loss (twice the "
            "batch); parity is measured on the first batch with an aligned sample"
        ),
        alignment={
            "coeff": 1,
            "divergence": "kl",
            "target": "paired",
            "tokens": "all",
            "pooling": "sequence",
            "examples": "all",
            "normalize": "samples",
            "missing-priors": "refuse",
            **PLAIN,
            "coeff-unit": "lm-loss",
        },
    ),
    "steering-soft": MethodEntry(
        kind="method",
        trains="nothing",
        adds="at inference: task experts' logits + strength x their standard deviation",
        source="arXiv 2510.04694, eq. 4",
        reading="which standard deviation: the population one, over all experts of the token",
        steering={"steer": "soft"},
    ),
    "steering-hard": MethodEntry(
        kind="method",
        trains="nothing",
        adds="at inference: task experts' logits above the largest",
        source="arXiv 2510.04694, eq. 5",
        reading=(
            "the noise is drawn once per layer and expert, and only upwards, "
            "so that it does not depend on the layout; rejected for routers that choose by more than the "
            "order of the logits (sigmoid scores, expert biases, groups), which the paper does not cover"
        ),
        steering={"steer": "hard"},
    ),
    "rise": MethodEntry(
        kind="method",
        trains="experts chosen by specificity (shallow, deep) and overlap (middle)",
        adds="nothing",
        source="arXiv 2604.03592",
        reading=(
            "with several target languages, the mean of their specificities; "
            "the means include the anchor; a layer whose middle lies on a border is in the middle zone; "
            "the budget is divided by the number of layers in each zone unless the shares are given"
        ),
        selection={"train": "rise"},
    ),
    "esft-gate": MethodEntry(
        kind="method",
        trains="in each layer, the experts with the largest mean gate, up to top-p",
        adds="nothing",
        source="arXiv 2407.01906",
        reading="gates of the training languages, counted by token; normalised in each layer",
        selection={"train": "esft-gate"},
    ),
    "esft-token": MethodEntry(
        kind="method",
        trains="in each layer, the experts with the largest token share, up to top-p",
        adds="nothing",
        source="arXiv 2407.01906",
        reading="as esft-gate",
        selection={"train": "esft-token"},
    ),
    "router-only": MethodEntry(
        kind="method",
        trains="routers",
        adds="nothing",
        source="a known baseline, without one source",
        reading="nothing",
        selection={"train": "routers"},
    ),
    "coeff-zero": MethodEntry(
        kind="control",
        trains=ALL,
        adds="as ra-moe, with coefficient 0: must equal sft bit for bit",
        source="our control",
        reading="all of it",
        alignment={"coeff": 0},
    ),
    "random-experts": MethodEntry(
        kind="control",
        trains=ALL,
        adds="as ra-moe, with the same number of random experts instead of the task experts",
        source="our control",
        reading="all of it",
        alignment={"random-experts": RUN_SEED},
    ),
    "all-layers": MethodEntry(
        kind="control",
        trains=ALL,
        adds="as ra-moe, in all layers",
        source="our control",
        reading="all of it",
        alignment={"layers": "all"},
    ),
    "outside-zone": MethodEntry(
        kind="control",
        trains=ALL,
        adds="as ra-moe, only in the layers outside the zone",
        source="our control",
        reading="all of it",
        alignment={"layers": "outside"},
    ),
    "ra-moe-shuffled": MethodEntry(
        kind="control",
        trains=ALL,
        adds="as ra-moe, with the English targets of other examples of the task",
        source="our control",
        reading="all of it",
        alignment={"shuffle-targets": RUN_SEED},
    ),
    "reversed": MethodEntry(
        kind="control",
        trains=ALL,
        adds="as ra-moe, with the English view pulled to the target language's routing",
        source="our control",
        reading="both views run at the current weights (twice the batch), the English view without a loss",
        alignment={"target": "paired", "reverse": True},
    ),
}


def preset_changes(
    names: list[str], section: Literal["alignment", "selection", "steering"]
) -> dict[str, Any] | None:
    """The changes of several named methods to one section; None when none of them has any.

    Raises:
        ValueError: two methods ask for different values of one key.
    """
    found: dict[str, Any] | None = None
    for name in names:
        changes = getattr(METHODS[name], section)
        for key, value in (changes or {}).items():
            if found and key in found and found[key] != value:
                raise ValueError(
                    f"{' and '.join(names)} do not combine: they ask for {section}.{key} {found[key]} and "
                    f"{value}"
                )
        if changes is not None and (changes or section == "alignment"):
            found = {**(found or {}), **changes}
    return found


_TRAINING = {"train", "replay", "ids_per_task", "alignment", "selection"}
"""Fields of `Method` that say how it trains."""


class Method(Section):
    """A method to compare: a name, and what it changes in the recipe's sections."""

    name: Name
    """A name that `ramoe methods` lists has the meaning listed there. Any other name needs at least one
    change; it is the recipe's alignment with these changes."""
    preset: list[str] | None = None
    """Named methods that this one combines, such as [ra-moe, esft-token]. Default: the method's own name."""
    alignment: AlignmentSection = AlignmentSection()
    """Changes to the recipe's `alignment`. Only the keys that are given change anything, here and in the next
    sections."""
    selection: SelectionSection = SelectionSection()
    """Changes to the recipe's `selection`."""
    steering: SteeringSection = SteeringSection()
    """Changes to the recipe's `steering`."""
    on: str | None = None
    """For steering: the trained method whose checkpoints are steered. Default: the base model."""
    train: Flags = {}
    """Changes to the recipe's `train`."""
    replay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the fine-tuning samples that are in the anchor language, from the training split. The others
    keep the shares of `data.weights`. Default: none, if `data.languages` are the target languages alone."""

    ids_per_task: PositiveInt | None = None
    """Fine-tune on this many ids of each task, in all their languages. The run's seed draws them, the same
    for every method. Default: all."""

    @field_validator("name")
    @classmethod
    def _not_base(cls, name: str) -> str:
        if name == "base" or re.search(r"-seed\d+$", name):
            raise ValueError(
                f"a method cannot be called {name!r}: base and names that end in -seedK are used for files "
                "of the run folder"
            )
        return name

    @model_validator(mode="after")
    def _presets(self) -> Self:
        for name in self.preset or []:
            if name not in METHODS:
                raise ValueError(
                    f"method {self.name}: no preset {name!r}; expected names that `ramoe methods` lists: "
                    f"{', '.join(METHODS)}"
                )
        if self.model_fields_set == {"name"} and not self.presets:
            near = difflib.get_close_matches(self.name, METHODS, n=1)
            own = f"expected {', '.join(METHODS)}, or a method of your own with a preset or a section"
            meant = f"did you mean {near[0]}?" if near else own
            raise ValueError(
                f"methods: {self.name!r} is not a name that `ramoe methods` lists, and it changes nothing: "
                f"{meant}"
            )
        if self.presets and self.steered and (len(self.presets) > 1 or not METHODS[self.presets[0]].steering):
            raise ValueError(
                f"method {self.name}: steering acts at inference; name the trained method that it acts on "
                "with the key `on`"
            )
        if self.on is not None and not self.steered:
            raise ValueError(f"method {self.name}: only a steering method acts `on` another one")
        if self.steered and (found := _TRAINING & self.model_fields_set):
            keys = ", ".join(sorted(key.replace("_", "-") for key in found))
            raise ValueError(f"method {self.name}: steering trains nothing, so {keys} has no meaning")
        self._refuse_absorbed()
        self._refuse_unread()
        return self

    def _refuse_absorbed(self) -> None:
        """Raise ValueError for presets of which one would silently be dropped: two losses, or sft with
        another."""
        losses = [
            name
            for name in self.presets
            if METHODS[name].kind == "method" and METHODS[name].alignment is not None
        ]
        if len(losses) > 1:
            raise ValueError(
                f"method {self.name}: {' and '.join(losses)} do not combine: each has its own loss"
            )
        if "sft" in self.presets and len(self.presets) > 1:
            raise ValueError(
                f"method {self.name}: sft trains all weights and adds no loss, "
                "so it combines with nothing: leave it out"
            )

    def _refuse_unread(self) -> None:
        """Raise ValueError for a key of this method's steering that nothing reads."""
        steering = self.steering_of(SteeringSection())
        unread = {
            "steer_strength": (steering.steer == "hard" or steering.search, "soft steering without a search"),
            "steer_tau": (steering.search, "steering without a search"),
        }
        for field_name, (unused, by) in unread.items():
            if unused and field_name in self.steering.model_fields_set:
                key = field_name.replace("_", "-")
                raise ValueError(f"method {self.name}: only {by} reads steering.{key}: remove it")

    @property
    def presets(self) -> list[str]:
        """The named methods that this one combines; none for a name that only the recipe has."""
        return self.preset if self.preset is not None else [self.name] if self.name in METHODS else []

    @property
    def steered(self) -> bool:
        """Whether the method steers at inference and trains nothing."""
        return bool(preset_changes(self.presets, "steering")) or self.steering.steer is not None

    @property
    def aligns(self) -> bool:
        """Whether the fine-tune gets the alignment's flags. With coefficient 0 they change nothing."""
        own = "alignment" in self.model_fields_set
        return not self.steered and (
            own or not self.presets or preset_changes(self.presets, "alignment") is not None
        )

    def alignment_of(self, given: AlignmentSection, seed: int) -> AlignmentSection:
        """The recipe's alignment with the changes of the presets, and then with the method's own changes.

        `seed` is the seed of the fine-tuning run.
        """
        if not self.aligns:
            # The alignment's section says which experts the task experts are.
            trained = self.selection_of(SelectionSection()).train == "task-experts"
            kept = {"select", "select_tokens"} if trained else set()
            found = given.model_dump(by_alias=True, include=kept)
            return AlignmentSection.model_validate({**found, "target": "profile"})  # needs no priors
        preset = preset_changes(self.presets, "alignment") or {}
        preset = {key: seed if value == RUN_SEED else value for key, value in preset.items()}
        changed = _changed(given, preset, self.alignment)
        if changed.layers == "outside":
            return changed.model_copy(update={"layers": f"outside:{given.layers}"})
        return changed

    def selection_of(self, given: SelectionSection) -> SelectionSection:
        """Which weights train: the presets' and the method's choice, and the recipe's keys that this choice
        reads."""
        changes = {"train": "all", **(preset_changes(self.presets, "selection") or {})}
        train = _changed(given, changes, self.selection).train
        unread = {key for key, kinds in READ_BY.items() if train not in kinds}
        read = type(given).model_validate(given.model_dump(by_alias=True, exclude=unread))
        return _changed(read, changes, self.selection)

    @model_serializer(mode="wrap")
    def _what_was_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Serialise without the defaults of the sections, which would count as changes when read again."""
        written = handler(self)
        # A given null resets the recipe's value.
        for key in ("alignment", "selection", "steering"):
            written[key] = getattr(self, key).model_dump(by_alias=True, exclude_unset=True)
        return {key: value for key, value in written.items() if value not in ({}, None, 0.0)}

    def steering_of(self, given: SteeringSection) -> SteeringSection:
        """The recipe's steering with the changes of the presets and of the method."""
        return _changed(given, preset_changes(self.presets, "steering") or {}, self.steering)


def _changed[Part: Section](given: Part, preset: dict[str, Any], own: Part) -> Part:
    changes = {**preset, **own.model_dump(by_alias=True, exclude_unset=True)}
    return type(given).model_validate({**given.model_dump(by_alias=True), **changes})
