"""torchrun, but without its own report after an error that a rank has reported to the user.

    python -m ramoe_megatron.recipe.torchrun ARGUMENTS OF TORCHRUN

torchrun prints thirty lines about the rank that failed, and ends with status 1 whatever the rank's status
was. After a `RamoeError`, which the rank has printed, this program prints nothing and ends with status 2.
Otherwise it is torchrun.
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
