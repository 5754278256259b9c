"""Attention over rows whose tokens have positions of their own: a key/value cache, and branches of a prompt.

Megatron's `StaticInferenceContext` has one offset for all rows of a batch. The contexts here are such
contexts with a position for each token. So prompts of different lengths are decoded together without padding
between their tokens, and choices follow their prompt in one forward pass. A key is rotated when it is stored,
where Megatron rotates all stored keys again in each step.

Shape suffixes: S input tokens of a row in this forward pass, B rows, K keys, H heads, G key/value heads, D
size of a head.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ramoe_megatron.mcore import compat
from ramoe_megatron.mcore.cpu.backend import uncompiled
from ramoe_megatron.mcore.router import unwrapped

with uncompiled():
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
    from megatron.core.transformer.attention import Attention, SelfAttention
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.identity_op import IdentityOp


class RowMask:
    """Which keys a query must not see, in place of Megatron's attention mask."""

    def __init__(
        self,
        hidden_BSK: Tensor,
        query_position_BS: Tensor,
        key_position_BK: Tensor,
        newest: bool = False,
        causal: bool = False,
    ) -> None:
        """
        Args:
            hidden_BSK: True where the query must not see the key, without a window. bool
            query_position_BS, key_position_BK: positions in the row's own sequence, for windows. A leading
                dimension of 1 stands for all rows.
            newest: each row has one query, and filler after it.
            causal: each query sees its own place and those before.
        """
        self.newest, self.causal = newest, causal
        self.query_position_BS, self.key_position_BK = query_position_BS, key_position_BK
        self._within: dict[int | None, Tensor] = {None: hidden_BSK[:, None]}

    def within(self, window: int | None) -> Tensor:
        """True where a query must not see a key. [B, 1, S, K], bool

        Args:
            window: keys before the query that it sees; None for all.
        """
        if window not in self._within:
            assert window is not None
            first_BS1 = self.query_position_BS[..., None] - window
            self._within[window] = self._within[None] | (self.key_position_BK[:, None] < first_BS1)[:, None]
        return self._within[window]


