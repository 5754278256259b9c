"""Relations of the outcome to transplant test, ci share, routing mass, time and memory, worked by hand."""

import json
import math
from pathlib import Path

import pytest
from comparison_runs import TARGETS, plain, row, write_run

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.report.comparison.assemble import compare
from ramoe_megatron.report.comparison.document import comparison_markdown
from ramoe_megatron.report.comparison.relations import sign_hits


def test_transplant_hits_worked_by_hand(tmp_path: Path) -> None:
    changes = {("a", "es"): 0.1, ("a", "tr"): 0.1, ("b", "es"): -0.1, ("b", "tr"): 0.0}
    gains = {("a", "es"): 6, ("a", "tr"): 3, ("b", "es"): 2, ("b", "tr"): 9}
    folder = write_run(tmp_path / "one", {("sft", 1): {}, ("ra-moe", 1): gains}, transplant=changes)
    found = compare([folder])["transplant"]
    pairs = row(found["hits"], level="pairs", base=None)
    assert {name: pairs[name] for name in ("up_up", "up_down", "down_up", "down_down", "ties")} == {
        "up_up": 1,
        "up_down": 1,
        "down_up": 0,
        "down_down": 1,
        "ties": 1,
    }
    assert (pairs["hits"], pairs["n"], pairs["rate"]) == (2, 3, pytest.approx(2 / 3))
    assert (pairs["low"], pairs["high"]) == pytest.approx((0.2077, 0.9385), abs=1e-4)  # Wilson, 2 of 3
    # Fisher: up/up is 1 with probability 2/3, else 0 with 1/3; neither table is rarer than that.
    assert pairs["p"] == pytest.approx(1.0)
    assert pairs["expected"] == pytest.approx((2 * 1 + 1 * 2) / 9)
    # Task a: +0.1 and (2 - 1) / 20 up; task b: -0.05 and (-2 + 5) / 20 up; together +0.025 and +4 / 40.
    assert [(u["task"], u["outcome"]) for u in found["tasks"]] == [("a", "up_up"), ("b", "down_up")]
    assert [(u["base"], u["outcome"], u["gain"]) for u in found["bases"]] == [
        ("one", "up_up", pytest.approx(0.1))
    ]


def test_hits_without_a_sign_have_no_rate() -> None:
    assert sign_hits([{"outcome": "ties"}]) == {
        **dict.fromkeys(("up_up", "up_down", "down_up", "down_down", "hits", "n"), 0),
        "ties": 1,
        **dict.fromkeys(("rate", "low", "high", "p", "expected")),
    }
    uneven = {"up_up": 3, "up_down": 1, "down_down": 2, "ties": 4}
    six = sign_hits([{"outcome": outcome} for outcome, count in uneven.items() for _ in range(count)])
    assert (six["hits"], six["n"]) == (5, 6)
    # Hypergeometric, margins 4, 2 and 3, 3: up/up is 3 in 4 of 20 tables, and 1 in as many.
    assert (six["p"], six["expected"]) == pytest.approx((8 / 20, (4 * 3 + 2 * 3) / 36))


def test_signs_that_are_nearly_all_up_are_no_evidence_that_they_go_together() -> None:
    ten = sign_hits([{"outcome": "up_up"}] * 10)
    assert (ten["p"], ten["expected"], ten["rate"]) == (None, 1.0, 1.0)
    mostly = sign_hits([{"outcome": "up_up"}] * 18 + [{"outcome": "up_down"}] + [{"outcome": "down_up"}])
    assert mostly["hits"] == 18
    assert mostly["p"] == pytest.approx(1.0)


def test_ci_share_stands_beside_the_headroom_of_the_reference(tmp_path: Path) -> None:
    """Gains over base on a line in ci share: r = 1 for both, and undefined for their constant difference."""
    ci = {cell: place + 1 for place, cell in enumerate(TARGETS)}
    sft = {cell: 4 + share for cell, share in ci.items()}
    folder = write_run(
        tmp_path / "one", {("sft", 1): sft, ("ra-moe", 1): {c: n + 1 for c, n in sft.items()}}, ci=ci
    )
    found = compare([folder])["ci_gain"]
    for method in ("sft", "ra-moe"):
        assert row(found["correlations"], method=method, over="base", base=None)["r"] == pytest.approx(1)
    assert row(found["correlations"], method="ra-moe", over="reference", base=None)["r"] is None
    point = row(found["points"], method="ra-moe", task="b", language="tr")
    assert (point["ci_share"], point["over_base"], point["over_reference"]) == pytest.approx((0.4, 0.5, 0.1))


