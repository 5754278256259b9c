"""The alignment loss of a micro-batch at Megatron's routers (RA-MoE, arXiv 2605.28306; our reading).

The scale law. With per-token loss off, the loss is the mean over the samples of the global batch. For its
micro-batch of B samples each rank attaches coeff * sum_i w_i D_i / B. Megatron multiplies this by cp /
micro-batches, and DDP averages over dp * cp ranks. The result is the sum over all samples, divided by the
global batch size. With `--calculate-per-token-loss` nothing is averaged, and `finalize_model_grads` divides
by the loss tokens of the global batch. There each sample is weighted by its loss tokens n_i.

A pack (THD) holds several samples, and the global batch counts packs. So for packs a sample's share is not 1
/ B but packs / samples of its global batch, which the data set knows in advance (`sample_share`). The loss is
again the mean over the samples.

Shape suffixes: G tasks, L MoE layers, Z aligned layers, B samples of the micro-batch, S its rows on this
rank, C its columns (packed: 1, else B), E experts.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.align.attach import Alignment
from ramoe_megatron.mcore.align.reach import refuse_unmoved
from ramoe_megatron.mcore.align.refusals import unreached
from ramoe_megatron.mcore.carrier import routing_context
from ramoe_megatron.mcore.observe import (
    TokenSelection,
    mean_over_tokens,
    pooled_distributions,
    router_distribution,
)
from ramoe_megatron.mcore.real_tokens import RealTokens
from ramoe_megatron.mcore.router import open_losses, unwrapped
from ramoe_megatron.method.losses import divergence, mass

BATCH_KEYS = ("ramoe_weight", "ramoe_task", "ramoe_target")
"""Keys of a batch beside prompt_length and length: weight [B] (0 = not aligned), task [B] (row of the expert
file, -1 = none) and, for the target "example", the English routing [B, Z, E]. `ramoe_ci` [B] (bool) is
optional and says which samples are ci; without it the log counts the aligned samples as ci. In a batch of one
pack each key has a leading dimension of 1."""

PACK_KEYS = ("start", "cu_seqlens", "sample_share")
"""Additional keys of a batch of packed samples (`data.packing`)."""


@contextlib.contextmanager
def routing_batch(model: Any, batch: Mapping[str, Tensor]) -> Iterator[None]:
    """A context for the model call of a `forward_step`: the routers of `model` align the samples of `batch`.

    With and without alignment, Megatron's own losses at the routers leave out padding (`real_tokens`). The
    model needs no `padding_mask`.

    Args:
        model: the model chunk that is called in the context.
        batch: the micro-batch of our dataset: `prompt_length`, `length` [B]; with alignment also `loss_mask`
            [B, S_whole] (before any context-parallel slicing) and the keys in `BATCH_KEYS`. Not read
            in evaluation mode.

    Raises:
        RamoeError: the batch lacks a key, an aligned layer of this chunk did not run exactly once, or the
            loss reaches no trained weight (`reach`).
    """
    chunk = unwrapped(model)
    if not chunk.training:  # validation data has no alignment labels, and Megatron's losses are off
        yield
        return
    alignment = getattr(chunk, "ramoe_alignment", None)
    if not _losses_opened(chunk) and alignment is None:
        yield
        return
    context = (
        AlignmentContext(alignment, batch, expected=chunk.ramoe_layers)
        if alignment
        else TrainingContext(batch)
    )
    with routing_context(context):
        yield
    context.check_consumed()


def _losses_opened(chunk: Any) -> bool:
    """Whether Megatron has losses at the chunk's routers that our code can reach. Opens the routers once."""
    if not hasattr(chunk, "ramoe_losses_opened"):
        reasons = unreached(getattr(chunk, "config", None))
        chunk.ramoe_losses_opened = not reasons and open_losses(chunk)
        if reasons and (not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0):
            note = "ramoe: note: Megatron's own losses at the routers count padding under "
            print(note + "; ".join(reasons), flush=True)
    return chunk.ramoe_losses_opened


