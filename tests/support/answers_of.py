"""Greedy answers and log-likelihoods of a model with its cache and shared prompts, and with neither."""

from typing import Any

import torch

from ramoe_megatron.data.encode import Encoded
from ramoe_megatron.data.stops import UNFINISHED, StopStrings
from ramoe_megatron.method.steering import Steering, steering_noise

PROMPTS = (5, 23, 3, 11, 11, 17, 8)
"""Lengths: more than one group, unequal numbers of rows on the ranks, beyond the window of GPT-OSS."""
NEW = (7, 5, 9, 2, 7, 1, 6)
CHOICES = ((1, 1, 1, 1), (3, 1), (2, 2, 5), (4,))
"""Tokens of the choices of the first prompts, with their end token."""


def prompts(vocabulary: int = 250) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in PROMPTS]


def choices(vocabulary: int = 250) -> list[list[Encoded]]:
    generator = torch.Generator().manual_seed(3)
    return [
        [
            Encoded([*ids, *torch.randint(3, vocabulary, (length,), generator=generator).tolist()], len(ids))
            for length in lengths
        ]
        for ids, lengths in zip(prompts(), CHOICES, strict=False)
    ]


def answers_of(model: Any) -> dict[str, Any]:
    """By kind of routing: the answers of `greedy`, and the log-likelihoods of all choices, in both ways."""
    from ramoe_megatron.mcore.offline.generation import greedy
    from ramoe_megatron.mcore.offline.scoring import log_likelihoods

    found: dict[str, Any] = {"rows": model.has_rows, "experts": experts_agree(model)}
    ends = [[] for _ in NEW]
    free = greedy(model, prompts(), NEW, stops=ends, cached=False)
    # stops that do occur, so that sequences leave their batch at different times
    stops = [[max(ids, key=ids.index)] if place % 2 else [] for place, ids in enumerate(free)]
    strings = [model.tokenizer.detokenize(ids[len(ids) // 2 :][:2]).strip() for ids in free]
    strings = ["" if UNFINISHED in string else string for string in strings]
    until = [StopStrings((string,)) if string else None for string in strings]
    found["free"], found["strings"] = free, strings
    found["until"] = greedy(model, prompts(), NEW, stops=ends, until=until)
    flat = [choice for group in choices() for choice in group]
    owners = [place for place, group in enumerate(choices()) for _ in group]
    for name, context in contexts(model).items():
        found[f"{name}-cached"] = greedy(model, prompts(), NEW, context, stops=stops)
        found[f"{name}-whole"] = greedy(model, prompts(), NEW, context, stops=stops, cached=False)
        of_owner = context and (lambda micro, context=context: context(owned(micro, owners)))
        found[f"{name}-shared"] = log_likelihoods(model, flat, of_owner, owners=owners).tolist()
        found[f"{name}-apart"] = log_likelihoods(model, flat, of_owner, owners=range(len(flat))).tolist()
    return found


def experts_agree(model: Any) -> list[bool]:
    """Whether each layer's experts compute the same bits as Megatron's own forward pass, which trains."""
    from megatron.core.transformer.moe.experts import SequentialMLP

    agree = []
    for module in (module for chunk in model.chunks for module in chunk.modules()):
        if isinstance(module, SequentialMLP):
            counts = torch.arange(module.num_local_experts) % 3
            states, probs = (
                torch.randn(int(counts.sum()), model.config.hidden_size),
                torch.rand(int(counts.sum())),
            )
            with torch.no_grad():
                once, _ = module(states, counts, probs)
                module.train()
                stock, _ = module(states, counts, probs)
                module.eval()
            agree.append(torch.equal(once, stock))
    return agree


def owned(micro: Any, owners: list[int]) -> Any:
    from ramoe_megatron.mcore.offline.model import MicroBatch

    owner = torch.tensor(owners, device=micro.places.device)
    return MicroBatch(micro.batch, owner[micro.places.clamp(min=0)])


def contexts(model: Any) -> dict[str, Any]:
    """Makers of routing contexts: none, steering at every token, other routing at the last prompt token."""
    from ramoe_megatron.mcore.offline.routing import Transplant
    from ramoe_megatron.mcore.steer.contexts import Steer

    shape = len(PROMPTS), model.shape.num_moe_layers, model.shape.num_experts
    generator = torch.Generator().manual_seed(4)
    mask_NLE = torch.rand(shape, generator=generator) < 0.3
    logits_NLE = 3 * torch.randn(shape, generator=generator)
    steering = Steering("soft", 1.5, None, (0, shape[1] - 1))

    def steered(micro: Any) -> Steer:
        return Steer(steering, mask_NLE[micro.places.clamp(min=0)], steering_noise(*shape[1:]))

    return {
        "plain": None,
        "steered": steered,
        "transplant": lambda micro: Transplant(micro, logits_NLE, range(shape[1])),
    }
