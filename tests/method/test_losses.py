"""Laws of the alignment divergences."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.losses import (
    DIVERGENCES,
    TINY,
    WeightedDivergence,
    mass,
    pool,
    reference,
    value_and_slope,
    weighted_divergence,
)

names = pytest.mark.parametrize("name", DIVERGENCES)


@st.composite
def routings(draw: st.DrawFn, zeros: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Two distributions [L, E] with exact zeros, and a mask with experts both inside and outside."""
    layers, experts, seed = draw(st.integers(1, 3)), draw(st.integers(2, 9)), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)

    def distribution() -> Tensor:
        weights = torch.rand(layers, experts, generator=generator, dtype=torch.float64) ** 4 + 1e-6
        if zeros:
            weights = weights.masked_fill(torch.rand(layers, experts, generator=generator) < 0.2, 0.0)
            weights[:, 0] += 1e-3
        return weights / weights.sum(-1, keepdim=True)

    mask = torch.rand(layers, experts, generator=generator) < 0.5
    mask[:, 0], mask[:, 1] = True, False
    return distribution(), distribution(), mask


def divergence(name: str, q_en: Tensor, q_tg: Tensor, mask: Tensor) -> Tensor:
    """The divergences themselves. [...]"""
    return value_and_slope(name, reference(name, q_en, mask), q_tg)[0]


def weighted(name: str, q_en: Tensor, q_tg: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """Their weighted sum, with a gradient. []"""
    known = reference(name, q_en, mask)
    weight = torch.ones(q_tg.shape[:-1], dtype=known.q_en.dtype) if weight is None else weight
    return WeightedDivergence.apply(q_tg, weight, name, weighted_divergence, *known)[0]


def lumped(q: Tensor, mask: Tensor) -> Tensor:
    """One bin for each task expert and one for all others, which stands last; a bin of no expert holds 0."""
    return torch.cat([q.masked_fill(~mask, 0.0), q.masked_fill(mask, 0.0).sum(-1, keepdim=True)], dim=-1)


def two_bins(q: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([q.masked_fill(~mask, 0.0).sum(-1), q.masked_fill(mask, 0.0).sum(-1)], dim=-1)


def floored_kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a.clamp_min(TINY).log() - b.clamp_min(TINY).log())).sum(-1)


BY_BINS = {
    "lumped-kl": lambda a, b, mask: floored_kl(lumped(a, mask), lumped(b, mask)),
    "mass": lambda a, b, mask: floored_kl(two_bins(a, mask), two_bins(b, mask)),
    "kl": lambda a, b, mask: floored_kl(a, b),
    "js": lambda a, b, mask: (floored_kl(a, (a + b) / 2) + floored_kl(b, (a + b) / 2)) / 2,
}
"""Each divergence over its bins, whose gradient is autograd's."""


def kl(a: Tensor, b: Tensor) -> Tensor:
    """Textbook KL with 0 log 0 = 0, written apart from the code under test."""
    return torch.special.xlogy(a, a).sum(-1) - torch.special.xlogy(a, b).sum(-1)


@given(routings(zeros=False))
def test_lumped_kl_is_mass_plus_weighted_relative_allocation(case: tuple[Tensor, Tensor, Tensor]) -> None:
    q_en, q_tg, mask = case
    m_en, m_tg = (q_en * mask).sum(-1), (q_tg * mask).sum(-1)
    binary = kl(torch.stack([m_en, 1 - m_en], -1), torch.stack([m_tg, 1 - m_tg], -1))
    relative = torch.stack(
        [kl(a[s] / a[s].sum(), b[s] / b[s].sum()) for a, b, s in zip(q_en, q_tg, mask, strict=True)]
    )
    torch.testing.assert_close(divergence("mass", q_en, q_tg, mask), binary)
    torch.testing.assert_close(divergence("lumped-kl", q_en, q_tg, mask), binary + m_en * relative)
    torch.testing.assert_close(divergence("kl", q_en, q_tg, mask), kl(q_en, q_tg))


@names
@given(routings())
def test_non_negative_and_zero_iff_the_compared_distributions_are_equal(
    name: str, case: tuple[Tensor, Tensor, Tensor]
) -> None:
    q_en, q_tg, mask = case
    value = divergence(name, q_en, q_tg, mask)
    assert (value > -1e-12).all()
    assert (divergence(name, q_en, q_en, mask) == 0).all()
    if name == "mass":
        compared_en, compared_tg = mass(q_en, mask).unsqueeze(-1), mass(q_tg, mask).unsqueeze(-1)
    elif name == "lumped-kl":
        compared_en, compared_tg = lumped(q_en, mask), lumped(q_tg, mask)
    else:
        compared_en, compared_tg = q_en, q_tg
    differ = (compared_en - compared_tg).abs().amax(-1) > 1e-4
    assert (value[differ] > 1e-10).all()


