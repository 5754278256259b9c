"""The methods of a recipe: those with a name (what each trains, adds to the loss, and takes from which source), and their combinations."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from pydantic import SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

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
    """To the training loss, beside cross-entropy and Megatron's load balancing; or what it does instead."""
    source: str
    reading: str
    """What the source does not state, or states otherwise: our choice."""
    alignment: Mapping[str, Any] | None = None
    """Changes to the recipe's `alignment`; None where the method aligns nothing."""
    selection: Mapping[str, Any] = field(default_factory=dict)
    """Changes to `selection`."""
    steering: Mapping[str, Any] = field(default_factory=dict)
    """Changes to `steering`; a method that has any is not trained."""


PLAIN: dict[str, Any] = {
    "coeff-unit": "absolute", "coeff-decay": "constant", "coeff-warmup-iters": 0, "layer-weights": "equal", "refresh-interval": None,
    "anchors": [], "select": None, "select-tokens": "all",
}  # fmt: skip
"""What no paper has: a published coefficient would change its meaning under a recipe's own schedule."""
RUN_SEED = "the seed of the run"
"""The value of a control that each fine-tune draws by its own seed."""
ALL = "all weights"
RA_MOE = "coefficient x divergence of the ci examples' routing from the English one, middle layers"
METHODS: dict[str, MethodEntry] = {
    "sft": MethodEntry("method", ALL, "nothing", "plain supervised fine-tuning", "nothing"),
    "ra-moe": MethodEntry(
        "method", ALL, RA_MOE, "arXiv 2605.28306",
        "divergence (lumped KL), target, tokens, pooling, coefficient and normaliser are not stated; each is an option", {},
    ),
    "sara": MethodEntry(
        "method", ALL, "1.5 x JS(anchor prior || pooled routing), mean over the zone", "arXiv 2606.25821",
        "stated: symmetric JS, 1.5, prompt and response pooled, constant anchor priors, "
        "data of anchor-correct examples; ours: those alone are aligned while all train, "
        "as in the other methods, and the mean is over all samples of the batch, "
        "so that one without a prior counts 0",
        {
            "coeff": 1.5, "divergence": "js", "target": "example", "tokens": "all", "pooling": "sequence", "examples": "ci+cc",
            "normalize": "samples", "missing-priors": "skip", **PLAIN,
        },
    ),
    "xlr": MethodEntry(
        "method", ALL, "KL(English || target) of mean-pooled routing of parallel text, as large as the LM loss at the start",
        "arXiv 2610.01921",
        "stated: KL, gradient through the target side only, middle layers, start at parity; ours: "
        "the direction of the KL, the English view run beside each sample without a loss of its own (twice "
        "the batch), parity measured on the first batch with an aligned sample",
        {
            "coeff": 1, "divergence": "kl", "target": "paired", "tokens": "all", "pooling": "sequence", "examples": "all",
            "normalize": "samples", "missing-priors": "refuse", **PLAIN, "coeff-unit": "lm-loss",
        },
    ),
    "steering-soft": MethodEntry(
        "method", "nothing", "at inference: task experts' logits + strength x their standard deviation", "arXiv 2510.04694, eq. 4",
        "whose standard deviation (population, over all experts of the token)", steering={"steer": "soft"},
    ),
    "steering-hard": MethodEntry(
        "method", "nothing", "at inference: task experts' logits above the largest", "arXiv 2510.04694, eq. 5",
        "the noise is drawn once per layer and expert, and only upwards, "
        "so that the layout changes nothing; refused for routers that choose by more than the order of the "
        "logits (sigmoid scores, expert biases, groups), which the paper does not have",
        steering={"steer": "hard"},
    ),
    "rise": MethodEntry(
        "method", "experts chosen by specificity (shallow, deep) and overlap (middle)", "nothing", "arXiv 2604.03592",
        "several target languages: the mean of their specificity; the anchor is among the languages of the "
        "means; a layer whose middle lies on a border is of the middle zone; "
        "the budget's split over depth, by the layers of each zone unless it is given",
        selection={"train": "rise"},
    ),
    "esft-gate": MethodEntry(
        "method", "per layer the experts of largest mean gate, up to top-p", "nothing", "arXiv 2407.01906",
        "gates of the training languages, counted by token; normalised in each layer", selection={"train": "esft-gate"},
    ),
    "esft-token": MethodEntry(
        "method", "per layer the experts of largest token share, up to top-p", "nothing", "arXiv 2407.01906",
        "as esft-gate", selection={"train": "esft-token"},
    ),
    "router-only": MethodEntry(
        "method", "routers", "nothing", "a known baseline, without one source", "nothing", selection={"train": "routers"}
    ),
    "coeff-zero": MethodEntry(
        "control", ALL, "ra-moe's, with coefficient 0: must equal sft bit for bit", "our control", "all of it", {"coeff": 0}
    ),
    "random-experts": MethodEntry(
        "control", ALL, "ra-moe's, with as many random experts for the task experts", "our control", "all of it",
        {"random-experts": RUN_SEED},
    ),
    "all-layers": MethodEntry("control", ALL, "ra-moe's, in all layers", "our control", "all of it", {"layers": "all"}),
    "outside-zone": MethodEntry(
        "control", ALL, "ra-moe's, in the layers outside the zone alone", "our control", "all of it", {"layers": "outside"}
    ),
    "ra-moe-shuffled": MethodEntry(
        "control", ALL, "ra-moe's, with the English targets of other examples of the task", "our control", "all of it",
        {"shuffle-targets": RUN_SEED},
    ),
    "reversed": MethodEntry(
        "control", ALL, "ra-moe's, the English view pulled to the target language's routing", "our control",
        "both views at the current weights (twice the batch), the English one without a loss of its own",
        {"target": "paired", "reverse": True},
    ),
}  # fmt: skip


