"""Builds the embedded world: `python -m ramoe_megatron.jobs.world --config JSON --out DIR`."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ramoe_megatron.data.config import config_from_json
from ramoe_megatron.data.world import WorldConfig, build_world
from ramoe_megatron.errors import RamoeError


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the counts as JSON; a fault in the config is told without a traceback, with exit status 2."""
    parser = argparse.ArgumentParser(prog="ramoe_megatron.jobs.world", description=__doc__)
    parser.add_argument("--config", default="{}", help="JSON object, or a file of one: the fields of WorldConfig")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files; made if missing")
    options = parser.parse_args(arguments)
    try:
        stats = build_world(config_from_json(WorldConfig, options.config), options.out)
    except RamoeError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(dataclasses.asdict(stats), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
