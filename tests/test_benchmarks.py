"""The benchmarks, run from end to end at a tiny shape, write what their tables and a reader need."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import profiling
from benchmarks.__main__ import Shown
from benchmarks.measure import WARM_UP, Ratio, alternate, peak_memory
from benchmarks.operations import Case
from benchmarks.tables import verdict
from ramoe_megatron.recipe.output import Progress

ROOT = Path(__file__).parents[1]
ROUNDS = 2


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    own = {"SHAPE": "tiny", "ROUNDS": str(ROUNDS), "OUT": str(folder), "PYTHON": sys.executable}
    command, environment = ["benchmarks/gpu.sh"], {**os.environ, **own, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    files = {"training": "training-base", "profiling": "profiling-base", "operations": "operations-tiny"}
    found = {name: json.loads((folder / f"{file}.json").read_text()) for name, file in files.items()}
    found["parity"] = json.loads((folder / "parity.json").read_text())
    return found | {"printed": done.stdout, "progress": done.stderr}


def test_progress_names_what_is_measured_and_how_far_it_is(figures: dict[str, Any]) -> None:
    lines = figures["progress"].splitlines()
    for what, rounds in (
        ("training of shape base: {} of {} rounds of 4 arms", WARM_UP + ROUNDS),
        ("training of shape base: {} of {} arms: memory and operations", 4),
        ("profiling of shape base: {} of {} rounds of 3 passes", profiling.WARM_UP + ROUNDS),
    ):
        assert any(line.startswith(what.format(1, rounds)) for line in lines)
        assert any(
            line.startswith(what.format(rounds, rounds)) and line.endswith("0 s left") for line in lines
        )


def test_the_estimate_is_the_time_of_the_rounds_so_far(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([100.0, 130.0, 131.0, 190.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    shown = Shown("it")
    for done in (1, 2, 3, 4):
        shown(Progress(done, 20, "rounds"))
    assert capsys.readouterr().err.splitlines() == [
        "it: 1 of 20 rounds",
        "it: 2 of 20 rounds, about 9.0 min left",
        "it: 4 of 20 rounds, about 8.0 min left",
    ]


def test_a_converted_model_in_bfloat16_is_near_float32(figures: dict[str, Any]) -> None:
    found = figures["parity"]["found"]
    assert set(found) == {"CPU, bfloat16"}
    assert 1e-3 < found["CPU, bfloat16"]["logits"] < 0.1
    assert 1e-3 < found["CPU, bfloat16"]["router gradients"] < 1


def test_alignment_adds_operations_where_it_aligns(figures: dict[str, Any]) -> None:
    arms = list(figures["training"]["arms"].values())
    stock, control, *aligned = [arm["operations"] for arm in arms]
    assert stock == control
    assert all(stock < count < 2 * stock for count in aligned)
    assert all(str(count) in figures["printed"] for count in (stock, *aligned))


def test_operations_of_a_layer_are_printed_for_each_option(figures: dict[str, Any]) -> None:
    cases = figures["operations"]["cases"]
    assert str(Case()) in cases
    for options, found in cases.items():
        (line,) = [
            line for line in figures["printed"].splitlines() if f"{options} " in line.replace("│", " ")
        ]
        assert f" {found['layer']} " in line
        assert f" {found['once']} " in line


def test_every_arm_takes_every_round(figures: dict[str, Any]) -> None:
    arms = figures["training"]["arms"]
    assert len(arms) == 4
    assert {len(arm[time]["seconds"]) for arm in arms.values() for time in ("wall", "cpu")} == {ROUNDS}
    assert all(
        label in figures["printed"]
        for label in ("stock Megatron", "bare forward pass", "Megatron's routing trace")
    )


def test_arms_compute_the_same_step_but_for_the_alignment(figures: dict[str, Any]) -> None:
    stock, control, *aligned = figures["training"]["arms"].values()
    for arm in (control, *aligned):
        assert arm["losses"]["lm loss"] == pytest.approx(stock["losses"]["lm loss"], rel=1e-6)
    assert "routing_alignment_loss" not in stock["losses"] | control["losses"]
    assert all(arm["losses"]["routing_alignment_loss"] > 0 for arm in aligned)


def test_weights_gradients_and_moments_are_counted_once(figures: dict[str, Any]) -> None:
    shape, arms = figures["training"]["shape"], figures["training"]["arms"]
    hidden, ffn, vocabulary = shape["hidden"], shape["ffn"], 640  # 517 pieces, padded to a multiple of 128
    expert, attention = 3 * hidden * ffn, 4 * hidden * hidden
    layer = shape["experts"] * (expert + hidden) + attention + 2 * hidden
    parameters = shape["layers"] * layer + vocabulary * hidden + hidden
    # Float32: the weight, its gradient, Adam's two moments, and a step counter for each tensor.
    for arm in arms.values():
        assert arm["bytes"]["between"] == pytest.approx(16 * parameters, rel=0.01)


def test_what_the_profile_keeps_does_not_grow_with_tokens(figures: dict[str, Any]) -> None:
    short, long = (figures["profiling"]["lengths"][length] for length in ("1x", "4x"))
    assert long["tokens"] > 3 * short["tokens"]
    kept = [[arm["kept_bytes"] for arm in length["passes"].values()] for length in (short, long)]
    shape = figures["profiling"]["shape"]
    assert kept[0][:2] == kept[1][:2] == [0, 5 * 4 * short["sequences"] * shape["layers"] * shape["experts"]]
    assert kept[1][2] > 3 * kept[0][2]


def test_a_ratio_has_its_interval() -> None:
    generator = np.random.default_rng(0)
    stock = generator.normal(1.0, 0.01, 41)
    ratio = Ratio.of(list(stock * 1.05), list(stock))
    # Noise that a round shares cancels.
    assert [ratio.low, ratio.value, ratio.high] == pytest.approx([1.05] * 3)
    noisy = Ratio.of(list(stock * 1.05), list(generator.normal(1.0, 0.2, 41)))
    assert noisy.high - noisy.low > ratio.high - ratio.low
    assert [verdict(ratio, target, at_most=True) for target in (1.1, 1.02)] == ["met", "missed"]
    assert verdict(noisy, noisy.value, at_most=True) == "open"


def test_the_order_within_a_round_turns() -> None:
    order: list[str] = []

    def arm(name: str) -> Any:
        return lambda: float(order.append(name) or len(order))

    seconds = alternate({name: arm(name) for name in "abc"}, rounds=2, warm_up=1)
    assert "".join(order) == "abcbcacab"
    assert seconds == {"a": [6.0, 8.0], "b": [4.0, 9.0], "c": [5.0, 7.0]}


def test_peak_memory_is_the_most_held_at_once() -> None:
    import torch

    def action() -> None:
        first = torch.zeros(1000)
        del first
        second = torch.zeros(2000)
        third = torch.zeros(500)
        del second, third

    assert peak_memory(action, on_cpu=True) == 4 * 2500
