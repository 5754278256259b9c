"""Megatron's distributed optimizer with torch's Adam, the only Adam that runs on a CPU.

Three assumptions of Megatron 0.19 fail there, so no run with `--use-distributed-optimizer` could resume:
- `state_dict` reads the optimizer's step. There is no step before the first step, which is when a checkpoint
  is loaded, and none on a rank without weights.
- `load_state_dict` gives all weights the same step tensor, and torch's Adam increments it once for each
  weight. The tensor has the value from before loading; the saved step is in the parameter groups.
- `load_state_dict` writes into float32 weights, which autograd forbids outside `no_grad`.

Remove when a float32 run on a CPU resumes with `--use-distributed-optimizer` by itself.
"""

from typing import Any

import torch


def optimizer_stand_ins() -> list[tuple[Any, str, Any]]:
    """(owner, attribute, stand-in), for the CPU backend."""
    from megatron.core.optimizer import distrib_optimizer

    optimizer = distrib_optimizer.DistributedOptimizer
    state_dict, load_state_dict = optimizer.state_dict, optimizer.load_state_dict

    def state_with_step(self: Any) -> dict[str, Any]:
        if self.optimizer.state:
            return state_dict(self)
        before = distrib_optimizer.HAVE_APEX_OR_TE
        distrib_optimizer.HAVE_APEX_OR_TE = True  # then it does not read the step
        try:
            state = state_dict(self)
        finally:
            distrib_optimizer.HAVE_APEX_OR_TE = before
        for group in state["optimizer"]["param_groups"]:
            group["step"] = 0
        return state

    def load_own_steps(self: Any, state: dict[str, Any]) -> None:
        with torch.no_grad():
            load_state_dict(self, state)
        for group in self.optimizer.param_groups:
            for weight in group["params"]:
                self.optimizer.state[weight]["step"] = torch.tensor(float(group["step"]))

    return [(optimizer, "state_dict", state_with_step), (optimizer, "load_state_dict", load_own_steps)]
