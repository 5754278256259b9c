"""Methods over seeds and base models: pairs, intervals, corrections, verdicts and hits, worked by hand."""

import json
import math
import random
from pathlib import Path

import pytest
from comparison_runs import CELLS, SEEDS, TARGETS, N, plain, rising, row, write_run

from ramoe_megatron.report.comparison.assemble import compare
from ramoe_megatron.report.comparison.contrasts import claim_verdict
from ramoe_megatron.statistics import wilson

# ---- differences ----


def test_paired_seeds_of_two_base_models_worked_by_hand(tmp_path: Path) -> None:
    """Differences 1..5 fortieths in one base model, none in the other; t and its quantiles from tables."""
    one, two = write_run(tmp_path / "one", rising()), write_run(tmp_path / "two", plain("sft", "ra-moe"))
    alone = row(compare([one])["headline"], method="ra-moe")["against"]
    half = 2.776445 * math.sqrt(2.5 / 5) / 40
    assert (alone["change"], alone["low"], alone["high"]) == pytest.approx(
        (3 / 40, 3 / 40 - half, 3 / 40 + half), abs=1e-6
    )
    assert alone["p"] == pytest.approx(0.013236, abs=1e-5)
    assert (alone["n"], alone["seeds_higher"], alone["seeds_lower"]) == (5, 5, 0)
    both = compare([one, two])
    found = row(both["headline"], method="ra-moe")
    assert (found["bases"], found["seeds"], found["outcomes"], found["against"]["n"]) == (2, 5, 10, 10)
    assert found["accuracy"] == pytest.approx((0.4 * 10 * 40 + 5 + 15) / 400)
    # 8 degrees of freedom; the squares about each base model's own mean are 10 and 0.
    half = 2.306004 * math.sqrt(10 / 8 / 10) / 40
    assert found["against"]["change"] == pytest.approx(1.5 / 40)
    assert found["against"]["high"] == pytest.approx(1.5 / 40 + half, abs=1e-6)
    assert [b["change"] for b in found["against"]["by_base"]] == pytest.approx([3 / 40, 0])
    assert row(both["english"], method="ra-moe")["against"]["change"] == 0
    assert row(both["english"], method="ra-moe")["accuracy"] == pytest.approx(0.4)


def test_an_example_is_one_draw_in_every_language_seed_and_base_model(tmp_path: Path) -> None:
    """The interval over examples is the same however often the same answers were given."""
    runs = [
        write_run(tmp_path / name, {("sft", 1): {}, ("ra-moe", 1): dict.fromkeys(TARGETS, 6)})
        for name in ("one", "two")
    ]
    one, two = (row(compare(folders)["headline"], method="ra-moe")["against"] for folders in (runs[:1], runs))
    assert one["low"] is None  # a single seed
    # 4 of 20 ids gain in both languages: the sum of squares over clusters is 4 (2 * 0.8)^2 + 16 (2 * 0.2)^2 =
    # 12.8.
    half = 2.093024 * math.sqrt(20 / 19 * 12.8) / 40
    assert one["by_example"]["high"] == pytest.approx(0.2 + half, abs=1e-6)
    for end in ("change", "low", "high"):
        assert two["by_example"][end] == pytest.approx(one["by_example"][end])


def test_what_sets_base_models_apart_is_no_error_of_a_difference_between_methods(tmp_path: Path) -> None:
    """A constant between two base models does not change the width, and costs one degree of freedom."""
    apart = {seed: {("a", "es"): 5 + seed, ("b", "tr"): 8} for seed in SEEDS}
    outcomes = {**rising(), **{("ra-moe", seed): right for seed, right in apart.items()}}
    folders = [write_run(tmp_path / "one", rising()), write_run(tmp_path / "two", outcomes)]
    found = row(compare(folders)["headline"], method="ra-moe")["against"]
    assert found["change"] == pytest.approx(5 / 40)
    assert found["high"] - found["change"] == pytest.approx(2.306004 * math.sqrt(2.5 / 10) / 40, abs=1e-6)


def test_parallel_rows_of_a_fact_do_not_narrow_an_accuracy(tmp_path: Path) -> None:
    """Every fact answered alike in es and tr: the interval of 40 rows is that of the 20 facts."""
    alike = {("a", "es"): 6, ("a", "tr"): 6, ("b", "es"): 3, ("b", "tr"): 3}
    c = compare([write_run(tmp_path / "one", {("sft", 1): alike, ("sft", 2): alike})])
    found = row(c["headline"], method="sft")
    assert (found["n"], found["outcomes"], found["effective"]) == (80, 2, pytest.approx(2 * N))
    assert (found["low"], found["high"]) == pytest.approx(wilson(9, 20))
    cell = row(c["cells"], method="sft", task="a", language="es")
    assert (cell["low"], cell["high"], cell["effective"]) == pytest.approx((*wilson(6, 10), 10))


