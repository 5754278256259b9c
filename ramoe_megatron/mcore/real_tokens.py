"""Megatron's own losses at the routers, over real tokens only: padding has no effect, in any layout.

The model in Megatron 0.19 takes a padding mask as an argument, but the routers get no mask or a wrong mask.
`GPTModel` splits the mask for sequence parallelism on the first pipeline stage only, `HybridModel` never
splits it, and multi-token prediction rolls a padding row into the real rows. So here each router finds its
real rows itself, from the micro-batch of `routing_batch`.

The losses are Megatron's. `RealTokenLosses` corrects what Megatron's methods do wrong with a mask:

    z-loss          takes the mean over the real tokens of each rank's piece of the sequence; the mean of
                    these means is not the mean over tokens
    per-token loss  scales each rank's gradient by the real tokens of that rank, but divides the loss by
                    the real tokens of all ranks
    seq_aux_loss    divides each sample by the mean length of the micro-batch, and counts a pack as one
                    sample
    expert bias     applies the mask [tokens] to the map [tokens, E] without a new dimension
                    (NVIDIA/Megatron-LM #6111, fixed on its main branch by #6114)

On one rank, with samples of equal length, the arithmetic is Megatron's bit for bit. Remove a method when
Megatron's method is correct.

Shape suffixes: S rows of the sequence dimension on this rank, C columns (packed: 1, else B), B samples,
E experts.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ramoe_megatron.mcore.cpu.backend import uncompiled
from ramoe_megatron.mcore.observe import LocalTokens, TokenSelection

with uncompiled():
    from megatron.core.transformer.moe import router as megatron_router
    from megatron.core.transformer.moe.router import TopKRouter


class RealTokens:
    """Which rows of a micro-batch are real tokens, and of which sample."""

    def __init__(self, selection: TokenSelection, share: float | Tensor) -> None:
        """
        Args:
            selection: the samples of the micro-batch.
            share: weight of a sample in the micro-batch's mean over samples: 1 / B, or `sample_share` of a
                pack.
        """
        self.share = share
        self._selections = {0: selection}
        self._rows: dict[tuple[int, int], RealRows] = {}

    def at(self, router: Any, count: int) -> "RealRows":
        """The real tokens in the `count` rows that reach a router. Computed once for the same rows."""
        depth = getattr(router, "ramoe_mtp_depth", 0)
        if (depth, count) not in self._rows:
            selection = self._selections.setdefault(depth, self._shortened(depth))
            local = selection.local(router, count)
            self._rows[depth, count] = RealRows(local, selection.length_B, self.share)
        return self._rows[depth, count]

    def _shortened(self, depth: int) -> TokenSelection:
        # A multi-token prediction layer of depth k reads at each row the token k rows later. The last k rows
        # of a sample have no such token.
        whole = self._selections[0]
        length_B = (whole.length_B - depth).clamp(min=0)
        return TokenSelection(whole.prompt_length_B, length_B, whole.start_B, whole.cu_seqlens)


@dataclass(frozen=True)
class RealRows:
    """The real tokens among a router's rows (`local`), and their number in each whole sample (`length_B`).

    What follows from them is computed once for all routers.
    """

    local: LocalTokens
    length_B: Tensor
    share: float | Tensor

    @functools.cached_property
    def padding_SC(self) -> Tensor:
        """True at padding, as Megatron's routers expect. [S, C], bool"""
        return ~self.local.chosen("all")

    @functools.cached_property
    def total(self) -> Tensor:
        """Number of real tokens of the micro-batch, over the ranks that share its sequences. []"""
        return self.length_B.sum()

    @functools.cached_property
    def part(self) -> Tensor:
        """Fraction of these tokens that is on this rank. []"""
        return self.local.chosen("all").sum() / self.total.clamp(min=1)

    def by_sample(self, values: Tensor) -> Tensor:
        """Each sample's sum over the real rows of this rank. [S * C, E] to [B, E], at least float32"""
        rows, columns = self.local.chosen("all").shape
        return self.local.sum(values.view(rows, columns, -1), "all")


class RealTokenLosses(TopKRouter):
    """A router with losses over the tokens of `real_rows`, if these are set. Only a base class."""

    real_rows: RealRows | None = None

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """As Megatron's, a mean over the real tokens of the micro-batch on all ranks."""
        rows, coeff = self.real_rows, self.config.moe_z_loss_coeff
        if rows is None or coeff is None or not (self.training and torch.is_grad_enabled()):
            return super().apply_z_loss(logits, padding_mask)
        # Megatron's mean over this rank's real tokens, weighted by their fraction of all real tokens.
        z_loss = megatron_router.z_loss_func(logits, coeff, padding_mask=padding_mask) * rows.part
        return self.attach_and_log_load_balancing_loss(logits, coeff, z_loss, "z_loss", self.tp_cp_group)

    def attach_and_log_load_balancing_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """As Megatron's, with the mean number of real tokens of the ranks that share the sequences."""
        if self.real_rows is not None and self.calculate_per_token_loss:  # Megatron reads it only there
            kwargs["valid_token_count"] = self.real_rows.total / self.tp_cp_group.size()
        return super().attach_and_log_load_balancing_loss(*args, **kwargs)

    def _apply_seq_aux_loss(
        self, probs: Tensor, scores: Tensor, routing_map: Tensor, seq_length: int, bsz: int, **kwargs: Any
    ) -> Tensor:
        """As Megatron's, for each sample over its own tokens.

        Megatron's loss only uses sums over a sample's rows, so the sums are passed as B samples of one row.
        """
        rows = self.real_rows
        if rows is None or self.get_aux_loss_coeff("seq_aux_loss") == 0:
            return super()._apply_seq_aux_loss(probs, scores, routing_map, seq_length, bsz, **kwargs)
        scores_BE, count_BE = rows.by_sample(scores), rows.by_sample(routing_map)
        samples = len(rows.length_B)
        # Megatron divides by the square of the mean length.
        relative_B = rows.length_B * samples / rows.total.clamp(min=1)
        # With per-token loss a sample is weighted by its tokens, so its weight is the same in any
        # micro-batch.
        unit_B = relative_B if self.calculate_per_token_loss else rows.share * samples
        weight_B = (unit_B / relative_B.square()).masked_fill(rows.length_B == 0, 0.0)
        weighted_BE = scores_BE * weight_B[:, None]
        return super()._apply_seq_aux_loss(probs, weighted_BE, count_BE, 1, samples, **kwargs)

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """As Megatron's, from the choices of real tokens only."""
        if padding_mask is not None:
            routing_map, padding_mask = routing_map & ~padding_mask.reshape(-1, 1), None
        super()._apply_expert_bias(routing_map, padding_mask)


def counts_tokens(router: TopKRouter) -> bool:
    """Whether a router has a loss or a bias of Megatron that counts tokens and accepts a mask."""
    if router.routing_type == "quantile_balancing":
        return False  # accepts no mask
    z_loss = router.config.moe_z_loss_coeff is not None
    return router.is_aux_loss_enabled() or z_loss or router.enable_expert_bias
