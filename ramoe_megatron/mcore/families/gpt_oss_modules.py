"""GPT-OSS trains with Megatron's experts that run one after another, in every layout.

Megatron 0.19 goes wrong twice with the biases of such experts:

    in-place bias   `MLP.forward` adds the bias of the second matrix in place. Without transformer-engine the
                    output is a view that a custom autograd function made, and torch refuses to change it
    summed bias     the gradient of this bias is summed over the tensor-parallel ranks under sequence
                    parallelism, though these ranks have different experts or different tokens, and the
                    expert-data-parallel reduction has summed it already

The class here is a subclass of the row-parallel class in the specification, so it is made of
transformer-engine's class too; that has not been run. Remove it when a training with TP 2, sequence
parallelism and EP 2 has the gradients of one rank without it.
"""

import functools
from dataclasses import replace
from typing import Any

from torch import Tensor

from ramoe_megatron.mcore.cpu.backend import uncompiled
from ramoe_megatron.mcore.families.changes import Layer, ModelChanges, with_experts
from ramoe_megatron.models.note import ModelNote

with uncompiled():
    from megatron.core.transformer.moe.experts import SequentialMLP


@functools.cache
def with_own_bias(kind: type) -> type:
    """The subclass of a row-parallel linear layer of experts with a bias."""

    class ExpertLinear(kind):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if getattr(self, "bias", None) is not None:
                self.bias.sequence_parallel = False

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            output, bias = super().forward(x)
            return output.clone(), bias

    ExpertLinear.__name__ = f"Expert{kind.__name__}"
    return ExpertLinear


def _experts(experts: Any) -> Any:
    if getattr(experts, "func", None) is not SequentialMLP:
        return experts  # grouped experts add their biases elsewhere
    modules = experts.keywords["submodules"]
    changed = replace(modules, linear_fc2=with_own_bias(modules.linear_fc2))
    return functools.partial(experts.func, **{**experts.keywords, "submodules": changed})


def _layer(layer: Layer) -> Layer:
    return with_experts(layer, experts=_experts)


def gpt_oss_changes(_: ModelNote) -> ModelChanges:
    """GPT-OSS's own modules.

    The router's bias is Megatron's own. Routing alignment aligns the softmax over all logits, with the bias.
    """
    return ModelChanges(layer=_layer)