@given(routings())
def test_js_is_symmetric_and_bounded_by_log_2(case: tuple[Tensor, Tensor, Tensor]) -> None:
    q_en, q_tg, mask = case
    forward = divergence("js", q_en, q_tg, mask)
    torch.testing.assert_close(forward, divergence("js", q_tg, q_en, mask))
    assert (forward <= math.log(2) + 1e-12).all()
    disjoint = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert divergence("js", *disjoint, torch.tensor([True, False])).item() == pytest.approx(math.log(2))


@given(routings(zeros=False), st.integers(0, 2**31))
def test_js_reaches_log_2_where_no_expert_is_shared_and_only_there(
    case: tuple[Tensor, Tensor, Tensor], seed: int
) -> None:
    q_en, q_tg, mask = case
    assert (divergence("js", q_en, q_tg, mask) < math.log(2) - 1e-9).all()
    apart = [
        q.masked_fill(m, 0.0) / q.masked_fill(m, 0.0).sum(-1, keepdim=True)
        for q, m in ((q_en, mask), (q_tg, ~mask))
    ]
    torch.testing.assert_close(
        divergence("js", *apart, mask), torch.full(mask.shape[:1], math.log(2), dtype=torch.float64)
    )


@given(routings(zeros=False))
def test_the_two_terms_at_their_ends(case: tuple[Tensor, Tensor, Tensor]) -> None:
    """Only the masses count without English mass on task experts; KL remains if all are task experts."""
    q_en, q_tg, mask = case
    outside = q_en.masked_fill(mask, 0.0) / q_en.masked_fill(mask, 0.0).sum(-1, keepdim=True)
    torch.testing.assert_close(
        divergence("lumped-kl", outside, q_tg, mask), divergence("mass", outside, q_tg, mask)
    )
    torch.testing.assert_close(divergence("mass", outside, q_tg, mask), -(1 - mass(q_tg, mask)).log())
    every = torch.ones_like(mask)
    torch.testing.assert_close(
        divergence("lumped-kl", q_en, q_tg, every), divergence("kl", q_en, q_tg, every)
    )
    torch.testing.assert_close(
        divergence("mass", q_en, q_tg, every), torch.zeros(len(mask), dtype=torch.float64), atol=1e-9, rtol=0
    )


@given(routings(zeros=False))
def test_coarser_bins_diverge_less(case: tuple[Tensor, Tensor, Tensor]) -> None:
    """Data-processing inequality: lumping can only reduce a divergence (not at zeros, because of `TINY`)."""
    q_en, q_tg, mask = case
    by_mass, by_expert, by_all = (divergence(name, q_en, q_tg, mask) for name in ("mass", "lumped-kl", "kl"))
    assert (by_mass <= by_expert + 1e-9).all()
    assert (by_expert <= by_all + 1e-9).all()


@names
@given(routings(), st.randoms(use_true_random=False))
def test_the_order_of_experts_does_not_matter(
    name: str, case: tuple[Tensor, Tensor, Tensor], rng: object
) -> None:
    q_en, q_tg, mask = case
    order = list(range(mask.shape[-1]))
    rng.shuffle(order)  # type: ignore[attr-defined]
    torch.testing.assert_close(
        divergence(name, q_en, q_tg, mask), divergence(name, q_en[:, order], q_tg[:, order], mask[:, order])
    )


@names
@settings(max_examples=25)
@given(routings(zeros=False))
def test_gradient_agrees_with_finite_differences(name: str, case: tuple[Tensor, Tensor, Tensor]) -> None:
    q_en, q_tg, mask = case
    logits, weight = q_tg.log().requires_grad_(), torch.linspace(0.5, 2, len(q_tg), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: weighted(name, q_en, z.softmax(-1), mask, weight), (logits,))


