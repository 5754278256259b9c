"""Laws of the coefficient's schedule, of the value of --ramoe-layers, and of the random control experts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.divergence import NoZone, Zone
from ramoe_megatron.method.experts import random_experts
from ramoe_megatron.method.layers import chosen_layers, parse_layers, span
from ramoe_megatron.method.schedule import coefficient_factor

sizes = st.integers(0, 200)


@given(sizes, sizes)
def test_without_a_schedule_the_factor_is_one(iteration: int, train_iters: int) -> None:
    assert coefficient_factor(iteration, 0, "constant", train_iters) == 1


@given(st.integers(1, 50), st.sampled_from(["constant", "cosine"]))
def test_the_warm_up_rises_in_equal_steps_to_one(warmup: int, decay: str) -> None:
    rise = [coefficient_factor(n, warmup, decay, 200) for n in range(warmup + 1)]
    assert rise == pytest.approx([(n + 1) / (warmup + 1) for n in range(warmup + 1)])


@given(st.integers(0, 20), st.integers(21, 100))
def test_the_cosine_falls_from_one_to_zero_and_is_one_half_in_the_middle(
    warmup: int, train_iters: int
) -> None:
    fall = [coefficient_factor(n, warmup, "cosine", train_iters) for n in range(warmup, train_iters + 1)]
    assert fall[0] == 1
    assert fall[-1] == pytest.approx(0, abs=1e-12)
    assert fall == sorted(fall, reverse=True)
    assert fall[len(fall) // 2] + fall[(len(fall) - 1) // 2] == pytest.approx(1)


@given(st.integers(1, 60), st.data())
def test_inside_and_outside_part_all_layers(count: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, count - 1))
    last = data.draw(st.integers(first, count - 1))
    zone = Zone(first, last, "auto", "")
    inside = chosen_layers("auto", count, zone)
    assert inside == chosen_layers(f"{first}-{last}", count) == tuple(range(first, last + 1))
    assert chosen_layers("all", count) == tuple(range(count))
    if len(inside) == count:
        with pytest.raises(RamoeError, match="leaves none"):
            chosen_layers("outside:auto", count, zone)
        return
    outside = chosen_layers("outside:auto", count, zone)
    assert outside == chosen_layers(f"outside:{first}-{last}", count)
    assert sorted(inside + outside) == list(range(count))


def test_what_is_wrong_with_layers_is_told_as_without_the_prefix() -> None:
    for text in ("auto", "5-2", "x"):
        with pytest.raises(RamoeError) as plain:
            parse_layers(text, 4, NoZone("flat"))
        with pytest.raises(RamoeError) as outside:
            chosen_layers(f"outside:{text}", 4, NoZone("flat"))
        assert str(plain.value) == str(outside.value)


def test_layers_for_a_reader() -> None:
    assert [span(layers) for layers in ((2, 3, 4), (1,), (0, 1, 4, 5))] == ["2-4", "1", "0, 1, 4, 5"]


@given(st.integers(0, 1000), st.integers(1, 3), st.integers(1, 12))
def test_random_experts_are_as_many_and_drawn_by_the_seed(seed: int, tasks: int, experts: int) -> None:
    mask = torch.rand(tasks, 4, experts, generator=torch.Generator().manual_seed(seed)) > 0.6
    drawn = random_experts(mask, seed)
    assert torch.equal(drawn.sum(-1), mask.sum(-1))
    assert torch.equal(drawn, random_experts(mask, seed))
    permuted = mask[..., torch.randperm(experts)]
    assert torch.equal(drawn, random_experts(permuted, seed))  # which experts the task has, it does not ask


def test_every_expert_is_drawn_equally_often() -> None:
    mask = torch.zeros(1, 500, 8, dtype=torch.bool)
    mask[..., :2] = True
    often = random_experts(mask, 3).float().mean(dim=(0, 1))
    assert (often - 0.25).abs().max() < 0.08
