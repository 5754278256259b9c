"""The alignment divergences of RA-MoE (arXiv 2605.28306), on pooled router distributions.

Shape suffixes: T tokens, B sequences, E routed experts; "..." stands for any leading dimensions. Logarithms
are natural, so every divergence is in nats. The paper says what is aligned: the total routing mass on the
task experts, and their relative allocation. The paper gives no formula; the divergences here are our reading.

Arithmetic is in float32, or in float64 for float64 input. Half-precision input is widened first.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ramoe_megatron.errors import RamoeError

TINY = 1e-20
"""Floor under every logarithm. A probability below the floor counts as TINY. The gradient of a KL divergence
passes no bin below the floor, so the gradient of any divergence stays below 1 / TINY, which float32 can hold.
A softmax reaches the floor at a logit gap of 46."""


def pool(p_TBE: Tensor, left_out_TB1: Tensor) -> Tensor:
    """Sum of the router distribution over the selected tokens of each sequence: a mean's numerator.

    A sequence may be split over several ranks: sum over the ranks, then divide by the number of tokens.

    Args:
        p_TBE: router probabilities over all E experts, before top-k. [T, B, E]
        left_out_TB1: true at the tokens that are not selected. [T, B, 1], bool

    Returns:
        [B, E], float32 (float64 for float64 input). A sequence without selected tokens gives zeros.
    """
    # A fill and no product: a value at padding (even NaN) cannot leak in, and TF32 cannot round.
    return widen(p_TBE).masked_fill(left_out_TB1, 0.0).sum(dim=0)


def mass(q: Tensor, expert_mask: Tensor) -> Tensor:
    """Total routing mass ``m = sum_{k in S} q_k`` on the task experts S (arXiv 2605.28306).

    Args:
        q: pooled router distribution. [..., E]
        expert_mask: true for the experts of S; broadcast against ``q``. [..., E]

    Returns:
        [...], in [0, 1].
    """
    return widen(q).masked_fill(~expert_mask.bool(), 0.0).sum(dim=-1)


class Reference(NamedTuple):
    """What a divergence needs of the English routing and the task experts S. No gradient goes through it.

    It is made once, for all target-language distributions that it is compared with.
    """

    q_en: Tensor
    """English distribution. [..., E], at least float32"""
    minus_bin: Tensor
    """Its mass in the bin of each expert, times -1. [..., E]"""
    log_bin: Tensor
    """Logarithm of its mass in the bin of each expert. [..., E]"""
    inside: Tensor
    """Whether an expert is in S. [..., E], bool"""
    halves: Tensor
    """The experts in S, and all others, as ones and zeros. [..., 2, E]"""


def task_expert_halves(expert_mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``Reference.halves`` of a mask of task experts. [..., E] to [..., 2, E]"""
    inside = expert_mask.bool()
    return torch.stack([inside, ~inside], dim=-2).to(dtype)


def reference(name: str, q_en: Tensor, expert_mask: Tensor, halves: Tensor | None = None) -> Reference:
    """The parts of a divergence that depend on the English side alone.

    Args:
        name: one of ``DIVERGENCES``.
            - ``lumped-kl``: KL over |S| + 1 bins, one for each task expert and one for all other experts. It
              equals the KL of the masses plus m_en times the KL of the relative allocations.
            - ``mass``: KL over two bins, the masses on S and on all other experts.
            - ``kl``: KL over all E experts.
            - ``js``: Jensen-Shannon over all E experts; symmetric, in [0, log 2] (SARA, arXiv 2606.25821).
        q_en: English distribution, summing to 1 over the last dimension. [..., E]
        expert_mask: true for the task experts S; not used by ``kl`` and ``js``. [..., E]
        halves: `task_expert_halves` of the mask, if they exist already.

    Raises:
        RamoeError: the name is unknown.
    """
    if name not in _BINS:
        raise RamoeError(f"divergence: found {name!r}, expected one of {', '.join(DIVERGENCES)}")
    q_en, inside = widen(q_en.detach()), expert_mask.bool()
    if halves is None:
        halves = task_expert_halves(inside, q_en.dtype)
    bin_en = _BINS[name](q_en, inside, _masses(q_en, halves))
    return Reference(q_en, -bin_en, _log(bin_en), inside, halves)


