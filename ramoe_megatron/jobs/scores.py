"""Scoring in shards: which examples a model answers correctly, for the jobs that keep the outcomes."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ramoe_megatron.data.parallel import Example
from ramoe_megatron.jobs.shards import SHARD_EXAMPLES, Shards
from ramoe_megatron.mcore.offline.scoring import ContextFor, Progress, score

if TYPE_CHECKING:
    from ramoe_megatron.mcore.offline.model import OfflineModel


def by_id(examples: Sequence[Example]) -> list[list[Example]]:
    """The examples in parts of `SHARD_EXAMPLES` ids, each with all its languages."""
    ids = list(dict.fromkeys(example.id for example in examples))
    part_of = {id_: number // SHARD_EXAMPLES for number, id_ in enumerate(ids)}
    parts: list[list[Example]] = [[] for _ in range(-(-len(ids) // SHARD_EXAMPLES))]
    for example in examples:
        parts[part_of[example.id]].append(example)
    return parts


def answers(examples: Sequence[Example]) -> int:
    """Sequences that scoring runs: one for each choice, or one that is generated."""
    return sum(len(example.choices or (example,)) for example in examples)


def score_parts(
    model: "OfflineModel",
    parts: Sequence[Sequence[Example]],
    limits: Sequence[int],
    shards: Shards,
    progress: Progress,
    contexts: Callable[[Sequence[Example]], ContextFor] | None = None,
) -> dict[tuple[str, str], bool]:
    """Whether each example is answered correctly, by (id, language), on every rank; the first shards are the
    parts, in order.

    Args:
        limits: new tokens of each example, in the order of the parts.
        contexts: the routing contexts of a part's examples (`steering_contexts`).

    The state gains "correct", uint8 by example in the order of the parts.
    """
    examples = [example for part in parts for example in part]
    correct: list[int] = shards.state["correct"].tolist() if shards.done else []
    if correct:
        progress(answers(examples[: len(correct)]))
    for number in range(shards.done, len(parts)):
        context_for = contexts(parts[number]) if contexts else None
        own = limits[len(correct) : len(correct) + len(parts[number])]
        correct += score(model, parts[number], own, context_for, progress)
        shards.save(number, {"correct": torch.tensor(correct, dtype=torch.uint8)})
    return {
        (example.id, example.language): bool(right) for example, right in zip(examples, correct, strict=True)
    }
