"""torchrun, silent where a rank has told the user its error.

    python -m ramoe_megatron.recipe.torchrun ARGUMENTS OF TORCHRUN

torchrun adds thirty lines about the rank that failed, and ends with status 1 whatever the rank's own status
was. After a `RamoeError`, which the rank has printed, nothing is added and the status is 2. In every other
case this is torchrun.
"""

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ramoe_megatron.errors import error_noted


def main() -> None:
    """Run torchrun with the arguments of the command line."""
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed"):
            logging.getLogger(name).addFilter(lambda _record: not error_noted())
    try:
        run.main()
    except ChildFailedError:
        if error_noted():
            sys.exit(2)
        raise


if __name__ == "__main__":
    main()
