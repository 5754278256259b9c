"""When a collective fails, the surviving ranks report which ranks did not respond."""

import os
import re
import sys
import time

GRACE_SECONDS = 10.0
"""How long a rank waits for the marks of the other ranks. Ranks fail within seconds of each other."""

# The words of gloo and NCCL for a timeout and for a lost peer.
_COLLECTIVE = re.compile(
    r"timed? ?out|connection (?:closed|reset|refused)|broken pipe|socket|NCCL|remote process", re.IGNORECASE
)


def name_missing_ranks(error: BaseException, job: str) -> None:
    """Print, once for a job, the ranks that show no sign of life after a collective failed on this rank.

    Each rank whose collective fails leaves a mark in the store of the process group, which torchrun keeps.
    After `GRACE_SECONDS` it looks for ranks without a mark. Other errors than those of collectives print
    nothing.

    Args:
        error: the error that was raised on this rank.
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
    except (RuntimeError, ValueError):  # the store is lost together with its node
        return
    if silent and rank == first:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
        named = ", ".join(f"rank {other} (node {other // local})" for other in silent)
        reason = str(error).strip().splitlines()[-1]
        print(
            f"ramoe: {job}: a collective failed on rank {rank} ({reason}), "
            f"and there is no sign of {named}: hung, or ended",
            file=sys.stderr,
            flush=True,
        )


def _key(rank: int) -> str:
    return f"ramoe/collective-failed/{rank}"
