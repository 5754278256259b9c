"""Reads the routing of a micro-batch: the router distribution, and its mean over each sample's chosen tokens.

A micro-batch holds one sample a column (padded), or all samples one after the other in a single column
(packed, THD). Values that depend on the micro-batch only are computed at the first router and kept for the
other routers.

Shape suffixes: S rows of the sequence dimension on this rank, C columns, B samples (padded: B = C; packed: C
= 1), E routed experts, X any dimension.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.placement import local_rows
from ramoe_megatron.method.losses import pool

TOKEN_CHOICES = ("prompt", "response", "all", "last")


def router_distribution(logits: Tensor, score_function: str) -> Tensor:
    """Router probabilities over all experts, before top-k, in float32 (arXiv 2605.28306). [..., E]

    The precision is our reading. No paper says what to align for routers with sigmoid or sqrt-softplus
    scores; our reading is the scores divided by their sum.

    Raises:
        RamoeError: Megatron 0.19 has no such score function.
    """
    logits = logits.float()
    if score_function == "softmax":
        return logits.softmax(dim=-1)
    if score_function == "sigmoid":
        scores = logits.sigmoid()
    elif score_function == "sqrtsoftplus":
        scores = torch.nn.functional.softplus(logits).sqrt()
    else:
        raise RamoeError(
            f"--moe-router-score-function {score_function}: expected softmax, sigmoid or sqrtsoftplus"
        )
    return scores / scores.sum(dim=-1, keepdim=True)


class TokenSelection:
    """Which tokens of a micro-batch belong to the prompt and the response of each sample, in every layout."""

    def __init__(
        self,
        prompt_length_B: Tensor,
        length_B: Tensor,
        start_B: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> None:
        """
        Args:
            prompt_length_B, length_B: number of input tokens of the prompt and of the whole sample. A sample
                is prompt, response and end token; the last token is no input.
            start_B, cu_seqlens: for packed samples, the first row of each sample in the pack, and the borders
                of all segments including the padding at the end.
        """
        self.prompt_length_B, self.length_B = prompt_length_B, length_B
        self.start_B, self.cu_seqlens = start_B, cu_seqlens
        self._local: dict[int, LocalTokens] = {}

    def count(self, choice: str) -> Tensor:
        """Number of chosen tokens of each whole sample, over all ranks. [B], float32"""
        counts = {
            "prompt": self.prompt_length_B,
            "response": self.length_B - self.prompt_length_B,
            "all": self.length_B,
            "last": self.prompt_length_B.clamp(max=1),
        }
        return counts[choice].float()

    def local(self, router: Any, count: int) -> "LocalTokens":
        """The tokens in the `count` rows at this rank's router; computed once for all routers of a chunk."""
        if count not in self._local:
            row_S = local_rows(router, count, self.cu_seqlens, self.length_B.device)
            if self.start_B is None:
                self._local[count] = LocalTokens(self, row_S, row_S[:, None], None)
            else:
                sample_S = torch.searchsorted(self.start_B, row_S, right=True) - 1
                self._local[count] = LocalTokens(
                    self, row_S, (row_S - self.start_B[sample_S])[:, None], sample_S
                )
        return self._local[count]


