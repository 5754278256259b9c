"""Builds the embedded world: `python -m ramoe_megatron.jobs.world --config JSON --out DIR`."""

import sys

from ramoe_megatron.data.world import WorldConfig, build_world
from ramoe_megatron.jobs.builder import run_builder

if __name__ == "__main__":
    sys.exit(run_builder("world", WorldConfig, build_world))
