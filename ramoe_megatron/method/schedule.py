"""The schedule of the alignment coefficient over training. Our own extension, in no paper."""

import math


def coefficient_factor(iteration: int, warmup: int, decay: str, train_iters: int) -> float:
    """The factor on the alignment coefficient at an iteration, in [0, 1].

    The warm-up is linear: the factor is 1 / (warmup + 1) at iteration 0 and 1 at iteration ``warmup``. After
    the warm-up, ``constant`` stays at 1. ``cosine`` falls along half a cosine from 1 to 0, which it reaches
    at ``train_iters``.

    Args:
        iteration: number of completed iterations, 0 at the first iteration.
        warmup: number of warm-up iterations; 0 means no warm-up.
        decay: "constant" or "cosine".
        train_iters: number of iterations of the whole training.
    """
    if iteration < warmup:
        return (iteration + 1) / (warmup + 1)
    if decay == "constant":
        return 1.0
    progress = (iteration - warmup) / max(1, train_iters - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
