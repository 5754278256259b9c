"""Megatron's local attention under context parallelism and over packed samples, for the CPU backend.

Megatron uses transformer-engine for both, which needs CUDA. Here each context-parallel rank gathers all keys
and values, and masks the pairs of rows that must not attend to each other. The arithmetic is that of the
local `DotProductAttention`.

Shape suffixes: Q query rows of this rank, K key rows of all context-parallel ranks.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.placement import context_parallel_rows


def attention_stand_ins() -> list[tuple[Any, str, Any]]:
    """The constructor and the forward pass of Megatron's local attention in the CPU backend."""
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    stock_init, stock_forward = DotProductAttention.__init__, DotProductAttention.forward

    @functools.wraps(stock_init)
    def init_with_context_parallelism(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        # The constructor only asserts that there is no context parallelism.
        context_parallel_size, config.context_parallel_size = config.context_parallel_size, 1
        try:
            stock_init(self, config, *args, **kwargs)
        finally:
            config.context_parallel_size = context_parallel_size

    @functools.wraps(stock_forward)
    def forward_over_all_rows(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        if self.config.context_parallel_size == 1 and packed_seq_params is None:
            return stock_forward(self, query, key, value, attention_mask, attn_mask_type, attention_bias)
        _refuse_other_masks(self, attention_mask, attn_mask_type or self.attn_mask_type, packed_seq_params)
        cu_seqlens = None
        if packed_seq_params is not None:
            padded, cu_seqlens = packed_seq_params.cu_seqlens_q_padded, packed_seq_params.cu_seqlens_q
            cu_seqlens = cu_seqlens if padded is None else padded
            # [t, heads, dim]: one sequence
            query, key, value = (rows.unsqueeze(1) for rows in (query, key, value))
        cp, cp_rank = 1, 0
        if self.config.context_parallel_size > 1:
            group = _context_parallel_group(self)
            cp, cp_rank = group.size(), group.rank()
            # Every rank's queries use every key. The backward pass sums over ranks and returns each rank's
            # rows.
            key, value = (gather_from_sequence_parallel_region(rows, group=group) for rows in (key, value))
        softmax = self.scale_mask_softmax
        window = softmax.window_size
        rows_of_rank = _rows_of_ranks(key.shape[0], cp, cu_seqlens, key.device)
        masked_QK = masked_pairs(
            rows_of_rank[cp_rank], torch.cat(rows_of_rank), cu_seqlens, window[0] if window else None
        )
        # With a window the softmax would make a mask of its own, of one whole sequence.
        softmax.window_size = None
        try:
            masked = masked_QK[None, None]
            return stock_forward(self, query, key, value, masked, attn_mask_type, attention_bias)
        finally:
            softmax.window_size = window

    return [
        (DotProductAttention, "__init__", init_with_context_parallelism),
        (DotProductAttention, "forward", forward_over_all_rows),
    ]


def masked_pairs(
    query_row_Q: Tensor, key_row_K: Tensor, cu_seqlens: Tensor | None = None, window: int | None = None
) -> Tensor:
    """True where a query must not see a key. [Q, K], bool

    Such a key is later, before the window, or of another packed sample.

    Args:
        query_row_Q, key_row_K: global rows (`placement.py`).
        cu_seqlens: borders of the packed samples; None when not packed.
        window: keys before the query that it sees; None for all.
    """
    masked_QK = key_row_K[None, :] > query_row_Q[:, None]
    if window is not None:
        masked_QK = masked_QK | (key_row_K[None, :] < query_row_Q[:, None] - window)
    if cu_seqlens is None:
        return masked_QK
    sample_Q, sample_K = (
        torch.searchsorted(cu_seqlens.long(), row, right=True) for row in (query_row_Q, key_row_K)
    )
    return masked_QK | (sample_Q[:, None] != sample_K[None, :])


def _rows_of_ranks(length: int, cp: int, cu_seqlens: Tensor | None, device: Any) -> list[Tensor]:
    """Global rows of each context-parallel rank, in the order of the gather."""
    if cp > 1 and cu_seqlens is not None and (cu_seqlens[-1] != length or (cu_seqlens % (2 * cp)).any()):
        raise RamoeError(
            f"packed samples end at rows {cu_seqlens.tolist()} of {length}: "
            f"with --context-parallel-size {cp} each sample must be padded to a multiple of {2 * cp} "
            "(cu_seqlens_q_padded), and the last sample must end the pack"
        )
    return [context_parallel_rows(length, cp, rank, cu_seqlens, device) for rank in range(cp)]


def _context_parallel_group(attention: Any) -> Any:
    from megatron.core import parallel_state

    group = getattr(attention.pg_collection, "cp", None)
    return parallel_state.get_context_parallel_group() if group is None else group


def _refuse_other_masks(
    attention: Any, attention_mask: Tensor | None, mask_type: Any, packed_seq_params: Any
) -> None:
    """Raise RamoeError for anything but causal attention within each sample, with or without a window."""
    from megatron.core.transformer.enums import AttnMaskType

    window = attention.scale_mask_softmax.window_size
    where = "--context-parallel-size above 1" if packed_seq_params is None else "packed samples"
    found = [
        name
        for name, on in (
            (
                f"mask type {mask_type.name}",
                mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal),
            ),
            ("an attention mask of the caller's (pass None)", attention_mask is not None),
            (
                f"--window-size {window} (expected LEFT,0 with LEFT of 0 or more)",
                window is not None and (window[0] < 0 or window[1] != 0),
            ),
            ("cross-attention", attention.attention_type != "self"),
            ("--hybrid-context-parallel", getattr(packed_seq_params, "local_cp_size", None) is not None),
            (
                "a qkv_format other than thd",
                packed_seq_params is not None and packed_seq_params.qkv_format != "thd",
            ),
        )
        if on
    ]
    if found:
        raise RamoeError(
            f"the CPU backend's attention over {where} supports causal self-attention only, "
            f"not {', '.join(found)}; remove it, or run on a GPU"
        )
