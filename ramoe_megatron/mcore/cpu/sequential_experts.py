"""Megatron's experts that run one after another, with fewer calls where no gradient is needed.

A step of decoding gives each expert a few tokens, so the calls take longer than the arithmetic. Here the
matrices of many experts are multiplied in one loop, and the activation of their tokens is computed at once.
The arithmetic is Megatron's, token by token.

Shape suffixes: T token choices sorted by expert, H hidden size, F size of an expert's hidden layer.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

RUN = 2048
"""Token choices of the experts that are computed at once. More would not stay in the processor's cache."""


def expert_stand_ins() -> list[tuple[Any, str, Any]]:
    """The forward pass of Megatron's sequential experts, and of their dispatcher, in the CPU backend."""
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.core.transformer.moe.experts import SequentialMLP

    stock, sort = SequentialMLP.forward, token_dispatcher.sort_chunks_by_idxs

    @functools.wraps(stock)
    def forward_at_once(
        self: Any, states_TH: Tensor, tokens_per_expert: Tensor, probs_T: Tensor, *more: Any, **named: Any
    ) -> tuple[Tensor, Tensor | None]:
        if self.training or torch.is_grad_enabled() or more or named or not _plain(self):
            return stock(self, states_TH, tokens_per_expert, probs_T, *more, **named)
        counts = tokens_per_expert.tolist()
        # The backend's mode would look at each of these calls, and change none.
        with torch._C.DisableTorchFunction():
            return _forward(self, states_TH, counts, probs_T), None

    @functools.wraps(sort)
    def sorted_unless_in_order(
        states: Tensor, sizes: Tensor, order: Tensor, probs: Tensor | None = None, **named: Any
    ) -> tuple[Tensor, Tensor | None]:
        # Without expert parallelism the chunks are in order already, and Megatron copies each of them.
        if not torch.is_grad_enabled() and order.tolist() == list(range(len(order))):
            return states, probs
        return sort(states, sizes, order, probs=probs, **named)

    return [
        (SequentialMLP, "forward", forward_at_once),
        (token_dispatcher, "sort_chunks_by_idxs", sorted_unless_in_order),
    ]


def transpose_weights(modules: Iterable[torch.nn.Module]) -> None:
    """Store the transpose of each linear layer's weight, of which the weight is then a view.

    The weight keeps its shape and values. Without this, the product with a few tokens first copies the weight
    to this order. For weights that no optimizer holds.
    """
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    for module in modules:
        if isinstance(module, ColumnParallelLinear | RowParallelLinear) and module.weight is not None:
            module.weight.data = module.weight.data.t().contiguous().t()


def _forward(experts: Any, states_TH: Tensor, counts: Sequence[int], probs_T: Tensor) -> Tensor:
    """The weighted outputs of the experts. [T, H]"""
    config, linears = experts.config, experts.local_experts
    first = [expert.linear_fc1.weight.t() for expert in linears]
    second = [expert.linear_fc2.weight.t() for expert in linears]
    output_TH = states_TH.new_empty(len(states_TH), second[0].shape[1])
    start = 0
    for run in _runs(counts):
        own = counts[run]
        end = start + sum(own)
        inner = states_TH.new_empty(end - start, first[0].shape[1])
        _multiply(states_TH[start:end], first[run], own, inner)
        if config.gated_linear_unit:
            gate_TF, linear_TF = inner.chunk(2, dim=-1)
            if (most := config.activation_func_clamp_value) is not None:
                gate_TF, linear_TF = gate_TF.clamp(max=most), linear_TF.clamp(-most, most)
            inner = config.activation_func(gate_TF).mul_(linear_TF.add_(config.glu_linear_offset))
        else:
            inner = config.activation_func(inner)
        inner.mul_(probs_T[start:end, None])
        _multiply(inner, second[run], own, output_TH[start:end])
        start = end
    return output_TH


def _runs(counts: Sequence[int]) -> Iterator[slice]:
    """Slices of experts that have at most `RUN` token choices together; or one expert with more."""
    first = tokens = 0
    for expert, count in enumerate(counts):
        if expert > first and tokens + count > RUN:
            yield slice(first, expert)
            first, tokens = expert, 0
        tokens += count
    yield slice(first, len(counts))


def _multiply(states_TX: Tensor, matrices: Sequence[Tensor], counts: Sequence[int], out: Tensor) -> None:
    """Each expert's tokens times its matrix."""
    pieces = zip(
        states_TX.split_with_sizes(counts), out.split_with_sizes(counts), matrices, counts, strict=True
    )
    for tokens, output, matrix, count in pieces:
        if count:
            torch.mm(tokens, matrix, out=output)


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
