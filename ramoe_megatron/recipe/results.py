"""`python -m ramoe_megatron.recipe.results RUN`: the results stage, evaluations to results.json."""

import sys
from pathlib import Path

from ramoe_megatron.errors import RamoeError


def main() -> int:
    """Exit status 2 with the text of a RamoeError on stderr, as the jobs do."""
    from ramoe_megatron.report.run_results import collect

    try:
        collect(Path(sys.argv[1]))
    except RamoeError as error:
        print(f"ramoe: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