def test_change_from_the_base_model_is_over_the_examples_of_its_table(tmp_path: Path) -> None:
    """Targets fall by 2 of 40 rows, English rises by 3 of 20. Neither table shows the other's change."""
    right = {("a", "es"): 2, ("a", "en"): 7}
    c = compare([write_run(tmp_path / "one", {("sft", seed): right for seed in SEEDS})])
    assert row(c["headline"], method="sft")["from_base"]["change"] == pytest.approx(-2 / 40)
    assert row(c["english"], method="sft")["from_base"]["change"] == pytest.approx(3 / 20)
    assert row(c["headline"], method="base")["from_base"] is None


def test_an_outcome_without_a_seed_meets_every_seed_of_the_reference(tmp_path: Path) -> None:
    outcomes = {
        **{("sft", seed): {("a", "es"): seed} for seed in SEEDS},
        ("steering-soft", None): {("a", "es"): 9},
    }
    found = row(compare([write_run(tmp_path / "one", outcomes)])["headline"], method="steering-soft")
    assert [pair["change"] for pair in found["against"]["by_seed"]] == pytest.approx(
        [(9 - seed) / 40 for seed in SEEDS]
    )
    assert [pair["seed"] for pair in found["against"]["by_seed"]] == list(SEEDS)
    assert (found["outcomes"], found["seeds"], found["against"]["seeds_higher"]) == (1, 0, 5)


def test_no_figure_depends_on_the_order_of_files_lines_or_folders(tmp_path: Path) -> None:
    draw = random.Random(0)
    outcomes = {
        (m, s): {cell: draw.randint(0, 10) for cell in CELLS}
        for m in ("sft", "ra-moe", "random-experts")
        for s in SEEDS
    }
    folders = [
        write_run(tmp_path / "one", outcomes),
        write_run(tmp_path / "two", {**rising(), **plain("random-experts")}),
    ]
    before = compare(folders)
    for path in (tmp_path / "one/evaluations").glob("*.jsonl"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(draw.sample(lines, len(lines))))
    recipe = tmp_path / "one/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("- 1\n- 2\n- 3\n- 4\n- 5", "- 4\n- 1\n- 5\n- 3\n- 2"))
    after = compare(folders[::-1])
    for name in ("headline", "claims", "cells", "english", "mass", "ablation", "cost"):
        assert sorted(map(json.dumps, before[name])) == sorted(map(json.dumps, after[name]))


# ---- families and verdicts ----


def test_each_family_is_corrected_by_itself(tmp_path: Path) -> None:
    """Three methods with p, p and 1. Holm: 3p, 3p (not below the first), 1. Benjamini-Hochberg: 3p/2, 3p/2,
    1."""
    outcomes = {**plain("same"), **rising("ra-moe"), **rising("other", -1)}
    for seed in SEEDS:
        outcomes["same", seed] = {("a", "es"): 5}
    c = compare([write_run(tmp_path / "one", outcomes)])
    p = 0.0132363
    adjusted = {
        r["method"]: (r["against"]["p_holm"], r["against"]["p_bh"]) for r in c["headline"] if r["against"]
    }
    assert adjusted == {
        "ra-moe": pytest.approx((3 * p, 1.5 * p), abs=1e-5),
        "other": pytest.approx((3 * p, 1.5 * p), abs=1e-5),
        "same": (1.0, 1.0),
    }
    # 3 methods x 4 cells: two cells hold a difference, the ten others none at all.
    cell = row(c["cells"], method="ra-moe", task="a", language="es")["against"]
    assert cell["change"] == pytest.approx(3 / 10)
    assert cell["p_holm"] == pytest.approx(12 * p, abs=1e-4)


@pytest.mark.parametrize(
    ("low", "high", "p_holm", "word"),
    [
        (1e-9, 1.0, 0.05, "supported"),
        (1e-9, 1.0, 0.051, "supported before correction only"),
        (0.0, 1.0, 0.01, "not shown"),
        (-1.0, 0.0, 0.01, "not shown"),
        (-1.0, -1e-9, 0.05, "contradicted"),
        (-1.0, -1e-9, 0.051, "contradicted before correction only"),
        (None, None, None, "not shown"),
    ],
)
def test_a_verdict_needs_the_whole_interval_and_the_corrected_p(
    low: float, high: float, p_holm: float, word: str
) -> None:
    assert claim_verdict({"low": low, "high": high, "p_holm": p_holm}) == word