class TrainingContext:
    """Routing context of a training micro-batch: which rows are real tokens, for Megatron's router losses."""

    def __init__(self, batch: Mapping[str, Tensor], needed: Sequence[str] = ()) -> None:
        """Check and keep the batch.

        Args:
            needed: keys that the batch must have beside the lengths.

        Raises:
            RamoeError: a key is missing, or the batch has several packs.
        """
        packed = "start" in batch
        missing = [
            key
            for key in ["prompt_length", "length", *needed, *(PACK_KEYS if packed else ())]
            if key not in batch
        ]
        if missing:
            raise RamoeError(
                f"routing_batch: the batch has no {', '.join(missing)}; expected a micro-batch of "
                "ramoe_megatron's dataset provider, moved to the model's device"
            )
        if packed:
            if len(batch["start"]) != 1:
                raise RamoeError(
                    f"routing_batch: {len(batch['start'])} packs in one micro-batch; "
                    "packed samples need --micro-batch-size 1"
                )
            batch = {key: value[0] for key, value in batch.items()}
        self.batch = batch
        self.selection = TokenSelection(
            batch["prompt_length"], batch["length"], batch.get("start"), batch.get("cu_seqlens")
        )
        self.share = batch["sample_share"] if packed else 1.0 / len(batch["length"])
        self.real_tokens = RealTokens(self.selection, self.share)

    def on_logits(self, router: Any, logits: Tensor) -> Tensor:
        """The logits unchanged: alignment acts through the loss only."""
        return logits

    def on_routing(self, router: Any, logits: Tensor, probs: Tensor, routing_map: Tensor) -> Tensor:
        """The probabilities unchanged."""
        return probs

    def check_consumed(self) -> None:
        """No check without alignment."""


