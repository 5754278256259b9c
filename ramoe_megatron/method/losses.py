"""The alignment divergences of RA-MoE (arXiv 2605.28306), on pooled router distributions.

Shape suffixes: T tokens, B sequences, E routed experts; "..." stands for any leading dimensions. Logarithms
are natural, so every divergence is in nats. The paper says what is aligned: the total routing mass on the
task experts, and their relative allocation. The paper gives no formula; the divergences here are our reading.

Arithmetic is in float32, or in float64 for float64 input. Half-precision input is widened first.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ramoe_megatron.errors import RamoeError

TINY = 1e-20
"""Floor under every logarithm. A probability below the floor counts as TINY and passes no gradient. So the
gradient of any divergence stays below 1 / TINY, which float32 can hold. A softmax reaches the floor at a
logit gap of 46."""


def pool(p_TBE: Tensor, mask_TB: Tensor) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of the pooled router distribution of each sequence (masked mean over tokens).

    The two parts are returned separately because a sequence may be split over several ranks: sum each part
    over the ranks, then divide.

    Args:
        p_TBE: router probabilities over all E experts, before top-k. [T, B, E]
        mask_TB: true (or non-zero) at the selected tokens. [T, B]

    Returns:
        The sum of ``p`` over the selected tokens, [B, E], and the number of selected tokens, [B]. Both are
        float32 (float64 for float64 input). A sequence without selected tokens gives zeros and 0; the caller
        has to handle it.
    """
    # A fill and no product: a value at padding (even NaN) cannot leak in, and TF32 cannot round.
    selected_TBE = _widen(p_TBE).masked_fill(~mask_TB.bool().unsqueeze(-1), 0.0)
    return selected_TBE.sum(dim=0), mask_TB.bool().sum(dim=0).to(selected_TBE.dtype)


def mass(q: Tensor, expert_mask: Tensor) -> Tensor:
    """Total routing mass ``m = sum_{k in S} q_k`` on the task experts S (arXiv 2605.28306).

    Args:
        q: pooled router distribution. [..., E]
        expert_mask: true for the experts of S; broadcast against ``q``. [..., E]

    Returns:
        [...], in [0, 1].
    """
    return _widen(q).masked_fill(~expert_mask.bool(), 0.0).sum(dim=-1)


def lumped(q: Tensor, expert_mask: Tensor) -> Tensor:
    """The lumped distribution: one bin per task expert and one bin for everything else.

    The number of task experts differs by layer, so every layer has E + 1 places. Place k holds the mass of
    expert k if k is in S, and 0 otherwise. Place E holds the mass of all experts outside S. A place with 0
    adds nothing to a divergence.

    Args:
        q: pooled router distribution. [..., E]
        expert_mask: true for the experts of S; broadcast against ``q``. [..., E]

    Returns:
        [..., E + 1], with the same sum as ``q``.
    """
    # The rest is summed, because 1 - m loses all its digits when m is near 1.
    inside = _widen(q).masked_fill(~expert_mask.bool(), 0.0)
    rest = mass(q, ~expert_mask.bool())
    return torch.cat([inside, rest.unsqueeze(-1)], dim=-1)


def divergence(name: str, q_en: Tensor, q_tg: Tensor, expert_mask: Tensor) -> Tensor:
    """Divergence of the target language's pooled routing from the English one (our reading).

    ``q_en`` is a constant: the gradient flows through ``q_tg`` only. Values and gradients are always finite,
    also at zeros (see ``TINY``).

    Args:
        name: one of ``DIVERGENCES``.
            - ``lumped-kl``: KL over the |S| + 1 lumped bins, which equals the KL of the masses plus m_en
              times the KL of the relative allocations.
            - ``mass``: KL of the masses.
            - ``kl``: KL over all E experts.
            - ``js``: Jensen-Shannon over all E experts; symmetric, in [0, log 2] (SARA, arXiv 2606.25821).
        q_en: pooled English distribution, summing to 1 over the last dimension. [..., E]
        q_tg: pooled target-language distribution, summing to 1 over the last dimension. [..., E]
        expert_mask: true for the task experts S; not used by ``kl`` and ``js``. [..., E]

    Returns:
        In nats, [...] (the leading dimensions, broadcast); 0 iff the compared distributions are equal. A
        layer with empty S gives 0 for ``lumped-kl`` and ``mass``: it has nothing to align.

    Raises:
        RamoeError: the name is unknown.
    """
    if name not in _FORMULAS:
        raise RamoeError(f"divergence: found {name!r}, expected one of {', '.join(DIVERGENCES)}")
    return _FORMULAS[name](_widen(q_en.detach()), _widen(q_tg), expert_mask.bool())


def _widen(q: Tensor) -> Tensor:
    return q.to(torch.promote_types(q.dtype, torch.float32))


def _log(q: Tensor) -> Tensor:
    return q.clamp_min(TINY).log()


def _kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (_log(a) - _log(b))).sum(dim=-1)


def _lumped_kl(q_en: Tensor, q_tg: Tensor, expert_mask: Tensor) -> Tensor:
    return _kl(lumped(q_en, expert_mask), lumped(q_tg, expert_mask))


def _mass_kl(q_en: Tensor, q_tg: Tensor, expert_mask: Tensor) -> Tensor:
    return _kl(_two_bins(q_en, expert_mask), _two_bins(q_tg, expert_mask))


def _two_bins(q: Tensor, expert_mask: Tensor) -> Tensor:
    return torch.stack([mass(q, expert_mask), mass(q, ~expert_mask)], dim=-1)


def _js(q_en: Tensor, q_tg: Tensor, _expert_mask: Tensor) -> Tensor:
    middle = (q_en + q_tg) / 2
    return (_kl(q_en, middle) + _kl(q_tg, middle)) / 2


_FORMULAS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "lumped-kl": _lumped_kl,
    "mass": _mass_kl,
    "kl": lambda q_en, q_tg, _expert_mask: _kl(q_en, q_tg),
    "js": _js,
}
DIVERGENCES = tuple(_FORMULAS)
"""The names that `divergence` and ``--ramoe-divergence`` accept: the entries of `_FORMULAS`."""
