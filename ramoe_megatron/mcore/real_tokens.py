"""Megatron's own losses at the routers, over real tokens: padding counts for nothing, in any layout.

Megatron 0.19 knows a padding mask, as an argument of the model. On the way to the routers the mask is lost
or spoilt: `GPTModel` cuts it for sequence parallelism on the first pipeline stage alone, `HybridModel`
never does, and multi-token prediction rolls a padding row into the real ones. So here the routers find
their rows themselves, from the micro-batch that `routing_batch` holds.

Every loss stays Megatron's. What its methods get wrong with a mask is mended around them, in
`RealTokenLosses`:

    z-loss          is a mean over the real tokens of a rank's piece of the sequence; a mean of the ranks'
                    means is not one over tokens
    per-token loss  scales each rank's gradient by its own real tokens, though the loss is divided by
                    those of all ranks
    seq_aux_loss    divides each sample by the mean length of the micro-batch, and takes a pack for one
                    sample
    expert bias     lays the mask [tokens] over the map [tokens, E] (NVIDIA/Megatron-LM #6111, mended on
                    its main branch by #6114)

On one rank, with samples of one length, the arithmetic is Megatron's bit for bit. Remove a method when
Megatron's own is right.

Shape suffixes: S rows of the sequence dimension on this rank, C columns (packed: 1, else B), B samples,
E experts.
"""

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
    """Which rows of a micro-batch hold real tokens, and of which sample."""

    def __init__(self, selection: TokenSelection, share: float | Tensor) -> None:
        """
        Args:
            selection: the samples of the micro-batch.
            share: what one sample counts for in the micro-batch's mean over samples: 1 / B, or `sample_share`
                of a pack.
        """
        self.share = share
        self._selections = {0: selection}
        self._rows: dict[tuple[int, int], RealRows] = {}

    def at(self, router: Any, count: int) -> "RealRows":
        """The real tokens in the `count` rows that reach a router. Found once for the same rows."""
        depth = getattr(router, "ramoe_mtp_depth", 0)
        if (depth, count) not in self._rows:
            selection = self._selections.setdefault(depth, self._shortened(depth))
            local = selection.local(router, count)
            self._rows[depth, count] = RealRows(local, selection.length_B, self.share)
        return self._rows[depth, count]

    def _shortened(self, depth: int) -> TokenSelection:
        # A multi-token prediction layer of depth k reads at each row the token k rows later. The last k rows
        # of a sample have none.
        whole = self._selections[0]
        length_B = (whole.length_B - depth).clamp(min=0)
        return TokenSelection(whole.prompt_length_B, length_B, whole.start_B, whole.cu_seqlens)


@dataclass(frozen=True)
class RealRows:
    """The real tokens among one router's rows (`local`), and the number in each whole sample (`length_B`)."""

    local: LocalTokens
    length_B: Tensor
    share: float | Tensor

    @property
    def padding_SC(self) -> Tensor:
        """True at padding, as Megatron's routers take it. [S, C], bool"""
        return ~self.local.chosen("all")

    @property
    def total(self) -> Tensor:
        """Real tokens of the micro-batch, over the ranks that share its sequences. []"""
        return self.length_B.sum()

    @property
    def part(self) -> Tensor:
        """This rank's share of them. []"""
        return self.local.chosen("all").sum() / self.total.clamp(min=1)

    def by_sample(self, values: Tensor) -> Tensor:
        """Each sample's sum over the real rows of this rank. [S * C, E] to [B, E], at least float32"""
        rows, columns = self.local.chosen("all").shape
        return self.local.sum(values.view(rows, columns, -1), "all")


class RealTokenLosses(TopKRouter):
    """A router whose own losses are over the tokens of `real_rows`, where that is set. A base class only."""

    real_rows: RealRows | None = None

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """As Megatron's, a mean over the real tokens of the micro-batch on all ranks."""
        rows, coeff = self.real_rows, self.config.moe_z_loss_coeff
        if rows is None or coeff is None or not (self.training and torch.is_grad_enabled()):
            return super().apply_z_loss(logits, padding_mask)
        # Megatron's mean over this rank's real tokens, weighted by their share of all.
        z_loss = megatron_router.z_loss_func(logits, coeff, padding_mask=padding_mask) * rows.part
        return self.attach_and_log_load_balancing_loss(logits, coeff, z_loss, "z_loss", self.tp_cp_group)

    def attach_and_log_load_balancing_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """As Megatron's, with the mean number of real tokens of the ranks that share the sequences."""
        if self.real_rows is not None:
            kwargs["valid_token_count"] = self.real_rows.total / self.tp_cp_group.size()
        return super().attach_and_log_load_balancing_loss(*args, **kwargs)

    def _apply_seq_aux_loss(
        self, probs: Tensor, scores: Tensor, routing_map: Tensor, seq_length: int, bsz: int, **kwargs: Any
    ) -> Tensor:
        """As Megatron's, of each sample over its own tokens.

        Megatron's loss is made of sums over a sample's rows. It is given the sums: one row, B samples.
        """
        rows = self.real_rows
        if rows is None or self.get_aux_loss_coeff("seq_aux_loss") == 0:
            return super()._apply_seq_aux_loss(probs, scores, routing_map, seq_length, bsz, **kwargs)
        scores_BE, count_BE = rows.by_sample(scores), rows.by_sample(routing_map)
        samples = len(rows.length_B)
        # Megatron divides by the square of the mean length.
        relative_B = rows.length_B * samples / rows.total.clamp(min=1)
        # Under per-token loss a sample counts by its tokens, so that it counts the same in any micro-batch.
        unit_B = relative_B if self.calculate_per_token_loss else rows.share * samples
        weight_B = (unit_B / relative_B.square()).masked_fill(rows.length_B == 0, 0.0)
        weighted_BE = scores_BE * weight_B[:, None]
        return super()._apply_seq_aux_loss(probs, weighted_BE, count_BE, 1, samples, **kwargs)

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """As Megatron's, which is given the choices of real tokens alone."""
        if padding_mask is not None:
            routing_map, padding_mask = routing_map & ~padding_mask.reshape(-1, 1), None
        super()._apply_expert_bias(routing_map, padding_mask)


def counts_tokens(router: TopKRouter) -> bool:
    """Whether a router has a loss or a bias of Megatron's that counts tokens, and may be given a mask."""
    if router.routing_type == "quantile_balancing":
        return False  # takes no mask
    z_loss = router.config.moe_z_loss_coeff is not None
    return router.is_aux_loss_enabled() or z_loss or router.enable_expert_bias