class RowContext(StaticInferenceContext):
    """Rotates queries and keys by each token's position in its own row."""

    mask: RowMask | None = None
    """The mask of this forward pass; None for Megatron's causal mask."""
    position_SB: Tensor | None = None
    """The position of each input token; None if a token's position is its place in the input."""

    def rotated(
        self, attention: Any, query_SBHD: Tensor, key_SBGD: Tensor, rotary_S11D: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys after Megatron's rotation."""
        if self.position_SB is None:
            own = rotary_S11D[: len(query_SBHD)]
        else:
            own = rotary_S11D[:, 0, 0][self.position_SB][:, :, None]
        factor, group = attention._yarn_concentration_factor, attention.pg_collection.cp
        turned = apply_rotary_pos_emb(
            torch.cat([query_SBHD, key_SBGD], 2), own, config=attention.config, mscale=factor, cp_group=group
        )
        query, key = turned.split([query_SBHD.shape[2], key_SBGD.shape[2]], 2)
        return query, key.contiguous()

    def seen(self, layer: int, key_SBGD: Tensor, value_SBGD: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values that the queries of a layer see. [K, B, G, D]"""
        return key_SBGD, value_SBGD


class Branches(RowContext):
    """Rows of a prompt and the branches that follow it, which do not see each other."""

    def __init__(self, position_BS: Tensor, branch_BS: Tensor) -> None:
        """
        Args:
            position_BS: the position of each token in the sequence of the prompt and its own branch.
            branch_BS: 0 in the prompt, else the number of the token's branch.
        """
        super().__init__(*position_BS.shape)
        self.position_SB = position_BS.T
        later_SK = torch.ones(branch_BS.shape[1], branch_BS.shape[1], device=branch_BS.device).triu(1).bool()
        apart_BSK = (branch_BS[:, None] > 0) & (branch_BS[:, None] != branch_BS[:, :, None])
        self.mask = RowMask(later_SK | apart_BSK, position_BS, position_BS)


class RowCache(RowContext):
    """The keys and values of all tokens so far, by their positions: first of the prompts, then of each step.

    The key of position p is in row p of the memory, so a query of position p sees the rows up to p. What the
    padding of the prompts has written behind a prompt is not seen before it is written over.
    """

    def __init__(self, rows: int, length: int) -> None:
        """
        Args:
            length: largest number of tokens of a sequence, and of padded prompts.
        """
        super().__init__(rows, length)
        self._row_B: Tensor | None = None

    def prompts(self, length: int, device: torch.device) -> None:
        """Prepare the forward pass of prompts, padded to a length."""
        later_1SK = torch.ones(1, length, length, dtype=torch.bool, device=device).triu(1)
        place_1S = torch.arange(length, device=device)[None]
        self.mask = RowMask(later_1SK, place_1S, place_1S, causal=True)

    def step(self, position_B: Tensor, last: int, tokens: int) -> None:
        """Prepare the forward pass of one new token a row.

        Args:
            position_B: the new token's position in each row.
            last: the largest of these.
            tokens: number of input tokens. Those after the first are filler, and are not kept.
        """
        self.position_SB = position_B.expand(tokens, -1)
        self._row_B = torch.arange(len(position_B), device=position_B.device)
        self.sequence_len_offset = last
        key_1K = torch.arange(last + 1, device=position_B.device)[None]
        query_BS = self.position_SB.T
        self.mask = RowMask(key_1K[:, None] > query_BS[..., None], query_BS, key_1K, newest=True)

    def keep(self, row_B: Tensor) -> None:
        """Keep these rows only, in this order."""
        self.max_batch_size = len(row_B)
        for layer, memory in self.key_value_memory_dict.items():
            self.key_value_memory_dict[layer] = tuple(kept.index_select(0, row_B) for kept in memory)

    def seen(self, layer: int, key_SBGD: Tensor, value_SBGD: Tensor) -> tuple[Tensor, Tensor]:
        """As `RowContext`; and store the keys and values."""
        new = key_SBGD, value_SBGD
        if self._row_B is None:
            self.key_value_memory_dict[layer] = tuple(self._memory(states) for states in new)
            return new
        memory = self.key_value_memory_dict[layer]
        assert self.position_SB is not None
        for kept_BGKD, states_SBGD in zip(memory, new, strict=True):
            kept_BGKD[self._row_B, :, self.position_SB[0]] = states_SBGD[0]
        end = self.sequence_len_offset + 1
        key, value = (kept_BGKD[:, :, :end].permute(2, 0, 1, 3) for kept_BGKD in memory)
        return key, value

    def _memory(self, states_SBGD: Tensor) -> Tensor:
        """The memory of a layer's keys or values, with those of the prompts. [B, G, K, D]"""
        length, rows, *heads = states_SBGD.shape
        # Zeros, because a masked value counts 0 times: NaN in uninitialised memory would stay NaN.
        memory = states_SBGD.new_zeros(rows, heads[0], self.max_sequence_length, heads[1])
        memory[:, :, :length] = states_SBGD.permute(1, 2, 0, 3)
        return memory


def teach_attention() -> None:
    """Make Megatron's attention use a `RowContext` and a `RowMask`. Without them nothing changes.

    A second call changes nothing.
    """
    adjust, forward = Attention._adjust_key_value_for_inference, DotProductAttention.forward
    if not hasattr(adjust, "knows_rows"):
        Attention._adjust_key_value_for_inference = _adjusting(adjust)
    if not hasattr(forward, "knows_rows"):  # the CPU backend replaces it each time that it is turned on
        DotProductAttention.forward = _masking(forward)


def _adjusting(stock: Any) -> Any:
    @functools.wraps(stock)
    def adjust_key_value(
        self: Any,
        context: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary: Any,
        *more: Any,
        **named: Any,
    ) -> tuple[Any, ...]:
        if not isinstance(context, RowContext):
            return stock(self, context, query, key, value, rotary, *more, **named)
        if rotary is not None:
            query, key = context.rotated(self, query, key, rotary[0])
        key, value = context.seen(self.layer_number, key, value)
        return query, key, value, None, self.attn_mask_type, None

    adjust_key_value.knows_rows = True  # type: ignore[attr-defined]
    return adjust_key_value


def _masking(stock: Any) -> Any:
    @functools.wraps(stock)
    def forward_with_row_mask(
        self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *more: Any, **named: Any
    ) -> Tensor:
        if not isinstance(attention_mask, RowMask):
            return stock(self, query, key, value, attention_mask, *more, **named)
        softmax = self.scale_mask_softmax
        kept = softmax.window_size, softmax.scaled_masked_softmax_fusion
        # With a window the softmax would make a mask of its own; the fused one knows only its own.
        softmax.window_size, softmax.scaled_masked_softmax_fusion = None, False
        try:
            window = kept[0][0] if kept[0] else None
            mask = attention_mask.within(window)
            if self.softmax_offset is None and softmax.scale is None:
                if attention_mask.newest:
                    return _newest(query, key, value, mask, self.softmax_scale)
                seen = None if attention_mask.causal and window is None else ~mask
                return _attended(query, key, value, seen, self.softmax_scale)
            return stock(self, query, key.contiguous(), value.contiguous(), mask, *more, **named)
        finally:
            softmax.window_size, softmax.scaled_masked_softmax_fusion = kept

    forward_with_row_mask.knows_rows = True  # type: ignore[attr-defined]
    return forward_with_row_mask


def _newest(
    query_SBHD: Tensor, key_KBGD: Tensor, value_KBGD: Tensor, mask_B1SK: Tensor, scale: float
) -> Tensor:
    """Attention of one query a row. [S, B, H * D]

    The local attention copies the keys and values for each head of a group; here the heads are the queries.
    """
    tokens, rows, heads, size = query_SBHD.shape
    query_BGHD = query_SBHD[0].view(rows, key_KBGD.shape[2], -1, size)
    key_BGKD, value_BGKD = (states.permute(1, 2, 0, 3) for states in (key_KBGD, value_KBGD))
    found = torch.nn.functional.scaled_dot_product_attention(
        query_BGHD, key_BGKD, value_BGKD, attn_mask=~mask_B1SK[:, :, :1], scale=scale
    )
    return found.reshape(1, rows, heads * size).expand(tokens, -1, -1).contiguous()


def _attended(
    query_SBHD: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, seen_BHSK: Tensor | None, scale: float
) -> Tensor:
    """Attention of all queries, without a matrix of their scores. [S, B, H * D]

    Args:
        seen_BHSK: True where a query sees a key; None for the causal mask.
    """
    query, key, value = (states.permute(1, 2, 0, 3) for states in (query_SBHD, key_SBGD, value_SBGD))
    found = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=seen_BHSK,
        is_causal=seen_BHSK is None,
        scale=scale,
        enable_gqa=query_SBHD.shape[2] != key_SBGD.shape[2],
    )
    return found.permute(2, 0, 1, 3).flatten(2)


def rows_fault(chunks: Sequence[Any]) -> str | None:
    """Why a `RowContext` cannot be given to the chunks of a model; None if it can. Every rank calls it."""
    kinds = {_fault(layer) for chunk in chunks for layer in unwrapped(chunk).decoder.layers}
    kinds |= {_model_fault(unwrapped(chunk)) for chunk in chunks} | {compat.attention_fault()}
    own = sorted(kind for kind in kinds if kind)
    ranks: list[list[str]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, own)
    return next((fault for faults in ranks for fault in faults), None)


def _fault(layer: Any) -> str | None:
    attention = getattr(layer, "self_attention", layer)
    if isinstance(attention, IdentityOp):
        return None
    if type(attention) is not SelfAttention:
        return f"{type(attention).__name__} is not Megatron's self-attention"
    core = attention.core_attention
    if not isinstance(core, DotProductAttention):
        return f"{type(core).__name__} is not Megatron's local attention"
    return None


def _model_fault(chunk: Any) -> str | None:
    if chunk.config.mtp_num_layers:
        return "the model has multi-token prediction"
    if chunk.position_embedding_type not in ("rope", "yarn", "learned_absolute", "none"):
        return f"position embedding {chunk.position_embedding_type}"
    return None
