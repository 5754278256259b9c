"""The command line of the jobs that build data: `--config JSON --out DIR`, one process, no Megatron."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ramoe_megatron.data.config import config_from_json
from ramoe_megatron.errors import RamoeError


def run_builder[T](
    name: str, kind: type[T], build: Callable[[T, Path], Any], arguments: Sequence[str] | None = None
) -> int:
    """Builds with a config of `kind` and prints the counts as JSON.

    Returns:
        The exit status: 2 after a fault in what the user gave, which is told without a traceback.
    """
    parser = argparse.ArgumentParser(prog=f"ramoe_megatron.jobs.{name}")
    parser.add_argument("--config", default="{}", help=f"JSON object, or a file of one: fields of {kind.__name__}")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files; made if missing")
    options = parser.parse_args(arguments)
    try:
        stats = build(config_from_json(kind, options.config), options.out)
    except RamoeError as error:
        print(f"ramoe: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(dataclasses.asdict(stats), indent=1))
    return 0
