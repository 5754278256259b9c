"""Writes results.json, plots/ and report.html of a run folder: `python -m ramoe_megatron.jobs.report --run DIR`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ramoe_megatron.errors import RamoeError


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints where the report is; a fault in the run folder is told without a traceback, with exit status 2."""
    parser = argparse.ArgumentParser(prog="ramoe_megatron.jobs.report", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder, as written by `ramoe run ... --out DIR`")
    options = parser.parse_args(arguments)
    from ramoe_megatron.report.page import write_report

    try:
        page = write_report(options.run)
    except RamoeError as error:
        print(f"ramoe: error: {error}", file=sys.stderr)
        return 2
    print(f"report: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
