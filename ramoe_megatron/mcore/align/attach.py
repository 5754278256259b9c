"""`attach`: checks an alignment against a built model and adds it to the model's routers.

The method is RA-MoE (arXiv 2605.28306; our reading).

Shape suffixes: G tasks, L MoE layers, Z aligned layers of a chunk, E experts.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ramoe_megatron.mcore.align.metrics import AlignmentMetrics
from ramoe_megatron.mcore.align.options import RoutingAlignmentConfig
from ramoe_megatron.mcore.align.reach import refuse_unreached_anywhere
from ramoe_megatron.mcore.align.refusals import refuse_foreign_routers, refuse_unsupported
from ramoe_megatron.mcore.align.resolve import resolve
from ramoe_megatron.mcore.align.startup import alignment_block
from ramoe_megatron.mcore.align.state import AlignmentState, state_of
from ramoe_megatron.mcore.router import chunks, local_routers, moe_layer_numbers, observe_routers, unwrapped


@dataclass(frozen=True)
class Alignment:
    """An attached alignment: its tensors on the model's device, its metrics and its state."""

    config: RoutingAlignmentConfig
    tasks: tuple[str, ...]
    layers: tuple[int, ...]
    """Aligned layers, 0-based among the MoE layers, ascending."""
    expert_mask_GLE: Tensor
    pattern_GLE: Tensor
    layer_weight: Mapping[int, float]
    """Weight of each aligned layer, mean 1."""
    metrics: AlignmentMetrics
    state: AlignmentState

    @functools.cached_property
    def _chunks(self) -> dict[tuple[int, ...], "ChunkAlignment"]:
        return {}

    def of_chunk(self, layers: tuple[int, ...]) -> "ChunkAlignment":
        """The tensors of the aligned layers of a model chunk, ascending; made once."""
        if layers not in self._chunks:
            device = self.expert_mask_GLE.device
            index_Z = torch.tensor(layers, dtype=torch.int64, device=device)
            places = [self.layers.index(layer) for layer in layers]
            weights = [self.layer_weight[layer] for layer in layers]
            self._chunks[layers] = ChunkAlignment(
                layers,
                self.expert_mask_GLE.index_select(1, index_Z).transpose(0, 1).contiguous(),
                self.pattern_GLE.index_select(1, index_Z).transpose(0, 1).contiguous(),
                torch.tensor(weights, dtype=torch.float32, device=device),
                torch.tensor(places, dtype=torch.int64, device=device),
            )
        return self._chunks[layers]


@dataclass(frozen=True)
class ChunkAlignment:
    """The tensors of an alignment in the aligned layers of one model chunk."""

    layers: tuple[int, ...]
    expert_mask_ZGE: Tensor
    pattern_ZGE: Tensor
    weight_Z: Tensor
    place_Z: Tensor
    """Place of each layer among the aligned layers of the whole model."""


def attach(model: Any, config: RoutingAlignmentConfig) -> Any:
    """Add routing alignment to a built Megatron model, before or after it is wrapped.

    With a softmax router, the distribution that is aligned is the softmax over all logits. That is so too
    where the router has a bias (GPT-OSS) or weighs its experts otherwise (SparseMixer of Phi-3.5-MoE).

    Weights may be frozen and adapters (LoRA) added before or after. The gradient reaches what trains at or
    below an aligned router. If nothing does, the first training step raises RamoeError (`reach`).

    Args:
        model: a `GPTModel` or `HybridModel`, a wrapped one, or the list of model chunks of this rank.
        config: the alignment. With coefficient 0 the model is not changed.

    Returns:
        `model`, so that `attach` can serve as one of a model configuration's `pre_wrap_hooks`.

    Raises:
        RamoeError: the expert file belongs to another model, the aligned layers do not exist in this model,
            or the model's configuration has a setting under which alignment is not defined (`refusals`).
    """
    if config.coeff == 0:
        return model
    model_config = unwrapped(next(iter(chunks(model)))).config
    refuse_unsupported(model_config)
    refuse_foreign_routers(chunks(model))
    numbers = moe_layer_numbers(model)
    resolved = resolve(config)
    resolved.check_model(model_config, len(numbers))
    device = torch.cuda.current_device() if torch.cuda.is_available() else torch.device("cpu")
    state = state_of(config, device)
    state.chunks += [unwrapped(chunk) for chunk in chunks(model)]
    alignment = Alignment(
        config=config,
        tasks=tuple(resolved.experts.tasks),
        layers=resolved.layers,
        expert_mask_GLE=resolved.experts.expert_mask.bool().to(device),
        pattern_GLE=resolved.experts.english_pattern[config.tokens].float().to(device),
        layer_weight=resolved.layer_weight,
        metrics=AlignmentMetrics.install(
            numbers, device, state.coefficient.now if config.scheduled else None
        ),
        state=state,
    )
    alignment.metrics.before_report = partial(refuse_unreached_anywhere, alignment)
    observe_routers(model)
    for chunk in chunks(model):
        local = {router.ramoe_layer for router in local_routers(chunk)}
        unwrapped(chunk).ramoe_alignment = alignment
        unwrapped(chunk).ramoe_layers = local & set(alignment.layers)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(alignment_block(resolved, numbers, model_config), flush=True)
    return model
