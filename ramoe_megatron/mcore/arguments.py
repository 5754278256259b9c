"""Our flags beside Megatron's: frozen dataclasses whose field docstrings are the `--help`."""

import argparse
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore import compat

PREFIX = "ramoe"


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

    divergence: Literal["lumped-kl", "mass", "kl", "js"] = "lumped-kl"
    """Divergence from the English routing to the target's: lumped-kl (task experts and one bin for the rest), mass (its first
    term alone), kl (all experts), js (symmetric Jensen-Shannon, natural logarithm)."""

    target: Literal["profile", "example"] = "profile"
    """What routing is pulled to: profile (the task's mean English pattern) or example (the same example's English view)."""

    layers: str = "auto"
    """Aligned layers: auto (the zone in the expert file), FIRST-LAST (inclusive, 0-based places among the MoE layers) or
    FRACTION-FRACTION of depth, such as 0.25-0.75."""

    tokens: Literal["prompt", "response", "all", "last"] = "last"
    """Tokens whose routing is pooled; last is the last prompt token."""

    pooling: Literal["sequence", "token"] = "sequence"
    """sequence: the divergence of the mean distribution over a sample's tokens; token: the mean over the tokens of each token's
    divergence."""

    examples: Literal["ci", "ci+cc", "all"] = "ci"
    """Samples that are aligned: ci (right in English, wrong in the target), ci+cc, or all target-language samples."""

    normalize: Literal["samples", "ci"] = "samples"
    """What the sum over aligned samples is divided by: samples (all of the global batch) or ci (the aligned ones alone)."""

    shuffle_targets: int | None = None
    """Control, not a method: seed of a permutation of the English targets among the examples of one task."""

    def __post_init__(self) -> None:
        if not (self.coeff >= 0 and math.isfinite(self.coeff)):
            raise RamoeError(f"--ramoe-coeff {self.coeff}: expected a finite number >= 0 (0 is off)")
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(kind) is Literal and value not in get_args(kind):  # argparse checks flags, nobody a keyword
                raise RamoeError(f"--ramoe-{name} {value!r}: expected one of {', '.join(get_args(kind))}")
        if self.coeff == 0:
            return
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
        if self.shuffle_targets is not None and self.target != "example":
            raise RamoeError("--ramoe-shuffle-targets permutes the targets of examples: it needs --ramoe-target example")

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Self:
        """The configuration that the parsed flags give."""
        return options_from_args(cls, args)


@dataclass(frozen=True)
class DataOptions:
    """Parallel task data and how it is drawn."""

    data: list[str] = dataclasses.field(default_factory=list)
    """JSONL files, folders of them, or the name of a data set on the hub."""

    split: str = "train"
    """Split of the data to use; several, separated by commas, in the offline jobs."""

    languages: list[str] | None = None
    """Languages to use; all of the data when not given. The offline jobs add the anchor."""

    anchor: str = "en"
    """The language whose routing is the reference, as it is called in the data."""

    columns: list[str] | None = None
    """FIELD=COLUMN pairs for data whose columns are called otherwise."""

    weights: list[str] | None = None
    """PATTERN=WEIGHT pairs over TASK/LANGUAGE (shell patterns): the share of draws of each group; without, each example once an
    epoch."""

    pack: bool = False
    """Training: several samples in each sequence of --seq-length (THD), which attend to themselves alone. The global batch then counts
    sequences, and the alignment term is still the mean over samples. Needs --micro-batch-size 1."""

    def column_mapping(self) -> dict[str, str] | None:
        """`columns` as a mapping from field to column."""
        return dict(_pairs("columns", self.columns)) if self.columns else None

    def weight_mapping(self) -> dict[str, float] | None:
        """`weights` as a mapping from pattern to weight."""
        if not self.weights:
            return None
        try:
            return {pattern: float(weight) for pattern, weight in _pairs("weights", self.weights)}
        except ValueError as error:
            raise RamoeError(f"--ramoe-weights: {error}; expected PATTERN=NUMBER, such as '*/en=0.4'") from error


def _pairs(flag: str, values: list[str]) -> list[tuple[str, str]]:
    pairs = [tuple(value.rsplit("=", 1)) for value in values]
    for value, pair in zip(values, pairs, strict=True):
        if len(pair) != 2 or not all(pair):
            raise RamoeError(f"--ramoe-{flag} {value!r}: expected NAME=VALUE")
    return pairs  # type: ignore[return-value]


def add_options(parser: argparse.ArgumentParser, options: type) -> argparse.ArgumentParser:
    """Add a dataclass's fields as `--ramoe-...` flags, through Megatron's own argument factory."""
    from megatron.training.argument_utils import ArgumentGroupFactory

    class PrefixedFlags(ArgumentGroupFactory):
        def _format_arg_name(self, config_attr_name: str, prefix: str | None = None) -> str:
            return super()._format_arg_name(f"{PREFIX}_{config_attr_name}", prefix)

        def _build_argparse_kwargs_from_field(self, attribute: Any) -> dict[str, Any]:
            kwargs = super()._build_argparse_kwargs_from_field(attribute)
            help_text = f"{kwargs['help']} (default: {kwargs['default']})".replace("%", "%%")
            return {**kwargs, "dest": f"{PREFIX}_{attribute.name}", "help": help_text}

    PrefixedFlags(options).build_group(parser, title=f"ramoe: {(options.__doc__ or '').splitlines()[0].rstrip('.')}")
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Megatron's `extra_args_provider`: the flags of routing alignment and of parallel data."""
    return arguments_with(RoutingAlignmentConfig, DataOptions)(parser)


def arguments_with(*options: type) -> Callable[[argparse.ArgumentParser], argparse.ArgumentParser]:
    """An `extra_args_provider` for a job with its own option dataclasses."""

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        for group in options:
            parser = add_options(parser, group)
        return compat.printable_help(parser)

    return provider


def options_from_args[Options](options: type[Options], args: argparse.Namespace) -> Options:
    """A dataclass filled from the parsed `--ramoe-...` flags."""
    names = [field.name for field in dataclasses.fields(options)]  # type: ignore[arg-type]
    return options(**{name: getattr(args, f"{PREFIX}_{name}") for name in names})


def known_flags() -> set[str]:
    """Every flag that Megatron's parser and ours accept, for checks before anything starts."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    return {flag for action in parser._actions for flag in action.option_strings}
