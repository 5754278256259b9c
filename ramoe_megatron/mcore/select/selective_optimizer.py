"""Megatron's optimizer for selective training, when a rank or the model has no trained weight of a kind.

Four assumptions of Megatron 0.19 fail in this case. They are fixed around Megatron's own functions:
- An optimizer without any weight (the dense weights, when only experts are trained) cannot give its state. It
  is left out.
- The state of a weight is saved as a piece of a tensor over all layers and experts, and all pieces must
  exist. Here each piece is saved as a separate tensor.
- The first rank saves the step, but it may have no weight that counts steps. Here the ranks exchange the
  step.
- The float32 copies of 16-bit weights are a list for each parameter group, and the first rank's empty list is
  saved for all ranks. Here the groups become a dictionary, and a rank does not save an empty group
  (Megatron's `LayerWiseDistributedOptimizer` does the same).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

MAIN_WEIGHTS = "fp32_from_fp16_params"
"""The key of the float32 copies in the state of Megatron's `Float16OptimizerWithFloat16Params`."""


def holding_to_selection(make: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's `get_megatron_optimizer` for a model with frozen weights."""

    def get_megatron_optimizer(*args: Any, **kwargs: Any) -> Any:
        optimizer = make(*args, **kwargs)
        # Megatron gives all ranks the same parameter groups, so a stub is a stub on every rank and no
        # collective waits for it.
        optimizer.chained_optimizers = [
            one for one in optimizer.chained_optimizers if not getattr(one, "is_stub_optimizer", False)
        ]
        sharded_state_dict = optimizer.sharded_state_dict
        for one in optimizer.chained_optimizers:
            one.load_state_dict = _taking_groups(one.load_state_dict)

        def with_steps(*args: Any, **kwargs: Any) -> Any:
            from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace

            step = _agreed_step(optimizer)
            for one in optimizer.chained_optimizers:
                if not _has_weights(one) and "gbuf_ranges" in vars(one):
                    one.state_dict = lambda one=one: _state_without_weights(one, step)
            state = sharded_state_dict(*args, **kwargs)
            parts = [state] if len(optimizer.chained_optimizers) == 1 else state.values()
            for one, part in zip(optimizer.chained_optimizers, parts, strict=True):
                _tell_step(
                    part,
                    step,
                    counted_by_weight=isinstance(one.optimizer, torch.optim.Adam | torch.optim.AdamW),
                )
                _name_groups(part)
            return dict_list_map_outplace(_by_itself, state)

        optimizer.sharded_state_dict = with_steps
        return optimizer

    get_megatron_optimizer.holds_to_selection = True  # type: ignore[attr-defined]
    return get_megatron_optimizer


def _has_weights(one: Any) -> bool:
    return any(group["params"] for group in one.optimizer.param_groups)


def _agreed_step(optimizer: Any) -> int | None:
    """Number of steps that the optimizer has taken; None before the first step. All ranks call it."""
    own = [
        int(step)
        for one in optimizer.chained_optimizers
        for holder in [
            *one.optimizer.state.values(),
            *(group for group in one.optimizer.param_groups if group["params"]),
        ]
        # torch's Adam keeps the step of each weight, transformer-engine's of each group
        if (step := holder.get("step")) is not None
    ]
    steps: list[int | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(steps, max(own, default=None))
    return max((step for step in steps if step is not None), default=None)


def _state_without_weights(one: Any, step: int | None) -> dict[str, Any]:
    """`DistributedOptimizer.state_dict` for a rank without weights; Megatron's reads the step of a weight."""
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in one.optimizer.state_dict()["param_groups"]
    ]
    state: dict[str, Any] = {"optimizer": {"param_groups": [group | {"step": step or 0} for group in groups]}}
    return state | ({"grad_scaler": one.grad_scaler.state_dict()} if one.grad_scaler else {})


def _tell_step(part: dict[str, Any], step: int | None, counted_by_weight: bool) -> None:
    """Add the step to the part of the state that the first rank saves for all ranks."""
    inner = part.get("optimizer", part)
    # In the distributed optimizer's usual format, which is no dictionary, each rank saves its own step.
    if step is None or not isinstance(inner, dict):
        return
    if not counted_by_weight:
        for group in inner["param_groups"]:
            group.setdefault("step", step)
    elif "state" in inner:
        inner["state"].setdefault("common_step", torch.tensor(float(step)))


def _name_groups(part: dict[str, Any]) -> None:
    """Number the groups of float32 copies in a dictionary. An empty group is neither saved nor loaded."""
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject

    if MAIN_WEIGHTS in part:
        part[MAIN_WEIGHTS] = {
            number: group or LocalNonpersistentObject(group)
            for number, group in enumerate(part[MAIN_WEIGHTS])
        }


def _taking_groups(load_state_dict: Callable[[Any], None]) -> Callable[[Any], None]:
    """A `load_state_dict` that turns the dictionary of `_name_groups` back into Megatron's list."""

    def load(state: Any) -> None:
        groups = state.get(MAIN_WEIGHTS)
        if isinstance(groups, dict):
            state = state | {MAIN_WEIGHTS: [groups[number] for number in sorted(groups)]}
        load_state_dict(state)

    return load


def _by_itself(entry: Any) -> Any:
    """Turn a piece of a tensor over layers and experts into a separate tensor, named by its index.

    Any other entry is returned unchanged.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    if isinstance(entry, ShardedTensorFactory):
        from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace

        build = entry.build_fn
        return replace(entry, build_fn=lambda *args: dict_list_map_outplace(_by_itself, build(*args)))
    if not isinstance(entry, ShardedTensor) or not entry.prepend_axis_num:
        return entry
    axes = entry.prepend_axis_num
    place = ".".join(str(offset) for offset in entry.global_offset[:axes])
    return replace(
        entry,
        key=f"{entry.key}.{place}",
        global_shape=entry.global_shape[axes:],
        global_offset=entry.global_offset[axes:],
        axis_fragmentations=entry.axis_fragmentations[axes:],
        prepend_axis_num=0,
    )