def preset_changes(
    names: list[str], section: Literal["alignment", "selection", "steering"]
) -> dict[str, Any] | None:
    """The changes of several named methods to one section; None where none of them has any.

    Raises:
        ValueError: two of them ask for different values of one key.
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


class Method(Section):
    """A run to compare: a name, and what it changes in the recipe's sections."""

    name: Name
    """A name of `ramoe methods` has its meaning; any other, with at least one change, is the recipe's alignment with the changes."""
    preset: list[str] | None = None
    """Named methods that this one combines, such as [ra-moe, esft-token]; by default its own name."""
    alignment: AlignmentSection = AlignmentSection()
    """Changes to the recipe's `alignment`. Here and in the next sections only the keys that are given change
    anything."""
    selection: SelectionSection = SelectionSection()
    """Changes to the recipe's `selection`."""
    steering: SteeringSection = SteeringSection()
    """Changes to the recipe's `steering`."""
    on: str | None = None
    """Steering: the trained method whose checkpoints are steered; the base model when left out."""
    train: Flags = {}
    """Changes to the recipe's `train`."""

    @field_validator("name")
    @classmethod
    def _not_base(cls, name: str) -> str:
        if name == "base" or re.search(r"-seed\d+$", name):
            raise ValueError(
                f"a method cannot be called {name!r}: base and the ending -seedK name the run folder's own "
                "files"
            )
        return name

    @model_validator(mode="after")
    def _presets(self) -> Self:
        for name in self.preset or []:
            if name not in METHODS:
                raise ValueError(
                    f"method {self.name}: no preset {name!r}; expected names of `ramoe methods`: "
                    f"{', '.join(METHODS)}"
                )
        if self.model_fields_set == {"name"} and not self.presets:
            near = difflib.get_close_matches(self.name, METHODS, n=1)
            own = f"expected {', '.join(METHODS)}, or a method of your own with a preset or a section"
            meant = f"did you mean {near[0]}?" if near else own
            raise ValueError(
                f"methods: {self.name!r} is no name of `ramoe methods`, and it changes nothing: {meant}"
            )
        if self.presets and self.steered and (len(self.presets) > 1 or not METHODS[self.presets[0]].steering):
            raise ValueError(
                f"method {self.name}: steering acts at inference; name the trained method that it acts on by "
                "`on`"
            )
        if self.on is not None and not self.steered:
            raise ValueError(f"method {self.name}: only a steering method acts `on` another one")
        if self.steered and (found := {"train", "alignment", "selection"} & self.model_fields_set):
            raise ValueError(
                f"method {self.name}: steering trains nothing, so {', '.join(sorted(found))} has no meaning"
            )
        self._refuse_absorbed()
        self._refuse_unread()
        return self

    def _refuse_absorbed(self) -> None:
        """Of two losses, or of all weights and some, one would be dropped without a word."""
        losses = [
            name
            for name in self.presets
            if METHODS[name].kind == "method" and METHODS[name].alignment is not None
        ]
        if len(losses) > 1:
            raise ValueError(
                f"method {self.name}: {' and '.join(losses)} do not combine: each is a loss of its own"
            )
        if "sft" in self.presets and len(self.presets) > 1:
            raise ValueError(
                f"method {self.name}: sft is all weights and no further loss, so it combines with nothing: "
                "leave it out"
            )

    def _refuse_unread(self) -> None:
        """Raise ValueError for a key of this method's steering that nothing would read."""
        steering = self.steering_of(SteeringSection())
        unread = {
            "steer_strength": (steering.steer == "hard" or steering.search, "soft steering without a search"),
            "steer_tau": (steering.search, "steering without a search"),
        }
        for field_name, (unused, by) in unread.items():
            if unused and field_name in self.steering.model_fields_set:
                key = field_name.replace("_", "-")
                raise ValueError(f"method {self.name}: steering.{key} is read by {by} alone: remove it")

    @property
    def presets(self) -> list[str]:
        """The named methods that this one combines; none for a name of the recipe's own."""
        return self.preset if self.preset is not None else [self.name] if self.name in METHODS else []

    @property
    def steered(self) -> bool:
        """Whether this is steering at inference, and nothing is trained."""
        return bool(preset_changes(self.presets, "steering")) or self.steering.steer is not None

    @property
    def aligns(self) -> bool:
        """Whether the alignment's flags are given (with coefficient 0 they change nothing)."""
        own = "alignment" in self.model_fields_set
        return not self.steered and (
            own or not self.presets or preset_changes(self.presets, "alignment") is not None
        )

    def alignment_of(self, given: AlignmentSection, seed: int) -> AlignmentSection:
        """The recipe's alignment with the changes of the presets, and then the method's own; `seed`: of the fine-tune."""
        if not self.aligns:
            trained = (
                self.selection_of(SelectionSection()).train == "task-experts"
            )  # which experts these are, the alignment's section says
            kept = {"select", "select_tokens"} if trained else set()
            return AlignmentSection.model_validate(given.model_dump(by_alias=True, include=kept))
        preset = preset_changes(self.presets, "alignment") or {}
        preset = {key: seed if value == RUN_SEED else value for key, value in preset.items()}
        changed = _changed(given, preset, self.alignment)
        if changed.layers == "outside":
            return changed.model_copy(update={"layers": f"outside:{given.layers}"})
        return changed

    def selection_of(self, given: SelectionSection) -> SelectionSection:
        """Likewise which weights train: of the recipe's own keys, those that the method's choice reads."""
        changes = {"train": "all", **(preset_changes(self.presets, "selection") or {})}
        train = _changed(given, changes, self.selection).train
        unread = {key for key, kinds in READ_BY.items() if train not in kinds}
        read = type(given).model_validate(given.model_dump(by_alias=True, exclude=unread))
        return _changed(read, changes, self.selection)

    @model_serializer(mode="wrap")
    def _what_was_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the defaults of its sections: read again, they would pass for changes."""
        written = handler(self)
        for key in (
            "alignment",
            "selection",
            "steering",
        ):  # a null that is given takes the recipe's value back
            written[key] = getattr(self, key).model_dump(by_alias=True, exclude_unset=True)
        return {key: value for key, value in written.items() if value not in ({}, None)}

    def steering_of(self, given: SteeringSection) -> SteeringSection:
        """Likewise the steering."""
        return _changed(given, preset_changes(self.presets, "steering") or {}, self.steering)


def _changed[Part: Section](given: Part, preset: dict[str, Any], own: Part) -> Part:
    changes = {**preset, **own.model_dump(by_alias=True, exclude_unset=True)}
    return type(given).model_validate({**given.model_dump(by_alias=True), **changes})
