"""GPT-OSS trains with Megatron's experts that run one after another.

`MLP.forward` adds the bias of the second matrix in place. Without transformer-engine the output is a view
that a custom autograd function made, and torch refuses to change it. The subclass returns a copy. It is made
of the row-parallel class in the specification, so transformer-engine's class would do as well; that has not
been run.

Remove when Megatron adds the bias out of place.
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
def copying(kind: type) -> type:
    """The subclass of a row-parallel linear layer whose output may be changed in place."""

    class CopyingLinear(kind):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            output, bias = super().forward(x)
            return output.clone(), bias

    CopyingLinear.__name__ = f"Copying{kind.__name__}"
    return CopyingLinear


def _experts(experts: Any) -> Any:
    if getattr(experts, "func", None) is not SequentialMLP:
        return experts  # grouped experts add their biases elsewhere
    modules = experts.keywords["submodules"]
    changed = replace(modules, linear_fc2=copying(modules.linear_fc2))
    return functools.partial(experts.func, **{**experts.keywords, "submodules": changed})


def _layer(layer: Layer) -> Layer:
    return with_experts(layer, experts=_experts)


def gpt_oss_changes(_: ModelNote) -> ModelChanges:
    """GPT-OSS's own modules. The router's bias is Megatron's own and part of the logits that are aligned."""
    return ModelChanges(layer=_layer)
