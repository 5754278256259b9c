"""Routing alignment on a built model (RA-MoE, arXiv 2605.28306; our reading): checked against it, and put on its routers.

Shape suffixes: G tasks, L MoE layers, E experts.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ramoe_megatron.artifacts.tables import ExpertFile, read_divergence
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.align.metrics import AlignmentMetrics
from ramoe_megatron.mcore.align.options import RoutingAlignmentConfig
from ramoe_megatron.mcore.align.refusals import refuse_foreign_routers, refuse_unsupported
from ramoe_megatron.mcore.align.startup import alignment_block
from ramoe_megatron.mcore.router import chunks, local_routers, moe_layer_numbers, observe_routers, unwrapped
from ramoe_megatron.mcore.train.coefficient import Coefficient
from ramoe_megatron.method.divergence import mean_curve
from ramoe_megatron.method.experts import random_experts
from ramoe_megatron.method.layer_weights import divergence_weights
from ramoe_megatron.method.layers import chosen_layers, span


@dataclass(frozen=True)
class Alignment:
    """An alignment configuration resolved against a model."""

    config: RoutingAlignmentConfig
    tasks: tuple[str, ...]
    layers: tuple[int, ...]
    """Aligned layers, 0-based among the MoE layers, ascending."""
    expert_mask_GLE: Tensor
    pattern_GLE: Tensor
    metrics: AlignmentMetrics
    layer_weight: Mapping[int, float]
    """Weight of each aligned layer, mean 1."""
    coefficient: Coefficient


def resolve_layers(config: RoutingAlignmentConfig, experts: ExpertFile) -> tuple[int, ...]:
    """The aligned layers, from `--ramoe-layers` and the expert file's own zone; RamoeError as `chosen_layers`."""
    try:
        return chosen_layers(config.layers, experts.shape.num_moe_layers, experts.zone)
    except RamoeError as error:
        raise RamoeError(f"--ramoe-layers {config.layers}: {str(error).removeprefix('layers: ')}") from error


def attach(model: Any, config: RoutingAlignmentConfig) -> Any:
    """Add routing alignment to a built Megatron model, before or after it is wrapped.

    Args:
        model: a `GPTModel` or `HybridModel`, a wrapped one, or the list of model chunks of this rank.
        config: the alignment; with coefficient 0 the model is left as it is.

    Returns:
        `model`, so that `attach` can serve as one of a model configuration's `pre_wrap_hooks`.

    Raises:
        RamoeError: the expert file belongs to another model, the zone holds no layer of it, or the model's configuration has a
            setting under which alignment is not defined (`refusals`).
    """
    if config.coeff == 0:
        return model
    model_config = unwrapped(next(iter(chunks(model)))).config
    refuse_unsupported(model_config)
    refuse_foreign_routers(chunks(model))
    numbers = moe_layer_numbers(model)
    experts, layers = fitting_experts(config, model_config, len(numbers))
    device = torch.cuda.current_device() if torch.cuda.is_available() else torch.device("cpu")
    coefficient = Coefficient(config)
    alignment = Alignment(
        config=config,
        tasks=tuple(experts.tasks),
        layers=layers,
        expert_mask_GLE=experts.expert_mask.bool().to(device),
        pattern_GLE=experts.english_pattern[config.tokens].float().to(device),
        metrics=AlignmentMetrics.install(numbers, device, coefficient),
        layer_weight=layer_weights(config, layers, len(numbers)),
        coefficient=coefficient,
    )
    alignment.metrics.chunks = [unwrapped(chunk) for chunk in chunks(model)]
    observe_routers(model)
    for chunk in chunks(model):
        local = {router.ramoe_layer for router in local_routers(chunk)}
        unwrapped(chunk).ramoe_alignment, unwrapped(chunk).ramoe_layers = alignment, local & set(alignment.layers)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(alignment_block(alignment, numbers, model_config), flush=True)
    return model


def fitting_experts(config: RoutingAlignmentConfig, model_config: Any, num_moe_layers: int) -> tuple[ExpertFile, tuple[int, ...]]:
    """The expert file of an alignment that is on, checked against the model's `TransformerConfig`, and the aligned layers.

    Under `--ramoe-select` its experts are chosen anew, under `--ramoe-random-experts` they are random ones, as many.

    Raises:
        RamoeError: as `attach`, for what concerns the file.
    """
    assert config.experts is not None  # the configuration refuses a coefficient without it
    with _naming("--ramoe-experts"):
        experts = ExpertFile.load(config.experts)
        experts.check_model(
            num_moe_layers=num_moe_layers,
            num_experts=model_config.num_moe_experts,
            topk=model_config.moe_router_topk,
            score_function=model_config.moe_router_score_function,
        )
    experts = experts.chosen_by(config.select)
    layers = resolve_layers(config, experts)
    if config.random_experts is not None:
        experts = dataclasses.replace(experts, expert_mask=random_experts(experts.expert_mask, config.random_experts))
    if config.tokens not in experts.english_pattern:
        raise RamoeError(
            f"--ramoe-experts {config.experts}: no English pattern for --ramoe-tokens {config.tokens}, only for "
            f"{', '.join(experts.english_pattern)}; run `ramoe profile` again, or change the flag"
        )
    if config.divergence in ("lumped-kl", "mass") and not experts.expert_mask[:, list(layers)].any():
        raise RamoeError(
            f"--ramoe-experts {config.experts}: no task has an expert in MoE layers {span(layers)}, so {config.divergence} aligns "
            "nothing; give a lower tau or top-m=M (--ramoe-select), or use --ramoe-divergence kl or js"
        )
    return experts, layers


def layer_weights(config: RoutingAlignmentConfig, layers: tuple[int, ...], num_moe_layers: int) -> dict[int, float]:
    """Weight of each aligned layer: 1, or by the divergence curve of `--ramoe-layer-weights`.

    Raises:
        RamoeError: the curve cannot be read, belongs to another model, or has no shape to weigh by.
    """
    if config.layer_weights is None:
        return dict.fromkeys(layers, 1.0)
    with _naming("--ramoe-layer-weights"):
        curve_L = mean_curve(read_divergence(config.layer_weights))
        if len(curve_L) != num_moe_layers:
            raise RamoeError(f"{config.layer_weights}: a curve over {len(curve_L)} MoE layers, but the model has {num_moe_layers}")
        return dict(zip(layers, divergence_weights(curve_L, layers).tolist(), strict=True))


@contextlib.contextmanager
def _naming(flag: str) -> Iterator[None]:
    """Put the flag before what is told of its file."""
    try:
        yield
    except RamoeError as error:
        raise RamoeError(f"{flag} {error}") from error
