"""Reading option dataclasses back from Megatron's parsed arguments."""

import argparse
import dataclasses

PREFIX = "ramoe"


def flag_of(field: str) -> str:
    """The flag of an option dataclass's field, as it is typed."""
    return f"--{PREFIX}-{field.replace('_', '-')}"


def options_from_args[Options](options: type[Options], args: argparse.Namespace) -> Options:
    """A dataclass filled from the parsed `--ramoe-...` flags."""
    names = [field.name for field in dataclasses.fields(options)]  # type: ignore[arg-type]
    return options(**{name: getattr(args, f"{PREFIX}_{name}") for name in names})
