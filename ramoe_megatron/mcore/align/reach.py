"""Refuses an alignment whose gradient reaches no trained weight.

With adapters (LoRA) or frozen weights, alignment acts through whatever trains at or below an aligned router:
the router itself, or the input that the router reads. If nothing there trains, the loss changes nothing.

What says so, and when:

    at the first forward pass    on a model without pipeline stages, the logits of the last aligned router
                                 have no gradient. Autograd knows every path, so this is exact.
    at the first report          over all ranks, no weight at or below the last aligned router trains, or no
                                 aligned router ran with gradients. A later pipeline stage, and a model whose
                                 inputs were made to require gradients, have logits with a gradient that ends
                                 nowhere, so the weights are looked at instead.

Evaluation, passes without gradients and the first pass of recomputed layers are never judged.
"""

from typing import Any

import torch
from torch import Tensor

from ramoe_megatron.errors import RamoeError

ABOVE = frozenset({"output_layer", "final_layernorm", "final_norm", "mtp"})
"""Megatron's names of modules that run after all decoder layers."""


def refuse_unmoved(alignment: Any, router: Any, layer: int, logits: Tensor) -> None:
    """Raise RamoeError if autograd finds no trained weight behind the last aligned router's logits.

    Args:
        alignment: the attached `Alignment`.
        router: an aligned router that runs with gradients.
        layer: its index among the MoE layers.
        logits: the router's logits.
    """
    alignment.state.attached |= logits.requires_grad
    if logits.requires_grad or layer != alignment.layers[-1]:
        return
    if router.config.pipeline_model_parallel_size == 1:  # else an earlier stage cannot tell of a later one
        raise RamoeError(_nothing_trains(alignment))


def refuse_unreached_anywhere(alignment: Any) -> bool:
    """Raise RamoeError on every rank if, over all ranks, the loss reached no trained weight.

    Every rank calls it after a step. One all-reduce.

    Args:
        alignment: the attached `Alignment`.

    Returns:
        whether the question is settled. It is not while no aligned layer has run.
    """
    state = alignment.state
    trains = any(_trains_below(chunk, _last_number(alignment)) for chunk in state.chunks)
    seen = torch.tensor(
        [state.ran, state.attached, trains], dtype=torch.int32, device=alignment.pattern_GLE.device
    )
    torch.distributed.all_reduce(seen, op=torch.distributed.ReduceOp.MAX)
    ran, attached, trains = seen.bool().tolist()
    if ran and not trains:
        raise RamoeError(_nothing_trains(alignment))
    if ran and not attached:
        raise RamoeError(
            "routing alignment: the aligned layers ran without gradients only, so the alignment loss changes "
            "nothing. Recomputed layers get no gradient when their input requires none: make the embedding's "
            "output require a gradient, do not recompute these layers, or set --ramoe-coeff 0"
        )
    return ran


def _nothing_trains(alignment: Any) -> str:
    return (
        "routing alignment: no trained weight is at or below the router of the last aligned MoE layer "
        f"{alignment.layers[-1]} (Megatron's layer {_last_number(alignment)}), so the alignment loss "
        "changes nothing; unfreeze an aligned router, train weights or adapters in it, in the attention of "
        "its layer or in a layer below, align later layers, or set --ramoe-coeff 0"
    )


def _last_number(alignment: Any) -> int:
    """Megatron's number (1-based) of the last aligned layer."""
    return alignment.metrics.layer_numbers[alignment.layers[-1]]


def _trains_below(chunk: Any, last: int) -> bool:
    """Whether a model chunk has a trained weight that can move the routing of Megatron's layer `last`.

    Those that cannot are in later layers, in the experts of that layer, or above the decoder.
    """
    from megatron.core.transformer.moe.moe_layer import BaseMoELayer

    beyond: set[int] = set()
    for name, module in chunk.named_modules():
        number = getattr(module, "layer_number", None)
        if name.rpartition(".")[2] in ABOVE or (isinstance(number, int) and number > last):
            beyond |= {id(weight) for weight in module.parameters()}
        elif isinstance(module, BaseMoELayer) and number == last:
            routers = {id(weight) for weight in module.router.parameters()}
            beyond |= {id(weight) for weight in module.parameters()} - routers
    return any(weight.requires_grad and id(weight) not in beyond for weight in chunk.parameters())
