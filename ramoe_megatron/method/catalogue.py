"""The methods that a recipe can name: what each trains, what it adds to the loss, where it comes from, and what of it is our reading.

`settings` are the keys of a recipe's sections that a name stands for; everything else stays the recipe's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


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
        "stated: symmetric JS, 1.5, prompt and response pooled, constant anchor priors, data of anchor-correct examples; ours: those "
        "alone are aligned while all train, as in the other methods, and the mean is over all samples of the batch, so that one without "
        "a prior counts 0",
        {
            "coeff": 1.5, "divergence": "js", "target": "example", "tokens": "all", "pooling": "sequence", "examples": "ci+cc",
            "normalize": "samples", "missing-priors": "skip", **PLAIN,
        },
    ),
    "xlr": MethodEntry(
        "method", ALL, "KL(English || target) of mean-pooled routing of parallel text, as large as the LM loss at the start",
        "arXiv 2610.01921",
        "stated: KL, gradient through the target side only, middle layers, start at parity; ours: the direction of the KL, the English "
        "view run beside each sample without a loss of its own (twice the batch), parity measured on the first batch with an "
        "aligned sample",
        {
            "coeff": 1, "divergence": "kl", "target": "paired", "tokens": "all", "pooling": "sequence", "examples": "all",
            "normalize": "samples", "missing-priors": "refuse", **PLAIN, "coeff-unit": "lm-loss",
        },
    ),
    "steering-soft": MethodEntry(
        "method", "nothing", "at inference: task experts' logits + strength x their standard deviation", "arXiv 2510.04694, eq. 4",
        "whose standard deviation (population, over all experts of the token)", steering={"kind": "soft"},
    ),
    "steering-hard": MethodEntry(
        "method", "nothing", "at inference: task experts' logits above the largest", "arXiv 2510.04694, eq. 5",
        "the noise is drawn once per layer and expert, and only upwards, so that the layout changes nothing; refused for routers that "
        "choose by more than the order of the logits (sigmoid scores, expert biases, groups), which the paper does not have",
        steering={"kind": "hard"},
    ),
    "rise": MethodEntry(
        "method", "experts chosen by specificity (shallow, deep) and overlap (middle)", "nothing", "arXiv 2604.03592",
        "several target languages: the mean of their specificity; the anchor is among the languages of the means; a layer whose middle "
        "lies on a border is of the middle zone; the budget's split over depth, by the layers of each zone unless it is given",
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
        "control", ALL, "ra-moe's, with as many random experts for the task experts", "our control", "all of it", {"random-experts": True}
    ),
    "all-layers": MethodEntry("control", ALL, "ra-moe's, in all layers", "our control", "all of it", {"layers": "all"}),
    "outside-zone": MethodEntry(
        "control", ALL, "ra-moe's, in the layers outside the zone alone", "our control", "all of it", {"layers": "outside"}
    ),
    "ra-moe-shuffled": MethodEntry(
        "control", ALL, "ra-moe's, with the English targets of other examples of the task", "our control", "all of it",
        {"shuffle-targets": True},
    ),
    "reversed": MethodEntry(
        "control", ALL, "ra-moe's, the English view pulled to the target language's routing", "our control",
        "both views at the current weights (twice the batch), the English one without a loss of its own",
        {"target": "paired", "reverse": True},
    ),
}  # fmt: skip


def merged(names: list[str], section: Literal["alignment", "selection", "steering"]) -> dict[str, Any] | None:
    """The changes of several named methods to one section; None where none of them has any.

    Raises:
        ValueError: two of them ask for different values of one key.
    """
    found: dict[str, Any] | None = None
    for name in names:
        changes = getattr(METHODS[name], section)
        for key, value in (changes or {}).items():
            if found and key in found and found[key] != value:
                raise ValueError(f"{' and '.join(names)} do not combine: they ask for {section}.{key} {found[key]} and {value}")
        if changes is not None and (changes or section == "alignment"):
            found = {**(found or {}), **changes}
    return found
