"""`resolve`: reads and checks the files of an alignment once, for the labels, the model and the selection.

Shape suffixes: G tasks, L MoE layers, E experts.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.records import read_divergence
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.align.options import RoutingAlignmentConfig
from ramoe_megatron.method.divergence import mean_curve
from ramoe_megatron.method.experts import random_experts
from ramoe_megatron.method.layer_weights import divergence_weights
from ramoe_megatron.method.layers import chosen_layers, span


@dataclass(frozen=True, eq=False)
class ResolvedAlignment:
    """An alignment that is on, with its expert file, its layers and their weights."""

    config: RoutingAlignmentConfig
    experts: ExpertFile
    """The expert file, with the task experts that the flags choose: stored, re-selected or random."""
    layers: tuple[int, ...]
    """Aligned layers, 0-based among the MoE layers, ascending."""
    layer_weight: Mapping[int, float]
    """Weight of each aligned layer, mean 1."""

    def check_model(self, model_config: Any, num_moe_layers: int) -> None:
        """Raise RamoeError if the expert file does not belong to the model of this `TransformerConfig`."""
        with _naming("--ramoe-experts"):
            self.experts.check_model(
                num_moe_layers=num_moe_layers,
                num_experts=model_config.num_moe_experts,
                topk=model_config.moe_router_topk,
                score_function=model_config.moe_router_score_function,
            )


def resolve(config: RoutingAlignmentConfig) -> ResolvedAlignment:
    """Read and check the files of an alignment that is on. Files are read again only if they change on disk.

    Raises:
        RamoeError: a file cannot be read; the layers do not exist or there is no zone; the file has no
            English pattern for the tokens; no task has an expert in the aligned layers; or the curve of
            `--ramoe-layer-weights` is flat or does not fit the model.
    """
    return _resolved(config, *(_stamp(path) for path in (config.experts, config.layer_weights)))


@functools.lru_cache(maxsize=1)
def _resolved(config: RoutingAlignmentConfig, *stamps: tuple[int, int] | None) -> ResolvedAlignment:
    assert config.experts is not None  # the configuration rejects a coefficient without an expert file
    with _naming("--ramoe-experts"):
        experts = ExpertFile.load(config.experts)
    experts = experts.chosen_by(config.select)
    layers = _layers(config, experts)
    if config.random_experts is not None:
        mask_GLE = random_experts(experts.expert_mask, config.random_experts)
        experts = dataclasses.replace(experts, expert_mask=mask_GLE)
    if config.tokens not in experts.english_pattern:
        raise RamoeError(
            f"--ramoe-experts {config.experts}: no English pattern for --ramoe-tokens {config.tokens}, "
            f"only for {', '.join(experts.english_pattern)}; run `ramoe profile` again, or change the flag"
        )
    if config.divergence in ("lumped-kl", "mass") and not experts.expert_mask[:, list(layers)].any():
        raise RamoeError(
            f"--ramoe-experts {config.experts}: no task has an expert in MoE layers {span(layers)}, "
            f"so {config.divergence} aligns nothing; use a lower tau or top-m=M (--ramoe-select), "
            "or --ramoe-divergence kl or js"
        )
    return ResolvedAlignment(
        config, experts, layers, _layer_weight(config, layers, experts.shape.num_moe_layers)
    )


def _layers(config: RoutingAlignmentConfig, experts: ExpertFile) -> tuple[int, ...]:
    try:
        return chosen_layers(config.layers, experts.shape.num_moe_layers, experts.zone)
    except RamoeError as error:
        raise RamoeError(f"--ramoe-layers {config.layers}: {str(error).removeprefix('layers: ')}") from error


def _layer_weight(
    config: RoutingAlignmentConfig, layers: tuple[int, ...], num_moe_layers: int
) -> dict[int, float]:
    """The weight of each aligned layer: 1, or from the divergence curve of `--ramoe-layer-weights`."""
    if config.layer_weights is None:
        return dict.fromkeys(layers, 1.0)
    with _naming("--ramoe-layer-weights"):
        curve_L = mean_curve(read_divergence(config.layer_weights))
        if len(curve_L) != num_moe_layers:
            raise RamoeError(
                f"{config.layer_weights}: the curve has {len(curve_L)} MoE layers, "
                f"but the model has {num_moe_layers}"
            )
        return dict(zip(layers, divergence_weights(curve_L, layers).tolist(), strict=True))


def _stamp(path: str | None) -> tuple[int, int] | None:
    """Modification time and size of a file, to notice a change; None without a file."""
    if path is None or not Path(path).is_file():
        return None
    found = Path(path).stat()
    return found.st_mtime_ns, found.st_size


@contextlib.contextmanager
def _naming(flag: str) -> Iterator[None]:
    """Put the name of the flag before an error about its file."""
    try:
        yield
    except RamoeError as error:
        raise RamoeError(f"{flag} {error}") from error
