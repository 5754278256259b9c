"""Reads and transplants the routing of whole sequences, with a forward-only model.

Shape suffixes: N sequences, L MoE layers, E experts, B sequences of a micro-batch, S its tokens on this rank.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ramoe_megatron.data.encode import Encoded
from ramoe_megatron.mcore.carrier import RoutingContext
from ramoe_megatron.mcore.observe import (
    TOKEN_CHOICES,
    TokenSelection,
    frequencies,
    mean_over_tokens,
    pooled_distributions,
    sum_over_sequence,
)
from ramoe_megatron.mcore.offline.model import ContextMaker, MicroBatch, OfflineModel

COUNTED = "frequency."


@dataclass(frozen=True)
class SequenceRouting:
    """The routing of N sequences at every MoE layer, on every rank."""

    frequency_NLE: dict[str, Tensor]
    """For each token choice, the share of a sequence's chosen tokens with an expert in the top-k. It counts
    tokens, not weights (arXiv 2510.04694, eq. 3). A sequence without such tokens has zeros."""
    pooled_NLE: dict[str, Tensor]
    """For each token choice, the mean router distribution before top-k."""
    tokens_N: Tensor
    """Number of input tokens of each sequence, the divisor of the frequencies of "all". int64"""
    gate_NLE: Tensor | None = None
    """Mean over a sequence's tokens of the weight of an expert, 0 where it is not chosen; None unless
    requested."""


def sequence_routing(
    model: OfflineModel,
    encoded: Sequence[Encoded],
    choices: Sequence[str] = TOKEN_CHOICES,
    steered: ContextMaker | None = None,
    gate: bool = False,
    counted: Collection[str] = ("all",),
) -> SequenceRouting:
    """Read the routing in one forward pass. Memory grows with the number of sequences, not their length.

    Args:
        choices: token choices of the pooled distributions.
        steered: makes contexts that change the logits; the routing is then read after the change.
        gate: also read the mean weights of the experts.
        counted: token choices of the frequencies.
    """
    shape = (len(encoded), len(model.layer_numbers), model.config.num_moe_experts)
    names = (*(f"{COUNTED}{choice}" for choice in counted), *choices, *(("gate",) if gate else ()))
    buffers = {name: torch.zeros(shape, device=model.device) for name in names}

    def context(micro: MicroBatch) -> "_Listen":
        return _Listen(micro, buffers, speaks=model.tp_rank == 0, steered=steered(micro) if steered else None)

    for group in model.groups([len(sequence.ids) for sequence in encoded]):
        model.run(encoded, group, None, context=context)
    for buffer in buffers.values():
        model.share(buffer)
    tokens_N = torch.tensor([len(sequence.ids) - 1 for sequence in encoded], device=model.device)
    frequency_NLE = {choice: buffers[f"{COUNTED}{choice}"] for choice in counted}
    return SequenceRouting(
        frequency_NLE, {choice: buffers[choice] for choice in choices}, tokens_N, buffers.get("gate")
    )


class _Listen:
    """Writes each sequence's routing to the buffers. The routing changes only by the context in `steered`."""

    def __init__(
        self,
        micro: MicroBatch,
        buffers: dict[str, Tensor],
        speaks: bool,
        steered: RoutingContext | None = None,
    ) -> None:
        self.micro, self.buffers, self.speaks, self.steered = micro, buffers, speaks, steered
        self.selection = TokenSelection(micro.batch["prompt_length"], micro.batch["length"])
        self.place_B, self.real_B1 = micro.places.clamp(min=0), micro.real[:, None].float()

    def on_logits(self, router: Any, logits: Tensor) -> Tensor:
        return self.steered.on_logits(router, logits) if self.steered else logits

    def on_routing(self, router: Any, logits: Tensor, probs: Tensor, routing_map: Tensor) -> Tensor:
        choices = [name for name in self.buffers if name in TOKEN_CHOICES]
        counted = [name for name in self.buffers if name.startswith(COUNTED)]
        if counted:
            tokens = [name.removeprefix(COUNTED) for name in counted]
            shares = frequencies(router, routing_map.view_as(logits), self.selection, tokens)
            for name, frequency_BE in zip(counted, shares, strict=True):
                self._write(name, router.ramoe_layer, frequency_BE)
        if "gate" in self.buffers:
            gate_BE = mean_over_tokens(router, probs.view_as(logits).float(), self.selection, "all")
            self._write("gate", router.ramoe_layer, gate_BE)
        if choices:
            for name, pooled_BE in pooled_distributions(router, logits, self.selection, choices).items():
                self._write(name, router.ramoe_layer, pooled_BE)
        return probs

    def _write(self, name: str, layer: int, value_BE: Tensor) -> None:
        if self.speaks:
            # Each place is written once and was zero before. A mask as index would make the host wait for the
            # device at every layer.
            self.buffers[name][:, layer].index_add_(0, self.place_B, value_BE * self.real_B1)


def last_prompt_logits(model: OfflineModel, encoded: Sequence[Encoded]) -> Tensor:
    """Router logits at the last prompt token of each sequence. [N, L, E], on every rank"""
    shape = (len(encoded), len(model.layer_numbers), model.config.num_moe_experts)
    logits_NLE = torch.zeros(shape, device=model.device)

    def context(micro: MicroBatch) -> "_CaptureLogits":
        return _CaptureLogits(micro, logits_NLE, speaks=model.tp_rank == 0)

    for group in model.groups([len(sequence.ids) for sequence in encoded]):
        model.run(encoded, group, None, context=context)
    return model.share(logits_NLE)


class _CaptureLogits(_Listen):
    def __init__(self, micro: MicroBatch, logits_NLE: Tensor, speaks: bool) -> None:
        super().__init__(micro, {"logits": logits_NLE}, speaks)

    def on_routing(self, router: Any, logits: Tensor, probs: Tensor, routing_map: Tensor) -> Tensor:
        last_BE, absent_B1 = self.selection.local(router, logits.shape[0]).last(logits)
        here_BE = last_BE.float().masked_fill(absent_B1, 0.0)
        self._write("logits", router.ramoe_layer, sum_over_sequence(router, here_BE))
        return probs


class Transplant:
    """Transplant test: routes a sequence's last prompt token by another sequence's logits, in some layers."""

    def __init__(self, micro: MicroBatch, logits_NLE: Tensor, layers: range) -> None:
        self.selection = TokenSelection(micro.batch["prompt_length"], micro.batch["length"])
        self.logits_BLE = logits_NLE[micro.places.clamp(min=0)]
        self.layers = layers

    def on_logits(self, router: Any, logits: Tensor) -> Tensor:
        if router.ramoe_layer not in self.layers:
            return logits
        chosen_SB1 = self.selection.local(router, logits.shape[0]).chosen("last")[..., None]
        return torch.where(chosen_SB1, self.logits_BLE[None, :, router.ramoe_layer].to(logits.dtype), logits)

    def on_routing(self, router: Any, logits: Tensor, probs: Tensor, routing_map: Tensor) -> Tensor:
        return probs
