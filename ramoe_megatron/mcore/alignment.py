"""Routing alignment on a built model (RA-MoE, arXiv 2605.28306; our reading): checked against it, and put on its routers.

Shape suffixes: G tasks, L MoE layers, E experts.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.arguments import RoutingAlignmentConfig
from ramoe_megatron.mcore.metrics import AlignmentMetrics
from ramoe_megatron.mcore.refusals import refuse_foreign_routers, refuse_unsupported
from ramoe_megatron.mcore.router import chunks, local_routers, moe_layer_numbers, observe_routers, unwrapped
from ramoe_megatron.mcore.startup import alignment_block
from ramoe_megatron.method.artefacts import ExpertFile
from ramoe_megatron.method.divergence import parse_layers


@dataclass(frozen=True)
class Alignment:
    """An alignment configuration resolved against a model."""

    config: RoutingAlignmentConfig
    tasks: tuple[str, ...]
    first: int
    last: int
    expert_mask_GLE: Tensor
    pattern_GLE: Tensor
    metrics: AlignmentMetrics

    @property
    def layers(self) -> range:
        """Aligned layers, 0-based among the MoE layers."""
        return range(self.first, self.last + 1)


def resolve_zone(config: RoutingAlignmentConfig, experts: ExpertFile) -> tuple[int, int]:
    """The aligned layers (first, last) inclusive, from `--ramoe-layers` and the expert file's own zone; RamoeError as `parse_layers`."""
    try:
        return parse_layers(config.layers, experts.shape.num_moe_layers, experts.zone)
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
    experts, (first, last) = fitting_experts(config, model_config, len(numbers))
    device = torch.cuda.current_device() if torch.cuda.is_available() else torch.device("cpu")
    alignment = Alignment(
        config=config,
        tasks=tuple(experts.tasks),
        first=first,
        last=last,
        expert_mask_GLE=experts.expert_mask.bool().to(device),
        pattern_GLE=experts.english_pattern[config.tokens].float().to(device),
        metrics=AlignmentMetrics.install(numbers, device),
    )
    observe_routers(model)
    for chunk in chunks(model):
        local = {router.ramoe_layer for router in local_routers(chunk)}
        unwrapped(chunk).ramoe_alignment, unwrapped(chunk).ramoe_layers = alignment, local & set(alignment.layers)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(alignment_block(alignment, numbers, model_config), flush=True)
    return model


def fitting_experts(config: RoutingAlignmentConfig, model_config: Any, num_moe_layers: int) -> tuple[ExpertFile, tuple[int, int]]:
    """The expert file of an alignment that is on, checked against the model's `TransformerConfig`, and the zone (first, last).

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
    first, last = resolve_zone(config, experts)
    if config.tokens not in experts.english_pattern:
        raise RamoeError(
            f"--ramoe-experts {config.experts}: no English pattern for --ramoe-tokens {config.tokens}, only for "
            f"{', '.join(experts.english_pattern)}; run `ramoe profile` again, or change the flag"
        )
    if config.divergence in ("lumped-kl", "mass") and not experts.expert_mask[:, first : last + 1].any():
        raise RamoeError(
            f"--ramoe-experts {config.experts}: no task has an expert in MoE layers {first}-{last}, so {config.divergence} aligns "
            "nothing; profile with a lower tau or with --ramoe-select top-m=M, or use --ramoe-divergence kl or js"
        )
    return experts, (first, last)


@contextlib.contextmanager
def _naming(flag: str) -> Iterator[None]:
    """Put the flag before what is told of its file."""
    try:
        yield
    except RamoeError as error:
        raise RamoeError(f"{flag} {error}") from error
