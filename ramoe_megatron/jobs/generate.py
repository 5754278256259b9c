"""Make a recipe's data: `python -m ramoe_megatron.jobs.generate world|sib200 --config JSON --out DIR`. One process, no Megatron."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ramoe_megatron.data.benchmarks.sib200 import SibConfig, convert
from ramoe_megatron.data.config import config_from_json
from ramoe_megatron.data.world import WorldConfig, build_world
from ramoe_megatron.errors import RamoeError

SOURCES: dict[str, tuple[type, Callable[[Any, Path], Any]]] = {
    "world": (WorldConfig, build_world),
    "sib200": (SibConfig, convert),
}
"""By name, the configuration of a source and what makes the data of it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the data and print the counts as JSON.

    Returns:
        The exit status: 2 after a fault in what the user gave, which is printed without a traceback.
    """
    parser = argparse.ArgumentParser(prog="ramoe_megatron.jobs.generate")
    parser.add_argument("source", choices=SOURCES)
    parser.add_argument(
        "--config", default="{}", help="JSON object, or a file of one: WorldConfig or SibConfig"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the files; made if missing")
    options = parser.parse_args(arguments)
    kind, build = SOURCES[options.source]
    try:
        stats = build(config_from_json(kind, options.config), options.out)
    except RamoeError as error:
        print(f"ramoe: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(dataclasses.asdict(stats), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
