"""Divergence against the gap between languages: by hand, by numpy, and in the files that are written."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_run import LANGUAGES, LAYERS, TASKS, write_run

from ramoe_megatron.report.comparison.assemble import compare
from ramoe_megatron.report.comparison.document import comparison_markdown
from ramoe_megatron.report.divergence_gap import gap_correlations, gap_points, split_by_unit
from ramoe_megatron.report.inputs import load_run
from ramoe_megatron.report.run_results import results_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("gap") / "run")


def test_the_gap_is_the_base_models_accuracy_in_english_minus_that_in_the_language(run: Path) -> None:
    found = load_run(run)
    base = next(each for each in found.evaluations if each.method == "base")

    def accuracy(language: str) -> float:
        own = [right for (_, spoken), right in base.examples.items() if spoken == language]
        return sum(own) / len(own)

    points, pairs = split_by_unit(gap_points(found))
    assert {(p["layer"], p["language"]) for p in points} == {
        (layer, language) for layer in range(LAYERS) for language in LANGUAGES[1:]
    }
    for point in points:
        assert point["gap"] == pytest.approx(accuracy("en") - accuracy(point["language"]))
    curve = {(row.moe_layer, row.language): row.divergence for row in found.divergence or ()}
    assert all(point["divergence"] == curve[point["layer"], point["language"]] for point in points)
    assert len(pairs) == LAYERS * len(LANGUAGES[1:]) * len(TASKS)
    for point in pairs:
        own = {
            language: [
                right
                for (id_, spoken), right in base.examples.items()
                if spoken == language and base.tasks[id_, spoken] == point["task"]
            ]
            for language in ("en", point["language"])
        }
        right = {language: sum(found) / len(found) for language, found in own.items()}
        assert point["gap"] == pytest.approx(right["en"] - right[point["language"]])


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=3, max_size=8), st.integers(0, 3))
def test_r_of_a_layer_is_numpys_and_other_layers_do_not_matter(
    pairs: list[tuple[int, int]], other: int
) -> None:
    points: list[dict[str, Any]] = [
        {"layer": 5, "language": str(n), "divergence": x / 50, "gap": y / 50}
        for n, (x, y) in enumerate(pairs)
    ]
    points += [{"layer": other, "language": str(n), "divergence": n / 9, "gap": n % 2} for n in range(4)]
    row = gap_correlations(points)[-1]
    assert (row["layer"], row["n"]) == (5, len(pairs))
    x, y = np.array(pairs, float).T
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert row["r"] is row["p"] is None
    else:
        assert row["r"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)
        assert row["low"] <= row["r"] <= row["high"]


def test_r_over_base_models_is_within_them() -> None:
    """Two base models, each with a falling line, of which one lies far above the other."""
    points = [
        {"layer": 0, "language": str(n), "divergence": n + 10 * base, "gap": 10 * base - n}
        for base in (0, 1)
        for n in range(4)
    ]
    together = gap_correlations(points)[0]
    within = gap_correlations(points, [str(n // 4) for n in range(8)])[0]
    assert together["r"] > 0.9
    assert within["r"] == pytest.approx(-1)


def test_fewer_than_three_languages_give_no_r() -> None:
    points = [{"layer": 0, "language": str(n), "divergence": n, "gap": n} for n in range(2)]
    assert gap_correlations(points) == [{"layer": 0, "n": 2, "r": None, "low": None, "high": None, "p": None}]


def test_results_and_comparison_have_it(run: Path) -> None:
    own = results_of(load_run(run))["divergence_gap"]
    found = compare([run])
    rows = [row for row in found["divergence_gap"]["correlations"] if row["base"] is None]
    for unit, expected in (("languages", own["layers"]), ("pairs", own["pairs"])):
        of_unit = [row for row in rows if row["unit"] == unit]
        assert [{key: row[key] for key in expected[0]} for row in of_unit] == expected
        assert len(expected) == LAYERS
    assert {row["n"] for row in own["pairs"]} == {len(LANGUAGES[1:]) * len(TASKS)}
    section = comparison_markdown(found, "c.json").partition("## Divergence against the gap")[2]
    assert f"| {LAYERS - 1} | r = " in section.partition("\n## ")[0]
