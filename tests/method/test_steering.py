"""Laws of routing steering (arXiv 2510.04694, eq. 4-5), and routers that would leave out steered experts."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.align.refusals import refuse_hard_steering
from ramoe_megatron.method.steering import KINDS, LEAST_RISE, NOISE_VARIANCE, steer, steering_noise

TYPES = st.sampled_from([torch.float32, torch.bfloat16])
NONE = torch.zeros(())


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [T, E] of some scale and offset, with zeros of both signs; a mask [T, E]; noise [E]."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tokens, experts = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    scale, offset = draw(st.sampled_from([1e-3, 1.0, 50.0])), draw(st.sampled_from([0.0, -3.0, 200.0]))
    z = torch.randn(tokens, experts, generator=generator) * scale + offset
    z = torch.where(torch.rand(z.shape, generator=generator) < 0.1, torch.tensor(-0.0), z)
    mask = torch.rand(z.shape, generator=generator) < draw(st.sampled_from([0.0, 0.2, 0.7]))
    noise = torch.randn(experts, generator=generator) * NOISE_VARIANCE**0.5
    return z.to(draw(TYPES)), mask, noise


@given(cases(), st.sampled_from(KINDS), st.floats(-2, 2))
def test_what_is_not_steered_keeps_its_bits_and_type(
    case: tuple[torch.Tensor, ...], kind: str, strength: float
) -> None:
    z, mask, noise = case
    steered = steer(kind, z, mask, strength, noise)
    assert steered.dtype == z.dtype
    assert torch.equal(bits(steered)[~mask], bits(z)[~mask])
    assert torch.equal(bits(steer(kind, z, torch.zeros_like(mask), strength, noise)), bits(z))


@given(cases())
def test_soft_of_strength_zero_keeps_every_bit(case: tuple[torch.Tensor, ...]) -> None:
    z, mask, noise = case
    assert torch.equal(bits(steer("soft", z, mask, 0.0, noise)), bits(z))
    assert torch.equal(bits(steer("soft", z, mask, -0.0, noise)), bits(z))


@given(cases(), st.integers(1, 12))
def test_hard_puts_every_steered_expert_above_all_others_and_into_the_top_k_while_there_is_room(
    case: tuple[torch.Tensor, ...], k: int
) -> None:
    z, mask, noise = case
    steered = steer("hard", z, mask, 0.0, noise)
    k = min(k, z.shape[-1])
    for row, chosen, before in zip(steered, mask, z, strict=True):
        assert (row[chosen] > before.max()).all()
        top = set(row.topk(k).indices.tolist())
        steered_experts = set(chosen.nonzero().flatten().tolist())
        assert (steered_experts <= top) if len(steered_experts) <= k else (top <= steered_experts)


SCORES = {
    "softmax-after": {"score_function": "softmax", "use_pre_softmax": False},
    "softmax-before": {"score_function": "softmax", "use_pre_softmax": True},
    "sqrtsoftplus": {"score_function": "sqrtsoftplus"},
}
WIDE = torch.randn(256, 16, generator=torch.Generator().manual_seed(0)) * 8
# four experts of each token
STEERED = torch.rand(256, 16, generator=torch.Generator().manual_seed(1)).argsort(-1) < 4


def chosen_by_megatron(
    z: torch.Tensor, mask: torch.Tensor, noise: torch.Tensor, k: int, **settings: Any
) -> torch.Tensor:
    """Megatron's top-k of the steered logits; bool [T, E]"""
    return topk_routing_with_score_function(steer("hard", z, mask, 0.0, noise), k, **settings)[1]


@pytest.mark.parametrize("scores", SCORES)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    experts=st.integers(2, 64),
    scale=st.sampled_from([1e-3, 1.0, 8.0, 50.0, 1e3, 1e4, 1e6]),
    offset=st.sampled_from([0.0, -60.0, 20.0, 200.0]),
    k=st.integers(1, 12),
    steered=st.integers(1, 12),
    eps=st.sampled_from([0.0, 1e-9, 1e-6, 1.0]),
)
def test_hard_fills_the_top_k_of_megatrons_router(
    scores: str,
    seed: int,
    dtype: torch.dtype,
    experts: int,
    scale: float,
    offset: float,
    k: int,
    steered: int,
    eps: float,
) -> None:
    """Also with k steered experts, where a single tie with another expert would take the place of one."""
    generator = torch.Generator().manual_seed(seed)
    k, steered = min(k, experts), min(steered, experts)
    z = torch.randn(32, experts, generator=generator) * scale + offset
    z[:, 0].clamp_(min=-80.0)  # sqrt(softplus) of nothing but large negative numbers is 0
    mask = torch.rand(z.shape, generator=generator).argsort(-1) < steered
    noise = torch.randn(experts, generator=generator) * NOISE_VARIANCE**0.5 * eps
    chosen = chosen_by_megatron(z.to(dtype), mask, noise, k, **SCORES[scores])
    assert (chosen.sum(-1) == k).all()
    assert not (mask & ~chosen if steered <= k else chosen & ~mask).any()


