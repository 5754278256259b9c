"""The flags of routing alignment: a frozen dataclass whose field docstrings are the `--help`, and what must agree among them."""

import argparse
import math
from dataclasses import dataclass
from typing import Literal, Self, get_args, get_origin, get_type_hints

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.flags import flag_of, options_from_args


@dataclass(frozen=True)
class RoutingAlignmentConfig:
    """Routing alignment beside the load-balancing loss (RA-MoE, arXiv 2605.28306; open choices are our reading).

    `from_args(args)` reads the `--ramoe-...` flags; a model built elsewhere takes the dataclass itself in `attach`.
    """

    coeff: float = 0.0
    """Coefficient of the alignment loss. 0 (the default) is off: training is then bit-for-bit Megatron's. With per-token loss off
    the term is coefficient times the mean over all samples of the global batch, in every parallel layout. The log shows the mean,
    routing_alignment_loss, without the coefficient."""

    experts: str | None = None
    """experts.safetensors of the profile job: task experts, the English routing pattern and the zone."""

    taxonomy: str | None = None
    """taxonomy.jsonl of the taxonomy job: the category (cc, ci, ic, ii) of each example id in each language."""

    priors: str | None = None
    """priors.safetensors of the profile job: the English routing of each example id (needed by the target "example")."""

    select: str | None = None
    """Task experts anew by this rule, tau=X or top-m=M, from the differences in frequency that the expert file holds; those that the file
    chose when left out."""

    divergence: Literal["lumped-kl", "mass", "kl", "js"] = "lumped-kl"
    """Divergence from the English routing to the target's: lumped-kl (task experts and one bin for the rest), mass (its first
    term alone), kl (all experts), js (symmetric Jensen-Shannon, natural logarithm)."""

    target: Literal["profile", "example", "paired"] = "profile"
    """What routing is pulled to: profile (the task's mean English pattern), example (the same example's English view, as the model
    routed it before training, from the priors) or paired (that view at the current weights, without gradient: it is run in the
    neighbouring place of the micro-batch, its own loss masked, so half of the batch's places are English views)."""

    missing_priors: Literal["refuse", "skip"] = "refuse"
    """Aligned examples without an English view among the priors: refuse to start, or skip them (they then contribute exactly 0)."""

    layers: str = "auto"
    """Aligned layers: auto (the zone in the expert file), FIRST-LAST (inclusive, 0-based places among the MoE layers),
    FRACTION-FRACTION of depth, such as 0.25-0.75, or all. outside:LAYERS takes all but those, such as outside:auto (a control)."""

    layer_weights: str | None = None
    """divergence.csv of the profile job: weigh the aligned layers by the divergence curve, most at its floor, mean 1 (our own
    option). Without it all aligned layers weigh the same."""

    coeff_warmup_iters: int = 0
    """The coefficient rises linearly from 0 over these first iterations."""

    coeff_decay: Literal["constant", "cosine"] = "constant"
    """After the warm-up: stay, or fall to 0 along half a cosine at --train-iters."""

    coeff_unit: Literal["absolute", "lm-loss"] = "absolute"
    """absolute: the coefficient as it stands. lm-loss: in units of parity, so that with 1 the term starts as large as the
    language-model loss (XLR, arXiv 2610.01921): both are measured on the first global batch that has an aligned
    sample, and nothing is aligned until then."""

    tokens: Literal["prompt", "response", "all", "last"] = "last"
    """Tokens whose routing is pooled; last is the last prompt token."""

    pooling: Literal["sequence", "token"] = "sequence"
    """sequence: the divergence of the mean distribution over a sample's tokens; token: the mean over the tokens of each token's
    divergence."""

    examples: Literal["ci", "ci+cc", "all"] = "ci"
    """Samples that are aligned: ci (right in English, wrong in the target), ci+cc, or all target-language samples."""

    normalize: Literal["samples", "ci"] = "samples"
    """What the sum over aligned samples is divided by: samples (all of the global batch) or ci (the aligned ones alone)."""

    refresh_interval: int | None = None
    """Every so many iterations, score a sample of the training examples anew with the current weights: those that have become right
    leave the aligned set, new ci ones enter it (our own option; off by default)."""

    refresh_examples: int = 512
    """Examples (ids, each in all its languages) of such a sample."""

    shuffle_targets: int | None = None
    """Control, not a method: seed of a permutation of the English targets among the examples of one task."""

    random_experts: int | None = None
    """Control: seed of random experts that take the place of the task experts, as many in each layer."""

    reverse: bool = False
    """Control: pull the English view of each aligned sample to the target language's routing; needs the target paired."""

    def __post_init__(self) -> None:
        if not (self.coeff >= 0 and math.isfinite(self.coeff)):
            raise RamoeError(f"--ramoe-coeff {self.coeff}: expected a finite number >= 0 (0 is off)")
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(kind) is Literal and value not in get_args(kind):  # argparse checks flags, nobody a keyword
                raise RamoeError(f"{flag_of(name)} {value!r}: expected one of {', '.join(get_args(kind))}")
        if (self.refresh_interval is not None and self.refresh_interval < 1) or self.refresh_examples < 1:
            raise RamoeError("--ramoe-refresh-interval and --ramoe-refresh-examples: expected whole numbers of at least 1")
        if self.coeff_warmup_iters < 0:
            raise RamoeError(f"--ramoe-coeff-warmup-iters {self.coeff_warmup_iters}: expected a number of iterations, 0 or more")
        if self.select is not None:
            from ramoe_megatron.method.experts import parse_rule  # torch, which a recipe is read without

            parse_rule(self.select)
        if self.coeff == 0:
            return
        self._refuse_combinations()
        if self.experts is None:
            raise RamoeError(
                f"--ramoe-coeff {self.coeff} without --ramoe-experts: alignment needs the expert file of the profile job; "
                "run `ramoe profile`, or set the coefficient to 0"
            )
        if self.taxonomy is None and self.examples != "all":
            raise RamoeError(
                f"--ramoe-examples {self.examples} without --ramoe-taxonomy: which samples are {self.examples} stands in "
                "taxonomy.jsonl; run `ramoe taxonomy`, or use --ramoe-examples all"
            )
        if self.target == "example" and self.priors is None:
            raise RamoeError(
                "--ramoe-target example without --ramoe-priors: each example's English routing stands in priors.safetensors; "
                "run `ramoe profile --ramoe-save-priors`, or use --ramoe-target profile"
            )

    @property
    def scheduled(self) -> bool:
        """Whether the coefficient changes while training goes on."""
        return self.coeff_warmup_iters > 0 or self.coeff_decay != "constant" or self.coeff_unit != "absolute"

    def _refuse_combinations(self) -> None:
        """Options that have no meaning together."""
        if self.shuffle_targets is not None and self.target != "example":
            raise RamoeError("--ramoe-shuffle-targets permutes the targets of examples: it needs --ramoe-target example")
        if self.missing_priors == "skip" and self.target != "example":
            raise RamoeError("--ramoe-missing-priors skip: only --ramoe-target example reads priors; remove one of the two")
        if self.random_experts is not None and self.divergence not in ("lumped-kl", "mass"):
            raise RamoeError(
                f"--ramoe-random-experts with --ramoe-divergence {self.divergence}, which knows no task experts: use lumped-kl or mass"
            )
        if self.reverse and self.target != "paired":
            raise RamoeError("--ramoe-reverse aligns English views, which only --ramoe-target paired runs: give that too")
        if self.refresh_interval is not None:
            for flag, on, way_out in (
                ("--ramoe-examples all", self.examples == "all", "which examples are right then changes nothing: remove one of the two"),
                ("--ramoe-normalize ci", self.normalize == "ci", "it needs to know them beforehand: use --ramoe-normalize samples"),
                ("--ramoe-target paired", self.target == "paired", "use --ramoe-target example"),
                ("--ramoe-shuffle-targets", self.shuffle_targets is not None, "remove one of the two"),
            ):
                if on:
                    raise RamoeError(f"--ramoe-refresh-interval does not go with {flag}: {way_out}")
        if self.target != "paired":
            return
        for flag, on, way_out in (
            ("--ramoe-pooling token", self.pooling == "token" and self.tokens != "last", "use --ramoe-pooling sequence"),
            ("--ramoe-normalize ci", self.normalize == "ci", "use --ramoe-normalize samples"),
        ):
            if on:
                raise RamoeError(f"--ramoe-target paired has no meaning with {flag}: {way_out}")

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Self:
        """The configuration that the parsed flags give."""
        return options_from_args(cls, args)

    def refuse_unread_rule(self, train: str) -> None:
        """Raise RamoeError for `select` where neither the divergence nor `--ramoe-train`, which is `train`, knows task experts."""
        if self.coeff and self.select is not None and self.divergence not in ("lumped-kl", "mass") and train != "task-experts":
            raise RamoeError(
                f"--ramoe-select {self.select} with --ramoe-divergence {self.divergence}, which knows no task experts: remove one of them"
            )
