"""Options of routing alignment: one dataclass whose field docstrings are the `--help`, and its checks."""

import argparse
import math
from dataclasses import dataclass
from typing import Literal, Self, get_args, get_origin, get_type_hints

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.flags import flag_of, options_from_args


@dataclass(frozen=True)
class RoutingAlignmentConfig:
    """Routing alignment beside the load-balancing loss (RA-MoE, arXiv 2605.28306).

    Where the paper leaves a choice open, the choice is our reading. `from_args(args)` reads the `--ramoe-...`
    flags. Code that builds its own model passes the dataclass to `attach`.
    """

    coeff: float = 0.0
    """Coefficient of the alignment loss. With 0 (the default) alignment is off and training is bit-for-bit
    Megatron's. In every parallel layout the loss is the coefficient times the mean over all samples of the
    global batch (samples count by their loss tokens under --calculate-per-token-loss). The log shows the mean
    without the coefficient, as routing_alignment_loss."""

    experts: str | None = None
    """experts.safetensors of the profile job: the task experts, the English routing patterns and the
    alignment zone."""

    taxonomy: str | None = None
    """taxonomy.jsonl of the taxonomy job: the category (cc, ci, ic, ii) of each example in each language."""

    priors: str | None = None
    """priors.safetensors of the profile job: the English routing of each example, which the target "example"
    reads."""

    select: str | None = None
    """Re-select the task experts with this rule, tau=X or top-m=M, from the frequency differences stored in
    the expert file. Default: the experts stored in the file."""

    divergence: Literal["lumped-kl", "mass", "kl", "js"] = "lumped-kl"
    """Divergence between the English routing and the target-language routing: lumped-kl (over the task
    experts and one bin for all others), mass (the first term of lumped-kl alone), kl (over all experts) or js
    (symmetric Jensen-Shannon, natural logarithm)."""

    target: Literal["profile", "example", "paired"] | None = None
    """The routing that samples are aligned to: profile (the task's mean English pattern), example (the
    English view of the same example, as the model routed it before training, from the priors) or paired (that
    English view at the current weights, without gradient). With paired, the view runs beside its sample in
    the micro-batch and has no language-model loss, so half of the places are English views. Default: example
    with --ramoe-priors, otherwise profile."""

    missing_priors: Literal["refuse", "skip"] = "refuse"
    """What to do with aligned examples that have no English view in the priors: refuse to start, or skip
    them. A skipped example contributes exactly 0."""

    layers: str = "auto"
    """Aligned layers: auto (the zone in the expert file), FIRST-LAST (inclusive, counted from 0 over the MoE
    layers), FRACTION-FRACTION of depth, such as 0.25-0.75, or all. outside:LAYERS, such as outside:auto,
    takes all layers except these (a control)."""

    layer_weights: str | None = None
    """divergence.csv of the profile job: weight the aligned layers by the divergence curve, with the largest
    weight at its minimum and a mean weight of 1 (our own option). Default: all aligned layers weigh the
    same."""

    coeff_warmup_iters: int = 0
    """Number of first iterations over which the coefficient rises linearly from 0."""

    coeff_decay: Literal["constant", "cosine"] = "constant"
    """The coefficient after the warm-up: constant, or cosine (falls along half a cosine to 0 at
    --train-iters)."""

    coeff_unit: Literal["absolute", "lm-loss"] = "absolute"
    """Unit of the coefficient. absolute: the plain number. lm-loss: relative to the language-model loss, so
    that with 1 the alignment loss starts as large as the language-model loss (XLR, arXiv 2610.01921). Both
    losses are measured on the first global batch that has an aligned sample; nothing is aligned before
    that."""

    tokens: Literal["prompt", "response", "all", "last"] = "last"
    """Tokens whose routing is aligned; last is the last prompt token."""

    pooling: Literal["sequence", "token"] = "sequence"
    """sequence: the divergence of the mean distribution over a sample's tokens. token: the mean of the
    divergences of the single tokens."""

    examples: Literal["ci", "ci+cc", "all"] = "ci"
    """Samples that are aligned: ci (right in English, wrong in the target language), ci+cc (also those right
    in both), or all target-language samples."""

    normalize: Literal["samples", "ci"] = "samples"
    """Divisor of the sum over aligned samples: samples (all samples of the global batch) or ci (only the
    aligned samples)."""

    refresh_interval: int | None = None
    """Every N iterations, score a sample of the training examples again with the current weights and update
    their categories. Examples that are now right are no longer aligned; new ci examples are (our own option;
    off by default)."""

    refresh_examples: int = 512
    """Number of example ids that each refresh scores, each id in all its languages."""

    shuffle_targets: int | None = None
    """Control, not a method: shuffle the English targets among the examples of a task, with this seed."""

    random_experts: int | None = None
    """Control, not a method: replace the task experts by as many random experts in each layer, with this
    seed."""

    reverse: bool = False
    """Control, not a method: align the English view of each aligned sample to its target-language routing.
    Needs --ramoe-target paired."""

    def __post_init__(self) -> None:
        if not (self.coeff >= 0 and math.isfinite(self.coeff)):
            raise RamoeError(f"--ramoe-coeff {self.coeff}: expected a finite number >= 0 (0 is off)")
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            choices = [
                each
                for part in (kind, *get_args(kind))
                if get_origin(part) is Literal
                for each in get_args(part)
            ]
            # argparse checks the flags, but nothing checks keyword arguments
            if choices and value not in (choices if get_origin(kind) is Literal else [*choices, None]):
                raise RamoeError(f"{flag_of(name)} {value!r}: expected one of {', '.join(choices)}")
        if self.target is None:
            object.__setattr__(self, "target", "profile" if self.priors is None else "example")
        if (self.refresh_interval is not None and self.refresh_interval < 1) or self.refresh_examples < 1:
            raise RamoeError(
                "--ramoe-refresh-interval and --ramoe-refresh-examples: expected whole numbers of at least 1"
            )
        if self.coeff_warmup_iters < 0:
            raise RamoeError(
                f"--ramoe-coeff-warmup-iters {self.coeff_warmup_iters}: expected a number of iterations, "
                "0 or more"
            )
        if self.select is not None:
            # Imported here because it imports torch, which reading a recipe does not need.
            from ramoe_megatron.method.experts import parse_rule

            parse_rule(self.select)
        if self.coeff == 0:
            return
        self._refuse_combinations()
        if self.experts is None:
            raise RamoeError(
                f"--ramoe-coeff {self.coeff} without --ramoe-experts: alignment needs the expert file of the "
                "profile job; run `ramoe profile`, or set the coefficient to 0"
            )
        if self.taxonomy is None and self.examples != "all":
            raise RamoeError(
                f"--ramoe-examples {self.examples} without --ramoe-taxonomy: "
                f"taxonomy.jsonl says which samples are {self.examples}; "
                "run `ramoe taxonomy`, or use --ramoe-examples all"
            )
        if self.target == "example" and self.priors is None:
            raise RamoeError(
                "--ramoe-target example without --ramoe-priors: each example's English routing is in "
                "priors.safetensors; run `ramoe profile --ramoe-save-priors`, or use --ramoe-target profile"
            )

    @property
    def scheduled(self) -> bool:
        """Whether the coefficient changes during training."""
        return self.coeff_warmup_iters > 0 or self.coeff_decay != "constant" or self.coeff_unit != "absolute"

    def _refuse_combinations(self) -> None:
        """Raise RamoeError for options that have no meaning together."""
        if self.shuffle_targets is not None and self.target != "example":
            raise RamoeError(
                "--ramoe-shuffle-targets permutes the targets of examples: it needs --ramoe-target example"
            )
        if self.missing_priors == "skip" and self.target != "example":
            raise RamoeError(
                "--ramoe-missing-priors skip: only --ramoe-target example reads priors; "
                "remove it, or use that target"
            )
        if self.random_experts is not None and self.divergence not in ("lumped-kl", "mass"):
            raise RamoeError(
                f"--ramoe-random-experts with --ramoe-divergence {self.divergence}, "
                "which does not use task experts: use lumped-kl or mass"
            )
        if self.reverse and self.target != "paired":
            raise RamoeError(
                "--ramoe-reverse aligns English views, and only --ramoe-target paired runs these: "
                "use that target"
            )
        if self.refresh_interval is not None:
            for flag, on, way_out in (
                (
                    "--ramoe-examples all",
                    self.examples == "all",
                    "every example is aligned, whatever its category: remove one of the two",
                ),
                (
                    "--ramoe-normalize ci",
                    self.normalize == "ci",
                    "that divisor must be known before training: use --ramoe-normalize samples",
                ),
                ("--ramoe-target paired", self.target == "paired", "use --ramoe-target example"),
                ("--ramoe-shuffle-targets", self.shuffle_targets is not None, "remove one of the two"),
            ):
                if on:
                    raise RamoeError(f"--ramoe-refresh-interval does not work with {flag}: {way_out}")
        if self.target != "paired":
            return
        for flag, on, way_out in (
            (
                "--ramoe-pooling token",
                self.pooling == "token" and self.tokens != "last",
                "use --ramoe-pooling sequence",
            ),
            ("--ramoe-normalize ci", self.normalize == "ci", "use --ramoe-normalize samples"),
        ):
            if on:
                raise RamoeError(f"--ramoe-target paired has no meaning with {flag}: {way_out}")

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Self:
        """The configuration from parsed flags."""
        return options_from_args(cls, args)

    def refuse_unread_rule(self, train: str) -> None:
        """Raise RamoeError for `select` when neither the divergence nor `--ramoe-train` uses task experts.

        Args:
            train: the value of `--ramoe-train`.
        """
        if (
            self.coeff
            and self.select is not None
            and self.divergence not in ("lumped-kl", "mass")
            and train != "task-experts"
        ):
            raise RamoeError(
                f"--ramoe-select {self.select} with --ramoe-divergence {self.divergence}, "
                "which does not use task experts: remove one of the two"
            )
