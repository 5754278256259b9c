"""Which rows of a sequence are on which rank, under context parallelism (zigzag) and sequence parallelism.

A row is one token of a micro-batch's sequence dimension. A global row is its index in the whole sequence, or
in the whole pack when several samples are packed into one sequence (THD).
"""

from typing import Any

import torch
from torch import Tensor


def context_parallel_rows(
    length: int, cp: int, cp_rank: int, cu_seqlens: Tensor | None = None, device: Any = None
) -> Tensor:
    """Global rows that a context-parallel rank computes, in the rank's order. [length / cp], int64

    Megatron's zigzag: of 2 cp equal slices, rank r takes slice r and slice 2 cp - 1 - r. With packed samples,
    each sample is sliced this way.

    Args:
        length: rows of the whole sequence or pack.
        cp, cp_rank: size of the context-parallel group and this rank's place in it.
        cu_seqlens: borders of the packed samples from 0 to `length`; each sample is a multiple of 2 cp long.
            None when not packed.
    """
    if cu_seqlens is not None:
        device = cu_seqlens.device
    rows = torch.arange(length, device=device)
    if cp == 1:
        return rows
    if cu_seqlens is None:
        # A list as index would be copied to the device, and the host would wait for the copy.
        pieces = rows.view(2 * cp, -1)
        return torch.cat([pieces[cp_rank], pieces[2 * cp - 1 - cp_rank]])
    borders = cu_seqlens.long()
    sample = torch.searchsorted(borders, rows, right=True) - 1
    slice_of_row = (rows - borders[sample]) * (2 * cp) // (borders[sample + 1] - borders[sample])
    mine = (slice_of_row == cp_rank) | (slice_of_row == 2 * cp - 1 - cp_rank)
    return rows[mine]


def local_rows(router: Any, count: int, cu_seqlens: Tensor | None = None, device: Any = None) -> Tensor:
    """Global rows of the `count` rows that reach this rank's router, in order. [count], int64"""
    tp, tp_rank = _size_and_rank(router.tp_group) if router.config.sequence_parallel else (1, 0)
    cp, cp_rank = _size_and_rank(router.cp_group)
    rows = context_parallel_rows(count * tp * cp, cp, cp_rank, cu_seqlens, device)
    return rows[tp_rank * count : (tp_rank + 1) * count]


def _size_and_rank(group: Any) -> tuple[int, int]:
    return (1, 0) if group is None else (group.size(), group.rank())
