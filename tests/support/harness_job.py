"""`ramoe_megatron.jobs.harness`, or lm_eval itself with the word `hf`, without lm_eval's own tasks.

Listing those takes twenty seconds.
"""

import sys
from functools import partialmethod


def main() -> None:
    from lm_eval.tasks import TaskManager

    TaskManager.__init__ = partialmethod(TaskManager.__init__, include_defaults=False)
    if sys.argv[1] == "hf":
        from lm_eval.__main__ import cli_evaluate

        sys.argv[1] = "run"
        cli_evaluate()
    else:
        from ramoe_megatron.jobs.harness import main as over_ranks

        over_ranks()
