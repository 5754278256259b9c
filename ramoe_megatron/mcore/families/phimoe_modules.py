"""Phi-3.5-MoE: SparseMixer routing, a bias in the attention's output and in the output layer, LongRoPE.

The modules serve the local and the transformer-engine layers. With transformer-engine they have not been run.

Shape suffixes: T tokens, E experts.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.cpu.backend import uncompiled
from ramoe_megatron.mcore.families.changes import Layer, ModelChanges, with_attention, with_experts
from ramoe_megatron.models.note import ModelNote

with uncompiled():
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
    from megatron.core.transformer.moe.router import TopKRouter


class SparseMixerRouter(TopKRouter):
    """SparseMixer-v2 (arXiv 2409.12136) as transformers evaluates it, in training too.

    The experts are those with the two largest logits, as Megatron's. An expert's weight is its probability
    among the experts whose logits are close to its own. transformers samples the experts in training and
    estimates their gradient; here training is deterministic and has the gradient of the weights.

    Routing alignment aligns the softmax over all logits, as for other routers, and not these weights.
    """

    def __init__(self, *args: Any, jitter: float, **kwargs: Any) -> None:
        """
        Args:
            jitter: half of the relative distance to the largest logit from which an expert does not compete.
        """
        super().__init__(*args, **kwargs)
        self.jitter = jitter

    def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """`logits` [S, B, E] to `probs`, `routing_map` [T, E], as Megatron's."""
        probs_TE, map_TE = super().routing(logits, *args, **kwargs)
        mixed_TE = sparse_mixer(logits.view(-1, logits.shape[-1]), self.jitter)
        # Megatron attached its losses to its own probabilities; the choice may have dropped tokens.
        return mixed_TE * map_TE + 0 * probs_TE, map_TE


def sparse_mixer(logits_TE: Tensor, jitter: float) -> Tensor:
    """The weights of the experts with the two largest logits, 0 for the others. [T, E]"""
    # Megatron's choice by Megatron's call, so that both choose the same of equal logits.
    competing_TE, weights_TE, fixed_TE = logits_TE, torch.zeros_like(logits_TE), logits_TE.detach()
    for chosen_T1 in fixed_TE.topk(2).indices.split(1, dim=-1):
        largest_T1 = fixed_TE.gather(-1, chosen_T1)
        distance_TE = (largest_T1 - fixed_TE) / fixed_TE.abs().clamp(min=largest_T1)
        close_TE = competing_TE.masked_fill(distance_TE > 2 * jitter, -math.inf)
        weights_TE = weights_TE.scatter(-1, chosen_T1, close_TE.softmax(-1).gather(-1, chosen_T1))
        competing_TE = competing_TE.scatter(-1, chosen_T1, -math.inf)
    return weights_TE


class ShortLongRope(RotaryEmbedding):
    """LongRoPE up to the length of the original training, where only the short factors apply."""

    longest: int

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """As Megatron's. Raises RamoeError for a sequence longer than `longest`."""
        if max_seq_len + offset > self.longest:
            raise RamoeError(
                f"a sequence of {max_seq_len + offset} tokens: LongRoPE has other frequencies above "
                f"{self.longest} tokens (original_max_position_embeddings), which are not supported; "
                f"give at most --seq-length {self.longest}, and shorter data"
            )
        return super().get_freqs_non_repeated(max_seq_len, offset)


def use_short_factors(chunk: Any, factors: Sequence[float], longest: int) -> None:
    """Divide the frequencies of a chunk's rotary embedding by the factors."""
    rope = chunk.rotary_pos_emb
    rope.__class__, rope.longest = ShortLongRope, longest
    rope.inv_freq = rope.inv_freq / torch.tensor(factors, dtype=torch.float32, device=rope.inv_freq.device)


def add_output_bias(chunk: Any) -> None:
    """Give the output layer of the last stage a bias, which Megatron's model leaves out."""
    if chunk.post_process:
        linear = chunk.output_layer
        weight = linear.weight
        linear.bias = torch.nn.Parameter(weight.new_zeros(linear.output_size_per_partition))
        set_tensor_model_parallel_attributes(linear.bias, is_parallel=True, dim=0, stride=1)
        linear.bias.allreduce = True


def with_bias(linear: Any, *args: Any, **kwargs: Any) -> Any:
    """Build a linear layer with a bias, whatever --disable-bias-linear says."""
    return linear(*args, **{**kwargs, "bias": True})


def _layer(layer: Layer, jitter: float, bias: bool) -> Layer:
    if bias:
        linear = layer.submodules.self_attention.submodules.linear_proj
        layer = with_attention(layer, linear_proj=partial(with_bias, linear))
    return with_experts(layer, router=lambda _: partial(SparseMixerRouter, jitter=jitter))


def _chunk(chunk: Any, factors: Sequence[float] | None, longest: int, bias: bool) -> None:
    if factors is not None:
        use_short_factors(chunk, factors, longest)
    if bias:
        add_output_bias(chunk)


def phimoe_changes(note: ModelNote) -> ModelChanges:
    """Phi-3.5-MoE's own modules, with the numbers of its configuration."""
    config = note.config()
    rope = config.rope_parameters
    long = rope["rope_type"] == "longrope"
    head_size = config.hidden_size // config.num_attention_heads
    return ModelChanges(
        layer=partial(_layer, jitter=config.router_jitter_noise, bias=bool(config.attention_bias)),
        chunk=partial(
            _chunk,
            factors=rope["short_factor"] if long else None,
            longest=rope["original_max_position_embeddings"] if long else 0,
            bias=bool(config.lm_head_bias),
        ),
        # LongRoPE scales cosines and sines, so queries and keys alike
        softmax_scale=rope["short_mscale"] ** 2 / math.sqrt(head_size) if long else None,
    )
