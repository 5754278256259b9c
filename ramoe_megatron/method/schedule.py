"""How the alignment coefficient changes over training: our own options, no paper of routing alignment has them."""

import math


def coefficient_factor(iteration: int, warmup: int, decay: str, train_iters: int) -> float:
    """What the coefficient is multiplied by at an iteration, in [0, 1].

    A linear warm-up reaches 1 at iteration `warmup`, and begins at 1 / (warmup + 1). Then `constant` stays at 1, and `cosine` falls along
    half a cosine from 1 towards 0, which it would reach at `train_iters`.

    Args:
        iteration: iterations done before this one: 0 is the first.
        warmup: iterations of the warm-up; 0 for none.
        decay: constant or cosine.
        train_iters: iterations of the whole training.
    """
    if iteration < warmup:
        return (iteration + 1) / (warmup + 1)
    if decay == "constant":
        return 1.0
    progress = (iteration - warmup) / max(1, train_iters - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
