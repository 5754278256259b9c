"""Laws of the weights by which a divergence curve lets its layers count."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.divergence import MIN_DEPTH
from ramoe_megatron.method.layer_weights import divergence_weights


@st.composite
def curves(draw: st.DrawFn) -> tuple[torch.Tensor, list[int]]:
    """A curve that is not flat, and some layers in any order, the lowest among them."""
    values = draw(st.lists(st.integers(1, 40).map(lambda n: n / 100), min_size=2, max_size=24))
    curve = torch.tensor([*values, 0.5 * min(values)], dtype=torch.float64)
    curve = curve[torch.tensor(draw(st.permutations(range(len(curve)))))]
    others = draw(st.lists(st.integers(0, len(curve) - 1), unique=True))
    lowest = int(curve.argmin())
    return curve, draw(st.permutations([lowest, *(layer for layer in others if layer != lowest)]))


@given(curves())
def test_weights_have_mean_one_and_fall_as_divergence_rises(case: tuple[torch.Tensor, list[int]]) -> None:
    curve, layers = case
    weights = divergence_weights(curve, layers)
    assert weights.shape == (len(layers),)
    assert weights.mean().item() == pytest.approx(1)
    assert (weights >= 0).all()
    for i, a in enumerate(layers):
        for j, b in enumerate(layers):
            assert (curve[a] < curve[b]) == bool(weights[i] > weights[j])  # so equal layers weigh equally
            if curve[a] == curve.max():
                assert weights[i] == 0


@given(curves(), st.floats(0.01, 100), st.floats(0, 0.2))
def test_scaling_and_shifting_the_curve_change_nothing(
    case: tuple[torch.Tensor, list[int]], scale: float, shift: float
) -> None:
    curve, layers = case
    weights = divergence_weights(curve, layers)
    torch.testing.assert_close(divergence_weights(scale * curve, layers), weights)
    depth = curve.max() - curve.min()
    if depth > MIN_DEPTH * (curve.max() + shift) + 1e-9:
        torch.testing.assert_close(divergence_weights(curve + shift, layers), weights, atol=1e-9, rtol=1e-9)


@given(curves(), st.randoms(use_true_random=False))
def test_weights_follow_their_layers(case: tuple[torch.Tensor, list[int]], rng: object) -> None:
    curve, layers = case
    order, depth = list(range(len(layers))), list(range(len(curve)))
    rng.shuffle(order)  # type: ignore[attr-defined]
    rng.shuffle(depth)  # type: ignore[attr-defined]
    weights = divergence_weights(curve, layers)
    torch.testing.assert_close(divergence_weights(curve, [layers[i] for i in order]), weights[order])
    torch.testing.assert_close(
        divergence_weights(curve[depth], [depth.index(layer) for layer in layers]), weights
    )


def test_weights_by_hand_are_taken_over_all_layers() -> None:
    curve = torch.tensor([0.6, 0.3, 0.1, 0.2, 0.5])
    # (0.6 - D) / 0.5 is 0.6, 1.0, 0.8 at layers 1 to 3: mean 0.8
    torch.testing.assert_close(
        divergence_weights(curve, [1, 2, 3]), torch.tensor([0.75, 1.25, 1.0], dtype=torch.float64)
    )
    assert divergence_weights(curve, [4]).tolist() == [1.0]  # one layer has nothing to be weighed against


@pytest.mark.parametrize(
    ("curve", "layers", "told"),
    [
        ([0.5, math.nan, 0.1], [0, 2], "no defined divergence at MoE layer 1"),
        ([0.5, 0.1, math.inf], [1], "no defined divergence at MoE layer 2"),
        ([0.5, 0.4, 0.45], [1], "flat .0.4000 to 0.5000.*do not differ enough"),
        ([0.0, 0.0, 0.0], [1], "flat"),
        ([0.5, 0.1, 0.5], [0, 2], "layers 0, 2 have the highest .*would be 0"),
        ([0.5, 0.1, 0.5], [], "found layers .., expected some of 0 to 2"),
        ([0.5, 0.1, 0.5], [1, 1], "each once"),
        ([0.5, 0.1, 0.5], [1, 3], "expected some of 0 to 2"),
        ([0.5, 0.1, 0.5], [-1, 1], "expected some of 0 to 2"),
    ],
)
def test_curves_and_layers_without_weights_are_refused(
    curve: list[float], layers: list[int], told: str
) -> None:
    with pytest.raises(RamoeError, match=told):
        divergence_weights(torch.tensor(curve, dtype=torch.float64), layers)
