"""What it is for two runs of the layout tables to be the same."""

from pathlib import Path

import pytest
from layout_errors import note
from layout_rows import ROWS
from small_run import gradients, outcome

BOUND = 1e-5  # relative, in float32; measured: up to 3e-6


def assert_same(world: Path, name: str, reference: str, scale: float = 1.0, bound: float = BOUND) -> None:
    """The router gradients of a run, divided by `scale`, and its logged figures are those of another."""
    expected, found = gradients(world, reference), gradients(world, name)
    assert sorted(found) == sorted(expected)
    for layer, gradient in expected.items():
        difference = (found[layer] / scale - gradient).norm()
        note(name, float(difference / gradient.norm()) if difference else 0.0)
        # where it is 0, exactly 0
        assert difference <= bound * gradient.norm(), f"layer {layer}: {difference} of {gradient.norm()}"
    assert_same_figures(world, name, reference, bound)


def assert_same_figures(world: Path, name: str, reference: str, bound: float = BOUND) -> None:
    """What each step logged; where the other run logged 0, exactly 0."""
    found, expected = outcome(world, name)["steps"], outcome(world, reference)["steps"]
    assert len(found) == len(expected) == ROWS[name].steps
    for step, figures in enumerate(expected):
        assert figures, "nothing logged"
        assert found[step] == pytest.approx(figures, rel=bound * (1 + 10 * step), abs=0), f"step {step + 1}"