@pytest.mark.parametrize(
    ("config", "words", "settings"),
    [
        (
            {"moe_router_score_function": "sigmoid"},
            "score-function sigmoid: large logits",
            {"score_function": "sigmoid"},
        ),
        (
            {"moe_router_score_function": "sqrtsoftplus", "moe_router_enable_expert_bias": True},
            "enable-expert-bias: experts are chosen by",
            {"score_function": "sqrtsoftplus", "expert_bias": torch.arange(16) * 0.05},
        ),
        (
            {"moe_router_num_groups": 4, "moe_router_group_topk": 2},
            "group-topk 2: an expert outside",
            {"num_groups": 4, "group_topk": 2},
        ),
        (
            {"moe_router_topk_limited_devices": 2},
            "topk-limited-devices 2: an expert outside",
            {"num_groups": 4, "group_topk": 2},
        ),
    ],
)
def test_hard_is_refused_where_megatrons_router_leaves_steered_experts_out(
    config: dict[str, Any], words: str, settings: dict[str, Any]
) -> None:
    chosen = chosen_by_megatron(WIDE, STEERED, torch.zeros(16), 4, **settings)
    assert (STEERED & ~chosen).any(-1).float().mean() > 0.1
    with pytest.raises(RamoeError, match=rf"^hard steering .*--moe-router-{words}.*Use soft steering"):
        refuse_hard_steering(SimpleNamespace(**config))


@pytest.mark.parametrize("balancing", ["sinkhorn", "quantile_balancing", ["aux_loss", "sinkhorn"]])
def test_hard_is_refused_where_balancing_chooses(balancing: str | list[str]) -> None:
    with pytest.raises(RamoeError, match=r"--moe-router-load-balancing-type \w+: it chooses experts"):
        refuse_hard_steering(SimpleNamespace(moe_router_load_balancing_type=balancing))


@pytest.mark.parametrize("scores", ["softmax", "sqrtsoftplus"])
def test_hard_is_let_through_where_the_largest_logits_are_chosen(scores: str) -> None:
    absent = {
        "moe_router_enable_expert_bias": False,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": None,
    }
    refuse_hard_steering(
        SimpleNamespace(
            moe_router_score_function=scores, moe_router_load_balancing_type=["aux_loss"], **absent
        )
    )


def test_soft_and_hard_by_hand() -> None:
    z = torch.tensor([[1.0, 2.0, 3.0, 6.0]])  # mean 3, squares 4 + 1 + 0 + 9 = 14
    mask = torch.tensor([True, False, True, False])
    assert steer("soft", z, mask, 0.5, NONE)[0].tolist() == pytest.approx(
        [1 + 0.5 * 3.5**0.5, 2, 3 + 0.5 * 3.5**0.5, 6]
    )
    assert steer("soft", z, mask, -1.0, NONE)[0].tolist() == pytest.approx([1 - 3.5**0.5, 2, 3 - 3.5**0.5, 6])
    noise = torch.tensor([-0.25, 9.0, 0.0, 9.0])
    found = steer("hard", z, mask, 0.0, noise)[0]
    assert found.tolist() == [6.25, 2, 6 + 6 * LEAST_RISE, 6]
    # bfloat16 has 8 bits of precision: steps of 1/32 above 4
    assert steer("hard", z.bfloat16(), mask, 0.0, noise / 1000)[0].tolist() == [6.03125, 2, 6.03125, 6]


@given(cases(), st.sampled_from(KINDS), st.randoms())
def test_steering_does_not_look_at_the_numbers_of_experts(
    case: tuple[torch.Tensor, ...], kind: str, random: object
) -> None:
    z, mask, noise = (tensor.double() if tensor.is_floating_point() else tensor for tensor in case)
    order = list(range(z.shape[-1]))
    random.shuffle(order)  # type: ignore[attr-defined]
    torch.testing.assert_close(
        steer(kind, z[:, order], mask[:, order], 0.5, noise[order]),
        steer(kind, z, mask, 0.5, noise)[:, order],
    )


@given(cases(), st.floats(-50, 50), st.floats(0.1, 10), st.floats(-2, 2))
def test_soft_moves_and_scales_with_the_logits(
    case: tuple[torch.Tensor, ...], shift: float, scale: float, strength: float
) -> None:
    z, mask = case[0].double(), case[1]
    moved = steer("soft", z, mask, strength, NONE)
    torch.testing.assert_close(steer("soft", z + shift, mask, strength, NONE), moved + shift)
    torch.testing.assert_close(steer("soft", z * scale, mask, strength, NONE), moved * scale)


@given(cases(), st.sampled_from(KINDS), st.floats(-2, 2))
def test_reduced_precision_is_float32_rounded_once(
    case: tuple[torch.Tensor, ...], kind: str, strength: float
) -> None:
    # Noise large enough that the rise is above one step of bfloat16.
    z, mask, noise = case[0].bfloat16(), case[1], case[2] * 100
    expected = steer(kind, z.float(), mask, strength, noise).bfloat16()
    largest = z.amax(dim=-1, keepdim=True)
    rounded_away = (expected <= largest) & mask if kind == "hard" else torch.zeros_like(mask)
    assert torch.equal(steer(kind, z, mask, strength, noise)[~rounded_away], expected[~rounded_away])


def test_noise_is_the_same_every_time_and_of_the_stated_size() -> None:
    torch.manual_seed(5)
    noise = steering_noise(40, 128)
    torch.manual_seed(6)
    assert torch.equal(noise, steering_noise(40, 128))
    assert noise.std().item() == pytest.approx(1e-3, rel=0.05)
    assert noise.unique().numel() > 5000
