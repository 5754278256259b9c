"""Which example the i-th draw of training takes: a pure function of (seed, i), so that resuming is slicing."""

import math
import zlib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np

from ramoe_megatron.data.parallel import Example
from ramoe_megatron.errors import RamoeError


def order(
    examples: Sequence[Example], num_samples: int, seed: int, weights: Mapping[str, float] | None = None
) -> np.ndarray:
    """Indices into `examples`, int64 [num_samples].

    The i-th entry depends on the examples, the weights, the seed and i alone: a longer order starts with the shorter
    one, so Megatron's `consumed_samples` resumes it. Without weights it is seeded epochs over all examples. With
    weights every draw takes a group at random by weight and the next example of that group's own seeded epochs, so each
    epoch of a group visits each of its examples once.

    Args:
        weights: "TASK/LANGUAGE" pattern (`*`, `?`, `[...]`) -> weight, not negative; they are divided by their sum. A
            group (all examples of one task and language) belongs to the first pattern that matches it. The weight of a
            pattern is shared by its groups by size. Weight 0 leaves its groups out.

    Raises:
        RamoeError: if there is no example, a group that no pattern matches, a pattern without a group, a bad weight.
    """
    if not examples:
        raise RamoeError("no examples to sample from.")
    if weights is None:
        pools, shares = [np.arange(len(examples), dtype=np.int64)], np.ones(1)
    else:
        pools, shares = _pools(examples, weights)
    draws = np.random.default_rng([seed, 0]).random(num_samples)
    # the last bound is open: rounding of the cumulative sum must not leave a draw without a pool
    chosen = np.searchsorted(np.cumsum(shares)[:-1], draws, side="right")
    result = np.empty(num_samples, dtype=np.int64)
    for number, pool in enumerate(pools):
        places = np.flatnonzero(chosen == number)
        result[places] = pool[_epochs(len(pool), len(places), seed, number)]
    return result


def named_rng(seed: int, name: str) -> np.random.Generator:
    """A generator of its own for every purpose, so that one more of them does not move the others."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _pools(examples: Sequence[Example], weights: Mapping[str, float]) -> tuple[list[np.ndarray], np.ndarray]:
    groups: dict[tuple[str, str], list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault((example.task, example.language), []).append(index)
    members: dict[str, list[tuple[str, str]]] = {pattern: [] for pattern in weights}
    for group in sorted(groups):
        name = "/".join(group)
        match = next((pattern for pattern in weights if fnmatchcase(name, pattern)), None)
        if match is None:
            raise RamoeError(
                f"sampling weights: no pattern matches the group {name!r} ({len(groups[group])} examples). "
                f"Patterns: {', '.join(weights) or 'none'}. Add one (weight 0 leaves the group out)."
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
            names = ", ".join("/".join(group) for group in sorted(groups))
            raise RamoeError(
                f"sampling weights: the pattern {pattern!r} matches no group that an earlier pattern leaves. "
                f"Groups (task/language): {names}."
            )
        size = sum(len(groups[group]) for group in members[pattern])
        for group in members[pattern]:
            if weight > 0:
                pools.append(np.array(groups[group], dtype=np.int64))
                shares.append(weight * len(groups[group]) / size)
    if not pools:
        raise RamoeError("sampling weights: all are 0, so no group is left to draw from.")
    return pools, np.array(shares) / sum(shares)


def _epochs(size: int, count: int, seed: int, pool: int) -> np.ndarray:
    """The first `count` places of endless epochs over `range(size)`, each epoch its own seeded permutation."""
    epochs = -(-count // size)
    parts = [np.random.default_rng([seed, 1, pool, epoch]).permutation(size) for epoch in range(epochs)]
    return np.concatenate(parts)[:count] if parts else np.empty(0, dtype=np.int64)
