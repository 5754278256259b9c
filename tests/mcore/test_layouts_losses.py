"""Beside Megatron's own losses at the routers, and in reduced precision: the alignment's gradient is still the same."""

from pathlib import Path

import pytest
from layout_laws import BOUND, assert_same, assert_same_figures
from layout_rows import OTHERS, PRECISIONS, ROWS
from small_run import gradients, outcome


@pytest.mark.parametrize("name", OTHERS)
def test_gradients_add(layouts: Path, name: str) -> None:
    """With both, less without alignment, is the alignment alone on one rank. True in every layout, also where another loss changes
    (global_aux_loss with data parallelism, the language-model loss with the micro-batch when samples differ in loss tokens).

    The bound is that of float32 sums: the difference of two gradients carries the rounding of the larger one.
    """
    alone = f"one-alone{'-tokens' * name.endswith('-tokens')}"
    both, other, expected = (gradients(layouts, row) for row in (f"{name}-both", f"{name}-stock", alone))
    for layer, gradient in expected.items():
        assert other[layer].norm() > 1e-4, "the other loss is not there"
        difference = (both[layer] - other[layer] - gradient).norm()
        assert difference <= BOUND * gradient.norm() + 1e-6 * other[layer].norm(), f"layer {layer}: {difference} of {gradient.norm()}"
    assert_same_figures(layouts, f"{name}-both", alone)


def test_a_loss_of_megatrons_that_changes_with_the_layout_is_among_them(layouts: Path) -> None:
    """Why the law above speaks of a difference: global_aux_loss is not the same on two data-parallel ranks and on two that share each
    sample."""
    one, two = gradients(layouts, "global_aux_loss-tp-stock"), gradients(layouts, "global_aux_loss-dp-stock")
    assert all((two[layer] - one[layer]).norm() > 1e-2 * one[layer].norm() for layer in one)


REDUCED = {"bfloat16": 8e-2, "float16": 2e-2, "float16-16": 2e-2}
"""Bounds of the relative error against float32. Logits and weights carry 8 (bfloat16) or 11 (float16) bits: 2^-8 = 4e-3 and
2^-11 = 5e-4 at each rounding, over three layers and back. Measured: 1e-2 and 2e-3 at the aligned layers, 5e-2 and 1e-2 at the layer
before them, which the gradient reaches through experts. The samples are some of which no token has its second and third expert so
close that rounding swaps them: a swap is another routing, and moves these gradients by 10 to 30 %."""


@pytest.mark.parametrize("name", [name for name in ROWS if name.startswith(tuple(PRECISIONS))])
def test_reduced_precision_is_float32_within_its_rounding(layouts: Path, name: str) -> None:
    precision, _, kind = name.partition("-alone")
    precision = precision.rpartition("-")[0]
    assert_same(layouts, name, f"float32-alone{kind}", PRECISIONS[precision][1], REDUCED[precision])


@pytest.mark.parametrize("kind", ["alone", "alone-tokens"])
def test_the_loss_scale_of_float16_cancels(layouts: Path, kind: str) -> None:
    """1024 and 16: the same but for what 16 lets fall below float16's range."""
    large, small = (gradients(layouts, f"{name}-one-{kind}") for name in ("float16", "float16-16"))
    for layer, gradient in small.items():
        assert (large[layer] / 1024 - gradient / 16).norm() <= 1e-3 * (gradient / 16).norm()
    steps = [outcome(layouts, f"{name}-one-{kind}")["steps"] for name in ("float16", "float16-16")]
    assert steps[0] == steps[1]  # the log knows no loss scale