class AlignmentContext(TrainingContext):
    """Routing context of an aligned micro-batch: attaches and records the loss at each aligned router."""

    def __init__(self, alignment: Alignment, batch: Mapping[str, Tensor], expected: set[int]) -> None:
        super().__init__(
            batch, ["loss_mask", *BATCH_KEYS[: 3 if alignment.config.target == "example" else 2]]
        )
        self.alignment, batch = alignment, self.batch
        # A sample without chosen tokens (an empty prompt) has no routing to align and no routing mass.
        chosen_B = self.selection.count(alignment.config.tokens) > 0
        self.partner_B = (
            torch.arange(len(chosen_B), device=chosen_B.device) ^ 1
            if alignment.config.target == "paired"
            else None
        )
        if self.partner_B is not None:
            if len(chosen_B) % 2:
                raise RamoeError(
                    f"routing_batch: {len(chosen_B)} samples in a micro-batch; "
                    "--ramoe-target paired needs an even number"
                )
            chosen_B = chosen_B & chosen_B[self.partner_B]
        refresh = alignment.state.refresh
        if refresh is None and alignment.config.refresh_interval is not None:
            raise RamoeError(
                "--ramoe-refresh-interval: nothing scores the examples in this program. "
                "A refresh needs Megatron's own training loop with the data of "
                "ramoe_megatron.dataset_provider: use them, or remove the flag"
            )
        weight_B = batch["ramoe_weight"].float() if refresh is None else refresh.weight(batch["example"])
        self.weight_B = weight_B * chosen_B
        if refresh is not None:
            self.ci_B = refresh.is_ci(batch["example"])
        else:
            self.ci_B = batch["ramoe_ci"].bool() if "ramoe_ci" in batch else self.weight_B > 0
        self.task_B = batch["ramoe_task"].clamp(min=0)
        self.has_task_B = (batch["ramoe_task"] >= 0) & chosen_B
        self.target_BZE = batch.get("ramoe_target")
        self.loss_tokens_B = loss_tokens(batch["loss_mask"], batch["length"], batch.get("start"))
        self.expected, self.passed, self.attached = expected, dict.fromkeys(expected, 0), set[int]()

    def on_routing(self, router: Any, logits: Tensor, probs: Tensor, routing_map: Tensor) -> Tensor:
        """Attach the layer's loss to `probs` when training with gradients."""
        layer = router.ramoe_layer
        if layer not in self.expected:
            return probs
        self.passed[layer] += 1
        self.alignment.state.ran = True
        if not (router.training and torch.is_grad_enabled()):
            return probs  # evaluation, or the first pass of a recomputed layer
        if layer in self.attached:
            raise RamoeError(f"MoE layer {layer} attached its alignment loss twice for one micro-batch")
        self.attached.add(layer)
        refuse_unmoved(self.alignment, router, layer, logits)
        return self._attach(router, layer, logits, probs)

    def _attach(self, router: Any, layer: int, logits_SCE: Tensor, probs: Tensor) -> Tensor:
        from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

        alignment, config = self.alignment, self.alignment.config
        mask_BE = alignment.expert_mask_GLE[self.task_B, layer]
        if config.pooling == "sequence" or config.tokens == "last":  # for one token both poolings are equal
            q_BE = pooled_distributions(router, logits_SCE, self.selection, (config.tokens,))[config.tokens]
            # The English view's routing at the current weights. `divergence` passes no gradient to it.
            target_BE = self._target(layer) if self.partner_B is None else q_BE[self.partner_B]
            divergence_B = divergence(config.divergence, target_BE, q_BE, mask_BE)
        else:
            divergence_B, q_BE = self._by_token(router, logits_SCE, self._target(layer), mask_BE)
        # A sample of weight zero must contribute exactly 0, whatever its divergence (empty prompt, missing
        # prior).
        divergence_B = torch.where(self.weight_B > 0, divergence_B, torch.zeros_like(divergence_B))

        per_token = router.calculate_per_token_loss
        unit_B = self.loss_tokens_B if per_token else torch.ones_like(self.weight_B)
        share = 1.0 if per_token else self.share
        weighted_B = self.weight_B * unit_B * divergence_B * alignment.layer_weight[layer]
        loss = alignment.state.coefficient.now() * share / len(alignment.layers) * weighted_B.sum()
        alignment.metrics.record_alignment(
            layer,
            loss=weighted_B.detach(),
            unit=unit_B,
            aligned=self.weight_B > 0,
            ci=self.ci_B,
            has_task=self.has_task_B,
            task_mass=mass(q_BE.detach(), mask_BE),
        )
        return MoEAuxLossAutoScaler.apply(probs, loss)

    def _target(self, layer: int) -> Tensor:
        if self.target_BZE is not None and self.alignment.config.target == "example":
            return self.target_BZE[:, self.alignment.layers.index(layer)]
        return self.alignment.pattern_GLE[self.task_B, layer]

    def _by_token(
        self, router: Any, logits_SCE: Tensor, target_BE: Tensor, mask_BE: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The means of the tokens' divergences [B] and of their distributions [B, E].

        The distributions are for the log and have no gradient.
        """
        config, local = self.alignment.config, self.selection.local(router, logits_SCE.shape[0])
        p_SCE = router_distribution(logits_SCE, router.score_function)
        divergence_SC = divergence(config.divergence, local.spread(target_BE), p_SCE, local.spread(mask_BE))
        divergence_B = mean_over_tokens(router, divergence_SC[..., None], self.selection, config.tokens)[:, 0]
        return divergence_B, mean_over_tokens(router, p_SCE.detach(), self.selection, config.tokens)

    def check_consumed(self) -> None:
        """Raise RamoeError unless every expected layer ran exactly once.

        Recomputation runs later and is not counted.
        """
        wrong = {layer: times for layer, times in self.passed.items() if times != 1}
        if wrong:
            raise RamoeError(
                f"routing_batch: aligned MoE layers ran {wrong} times (layer: times) in one micro-batch; "
                "expected once each. Call the model once inside the context, "
                "with the routers that attach() opened"
            )


def loss_tokens(loss_mask: Tensor, length_B: Tensor, start_B: Tensor | None) -> Tensor:
    """Number of loss tokens of each sample. `loss_mask`: [B, S_whole], of a pack [S_whole]. [B], float32"""
    if start_B is None:
        return loss_mask.float().sum(dim=1)
    before = torch.nn.functional.pad(loss_mask.float().cumsum(0), (1, 0))
    return before[start_B + length_B] - before[start_B]
