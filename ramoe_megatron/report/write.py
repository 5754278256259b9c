"""The last stages of a recipe: `python -m ramoe_megatron.report.write results|report --run DIR`.

`results` makes results.json of the evaluations; `report` makes plots/ and report.html of the whole run
folder.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ramoe_megatron.errors import RamoeError


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files, and print where the report is.

    Returns:
        The exit status: 2 after an error in the run folder, which is printed without a traceback.
    """
    parser = argparse.ArgumentParser(prog="ramoe_megatron.report.write", description=__doc__)
    parser.add_argument("what", choices=("results", "report"))
    parser.add_argument(
        "--run", type=Path, required=True, help="run folder, as written by `ramoe run ... --out DIR`"
    )
    options = parser.parse_args(arguments)
    try:
        if options.what == "results":
            from ramoe_megatron.report.run_results import collect

            collect(options.run)
        else:
            from ramoe_megatron.report.page import write_report

            print(f"report: {write_report(options.run)}")
    except RamoeError as error:
        print(f"ramoe: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
