"""Routing steering of a forward-only model: raises the logits of the task experts at every token.

Shape suffixes: G tasks, L MoE layers, E experts, N scored sequences, B sequences of a micro-batch, S its
tokens on this rank.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.data.parallel import Example
from ramoe_megatron.mcore.offline.model import ContextMaker, MicroBatch, OfflineModel
from ramoe_megatron.mcore.offline.scoring import ContextFor
from ramoe_megatron.method.steering import Steering, steer, steering_noise


class Steer:
    """Raises the logits of each sequence's task experts, at all its tokens, in the chosen layers.

    Megatron's router then chooses the experts. Hard steering needs a router whose top-k are the largest
    logits; the jobs reject other routers (`refusals.refuse_hard_steering`).
    """

    def __init__(self, steering: Steering, mask_BLE: Tensor, noise_LE: Tensor) -> None:
        self.steering, self.mask_BLE, self.noise_LE = steering, mask_BLE, noise_LE

    def on_logits(self, router: Any, logits: Tensor) -> Tensor:
        layer, (first, last) = router.ramoe_layer, self.steering.layers
        if not first <= layer <= last:
            return logits
        return steer(
            self.steering.kind,
            logits,
            self.mask_BLE[None, :, layer],
            self.steering.strength or 0.0,
            self.noise_LE[layer],
        )

    def on_routing(self, router: Any, logits: Tensor, probs: Tensor, routing_map: Tensor) -> Tensor:
        return probs


def steering_contexts(
    model: OfflineModel, experts: ExpertFile, steering: Steering
) -> Callable[[Sequence[Example]], ContextFor]:
    """For `scoring.score`: a function that makes the steering contexts of scored examples.

    An example whose task is not in the expert file is not steered.
    """
    chosen_GLE = experts.steered_by(steering)
    # one more row, without experts, for all other tasks
    mask_GLE = torch.cat([chosen_GLE, torch.zeros_like(chosen_GLE[:1])]).to(model.device)
    noise_LE = steering_noise(*chosen_GLE.shape[1:]).to(model.device)
    row_of = {task: row for row, task in enumerate(experts.tasks)}

    def for_examples(examples: Sequence[Example]) -> ContextFor:
        rows = [row_of.get(example.task, len(row_of)) for example in examples]

        def context_for(places: Sequence[int]) -> ContextMaker:
            row_N = torch.tensor([rows[place] for place in places], device=model.device)

            def context(micro: MicroBatch) -> Steer:
                return Steer(steering, mask_GLE[row_N[micro.places.clamp(min=0)]], noise_LE)

            return context

        return context_for

    return for_examples
