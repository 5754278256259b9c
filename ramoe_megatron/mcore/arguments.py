"""Add our flags to Megatron's parser. Flags are fields of dataclasses; field docstrings are the help."""

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore import compat
from ramoe_megatron.mcore.align.options import RoutingAlignmentConfig
from ramoe_megatron.mcore.flags import PREFIX
from ramoe_megatron.mcore.select.selective_options import SelectiveOptions

CHECK = "--check"
"""With this flag a job checks its inputs and stops before it builds a model."""


@dataclass(frozen=True)
class DataOptions:
    """Parallel task data and how examples are drawn."""

    data: list[str] = dataclasses.field(default_factory=list)
    """Data to read: JSONL files, folders of JSONL files, or names of Hugging Face data sets."""

    split: str = "train"
    """Split of the data to use. The offline jobs also take several splits, separated by commas."""

    languages: list[str] | None = None
    """Languages to use. Default: all languages in the data. The offline jobs always add the anchor."""

    anchor: str = "en"
    """Language whose routing is the reference, by its name in the data."""

    columns: list[str] | None = None
    """FIELD=COLUMN pairs: the column of the data that holds the field. Default: a column of the same name."""

    weights: list[str] | None = None
    """PATTERN=WEIGHT pairs: the share of draws for each group TASK/LANGUAGE that the shell pattern matches.
    Default: each example is drawn once per epoch."""

    ids_per_task: int | None = None
    """Training only: train on this many ids of each task, in all their languages. --seed draws them, and a
    larger number keeps the ids of a smaller one. Default: all."""

    pack: bool = False
    """Training only: pack several samples into each sequence of --seq-length tokens (THD layout). A sample
    attends only to its own tokens. The global batch then counts sequences; the alignment term stays a mean
    over samples. Requires --micro-batch-size 1."""

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
            raise RamoeError(
                f"--ramoe-weights: {error}; expected PATTERN=NUMBER, such as '*/en=0.4'"
            ) from error


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

    PrefixedFlags(options).build_group(
        parser, title=f"ramoe: {(options.__doc__ or '').splitlines()[0].rstrip('.')}"
    )
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Megatron's `extra_args_provider`: add the flags of alignment, parallel data and selective training."""
    return arguments_with(RoutingAlignmentConfig, DataOptions, SelectiveOptions)(parser)


def arguments_with(*options: type) -> Callable[[argparse.ArgumentParser], argparse.ArgumentParser]:
    """An `extra_args_provider` that adds the flags of these option dataclasses."""

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        for group in options:
            parser = add_options(parser, group)
        return compat.printable_help(parser)

    return provider


def job_arguments(*options: type) -> Callable[[argparse.ArgumentParser], argparse.ArgumentParser]:
    """`arguments_with`, plus the flag --check."""

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        help_text = (
            "Check the flags, data, checkpoint and files that the job needs. "
            "List every problem and stop before the model is built."
        )
        # suppressed when absent: a checkpoint stores all arguments
        parser.add_argument(CHECK, action="store_true", default=argparse.SUPPRESS, help=help_text)
        return arguments_with(*options)(parser)

    return provider


def known_flags() -> set[str]:
    """Every flag that a training job accepts: Megatron's and ours. Raises RamoeError for an old Megatron."""
    compat.refuse_other_megatron()
    from megatron.training.arguments import add_megatron_arguments

    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    return {flag for action in parser._actions for flag in action.option_strings}
