"""Resolves which weights a run trains before a model is built, and rejects unsupported settings.

Shape suffixes: L MoE layers, E routed experts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.usage import UsageFile
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.align.options import RoutingAlignmentConfig
from ramoe_megatron.mcore.align.resolve import resolve
from ramoe_megatron.mcore.arguments import DataOptions
from ramoe_megatron.mcore.flags import options_from_args
from ramoe_megatron.mcore.router import configured_moe_layer_numbers
from ramoe_megatron.mcore.select.selective_options import SelectiveOptions
from ramoe_megatron.method.selection import esft, rise


@dataclass(frozen=True)
class Selection:
    """The trained weights: all routers, or some of the routed experts. All other weights are frozen."""

    kind: str
    """The value of --ramoe-train."""
    routers: bool
    experts_LE: Tensor
    """Trained experts of each MoE layer (from 0). bool"""
    told: str
    """How the weights were chosen, in words."""


def selection_from_args(args: Any, config: Any, languages: Sequence[str]) -> Selection | None:
    """The selection from the flags; None if all weights are trained.

    Args:
        args: parsed arguments of the finetune job.
        config: the model's `TransformerConfig`.
        languages: the languages of the training examples.

    Raises:
        RamoeError: a file is missing, belongs to another model or lacks a language; the budget is larger than
            the model; nothing would be trained; the alignment loss would not reach any trained weight; or the
            run has a setting that does not work with selective training.
    """
    options = options_from_args(SelectiveOptions, args)
    if options.train == "all":
        return None
    layers = (
        len(configured_moe_layer_numbers(config, args.hybrid_layer_pattern)) if config.num_moe_experts else 0
    )
    if not layers:
        raise RamoeError(f"--ramoe-train {options.train}: the model has no MoE layer; remove the flag")
    alignment = RoutingAlignmentConfig.from_args(args)
    selection = select_weights(
        options, alignment, config, layers, languages, options_from_args(DataOptions, args).anchor
    )
    _refuse_unsupported(selection, args, config)
    refuse_partial_groups(selection, config)
    refuse_unreached(selection, alignment)
    return selection


def select_weights(
    options: SelectiveOptions,
    alignment: RoutingAlignmentConfig,
    config: Any,
    layers: int,
    languages: Sequence[str],
    anchor: str,
) -> Selection:
    """The selection itself; see `selection_from_args`."""
    none_LE = torch.zeros(layers, config.num_moe_experts, dtype=torch.bool)
    shape = (layers, config.num_moe_experts, config.moe_router_topk, config.moe_router_score_function)
    kind = options.train
    if kind == "routers":
        return Selection(kind, True, none_LE, "every router, and nothing else")
    if kind == "task-experts":
        if alignment.experts is None:
            raise RamoeError(
                "--ramoe-train task-experts without --ramoe-experts: the task experts are in "
                "experts.safetensors; run `ramoe profile`"
            )
        experts = ExpertFile.load(alignment.experts)
        experts.check_model(*shape)
        experts = experts.chosen_by(alignment.select)
        return _not_empty(
            Selection(kind, False, experts.expert_mask.any(0), f"of the tasks {', '.join(experts.tasks)}")
        )
    assert options.usage is not None  # the options require it
    usage = UsageFile.load(options.usage)
    usage.check_model(*shape)
    usage.places(languages)
    if kind == "rise":
        targets = [language for language in languages if language != anchor]
        if not targets:
            raise RamoeError(
                f"--ramoe-train rise: all training examples are in {anchor}; expected a target language: "
                "add data in one"
            )
        if options.train_budget is not None and options.train_budget > none_LE.numel():
            raise RamoeError(
                f"--ramoe-train-budget {options.train_budget}: the model has {none_LE.numel()} (layer, "
                f"expert) pairs ({layers} MoE layers x {config.num_moe_experts} experts); "
                "give at most this number"
            )
        mask_LE = rise(usage.frequency, usage.places(targets), options.train_budget or 0, options.train_split)
        return Selection(
            kind, False, mask_LE, f"for {', '.join(targets)}, of {options.train_budget} (layer, expert) pairs"
        )
    score, told = ("gate", "gate weight") if kind == "esft-gate" else ("frequency", "tokens")
    mask_LE = esft(usage.mean(score, languages), options.train_top_p or 0.0)
    told = f"for {', '.join(languages)}, {options.train_top_p:g} of the {told} of each layer"
    return _not_empty(Selection(kind, False, mask_LE, told))


def _not_empty(selection: Selection) -> Selection:
    if not selection.experts_LE.any():
        raise RamoeError(
            f"--ramoe-train {selection.kind}: no expert is chosen, so nothing would be trained; "
            "use a lower tau or top-m=M (--ramoe-select), or another --ramoe-train"
        )
    return selection


def refuse_unreached(selection: Selection, alignment: RoutingAlignmentConfig) -> None:
    """Raise RamoeError if alignment is on and no trained weight can change the routing of an aligned layer.

    Experts change the routing of later layers only.
    """
    if alignment.coeff == 0 or selection.routers:
        return
    last = resolve(alignment).layers[-1]
    if not selection.experts_LE[:last].any():
        raise RamoeError(
            f"--ramoe-train {selection.kind} with --ramoe-coeff {alignment.coeff:g}: "
            f"no trained expert is below the last aligned MoE layer {last}, "
            "so the alignment loss changes nothing; align later layers, train other weights, "
            "or set --ramoe-coeff 0"
        )


def refuse_partial_groups(selection: Selection, config: Any) -> None:
    """Raise RamoeError if only some grouped experts (`--moe-grouped-gemm`) of a rank and layer are trained.

    transformer-engine's GroupedLinear computes the gradients of all weights of a group or of none, depending
    on the first weight (from its source, 2.20; not run here). So trained weights would silently not be
    trained, or frozen weights without a gradient buffer would get a gradient.
    """
    ranks = config.expert_model_parallel_size
    on_rank = selection.experts_LE.view(len(selection.experts_LE), ranks, -1)
    partial = (on_rank.any(-1) & ~on_rank.all(-1)).any(-1).nonzero()[:, 0].tolist()
    if config.moe_grouped_gemm and partial:
        raise RamoeError(
            f"--moe-grouped-gemm with --ramoe-train {selection.kind}: "
            "transformer-engine computes the weight gradients of all grouped experts of a layer or of none, "
            f"but in {len(partial)} MoE layers (first {partial[0]}) only some experts of a rank are trained; "
            "remove --moe-grouped-gemm (the checkpoint loads without it)"
        )


def _refuse_unsupported(selection: Selection, args: Any, config: Any) -> None:
    found = [f"{flag} ({reason})" for flag, reason, on in _unsupported(selection, args, config) if on]
    if found:
        raise RamoeError(
            f"--ramoe-train {selection.kind} does not work with {'; '.join(found)}. "
            "Remove the flag, or train all weights"
        )


def _unsupported(selection: Selection, args: Any, config: Any) -> Iterator[tuple[str, str, bool]]:
    kinds = config.moe_router_load_balancing_type
    quantile = "quantile_balancing" in ([kinds] if isinstance(kinds, str) else kinds)
    yield (
        "--moe-router-load-balancing-type quantile_balancing",
        "it changes the biases of frozen routers",
        quantile and not selection.routers,
    )
    for flag in (
        "use_megatron_fsdp",
        "use_torch_fsdp2",
        "overlap_param_gather_with_optimizer_step",
        "optimizer_cpu_offload",
    ):
        reason = "it needs trained weights on every rank"
        yield f"--{flag.replace('_', '-')}", reason, bool(getattr(args, flag, False))
    yield (
        "--delay-wgrad-compute",
        "frozen weights have no gradient to delay",
        bool(getattr(config, "delay_wgrad_compute", False)),
    )
    yield (
        "--freeze-all-layers",
        "it also freezes the selected weights",
        bool(getattr(args, "freeze_all_layers", False)),
    )
    yield (
        f"--optimizer {args.optimizer}",
        "only adam and sgd are known to skip frozen weights",
        args.optimizer not in ("adam", "sgd"),
    )
