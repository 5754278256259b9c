"""Scoring in shards, for the jobs that record which examples a model answers correctly."""

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ramoe_megatron.data.parallel import Example
from ramoe_megatron.jobs.shards import SHARD_EXAMPLES, Shards
from ramoe_megatron.mcore.offline.scoring import ContextFor, OnProgress, score

if TYPE_CHECKING:
    from ramoe_megatron.mcore.offline.model import OfflineModel


def by_id(examples: Sequence[Example]) -> list[list[Example]]:
    """The examples in parts of `SHARD_EXAMPLES` ids. A part holds all languages of its ids."""
    ids = list(dict.fromkeys(example.id for example in examples))
    part_of = {id_: number // SHARD_EXAMPLES for number, id_ in enumerate(ids)}
    parts: list[list[Example]] = [[] for _ in range(-(-len(ids) // SHARD_EXAMPLES))]
    for example in examples:
        parts[part_of[example.id]].append(example)
    return parts


def answers(examples: Sequence[Example]) -> int:
    """Number of sequences that scoring runs: one per choice, or one per generated answer."""
    return sum(len(example.choices or (example,)) for example in examples)


def score_parts(
    model: "OfflineModel",
    parts: Sequence[Sequence[Example]],
    limits: Sequence[int],
    shards: Shards,
    progress: OnProgress,
    contexts: Callable[[Sequence[Example]], ContextFor] | None = None,
    keep_answers: bool = False,
) -> dict[tuple[str, str], bool]:
    """Score the parts, one shard each. The shards are numbered from 0.

    The shard state stores "correct", uint8 [examples], in the order of the parts.

    Args:
        limits: maximum number of new tokens of each example, in the order of the parts.
        contexts: makes the routing contexts of a part's examples (`steering_contexts`).
        keep_answers: keep what the model answered with each shard, for `kept_answers`.

    Returns:
        (id, language) -> whether the example is answered correctly, equal on every rank.
    """
    examples = [example for part in parts for example in part]
    correct: list[int] = shards.state["correct"].tolist() if shards.done else []
    if correct:
        progress(answers(examples[: len(correct)]))
    for number in range(shards.done, len(parts)):
        context_for = contexts(parts[number]) if contexts else None
        own = limits[len(correct) : len(correct) + len(parts[number])]
        found: dict[int, list[float] | str] = {}
        answered = found.__setitem__ if keep_answers else None
        correct += score(model, parts[number], own, context_for, progress, answered)
        text = json.dumps([found[place] for place in sorted(found)]).encode()
        kept = {"answers": torch.tensor(list(text), dtype=torch.uint8)} if keep_answers else None
        shards.save(number, {"correct": torch.tensor(correct, dtype=torch.uint8)}, kept)
    return {
        (example.id, example.language): bool(right) for example, right in zip(examples, correct, strict=True)
    }


def kept_answers(
    shards: Shards, parts: Sequence[Sequence[Example]]
) -> dict[tuple[str, str], list[float] | str]:
    """What the model answered in each part, from `score_parts` with `keep_answers`. Only on rank 0.

    Returns:
        (id, language) -> the log-likelihood of each choice, or the generated text.
    """
    found: dict[tuple[str, str], list[float] | str] = {}
    for number, part in enumerate(parts):
        answers = json.loads(bytes(shards.kept(number)["answers"].tolist()))
        found |= {(e.id, e.language): answer for e, answer in zip(part, answers, strict=True)}
    return found
