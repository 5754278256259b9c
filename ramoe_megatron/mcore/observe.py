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
from ramoe_megatron.method.losses import pool, widen

TOKEN_CHOICES = ("prompt", "response", "all", "last")


def router_distribution(logits: Tensor, score_function: str) -> Tensor:
    """Router probabilities over all experts, before top-k, in float32 (arXiv 2605.28306). [..., E]

    The precision is our reading. No paper says what to align for routers with sigmoid or sqrt-softplus
    scores; our reading is the scores divided by their sum, which is the softmax of their logarithms.

    Raises:
        RamoeError: Megatron 0.19 has no such score function.
    """
    if logits.dtype != torch.float32:
        logits = logits.float()
    if score_function == "sigmoid":
        logits = torch.nn.functional.logsigmoid(logits)
    elif score_function == "sqrtsoftplus":
        logits = torch.nn.functional.softplus(logits).log() / 2
    elif score_function != "softmax":
        raise RamoeError(
            f"--moe-router-score-function {score_function}: expected softmax, sigmoid or sqrtsoftplus"
        )
    return logits.softmax(dim=-1)


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
        self._divisor: dict[str, Tensor] = {}

    def count(self, choice: str) -> Tensor:
        """Number of chosen tokens of each whole sample, over all ranks. [B], float32"""
        if choice == "prompt":
            return self.prompt_length_B.float()
        if choice == "response":
            return (self.length_B - self.prompt_length_B).float()
        return (self.length_B if choice == "all" else self.prompt_length_B.clamp(max=1)).float()

    def divisor(self, choice: str) -> Tensor:
        """The same, at least 1; computed once for all routers. [B, 1]"""
        if choice not in self._divisor:
            self._divisor[choice] = self.count(choice).clamp(min=1)[:, None]
        return self._divisor[choice]

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
    _left_out: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

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

    def left_out(self, choice: str) -> Tensor:
        """True at all other tokens. Read-only. [S, C, 1], bool"""
        if choice not in self._left_out:
            self._left_out[choice] = ~self.chosen(choice)[..., None]
        return self._left_out[choice]

    def sum(self, values_SCX: Tensor, choice: str) -> Tensor:
        """Each sample's sum over the chosen rows of this rank. [B, X], at least float32"""
        if self.sample_S is None:
            return pool(values_SCX, self.left_out(choice))
        kept_SX = widen(values_SCX).masked_fill(self.left_out(choice), 0.0).flatten(0, 1)
        return self._sum_of_samples(kept_SX)

    def times_chosen(self, map_SCE: Tensor, choice: str) -> Tensor:
        """In how many of each sample's chosen rows of this rank an expert is in the map. [B, E], float32

        Args:
            map_SCE: a router's map, bool.
        """
        kept_SCE = map_SCE & self.chosen(choice)[..., None]
        if self.sample_S is None:
            return kept_SCE.sum(dim=0, dtype=torch.float32)
        return self._sum_of_samples(kept_SCE.flatten(0, 1).float())

    def _sum_of_samples(self, values_SX: Tensor) -> Tensor:
        assert self.sample_S is not None
        shape = (len(self.selection.length_B), values_SX.shape[-1])
        return values_SX.new_zeros(shape).index_add_(0, self.sample_S, values_SX)

    def last(self, values_SCX: Tensor) -> tuple[Tensor, Tensor]:
        """The values at each sample's last prompt token [B, X], and whether it is on another rank [B, 1].

        In the latter case, and without a prompt, the values are those of some other row.
        """
        row_B, absent_B1 = self._last
        return values_SCX.flatten(0, 1).index_select(0, row_B), absent_B1

    @functools.cached_property
    def _last(self) -> tuple[Tensor, Tensor]:
        selection = self.selection
        last_B = selection.prompt_length_B - 1 + (0 if selection.start_B is None else selection.start_B)
        place_B = torch.searchsorted(self.row_S, last_B).clamp(max=len(self.row_S) - 1)
        here_B = (self.row_S[place_B] == last_B) & (selection.prompt_length_B > 0)
        if self.sample_S is None:  # rows of all columns, one after another
            place_B = place_B * len(last_B) + torch.arange(len(last_B), device=last_B.device)
        return place_B, ~here_B[:, None]

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

    A sample without chosen tokens gets zeros, and must have weight 0. All choices share one softmax and one
    reduction over the ranks.
    """
    local = selection.local(router, logits_SCE.shape[0])
    sums: dict[str, Tensor] = {}
    if "last" in choices:  # one row a sample: scores of other rows are not needed
        logits_BE, absent_B1 = local.last(logits_SCE)
        sums["last"] = router_distribution(logits_BE, router.score_function).masked_fill(absent_B1, 0.0)
    if over_rows := [choice for choice in choices if choice != "last"]:
        p_SCE = router_distribution(logits_SCE, router.score_function)
        parts = {"prompt", "response"} <= set(over_rows)
        for choice in over_rows:
            if choice != "all" or not parts:
                sums[choice] = local.sum(p_SCE, choice)
        if parts and "all" in over_rows:
            sums["all"] = sums["prompt"] + sums["response"]
    totals: tuple[Tensor, ...] = ()
    if len(sums) == 1:
        totals = (sum_over_sequence(router, sums[choices[0]]),)
    elif sums:
        totals = sum_over_sequence(router, torch.stack([sums[choice] for choice in choices])).unbind()
    return {
        # the last prompt token is one token
        choice: total_BE if choice == "last" else total_BE / selection.divisor(choice)
        for choice, total_BE in zip(choices, totals, strict=True)
    }


def mean_over_tokens(router: Any, values_SCX: Tensor, selection: TokenSelection, choice: str) -> Tensor:
    """Mean of the values over the chosen tokens of each whole sample; 0 without chosen tokens. [B, X]"""
    local = selection.local(router, values_SCX.shape[0])
    return sum_over_sequence(router, local.sum(values_SCX, choice)) / selection.divisor(choice)


def frequencies(
    router: Any, map_SCE: Tensor, selection: TokenSelection, choices: Sequence[str]
) -> list[Tensor]:
    """For each token choice, the share of each whole sample's chosen tokens with an expert in the map. [B, E]

    `map_SCE` is the router's map, bool. A sample without chosen tokens gets zeros.
    """
    local = selection.local(router, map_SCE.shape[0])
    counts = torch.stack([local.times_chosen(map_SCE, choice) for choice in choices])
    totals = sum_over_sequence(router, counts).unbind()
    return [total / selection.divisor(choice) for choice, total in zip(choices, totals, strict=True)]
