"""Changes to the layers and to the built chunks of Megatron's GPT model."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

Layer = Any
"""Megatron's `ModuleSpec` of a `TransformerLayer`."""


@dataclass(frozen=True)
class ModelChanges:
    """How a family's model differs from Megatron's."""

    layer: Callable[[Layer], Layer] = lambda layer: layer
    """Returns a changed copy of a layer's specification."""
    chunk: Callable[[Any], None] | None = None
    """Changes a built model chunk, before the weights are loaded."""
    softmax_scale: float | None = None
    """Factor on the attention scores; None for Megatron's default."""


class ChangedLayers:
    """Megatron's default specification of the layers with a family's changes: a `transformer_layer_spec`."""

    def __init__(self, change: Callable[[Layer], Layer]) -> None:
        self.change = change

    def __call__(self, config: Any, vp_stage: int | None = None) -> Any:
        """The specification for a `GPTModelConfig` and a virtual pipeline stage."""
        from megatron.training.models.gpt import default_layer_spec

        spec = default_layer_spec(config, vp_stage)
        if hasattr(spec, "layer_specs"):
            return replace(spec, layer_specs=[self.change(layer) for layer in spec.layer_specs])
        return self.change(spec)


def change_chunks(change: Callable[[Any], None], chunks: list[Any]) -> list[Any]:
    """Change every chunk; as one of a model configuration's `pre_wrap_hooks`."""
    for chunk in chunks:
        change(chunk)
    return chunks


def with_attention(layer: Layer, **modules: Any) -> Layer:
    """A layer with other submodules in its self-attention."""
    attention = layer.submodules.self_attention
    changed = replace(attention, submodules=replace(attention.submodules, **modules))
    return replace(layer, submodules=replace(layer.submodules, self_attention=changed))


def with_experts(layer: Layer, **modules: Callable[[Any], Any]) -> Layer:
    """A layer whose MoE submodules are changed by these functions. A dense layer is returned as it is."""
    from megatron.core.transformer.moe.moe_layer import MoESubmodules

    mlp = layer.submodules.mlp
    moe = mlp.keywords.get("submodules") if isinstance(mlp, partial) else None
    if not isinstance(moe, MoESubmodules):
        return layer
    changed = replace(moe, **{name: change(getattr(moe, name)) for name, change in modules.items()})
    other = partial(mlp.func, *mlp.args, **{**mlp.keywords, "submodules": changed})
    return replace(layer, submodules=replace(layer.submodules, mlp=other))
