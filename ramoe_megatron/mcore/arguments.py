"""Our flags beside Megatron's: frozen dataclasses whose field docstrings are the `--help`."""

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
"""The flag that has a job stop before its model is built."""


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
    """PATTERN=WEIGHT pairs over TASK/LANGUAGE (shell patterns): the share of draws of each group; without,
    each example once an epoch."""

    pack: bool = False
    """Training: several samples in each sequence of --seq-length (THD), which attend to themselves alone. The
    global batch then counts sequences, and the alignment term is still the mean over samples. Needs
    --micro-batch-size 1."""

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
    """Megatron's `extra_args_provider`: the flags of routing alignment, of parallel data and of selective training."""
    return arguments_with(RoutingAlignmentConfig, DataOptions, SelectiveOptions)(parser)


def arguments_with(*options: type) -> Callable[[argparse.ArgumentParser], argparse.ArgumentParser]:
    """An `extra_args_provider` for a job with its own option dataclasses."""

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        for group in options:
            parser = add_options(parser, group)
        return compat.printable_help(parser)

    return provider


def job_arguments(*options: type) -> Callable[[argparse.ArgumentParser], argparse.ArgumentParser]:
    """`arguments_with`, and the flag --check that every job has."""

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        told = "stop before the model is built: parse, validate, read what the job reads, and list what would stop it"
        parser.add_argument(
            CHECK, action="store_true", default=argparse.SUPPRESS, help=told
        )  # absent: no trace in a checkpoint
        return arguments_with(*options)(parser)

    return provider


def known_flags() -> set[str]:
    """Every flag that Megatron's parser and ours accept, for checks before anything starts."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    return {flag for action in parser._actions for flag in action.option_strings}
