"""Selective training on a built model: freezes all weights that are not selected.

The weights are frozen before Megatron makes gradient buffers and optimizers. They stay bit-for-bit, because
weight decay, clipping and the distributed optimizer never see them.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.align.startup import count_range, numbers_in_words
from ramoe_megatron.mcore.router import chunks, moe_layer_numbers, unwrapped
from ramoe_megatron.mcore.select.selective_optimizer import holding_to_selection
from ramoe_megatron.mcore.select.trained import Selection, selection_from_args
from ramoe_megatron.mcore.train.datasets import inputs_of


def train_selected(args: Any, model_config: Any) -> None:
    """Make `pretrain()` build a model and an optimizer that train only what `--ramoe-train` selects.

    Args:
        args: Megatron's parsed arguments with ours.
        model_config: a `GPTModelConfig` or `HybridModelConfig`, not yet built.

    Raises:
        RamoeError: as `selection_from_args`.
    """
    hold_to(selection_from_args(args, model_config.transformer, inputs_of(args).languages), model_config)


def hold_to(selection: Selection | None, model_config: Any) -> None:
    """The part of `train_selected` after the selection is made. None trains all weights."""
    from megatron.training import training

    if selection is not None:
        model_config.pre_wrap_hooks.append(partial(select_trainable, selection=selection))
        training.get_megatron_optimizer = holding_to_selection(training.get_megatron_optimizer)


def select_trainable(model: Any, selection: Selection) -> Any:
    """Freeze all weights of a built model that are not selected.

    It runs as one of the `pre_wrap_hooks` of a model configuration, before DDP wraps the model. The expert
    bias of a frozen router (`--moe-router-enable-expert-bias`) and multi-token prediction layers are frozen
    too.

    Args:
        model: the list of model chunks of this rank, not wrapped.
        selection: the trained weights.

    Returns:
        `model`.

    Raises:
        RamoeError: the model has another number of MoE layers than the selection.
    """
    from megatron.core.transformer.moe.router import TopKRouter

    numbers = moe_layer_numbers(model)
    if len(numbers) != len(selection.experts_LE):
        raise RamoeError(
            f"the model has {len(numbers)} MoE layers, but experts were selected for "
            f"{len(selection.experts_LE)}"
        )
    total, trained = 0, 0
    for chunk in chunks(model):
        chunk.requires_grad_(False)
        for module in chunk.modules():
            if isinstance(module, TopKRouter):
                module.frozen_expert_bias = not (selection.routers and not module.is_mtp_layer)
        for parameter in _selected(chunk, selection, numbers):
            parameter.requires_grad_(True)
        _have_inputs_require_grad(unwrapped(chunk))
    for parameter, share in _counted(model):
        total += share
        trained += share * parameter.requires_grad
    _tell(selection, numbers, trained, total)
    return model


def _selected(chunk: Any, selection: Selection, numbers: list[int]) -> Iterator[torch.nn.Parameter]:
    from megatron.core.transformer.moe.moe_layer import BaseMoELayer

    for layer in chunk.modules():
        if not isinstance(layer, BaseMoELayer) or layer.router.is_mtp_layer:
            continue
        if selection.routers:
            yield from layer.router.parameters()
        chosen_E = selection.experts_LE[numbers.index(layer.layer_number)]
        local = chosen_E[layer.local_expert_indices].tolist()
        if all(local):
            yield from layer.experts.parameters()
        elif any(local):
            for expert, on in zip(layer.experts.local_experts, local, strict=True):
                if on:
                    yield from expert.parameters()


def _have_inputs_require_grad(chunk: Any) -> None:
    """Make the first layer's input require a gradient when the embedding is frozen.

    A recomputed layer is an autograd function of its input only, so otherwise its weights would get no
    gradient. And of two expert-parallel ranks only the rank with trained experts would enter the backward
    all-to-all.
    """
    if not getattr(chunk, "pre_process", False):
        return  # the input comes from another stage and already requires a gradient

    def require_grad(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if module.training and torch.is_grad_enabled() and not hidden.requires_grad:
            hidden.requires_grad_(True)

    chunk.decoder.register_forward_pre_hook(require_grad, with_kwargs=True)


def _counted(model: Any) -> Iterator[tuple[torch.nn.Parameter, int]]:
    """This rank's parameters, each with the number of elements that this rank counts.

    Of the ranks that have the same weights, only one counts them.
    """
    from megatron.core import parallel_state
    from megatron.core.transformer.module import param_is_not_shared

    for chunk in chunks(model):
        for parameter in chunk.parameters():
            expert = not getattr(parameter, "allreduce", True)
            if expert:
                copy = parallel_state.get_expert_data_parallel_rank()
                tp_rank = parallel_state.get_expert_tensor_parallel_rank()
            else:
                copy = parallel_state.get_data_parallel_rank(with_context_parallel=True)
                tp_rank = parallel_state.get_tensor_model_parallel_rank()
            split = getattr(parameter, "tensor_model_parallel", False)
            counts = copy == 0 and (split or tp_rank == 0) and param_is_not_shared(parameter)
            yield parameter, parameter.numel() if counts else 0


def _tell(selection: Selection, numbers: list[int], trained: int, total: int) -> None:
    distributed = torch.distributed.is_initialized()
    if distributed:
        device = torch.cuda.current_device() if torch.cuda.is_available() else torch.device("cpu")
        sums = torch.tensor([trained, total], dtype=torch.int64, device=device)
        torch.distributed.all_reduce(sums)
        trained, total = sums.tolist()
    if not distributed or torch.distributed.get_rank() == 0:
        print(_selection_block(selection, numbers, trained, total), flush=True)


def _selection_block(selection: Selection, layer_numbers: Sequence[int], trained: int, total: int) -> str:
    """The startup message of a selective run. Parameters of the whole model are counted once each.

    Args:
        layer_numbers: Megatron's layer number (1-based) of each MoE layer of the whole model.
    """
    rows = [
        ("trained", f"{selection.kind}: {selection.told}"),
        ("parameters", f"{trained} of {total} ({trained / max(total, 1):.2%})"),
    ]
    if not selection.routers:
        counts, experts = selection.experts_LE.sum(-1).tolist(), selection.experts_LE.shape[-1]
        empty = [layer for layer, count in enumerate(counts) if count == 0]
        spread = f"{sum(counts)} in all, {count_range(counts)} of {experts} a layer"
        rows.append(
            ("experts", spread + (f"; none in MoE layers {numbers_in_words(empty)}" if empty else ""))
        )
        listed = ", ".join(f"{layer}: {count}" for layer, count in enumerate(counts))
        rows.append(
            ("by layer", f"{listed} (MoE layers, from 0; Megatron's {numbers_in_words(layer_numbers)})")
        )
    frozen = "everything else, bit-for-bit" + (
        "" if selection.routers else "; routers are frozen with their expert bias"
    )
    rows.append(("frozen", frozen))
    width = max(len(name) for name, _ in rows)
    return "\n".join(
        ["ramoe: selective training is on", *(f"  {name:<{width}}  {text}" for name, text in rows)]
    )
