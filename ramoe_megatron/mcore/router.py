"""The observed router, a subclass of Megatron's `TopKRouter`; and the numbering of MoE layers.

The subclass only wraps Megatron's methods: `routing` here, the losses in `real_tokens`. No code of
Megatron is copied. The keys of the state dict stay Megatron's.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore import carrier, compat
from ramoe_megatron.mcore.cpu.backend import uncompiled
from ramoe_megatron.mcore.real_tokens import RealRows, RealTokenLosses, counts_tokens

with uncompiled():
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer


@functools.cache
def observed(kind: type[TopKRouter]) -> type[TopKRouter]:
    """The subclass of a router class that passes logits and routing to the current routing context.

    It also takes Megatron's own losses over the context's real tokens. Its instances have the memory layout
    of `kind`, so the class of a built router can be changed to it.
    """

    class ObservedRouter(RealTokenLosses, kind):  # type: ignore[misc, valid-type]
        def routing(
            self, logits: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """`logits` [S_local, B, E] to `probs`, `routing_map` [S_local*B, E], as Megatron's."""
            context = carrier.current()
            if context is None:
                return super().routing(logits, *args, **kwargs)
            listening = hasattr(self, "ramoe_layer")  # routers of multi-token prediction only count tokens
            logits = context.on_logits(self, logits) if listening else logits
            self.real_rows = _real_rows(context, self, logits)
            if self.real_rows is not None:
                args, kwargs = (), {"padding_mask": self.real_rows.padding_SC}
            try:
                probs, routing_map = super().routing(logits, *args, **kwargs)
            finally:
                self.real_rows = None
            return context.on_routing(self, logits, probs, routing_map) if listening else probs, routing_map

    ObservedRouter.__name__ = f"Observed{kind.__name__}"
    return ObservedRouter


def _real_rows(context: Any, router: TopKRouter, logits: torch.Tensor) -> RealRows | None:
    real = getattr(context, "real_tokens", None)
    if real is None or not (router.training and torch.is_grad_enabled() and counts_tokens(router)):
        return None
    return real.at(router, logits.shape[0])


def open_router(router: TopKRouter) -> None:
    """Change a built router's class to its observed subclass. A second call changes nothing."""
    if not isinstance(router, RealTokenLosses):
        router.__class__ = observed(type(router))  # type: ignore[arg-type]


def open_losses(chunk: Any) -> bool:
    """Open the routers of a model chunk that have losses of Megatron, including multi-token prediction.

    Returns:
        whether the chunk has such routers.
    """
    found = [module for module in chunk.modules() if isinstance(module, TopKRouter) and counts_tokens(module)]
    for router in found:
        open_router(router)
    for layer in (module for module in chunk.modules() if isinstance(module, MultiTokenPredictionLayer)):
        for router in (module for module in layer.modules() if isinstance(module, TopKRouter)):
            router.ramoe_mtp_depth = layer.layer_number
    return bool(found)


def observe_routers(model: Any) -> list[Any]:
    """Change the class of every router of a model, except in MTP layers, to its observed subclass.

    A second call changes nothing.

    Args:
        model: a built model chunk, or a list of chunks.

    Returns:
        the observed routers of this rank, in order.
    """
    routers = list(local_routers(model))
    numbers = moe_layer_numbers(model)
    for router in routers:
        if router.layer_number not in numbers:
            raise RamoeError(
                f"a router is in Megatron layer {router.layer_number}, but by the model's configuration the "
                f"MoE layers are {numbers}: give the --moe-layer-freq or --hybrid-layer-pattern that the "
                "model was built with"
            )
        open_router(router)
        router.ramoe_layer = numbers.index(router.layer_number)
    return routers


def local_routers(model: Any) -> Iterator[TopKRouter]:
    """The routers of this rank's decoder layers, without MTP layers."""
    for chunk in chunks(model):
        for module in chunk.modules():
            if isinstance(module, TopKRouter) and not module.is_mtp_layer:
                yield module


def chunks(model: Any) -> Iterable[Any]:
    """A model or list of model chunks (one for each virtual pipeline stage) as a list."""
    return model if isinstance(model, list | tuple) else [model]


def unwrapped(chunk: Any) -> Any:
    """The chunk without DDP and mixed-precision wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def moe_layer_numbers(model: Any) -> list[int]:
    """Megatron's layer numbers (1-based) of all MoE layers of the whole model, over all pipeline stages.

    A hybrid model numbers attention and MoE layers separately; a GPT model gives both in a block one number.
    The index in this list is the same for both kinds.
    """
    chunk = unwrapped(next(iter(chunks(model))))
    # a HybridModel stores its deprecated patterns and ratios in this attribute too
    return configured_moe_layer_numbers(chunk.config, getattr(chunk, "hybrid_layer_pattern", None))


def configured_moe_layer_numbers(config: Any, hybrid_pattern: str | None) -> list[int]:
    """`moe_layer_numbers` before a model is built, from `TransformerConfig` and `--hybrid-layer-pattern`."""
    if hybrid_pattern:
        return hybrid_moe_layer_numbers(hybrid_pattern)
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return [layer + 1 for layer in range(config.num_layers) if layer % frequency == 0]
    return [layer + 1 for layer, is_moe in enumerate(frequency) if is_moe]


def hybrid_moe_layer_numbers(pattern: str) -> list[int]:
    """The 1-based indices of the MoE layers in `--hybrid-layer-pattern`.

    MTP layers are left out, and stage boundaries are not counted as layers.
    """
    hybrid = compat.hybrid_layer_allocation()
    layers = (hybrid.parse_hybrid_pattern(pattern).main_pattern or "").replace(hybrid.Symbols.PIPE, "")
    return [number for number, symbol in enumerate(layers, 1) if symbol == hybrid.Symbols.MOE]
