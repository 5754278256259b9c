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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.align.attach import Alignment
from ramoe_megatron.mcore.align.metrics import LoggedSamples
from ramoe_megatron.mcore.align.reach import refuse_unmoved
from ramoe_megatron.mcore.align.refusals import unreached
from ramoe_megatron.mcore.carrier import routing_context
from ramoe_megatron.mcore.cpu.backend import cuda_absent, uncompiled
from ramoe_megatron.mcore.observe import (
    LocalTokens,
    TokenSelection,
    mean_over_tokens,
    pooled_distributions,
    router_distribution,
)
from ramoe_megatron.mcore.real_tokens import RealTokens
from ramoe_megatron.mcore.router import open_losses, unwrapped
from ramoe_megatron.method.losses import (
    Reference,
    WeightedDivergence,
    reference,
    task_expert_halves,
    weighted_divergence,
)

with uncompiled():
    from megatron.core.jit import jit_fuser

BATCH_KEYS = ("ramoe_weight", "ramoe_task", "ramoe_target")
"""Keys of a batch beside prompt_length and length: weight [B] (0 = not aligned), task [B] (row of the expert
file, -1 = none) and, for the target "example", the English routing [B, Z, E]. `ramoe_ci` [B] (bool) is
optional and says which samples are ci; without it the log counts the aligned samples as ci. In a batch of one
pack each key has a leading dimension of 1."""

PACK_KEYS = ("start", "cu_seqlens", "sample_share")
"""Additional keys of a batch of packed samples (`data.packing`)."""


compiled_divergence = weighted_divergence if cuda_absent() else jit_fuser(weighted_divergence)
"""`weighted_divergence`, compiled as Megatron compiles its own functions where there is a CUDA device."""


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


@dataclass(frozen=True)
class Prepared:
    """What one aligned layer needs of a micro-batch and that does not depend on its routing."""

    weight_B: Tensor
    """What the divergence of each sample is multiplied by in the attached loss."""
    inside_BE: Tensor
    """The task experts of each sample. bool"""
    halves_B2E: Tensor
    """`task_expert_halves` of them."""
    known: Reference | None
    """The English side; None where it is the routing of a partner in the micro-batch."""


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
        self._prepared: dict[int, Prepared] | None = None
        self._weight_of_row: dict[int, Tensor] | None = None

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
        if self._prepared is None:
            self._prepared = self._prepare(router.calculate_per_token_loss)
        layer_of, name = self._prepared[layer], config.divergence
        if config.pooling == "sequence" or config.tokens == "last":  # for one token both poolings are equal
            q_BE = pooled_distributions(router, logits_SCE, self.selection, (config.tokens,))[config.tokens]
            known = layer_of.known
            if known is None:  # the English view's routing at the current weights, without gradient
                assert self.partner_B is not None
                target_BE = q_BE.detach().index_select(0, self.partner_B)
                known = reference(name, target_BE, layer_of.inside_BE, layer_of.halves_B2E)
            loss, divergence_B, masses_B2 = WeightedDivergence.apply(
                q_BE, layer_of.weight_B, name, compiled_divergence, *known
            )
        else:
            loss, divergence_B, masses_B2 = self._by_token(router, logits_SCE, layer_of)
        alignment.metrics.record_alignment(
            layer, self.logged, divergence_B, masses_B2, alignment.layer_weight[layer]
        )
        return MoEAuxLossAutoScaler.apply(probs, loss)

    def _prepare(self, per_token: bool) -> dict[int, "Prepared"]:
        """What does not depend on the routing, for all aligned layers at once."""
        alignment, layers = self.alignment, tuple(sorted(self.expected))
        own, config = alignment.of_chunk(layers), alignment.config
        aligned_B = self.weight_B > 0
        unit_B = self.loss_tokens_B if per_token else torch.ones_like(self.weight_B)
        weight_B = self.weight_B * unit_B
        self.logged = LoggedSamples.of(weight_B, unit_B, aligned_B, self.ci_B, self.has_task_B)
        scale = alignment.state.coefficient.now() * (1.0 if per_token else self.share) / len(alignment.layers)
        weight_ZB = own.weight_Z[:, None] * (scale * weight_B)
        inside_ZBE = own.expert_mask_ZGE.index_select(1, self.task_B)
        halves_ZB2E = task_expert_halves(inside_ZBE)
        parts: list[Sequence[Any]] = [weight_ZB.unbind(), inside_ZBE.unbind(), halves_ZB2E.unbind()]
        if self.partner_B is not None:
            parts.append([None] * len(layers))
            return {layer: Prepared(*one) for layer, *one in zip(layers, *parts, strict=True)}
        if config.target == "example":
            assert self.target_BZE is not None
            target_ZBE = self.target_BZE.transpose(0, 1).index_select(0, own.place_Z)
        else:
            target_ZBE = own.pattern_ZGE.index_select(1, self.task_B)
        # A sample of weight zero must contribute exactly 0, whatever its target (a missing prior).
        target_ZBE = target_ZBE.masked_fill(~aligned_B[:, None], 0.0)
        known_Z = reference(config.divergence, target_ZBE, inside_ZBE, halves_ZB2E)
        parts.append([Reference(*one) for one in zip(*(part.unbind() for part in known_Z), strict=True)])
        return {layer: Prepared(*one) for layer, *one in zip(layers, *parts, strict=True)}

    def _by_token(
        self, router: Any, logits_SCE: Tensor, layer_of: "Prepared"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of this rank's rows; the means over tokens of the divergences [B] and the masses [B, 2].

        Autograd reads only the loss's gradient, which each rank has of its own rows.
        """
        tokens, local = self.alignment.config.tokens, self.selection.local(router, logits_SCE.shape[0])
        known = layer_of.known
        assert known is not None  # a paired target is of whole samples
        p_SCE = router_distribution(logits_SCE, router.score_function)
        if local.sample_S is not None:
            known = Reference(*(part.index_select(0, local.sample_S)[:, None] for part in known))
        if self._weight_of_row is None:
            self._weight_of_row = self._weights_of_rows(local)
        weight_SC = self._weight_of_row[router.ramoe_layer]
        loss, divergence_SC, masses_SC2 = WeightedDivergence.apply(
            p_SCE, weight_SC, self.alignment.config.divergence, compiled_divergence, *known
        )
        figures_SC3 = torch.cat([divergence_SC[..., None], masses_SC2], dim=-1)
        figures_B3 = mean_over_tokens(router, figures_SC3, self.selection, tokens)
        return loss, figures_B3[:, 0], figures_B3[:, 1:]

    def _weights_of_rows(self, local: LocalTokens) -> dict[int, Tensor]:
        """For each aligned layer, what the divergence at each row of this rank is multiplied by. [S, C]"""
        assert self._prepared is not None
        tokens = self.alignment.config.tokens
        weight_ZB = torch.stack([layer_of.weight_B for layer_of in self._prepared.values()])
        weight_ZB = weight_ZB / self.selection.divisor(tokens)[:, 0]
        rows_SCZ = local.spread(weight_ZB.T) * local.chosen(tokens)[..., None]
        return dict(zip(self._prepared, rows_SCZ.unbind(dim=-1), strict=True))

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
