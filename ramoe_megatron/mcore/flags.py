"""Fills option dataclasses from Megatron's parsed arguments."""

import argparse
import dataclasses

PREFIX = "ramoe"


def flag_of(field: str) -> str:
    """The command-line flag of a field of an option dataclass."""
    return f"--{PREFIX}-{field.replace('_', '-')}"


def options_from_args[Options](options: type[Options], args: argparse.Namespace) -> Options:
    """A dataclass filled from the parsed `--ramoe-...` flags."""
    names = [field.name for field in dataclasses.fields(options)]  # type: ignore[arg-type]
    return options(**{name: getattr(args, f"{PREFIX}_{name}") for name in names})
