"""Collectives over pieces of unequal size, which NCCL has but gloo does not.

The all-to-all dispatcher uses them to gather the tokens of experts that are split over tensor-parallel ranks
(ETP).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def all_gather_of_unequal(all_gather: Callable) -> Callable:
    """`torch.distributed.all_gather` that pads unequal pieces to the longest, and then cuts them again."""

    def gather(tensor_list: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
        if all(piece.shape == tensor_list[0].shape for piece in tensor_list):
            return all_gather(tensor_list, tensor, group=group, async_op=async_op)
        padded = tensor.new_zeros(max(piece.shape[0] for piece in tensor_list), *tensor.shape[1:])
        padded[: tensor.shape[0]] = tensor
        found = [torch.empty_like(padded) for _ in tensor_list]
        all_gather(found, padded, group=group)
        for piece, whole in zip(tensor_list, found, strict=True):
            piece.copy_(whole[: piece.shape[0]])
        return None

    return gather


def reduce_scatter_of_unequal(reduce_scatter: Callable) -> Callable:
    """`torch.distributed.reduce_scatter` that sums all unequal pieces, and keeps this rank's piece."""

    def scatter(
        output: Tensor,
        input_list: list[Tensor],
        op: Any = torch.distributed.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if all(piece.shape == input_list[0].shape for piece in input_list):
            return reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
        whole = torch.cat(input_list)
        torch.distributed.all_reduce(whole, op=op, group=group)
        rank = torch.distributed.get_rank(group)
        output.copy_(whole.split([piece.shape[0] for piece in input_list])[rank])
        return None

    return scatter
