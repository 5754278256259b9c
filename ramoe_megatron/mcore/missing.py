"""Which ranks did not answer, told by those whose collective failed: a hung or killed rank cannot tell it itself."""

import os
import re
import sys
import time

GRACE_SECONDS = 10.0
"""Ranks whose collective fails for the same reason fail within seconds of each other."""

# As gloo and NCCL put it: waited too long, or the other side has gone.
_COLLECTIVE = re.compile(
    r"timed? ?out|connection (?:closed|reset|refused)|broken pipe|socket|NCCL|remote process", re.IGNORECASE
)


def name_missing_ranks(error: BaseException, job: str) -> None:
    """Print, once for a job, the ranks that show no sign of life after a collective failed on this one; else nothing.

    Each rank whose collective fails leaves a mark in the store of the process group, which torchrun keeps, and looks after
    `GRACE_SECONDS` who has left none.

    Args:
        error: what was raised on this rank.
        job: the job's name, for the message.
    """
    import torch
    from torch.distributed import distributed_c10d

    if not torch.distributed.is_initialized() or not _COLLECTIVE.search(str(error)):
        return
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    try:
        store = distributed_c10d._get_default_store()
        store.set(_key(rank), "1")
        time.sleep(GRACE_SECONDS)
        silent = [other for other in range(ranks) if not store.check([_key(other)])]
        first = next(other for other in range(ranks) if other not in silent)
    except (RuntimeError, ValueError):  # the store has gone too, with its node
        return
    if silent and rank == first:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
        named = ", ".join(f"rank {other} (node {other // local})" for other in silent)
        reason = str(error).strip().splitlines()[-1]
        print(
            f"ramoe: {job}: a collective failed on rank {rank} ({reason}), and there is no sign of {named}: hung, or ended",
            file=sys.stderr, flush=True,
        )  # fmt: skip


def _key(rank: int) -> str:
    return f"ramoe/collective-failed/{rank}"