@names
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@settings(max_examples=25)
@given(routings())
def test_value_and_gradient_are_those_of_the_bins(
    name: str, dtype: torch.dtype, bound: float, case: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Errors are relative to the largest term: to the gradient's norm, and to the sum of the terms' sizes."""
    q_en, q_tg, mask = case
    q_tg = (q_tg + 1e-3) / (q_tg + 1e-3).sum(-1, keepdim=True)  # away from the floor
    weight = torch.linspace(0.5, 2, len(q_tg), dtype=dtype)
    found, expected = (q_tg.to(kind).requires_grad_() for kind in (dtype, torch.float64))
    total = weighted(name, q_en.to(dtype), found, mask, weight)
    by_bins = BY_BINS[name](q_en.to(dtype).double(), expected, mask)
    total.backward()
    (by_bins * weight.double()).sum().backward()
    assert found.grad is not None
    assert expected.grad is not None
    torch.testing.assert_close(total.double(), (by_bins * weight.double()).sum(), rtol=bound, atol=4 * bound)
    assert (found.grad.double() - expected.grad).norm() <= 2 * bound * expected.grad.norm() + bound


@names
def test_only_the_target_side_gets_a_gradient(name: str) -> None:
    q_en = torch.tensor([0.7, 0.2, 0.1], requires_grad=True)
    q_tg = torch.tensor([0.1, 0.2, 0.7], requires_grad=True)
    weighted(name, q_en, q_tg, torch.tensor([True, False, False])).backward()
    assert q_en.grad is None
    assert q_tg.grad is not None
    assert q_tg.grad.abs().sum() > 0


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient_are_finite_at_zeros(name: str, dtype: torch.dtype) -> None:
    corners = torch.eye(4, dtype=dtype)
    below = torch.tensor([1.0, TINY / 10, TINY * 10, 0.0], dtype=dtype)
    mask = torch.tensor([True, True, False, False])
    for q_en in (*corners, below):
        for start in (*corners, below):
            q_tg = start.clone().requires_grad_()
            value = weighted(name, q_en, q_tg, mask)
            assert value.dtype == torch.float32
            value.backward()
            assert value.isfinite()
            assert q_tg.grad is not None
            assert q_tg.grad.isfinite().all()


@names
def test_leading_dimensions_broadcast(name: str) -> None:
    q_en, q_tg = torch.rand(3, 5).softmax(-1), torch.rand(4, 3, 5).softmax(-1)
    mask = torch.rand(3, 5) < 0.5
    together = divergence(name, q_en, q_tg, mask)
    assert together.shape == (4, 3)
    for b in range(4):
        for layer in range(3):
            torch.testing.assert_close(
                together[b, layer], divergence(name, q_en[layer], q_tg[b, layer], mask[layer].to(torch.uint8))
            )


@pytest.mark.parametrize("name", ["lumped-kl", "mass"])
def test_a_layer_without_task_experts_asks_for_nothing(name: str) -> None:
    logits = torch.randn(6, requires_grad=True)
    value = weighted(name, torch.rand(6).softmax(-1), logits.softmax(-1), torch.zeros(6, dtype=torch.bool))
    value.backward()
    assert value.abs() < 1e-6
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-6


@given(routings())
def test_lumping_keeps_the_total_and_the_task_experts(case: tuple[Tensor, Tensor, Tensor]) -> None:
    q, _, mask = case
    bins = lumped(q, mask)
    assert bins.shape[-1] == q.shape[-1] + 1
    torch.testing.assert_close(bins.sum(-1), q.sum(-1))
    torch.testing.assert_close(bins[..., :-1][mask], q[mask])
    torch.testing.assert_close(bins[..., :-1].sum(-1), mass(q, mask))


@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 2**31))
def test_pooling_in_pieces_equals_pooling_at_once_and_ignores_padding(
    tokens: int, batch: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(tokens, batch, 4, generator=generator, dtype=torch.float64).softmax(-1)
    keep = torch.rand(tokens, batch, generator=generator) < 0.6
    numerator = pool(p.masked_fill(~keep[..., None], float("nan")), ~keep[..., None])
    cut = tokens // 2
    pieces = [pool(p[piece], ~keep[piece, :, None]) for piece in (slice(cut), slice(cut, None))]
    torch.testing.assert_close(numerator, pieces[0] + pieces[1])
    for b in range(batch):
        torch.testing.assert_close(numerator[b], p[keep[:, b], b].sum(0))


def test_pooling_sums_in_float32() -> None:
    numerator = pool(torch.full((4096, 1, 2), 0.5, dtype=torch.bfloat16), torch.zeros(4096, 1, 1).bool())
    assert numerator.dtype == torch.float32
    assert numerator.tolist() == [[2048.0, 2048.0]]


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(RamoeError, match=r"'euclid'.*lumped-kl, mass, kl, js"):
        divergence("euclid", torch.ones(1), torch.ones(1), torch.ones(1))
