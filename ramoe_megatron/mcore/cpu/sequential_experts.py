"""Megatron's experts that run one after another, with fewer calls where no gradient is needed.

A step of decoding gives each expert a few tokens, so the calls take longer than the arithmetic. Here the
matrices of all experts are multiplied in one loop, and the activation of all tokens is computed at once. The
arithmetic is Megatron's, token by token.

Shape suffixes: T token choices sorted by expert, H hidden size, F size of an expert's hidden layer.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def expert_stand_ins() -> list[tuple[Any, str, Any]]:
    """The forward pass of Megatron's sequential experts in the CPU backend."""
    from megatron.core.transformer.moe.experts import SequentialMLP

    stock = SequentialMLP.forward

    @functools.wraps(stock)
    def forward_at_once(
        self: Any, states_TH: Tensor, tokens_per_expert: Tensor, probs_T: Tensor, *more: Any, **named: Any
    ) -> tuple[Tensor, Tensor | None]:
        if self.training or torch.is_grad_enabled() or more or named or not _plain(self):
            return stock(self, states_TH, tokens_per_expert, probs_T, *more, **named)
        counts, config = tokens_per_expert.tolist(), self.config
        inner = _products(states_TH, [expert.linear_fc1.weight for expert in self.local_experts], counts)
        if config.gated_linear_unit:
            gate_TF, linear_TF = inner.chunk(2, dim=-1)
            if (most := config.activation_func_clamp_value) is not None:
                gate_TF, linear_TF = gate_TF.clamp(max=most), linear_TF.clamp(-most, most)
            inner = config.activation_func(gate_TF) * (linear_TF + config.glu_linear_offset)
        else:
            inner = config.activation_func(inner)
        weighted_TF = (inner * probs_T[:, None]).to(inner.dtype)
        return _products(
            weighted_TF, [expert.linear_fc2.weight for expert in self.local_experts], counts
        ), None

    return [(SequentialMLP, "forward", forward_at_once)]


def _products(states_TX: Tensor, weights: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Each expert's tokens times the transpose of its weight."""
    found = states_TX.new_empty(len(states_TX), len(weights[0]))
    # The backend's mode would look at each of these calls, and change none.
    with torch._C.DisableTorchFunction():
        for tokens, output, weight in zip(states_TX.split(counts), found.split(counts), weights, strict=True):
            if len(tokens):
                torch.mm(tokens, weight.t(), out=output)
    return found


def _plain(experts: Any) -> bool:
    """Whether the experts are Megatron's own linear layers, without biases and quantisation."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    config = experts.config
    if config.fp8 or config.fp4 or config.add_bias_linear or config.moe_apply_probs_on_input:
        return False
    if config.use_te_activation_func or config.bias_activation_fusion:
        return False
    # A module of another class, such as an adapter, computes more than its weight.
    return all(
        type(expert.linear_fc1) is ColumnParallelLinear and type(expert.linear_fc2) is RowParallelLinear
        for expert in experts.local_experts
    )