@dataclass(frozen=True)
class LocalTokens:
    """The tokens in this rank's rows of a micro-batch.

    Attributes:
        selection: the samples of the micro-batch.
        row_S: index of each row in the whole sequence, ascending.
        position_SC: index of each row in its own sample. [S, 1] when padded
        sample_S: the sample of each row; None when padded.
    """

    selection: TokenSelection
    row_S: Tensor
    position_SC: Tensor
    sample_S: Tensor | None
    _chosen: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def chosen(self, choice: str) -> Tensor:
        """True at the chosen tokens. Read-only, since all routers share the tensor. [S, C], bool"""
        if choice not in self._chosen:
            self._chosen[choice] = self._find(choice)
        return self._chosen[choice]

    def _find(self, choice: str) -> Tensor:
        prompt_length, length = (
            self.spread(self.selection.prompt_length_B),
            self.spread(self.selection.length_B),
        )
        if choice == "prompt":
            return self.position_SC < prompt_length
        if choice == "response":
            return (self.position_SC >= prompt_length) & (self.position_SC < length)
        if choice == "all":
            return self.position_SC < length
        return self.position_SC == prompt_length - 1

    def sum(self, values_SCX: Tensor, choice: str) -> Tensor:
        """Each sample's sum over the chosen rows of this rank. [B, X], at least float32"""
        chosen_SC = self.chosen(choice)
        if self.sample_S is None:
            return pool(values_SCX, chosen_SC)[0]
        values_SX = values_SCX.to(torch.promote_types(values_SCX.dtype, torch.float32)).masked_fill(
            ~chosen_SC[..., None], 0.0
        )[:, 0]
        return values_SX.new_zeros(len(self.selection.length_B), values_SX.shape[-1]).index_add(
            0, self.sample_S, values_SX
        )

    def last(self, values_SCX: Tensor) -> tuple[Tensor, Tensor]:
        """The values at each sample's last prompt token [B, X], and whether that row is on this rank [B].

        If the row is on another rank, the values are those of some other row.
        """
        place_B, column_B, here_B = self._last
        return values_SCX[place_B, column_B], here_B

    @functools.cached_property
    def _last(self) -> tuple[Tensor, Tensor, Tensor]:
        row_B = (
            self.selection.prompt_length_B
            - 1
            + (0 if self.selection.start_B is None else self.selection.start_B)
        )
        place_B = torch.searchsorted(self.row_S, row_B).clamp(max=len(self.row_S) - 1)
        column_B = (
            torch.arange(len(row_B), device=row_B.device)
            if self.sample_S is None
            else torch.zeros_like(row_B)
        )
        return place_B, column_B, (self.row_S[place_B] == row_B) & (self.selection.prompt_length_B > 0)

    def spread(self, values_BX: Tensor) -> Tensor:
        """Each sample's value at its rows, for broadcasting. Padded: [1, B, X]; packed: [S, 1, X]"""
        return values_BX[None] if self.sample_S is None else values_BX[self.sample_S][:, None]


def sum_over_sequence(router: Any, partial: Tensor) -> Tensor:
    """Sum over the ranks that have pieces of the same sequences.

    The backward pass is the identity, so each rank has the gradient of its own rows. Megatron sums the router
    weight's gradient over these ranks: over tensor-parallel ranks because the weight is marked
    `sequence_parallel`, over context-parallel ranks in DDP.
    """
    from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region

    group = router.tp_cp_group if router.config.sequence_parallel else router.cp_group
    if group is None or group.size() == 1:
        return partial
    return reduce_from_tensor_model_parallel_region(partial, group=group)


def pooled_distributions(
    router: Any, logits_SCE: Tensor, selection: TokenSelection, choices: Sequence[str]
) -> Mapping[str, Tensor]:
    """For each token choice, the mean router distribution over the chosen tokens of each whole sample. [B, E]

    A sample without chosen tokens gets zeros, and must have weight 0. All choices share one reduction.
    """
    local = selection.local(router, logits_SCE.shape[0])
    p_SCE = router_distribution(logits_SCE, router.score_function) if set(choices) - {"last"} else None
    numerators = []
    for choice in choices:
        if choice == "last":  # one row a sample: scores of other rows are not needed
            logits_BE, here_B = local.last(logits_SCE)
            p_BE = router_distribution(logits_BE, router.score_function)
            numerators.append(p_BE.masked_fill(~here_B[:, None], 0.0))
        else:
            assert p_SCE is not None
            numerators.append(local.sum(p_SCE, choice))
    totals = sum_over_sequence(router, torch.stack(numerators)).unbind()
    return {
        choice: total_BE / selection.count(choice).clamp(min=1)[:, None]
        for choice, total_BE in zip(choices, totals, strict=True)
    }


def mean_over_tokens(router: Any, values_SCX: Tensor, selection: TokenSelection, choice: str) -> Tensor:
    """Mean of the values over the chosen tokens of each whole sample; 0 without chosen tokens. [B, X]"""
    local = selection.local(router, values_SCX.shape[0])
    return (
        sum_over_sequence(router, local.sum(values_SCX, choice))
        / selection.count(choice).clamp(min=1)[:, None]
    )
