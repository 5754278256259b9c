"""A job for the tests: the operations of alignment, counted as `make bench` counts them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.operations import main

if __name__ == "__main__":
    main()
