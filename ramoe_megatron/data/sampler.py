"""The order of training examples: a pure function of the seed and the draw, so that a run can be resumed."""

import math
import zlib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np

from ramoe_megatron.data.codes import codes_of, groups_of, pick
from ramoe_megatron.data.parallel import Example
from ramoe_megatron.errors import RamoeError


def order(
    examples: Sequence[Example], num_samples: int, seed: int, weights: Mapping[str, float] | None = None
) -> np.ndarray:
    """Indices into `examples`, int64 [num_samples].

    The i-th entry depends only on the examples, the weights, the seed and i. So a longer order starts with
    the shorter order, and Megatron's ``consumed_samples`` is enough to resume. Without weights, the order is
    a sequence of shuffled epochs over all examples. With weights, each draw picks a group at random by
    weight, and takes the next example of that group. Each group has a sequence of shuffled epochs, so each
    epoch of a group has each of its examples once.

    Args:
        examples: the examples to draw from.
        num_samples: number of draws.
        seed: seed of the draws and the epochs.
        weights: "TASK/LANGUAGE" pattern (with ``*``, ``?``, ``[...]``) -> weight, at least 0. Only ratios of
            weights matter. A group is all examples of one task and language, and belongs to the first pattern
            that matches. The groups of a pattern share its weight in proportion to their sizes. Weight 0
            leaves out the groups.

    Raises:
        RamoeError: there is no example, a group matches no pattern, a pattern matches no group, or a weight
            is invalid.
    """
    if not examples:
        raise RamoeError("no examples to sample from.")
    if weights is None:
        pools, shares = [np.arange(len(examples), dtype=np.int64)], np.ones(1)
    else:
        pools, shares = _pools(examples, weights)
    draws = np.random.default_rng([seed, 0]).random(num_samples)
    # Without the last bound, because rounding of the cumulative sum must not leave a draw without a pool.
    chosen = np.searchsorted(np.cumsum(shares)[:-1], draws, side="right")
    result = np.empty(num_samples, dtype=np.int64)
    for number, pool in enumerate(pools):
        places = np.flatnonzero(chosen == number)
        result[places] = pool[_epochs(len(pool), len(places), seed, number)]
    return result


def with_ids_per_task(examples: Sequence[Example], count: int, seed: int) -> Sequence[Example]:
    """The examples of `count` random ids of each task, in all their languages and in their order.

    A larger count with the same seed keeps the ids of a smaller one. A list gives a list.

    Raises:
        RamoeError: a task has fewer ids.
    """
    ids, tasks = codes_of(examples, "id"), codes_of(examples, "task")
    found, first = np.unique(ids.codes, return_index=True)
    task_of_id = tasks.codes[first]
    drawn = []
    for task in np.unique(task_of_id):
        name, own = tasks.names[int(task)], found[task_of_id == task]
        if len(own) < count:
            raise RamoeError(f"{count} ids of each task were asked for, but task {name!r} has {len(own)}.")
        drawn.append(named_rng(seed, f"ids of {name}").permutation(own)[:count])
    return pick(examples, np.flatnonzero(np.isin(ids.codes, np.concatenate(drawn))))


def named_rng(seed: int, name: str) -> np.random.Generator:
    """A random generator for one purpose, so that a new purpose does not change the numbers of the others."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _pools(examples: Sequence[Example], weights: Mapping[str, float]) -> tuple[list[np.ndarray], np.ndarray]:
    groups = dict(groups_of(examples))
    members: dict[str, list[tuple[str, str]]] = {pattern: [] for pattern in weights}
    for group in groups:
        name = "/".join(group)
        match = next((pattern for pattern in weights if fnmatchcase(name, pattern)), None)
        if match is None:
            raise RamoeError(
                f"sampling weights: no pattern matches the group {name!r} ({len(groups[group])} examples). "
                f"Patterns: {', '.join(weights) or 'none'}. Add a pattern for the group (weight 0 leaves the "
                "group out)."
            )
        members[match].append(group)
    pools: list[np.ndarray] = []
    shares: list[float] = []
    for pattern, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise RamoeError(
                f"sampling weights: {pattern}={weight}, expected a finite number that is not negative."
            )
        if not members[pattern]:
            names = ", ".join("/".join(group) for group in groups)
            raise RamoeError(
                f"sampling weights: the pattern {pattern!r} matches no group, "
                f"or only groups of earlier patterns. Groups (task/language): {names}."
            )
        size = sum(len(groups[group]) for group in members[pattern])
        for group in members[pattern]:
            if weight > 0:
                pools.append(groups[group])
                shares.append(weight * len(groups[group]) / size)
    if not pools:
        raise RamoeError("sampling weights: all are 0, so no group is left to draw from.")
    return pools, np.array(shares) / sum(shares)


def _epochs(size: int, count: int, seed: int, pool: int) -> np.ndarray:
    """The first ``count`` entries of epochs over ``range(size)``; each epoch is a seeded permutation."""
    epochs = -(-count // size)
    parts = [np.random.default_rng([seed, 1, pool, epoch]).permutation(size) for epoch in range(epochs)]
    return np.concatenate(parts)[:count] if parts else np.empty(0, dtype=np.int64)
