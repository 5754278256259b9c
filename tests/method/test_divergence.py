"""Laws of the divergence curve and of the zone read off it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.divergence import (
    DivergenceCurve,
    DivergenceRow,
    NoZone,
    Zone,
    hjs,
    mean_curve,
    zone_from_curve,
)
from ramoe_megatron.method.layers import parse_layers

seeds = st.integers(0, 2**31)


def distributions(*shape: int, seed: int, sharpness: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(*shape, generator=generator, dtype=torch.float64)).softmax(-1)


@given(seeds, st.integers(2, 9))
def test_hjs_is_symmetric_in_zero_to_one_and_zero_at_equality(seed: int, experts: int) -> None:
    a, b = distributions(2, 4, experts, seed=seed)
    value, defined = hjs(a, b)
    assert defined.all()
    assert ((value > 0) & (value <= 1)).all()
    torch.testing.assert_close(hjs(b, a)[0], value)
    torch.testing.assert_close(hjs(a, a)[0], torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)


@given(seeds, st.integers(2, 9), st.randoms(use_true_random=False))
def test_hjs_does_not_depend_on_the_order_of_experts_nor_on_unused_ones(
    seed: int, experts: int, rng: object
) -> None:
    a, b = distributions(2, 4, experts, seed=seed)
    a[:, 0] = 0.0
    a = a / a.sum(-1, keepdim=True)
    order = list(range(experts))
    rng.shuffle(order)  # type: ignore[attr-defined]
    torch.testing.assert_close(hjs(a[:, order], b[:, order])[0], hjs(a, b)[0])
    # An unused expert widens log E alone: the JSD, numerator of both, stays.
    wider = [torch.cat([q, torch.zeros(4, 1, dtype=q.dtype)], -1) for q in (a, b)]
    entropy = -(torch.special.xlogy(a, a) + torch.special.xlogy(b, b)).sum(-1) / 2
    jsd = hjs(a, b)[0] * (math.log(experts) - entropy)
    torch.testing.assert_close(hjs(*wider)[0] * (math.log(experts + 1) - entropy), jsd)


def test_hjs_closed_forms() -> None:
    corner, other, uniform = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5])
    assert hjs(corner, other)[0].item() == pytest.approx(1.0)
    # JSD = H(3/4, 1/4) - log(2)/2 over log 2 - log(2)/2
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert hjs(corner, uniform)[0].item() == pytest.approx((entropy - math.log(2) / 2) / (math.log(2) / 2))
    wide = torch.zeros(4)
    wide[0] = 1.0
    shifted = wide.roll(1)
    assert hjs(wide, shifted)[0].item() == pytest.approx(math.log(2) / math.log(4))


def test_two_uniform_distributions_are_undefined_and_give_no_nan() -> None:
    uniform = torch.full((3, 8), 1 / 8)
    value, defined = hjs(uniform, uniform)
    assert not defined.any()
    assert value.tolist() == [0.0] * 3


@given(seeds, st.integers(0, 6))
def test_the_curve_is_the_mean_of_defined_pairs_in_whatever_pieces(seed: int, cut: int) -> None:
    q_en, q_tg = distributions(2, 6, 3, 4, seed=seed)
    q_en[2, 1] = q_tg[2, 1] = 0.25  # one undefined pair, at layer 1
    tasks = torch.tensor([0, 1, 1, 0, 0, 1])
    curve, first, second = (DivergenceCurve(["a", "b"], ["sw", "tr"], 3) for _ in range(3))
    curve.add("tr", tasks, q_en, q_tg)
    first.add("tr", tasks[:cut], q_en[:cut], q_tg[:cut])
    second.add("tr", tasks[cut:], q_en[cut:], q_tg[cut:])
    first.sums += second.sums
    torch.testing.assert_close(first.sums, curve.sums)
    sw, tr = curve.rows([2, 4, 6])[:3], curve.rows([2, 4, 6])[3:]
    assert [(row.divergence, row.pairs, row.undefined_pairs) for row in sw] == [(None, 0, 0)] * 3
    assert [(row.moe_layer, row.layer_number) for row in tr] == [(0, 2), (1, 4), (2, 6)]
    assert [(row.pairs, row.undefined_pairs) for row in tr] == [(6, 0), (5, 1), (6, 0)]
    value, defined = hjs(q_en, q_tg)
    for layer, row in enumerate(tr):
        assert row.divergence == pytest.approx(value[defined[:, layer], layer].mean().item())
    by_task = curve.rows_by_task([2, 4, 6])
    assert [(row.task, row.language, row.moe_layer) for row in by_task] == [
        (task, "tr", layer) for task in "ab" for layer in range(3)
    ]
    for row in by_task:
        own = defined[:, row.moe_layer] & (tasks == "ab".index(row.task or ""))
        assert (row.pairs, row.undefined_pairs) == (int(own.sum()), 3 - int(own.sum()))
        assert row.divergence == pytest.approx(value[own, row.moe_layer].mean().item())


def test_a_language_that_was_not_announced_is_refused() -> None:
    with pytest.raises(RamoeError, match="found language 'xx', expected one of tr, sw"):
        DivergenceCurve(["a"], ["tr", "sw"], 2).add(
            "xx", torch.zeros(1).long(), torch.ones(1, 2, 2), torch.ones(1, 2, 2)
        )


def test_languages_weigh_equally_in_the_mean_curve() -> None:
    rows = [
        DivergenceRow("tr", 0, 1, 0.2, 1000, 0),
        DivergenceRow("tr", 1, 2, None, 0, 3),
        DivergenceRow("sw", 0, 1, 0.4, 1, 0),
        DivergenceRow("sw", 1, 2, None, 0, 3),
    ]
    curve = mean_curve(rows)
    assert curve[0].item() == pytest.approx(0.3)
    assert curve[1].isnan()


# --- zone ---


def u_curve(layers: int, bottom: float, low: float = 0.1, high: float = 0.6) -> torch.Tensor:
    """Parabola with its lowest point at a share of depth, the higher rim at ``high``."""
    depth = torch.linspace(0, 1, layers, dtype=torch.float64)
    shape = (depth - bottom) ** 2
    return low + (high - low) * shape / shape.max()


@given(st.integers(6, 64), st.floats(0.35, 0.65), st.floats(0.01, 100))
def test_the_zone_of_a_u_is_its_floor_whatever_the_scale(layers: int, bottom: float, scale: float) -> None:
    curve = u_curve(layers, bottom)
    zone = zone_from_curve(curve)
    assert isinstance(zone, Zone)
    assert zone.how == "auto"
    assert abs((zone.first + zone.last) / 2 - bottom * (layers - 1)) <= 1.0
    assert 0 < zone.first <= zone.last < layers - 1
    outside = torch.cat([curve[: zone.first - 1], curve[zone.last + 2 :]])  # but the layer at either edge
    if len(outside):
        assert curve[zone.first : zone.last + 1].mean() < outside.min()
    scaled = zone_from_curve(curve * scale)
    assert isinstance(scaled, Zone)
    assert (scaled.first, scaled.last) == (zone.first, zone.last)


@given(st.integers(6, 64), st.floats(0.3, 0.7))
def test_mirroring_the_curve_mirrors_the_zone(layers: int, bottom: float) -> None:
    generator = torch.Generator().manual_seed(layers)
    curve = u_curve(layers, bottom) + 1e-4 * torch.rand(layers, generator=generator, dtype=torch.float64)
    zone, mirrored = zone_from_curve(curve), zone_from_curve(curve.flip(0))
    assert isinstance(zone, Zone)
    assert isinstance(mirrored, Zone)
    assert (mirrored.first, mirrored.last) == (layers - 1 - zone.last, layers - 1 - zone.first)


@given(st.integers(12, 64), st.floats(0.4, 0.6), seeds)
def test_small_noise_and_one_odd_layer_move_the_edges_little(layers: int, bottom: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    curve = u_curve(layers, bottom)
    noisy = curve + 0.01 * torch.randn(layers, generator=generator, dtype=torch.float64).clamp(-2, 2)
    noisy[layers // 2] = 0.6
    zone, found = zone_from_curve(curve), zone_from_curve(noisy)
    assert isinstance(zone, Zone)
    assert isinstance(found, Zone)
    slack = max(2, layers // 10)
    assert abs(found.first - zone.first) <= slack
    assert abs(found.last - zone.last) <= slack


@given(st.integers(6, 64), st.floats(0.3, 0.7), st.floats(0.01, 0.99), seeds)
def test_noise_too_small_to_carry_a_layer_over_the_level_changes_nothing(
    layers: int, bottom: float, size: float, seed: int
) -> None:
    """Noise moves each median, and the level between floor and lower rim, by at most its own size."""
    curve = u_curve(layers, bottom)
    smooth = torch.cat([curve[:1], curve.unfold(0, 3, 1).median(-1).values, curve[-1:]])
    floor = smooth.argmin()
    level = (smooth[floor] + min(smooth[: floor + 1].max(), smooth[floor:].max())) / 2
    noise = 2 * torch.rand(layers, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1
    zone, found = (
        zone_from_curve(curve),
        zone_from_curve(curve + size * (smooth - level).abs().min() / 2 * noise),
    )
    assert isinstance(zone, Zone)
    assert isinstance(found, Zone)
    assert (found.first, found.last) == (zone.first, zone.last)


@given(st.integers(3, 48), st.floats(0.0, 1.0), seeds)
def test_a_flat_curve_has_no_zone(layers: int, height: float, seed: int) -> None:
    noise = torch.rand(layers, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = zone_from_curve(height * (1 + 0.1 * noise))
    assert isinstance(found, NoZone)
    assert "flat" in found.reason


@given(st.integers(5, 48), st.floats(0.45, 0.55), seeds)
def test_an_inverted_curve_has_no_zone_noise_or_not(layers: int, top: float, seed: int) -> None:
    noise = torch.rand(layers, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = zone_from_curve(0.8 - u_curve(layers, top) + 0.01 * noise)
    assert isinstance(found, NoZone)
    assert "inverted" in found.reason


@given(st.integers(3, 48))
def test_a_curve_with_one_rim_has_no_zone(layers: int) -> None:
    rising = torch.linspace(0.1, 0.6, layers)
    for curve, reason in [
        (rising, "rises from the first layer"),
        (rising.flip(0), "falls towards the last layer"),
    ]:
        found = zone_from_curve(curve)
        assert isinstance(found, NoZone)
        assert reason in found.reason


def test_undefined_layers_and_short_models_have_no_zone() -> None:
    undefined = zone_from_curve(torch.tensor([0.5, math.nan, 0.1, 0.5]))
    assert undefined == NoZone("no defined divergence at MoE layer 1")
    short = zone_from_curve(torch.tensor([0.5, 0.1]))
    assert isinstance(short, NoZone)
    assert "too few" in short.reason


# --- ranges ---


@given(st.integers(1, 96), st.data())
def test_integers_are_layer_numbers(layers: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, layers - 1))
    last = data.draw(st.integers(first, layers - 1))
    assert parse_layers(f"{first}-{last}", layers) == (first, last)
    assert parse_layers("auto", layers, Zone(first, last, "auto", "")) == (first, last)


@given(st.integers(1, 96), st.integers(0, 99), st.integers(1, 100))
def test_decimals_are_depths_of_layer_middles(layers: int, low: int, high: int) -> None:
    text = f"{low / 100:.2f}-{high / 100:.2f}"
    inside = [layer for layer in range(layers) if low * layers <= (layer + 0.5) * 100 <= high * layers]
    if low < high and inside:
        assert parse_layers(text, layers) == (inside[0], inside[-1])
    else:
        with pytest.raises(RamoeError, match=text):
            parse_layers(text, layers)


def test_the_documented_examples() -> None:
    assert parse_layers("0.0-1.0", 7) == (0, 6)
    assert parse_layers("0.25-0.75", 24) == (6, 17)
    assert parse_layers("0-1", 7) == (0, 1)
    assert parse_layers(" 8 - 35 ", 48) == (8, 35)


@pytest.mark.parametrize("text", ["", "all", "8", "8-", "3-0.5", "-1-3", "0.7-0.3", "0.5-1.5", "5-2", "2-6"])
def test_other_ranges_are_refused_with_what_was_found(text: str) -> None:
    with pytest.raises(RamoeError, match=rf"layers: .*'{text}'.*(expected|give)"):
        parse_layers(text, 6)


def test_auto_without_a_zone_says_why_and_asks_for_a_range() -> None:
    with pytest.raises(
        RamoeError, match=r"the divergence curve is flat: 0.1 to 0.1\); give the range yourself"
    ):
        parse_layers("auto", 6, NoZone("the divergence curve is flat: 0.1 to 0.1"))
    with pytest.raises(RamoeError, match="no divergence curve was measured"):
        parse_layers("auto", 6)
    with pytest.raises(RamoeError, match=r"MoE layers 2 to 9, expected a rising range within 0 to 5"):
        parse_layers("auto", 6, Zone(2, 9, "auto", ""))


@pytest.mark.parametrize("odd", [0.05, 0.95])
@pytest.mark.parametrize("layer", range(1, 7))
def test_one_odd_layer_makes_no_zone(odd: float, layer: int) -> None:
    curve = torch.full((8,), 0.5, dtype=torch.float64)
    curve[layer] = odd
    assert isinstance(zone_from_curve(curve), NoZone)