def value_and_slope(name: str, known: Reference, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A divergence from the English routing, and its derivative, in closed form.

    With b(k) for the mass in the bin of expert k, a KL divergence over bins is a sum over experts:

        D = sum_k q_en_k (log b_en(k) - log b(k)),    dD / dq_k = -b_en(k) / b(k).

    For js, with c = (q_en + q) / 2:

        D = sum_k (q_en_k (log q_en_k - log c_k) + q_k (log q_k - log c_k)) / 2,
        dD / dq_k = (log q_k - log c_k) / 2.

    Args:
        name: the divergence for which ``known`` was made.
        known: the English side; broadcast against ``q``.
        q: target-language distribution, summing to 1 over the last dimension. [..., E], at least float32

    Returns:
        The divergence in nats, 0 iff the compared distributions are equal [...]; its derivative [..., E]; and
        the masses of ``q`` on the task experts and on all others [..., 2]. All are finite, also at zeros (see
        ``TINY``). A layer with empty S gives 0 for ``lumped-kl`` and ``mass``: it has nothing to align.
    """
    masses = _masses(q, known.halves)
    if name == "js":
        middle = _log((known.q_en + q) * 0.5)
        slope = (_log(q) - middle) * 0.5
        value = (known.q_en * ((known.log_bin - middle) * 0.5) + q * slope).sum(dim=-1)
        return value, slope, masses
    bin_mass = _BINS[name](q, known.inside, masses)
    floored = bin_mass.clamp_min(TINY)
    value = (known.q_en * (known.log_bin - floored.log())).sum(dim=-1)
    return value, torch.where(bin_mass < TINY, 0.0, known.minus_bin / floored), masses


def weighted_divergence(
    name: str, known: Reference, q: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weighted sum of divergences, and its gradient: all that depends on ``q`` at a router.

    Args:
        weight: weight of each divergence. [...]

    Returns:
        The sum []; its gradient by ``q`` [..., E]; the divergences without weights [...]; and the masses as
        in ``value_and_slope`` [..., 2].
    """
    value, slope, masses = value_and_slope(name, known, q)
    return (value * weight).sum(), slope * weight.unsqueeze(-1), value, masses


class WeightedDivergence(torch.autograd.Function):
    """`weighted_divergence` for autograd: one node, whose gradient is computed with the value."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, weight: Tensor, name: str, compute: Callable, *known: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The sum, with a gradient through ``q``; the divergences and the masses, without.

        Args:
            compute: `weighted_divergence`, or the same compiled.
            known: the fields of a `Reference`.
        """
        total, gradient, value, masses = compute(name, Reference(*known), widen(q), weight)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(value, masses)
        ctx.set_materialize_grads(False)
        return total, value, masses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor | None, *_: Any) -> tuple:
        """The stored gradient, times the gradient of the sum."""
        (gradient,) = ctx.saved_tensors
        by_q = None if above is None else gradient * above
        return by_q, None, None, None, *[None] * len(Reference._fields)


def widen(q: Tensor) -> Tensor:
    """`q` in float32, or as it is in a wider type."""
    return q if q.dtype in (torch.float32, torch.float64) else q.float()


def _log(q: Tensor) -> Tensor:
    return q.clamp_min(TINY).log()


def _masses(q: Tensor, halves: Tensor) -> Tensor:
    # The rest is summed, because 1 - m loses all its digits when m is near 1.
    return (q.unsqueeze(-2) * halves).sum(dim=-1)


_BINS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "lumped-kl": lambda q, inside, masses: torch.where(inside, q, masses[..., 1:]),
    "mass": lambda q, inside, masses: torch.where(inside, masses[..., :1], masses[..., 1:]),
    "kl": lambda q, _inside, _masses: q,
    "js": lambda q, _inside, _masses: q,
}
"""For each divergence, the mass in the bin of each expert, [..., E], from ``q``, the task experts and the
masses on them and on all others."""

DIVERGENCES = tuple(_BINS)
"""The names that `reference` and ``--ramoe-divergence`` accept: the entries of `_BINS`."""
