"""`ramoe_megatron.jobs.harness` without lm_eval's own tasks, because listing them takes twenty seconds."""

from functools import partialmethod


def main() -> None:
    from lm_eval.tasks import TaskManager

    from ramoe_megatron.jobs.harness import main as over_ranks

    TaskManager.__init__ = partialmethod(TaskManager.__init__, include_defaults=False)
    over_ranks()
