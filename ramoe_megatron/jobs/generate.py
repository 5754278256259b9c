"""Generate the data of a recipe. One process, without Megatron.

python -m ramoe_megatron.jobs.generate world|sib200|benchmarks --config JSON --out DIR
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ramoe_megatron.data.benchmarks.engine import BenchmarksConfig, write_benchmarks
from ramoe_megatron.data.benchmarks.sib200 import SibConfig, convert
from ramoe_megatron.data.config import config_from_json
from ramoe_megatron.data.world import WorldConfig, build_world
from ramoe_megatron.errors import RamoeError

SOURCES: dict[str, tuple[type, Callable[[Any, Path], Any]]] = {
    "world": (WorldConfig, build_world),
    "sib200": (SibConfig, convert),
    "benchmarks": (BenchmarksConfig, write_benchmarks),
}
"""Name of a source -> (configuration class, function that makes the data)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Generate the data and print the counts as JSON.

    Returns:
        Exit status: 0, or 2 after an error in the user's input. Such an error is printed without a traceback.
    """
    parser = argparse.ArgumentParser(prog="ramoe_megatron.jobs.generate")
    parser.add_argument("source", choices=SOURCES)
    parser.add_argument(
        "--config", default="{}", help="JSON object, or JSON file: the fields of the configuration"
    )
    parser.add_argument("--out", type=Path, required=True, help="output folder; created if missing")
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
