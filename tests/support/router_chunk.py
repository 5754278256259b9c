"""A model chunk with one router, and micro-batches, for the laws of alignment without ranks."""

import types
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from ramoe_megatron.mcore.align.attach import Alignment
from ramoe_megatron.mcore.align.batch import routing_batch
from ramoe_megatron.mcore.align.metrics import AlignmentMetrics
from ramoe_megatron.mcore.align.state import AlignmentState
from ramoe_megatron.mcore.arguments import RoutingAlignmentConfig

S, B, E, LAYERS = 6, 3, 4, 2


def alignment(**changes: Any) -> Alignment:
    config = RoutingAlignmentConfig(
        **({"coeff": 2.0, "experts": "e", "examples": "all", "tokens": "last"} | changes)
    )
    mask = torch.tensor([True, True, False, False]).expand(1, LAYERS, E)
    pattern = torch.tensor([0.5, 0.2, 0.2, 0.1]).expand(1, LAYERS, E)
    metrics, state = AlignmentMetrics(range(1, LAYERS + 1), "cpu"), AlignmentState(config, "cpu")
    equal = dict.fromkeys(range(LAYERS), 1.0)
    return Alignment(config, ("task",), tuple(range(LAYERS)), mask, pattern, equal, metrics, state)


def batch(prompt: list[int], weight: list[float]) -> dict[str, torch.Tensor]:
    return {
        "prompt_length": torch.tensor(prompt), "length": torch.full((B,), S), "loss_mask": torch.ones(B, S),
        "ramoe_weight": torch.tensor(weight), "ramoe_task": torch.zeros(B, dtype=torch.int64),
    }  # fmt: skip


class Chunk(torch.nn.Module):
    """A model chunk with one router to the two aligned layers."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.ramoe_alignment, self.ramoe_layers = alignment(**changes), {0}
        groups = {"tp_group": None, "cp_group": None, "tp_cp_group": None}
        config = types.SimpleNamespace(sequence_parallel=False)
        self.router = types.SimpleNamespace(
            **groups,
            config=config,
            score_function="softmax",
            ramoe_layer=0,
            training=True,
            calculate_per_token_loss=False,
        )

    def run(self, micro: dict[str, torch.Tensor], times: int = 1) -> torch.Tensor:
        """Router-logit gradient of one micro-batch, the model's own loss left out."""
        return self.gradient(micro, B, times=times)

    def gradient(
        self, micro: dict[str, torch.Tensor], samples: int, logits: torch.Tensor | None = None, times: int = 1
    ) -> torch.Tensor:
        """The same for any number of samples, or logits of one's own."""
        from ramoe_megatron.mcore.carrier import current

        MoEAuxLossAutoScaler.main_loss_backward_scale = None
        unlike = torch.linspace(0, 50, S * samples * E).sin().view(S, samples, E)  # no two tokens alike
        logits = (unlike if logits is None else logits).clone().requires_grad_()
        with routing_batch(self, micro):
            context = current()
            for _ in range(times if context else 0):
                self.router.training = self.training
                probs = context.on_routing(self.router, logits, logits.view(-1, E).softmax(-1), None)
                (probs.sum() * 0).backward()
        return torch.zeros_like(logits) if logits.grad is None else logits.grad
