"""Converts SIB-200: `python -m ramoe_megatron.jobs.sib200 --config JSON --out DIR`."""

import sys

from ramoe_megatron.data.benchmarks.sib200 import SibConfig, convert
from ramoe_megatron.jobs.builder import run_builder

if __name__ == "__main__":
    sys.exit(run_builder("sib200", SibConfig, convert))