def test_r_is_within_base_models(tmp_path: Path) -> None:
    """Two base models with other ci shares and gains, without a relation within each: pooled, r is near 1."""
    folders = []
    for name, more in (("low", 0), ("high", 4)):
        ci = {cell: 1 + more + step for cell, step in zip(TARGETS, (0, 0, 1, 1), strict=True)}
        gains = {cell: 4 + more // 2 + step for cell, step in zip(TARGETS, (0, 1, 0, 1), strict=True)}
        folders.append(write_run(tmp_path / name, {("sft", 1): {}, ("ra-moe", 1): gains}, ci=ci))
    found = row(compare(folders)["ci_gain"]["correlations"], method="ra-moe", over="base", base=None)
    assert found["n"] == 8
    assert found["r"] == pytest.approx(0, abs=1e-9)


def test_uniform_mass_is_the_share_of_the_zones_experts_that_are_task_experts(tmp_path: Path) -> None:
    """Zone: layers 1 and 2 of 4 experts; task a has 1 and 3 there, task b none: a mean of 4 / 16."""
    folder = write_run(tmp_path / "one", plain("sft"))
    path = folder / "experts.safetensors"
    experts = ExpertFile.load(path)
    experts.expert_mask[:, 1:3] = False
    experts.expert_mask[0, 1, :1] = experts.expert_mask[0, 2, :3] = True
    experts.save(path)
    c = compare([folder])
    assert c["bases"][0]["uniform_mass"] == pytest.approx(0.25)
    assert (
        "Uniform routing would give 0.250: the share of the experts that are task experts."
        in comparison_markdown(c, "comparison.json")
    )


def test_mass_is_the_mean_over_the_zone(tmp_path: Path) -> None:
    """Zone: the two inner layers, 0.5 and 0.5 + 0.02 seed; seeds 1 to 5."""
    found = {r["method"]: r for r in compare([write_run(tmp_path / "one", plain("sft", "ra-moe"))])["mass"]}
    assert found["ra-moe"]["mass"] == pytest.approx(0.53)
    assert found["ra-moe"]["anchor"] == pytest.approx(0.93)
    assert found["ra-moe"]["against"]["change"] == pytest.approx(0.2)
    assert found["base"]["against"]["change"] == pytest.approx(0.2 - 0.33)


def test_cost_is_a_ratio_over_paired_seeds(tmp_path: Path) -> None:
    """Ratios 2 and 8 have the geometric mean 4. The first iteration is left out. SFT has no memory record."""

    def log(*times: float) -> str:
        return "".join(
            f" iteration {i} | elapsed time per iteration (ms): {t} | lm loss\n" for i, t in enumerate(times)
        )

    logs = {
        "sft-seed1": log(900, 10, 10, 10),
        "sft-seed2": log(900, 10),
        "ra-moe-seed1": log(900, 20, 20, 90),
    }
    logs["ra-moe-seed2"] = log(900, 80) + "ramoe: peak resident memory: 512.5 MiB\n"
    seconds = {("sft", 1): 10, ("sft", 2): 20, ("ra-moe", 1): 20, ("ra-moe", 2): 40}
    outcomes = {(method, seed): {} for seed in (1, 2) for method in ("sft", "ra-moe")}
    found = row(
        compare([write_run(tmp_path / "one", outcomes, logs=logs, seconds=seconds)])["cost"], method="ra-moe"
    )
    assert found["iteration"]["ratio"]["ratio"] == pytest.approx(4)
    # Student's quantile at one degree of freedom; log 4 and its neighbours at log 2.
    half = 12.7062 * math.log(2)
    assert found["iteration"]["ratio"]["high"] == pytest.approx(4 * math.exp(half), rel=1e-4)
    assert (found["wall"]["ratio"]["ratio"], found["wall"]["median"]) == (pytest.approx(2), 30)
    assert found["memory"] == {"median": 512.5, "ratio": None}


def test_a_cost_ratio_takes_its_spread_within_base_models(tmp_path: Path) -> None:
    """Ratios 2, 8 and 200, 800 in two base models: deviation log 2 in each, with 2 degrees of freedom."""
    folders = []
    for name, slower in (("one", 1), ("two", 100)):
        times = {"sft-seed1": 10, "sft-seed2": 10, "ra-moe-seed1": 20 * slower, "ra-moe-seed2": 80 * slower}
        logs = {run: f"elapsed time per iteration (ms): {time}.0\n" * 2 for run, time in times.items()}
        outcomes = {(method, seed): {} for seed in (1, 2) for method in ("sft", "ra-moe")}
        folders.append(write_run(tmp_path / name, outcomes, logs=logs))
    found = row(compare(folders)["cost"], method="ra-moe")["iteration"]["ratio"]
    assert found["ratio"] == pytest.approx(40)
    assert found["high"] == pytest.approx(
        40 * math.exp(4.302653 * math.sqrt(2 * 2 * math.log(2) ** 2 / 2 / 4)), rel=1e-5
    )


def test_hours_count_stages_side_by_side_once_and_breaks_not_at_all(tmp_path: Path) -> None:
    run = write_run(tmp_path / "one", {("sft", 1): {}, ("ra-moe", 1): {}})
    manifest = json.loads((run / "manifest.json").read_text())
    spans = {
        "a": ("12:00", "13:00"),
        "b": ("12:10", "12:20"),
        "c": ("12:30", "13:30"),
        "d": ("15:00", "15:15"),
    }
    manifest["stages"] = {
        name: {
            "state": "done",
            "started": f"2026-01-01T{start}:00+00:00",
            "ended": f"2026-01-01T{end}:00+00:00",
            "command": [],
        }
        for name, (start, end) in spans.items()
    } | {
        "failed": {
            "state": "failed",
            "started": "2026-01-01T16:00:00+00:00",
            "ended": "2026-01-01T20:00:00+00:00",
            "command": [],
        }
    }
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert compare([run])["bases"][0]["hours"] == pytest.approx(1.75)
