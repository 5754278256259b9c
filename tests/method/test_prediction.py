"""Laws of what is measured before training."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramoe_megatron.artifacts.files import load_document, save_document
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.categories import TaxonomyRow, summarise
from ramoe_megatron.method.divergence import DivergenceRow
from ramoe_megatron.method.prediction import (
    PAPER_N,
    PAPER_R,
    RECORD,
    TransplantOutcome,
    predict,
    zone_divergence,
)
from ramoe_megatron.statistics import paired_proportions, pearson

TAXONOMY = summarise(
    TaxonomyRow(f"{task}{i}", task, language, "test", True, i % share == 0)
    for task in ("currency", "month")
    for language, share in (("sw", 4), ("tr", 2))
    for i in range(12)
)
DIVERGENCE = [DivergenceRow("tr", layer, layer + 1, 0.1 * layer, 9, 0) for layer in range(4)]


def outcomes(gained: int, lost: int, same: int) -> list[TransplantOutcome]:
    """Examples of one pair, each an id of its own."""
    kinds = [(False, True)] * gained + [(True, False)] * lost + [(True, True)] * same
    return [TransplantOutcome(f"id{i}", "currency", "tr", *kind) for i, kind in enumerate(kinds)]


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30))
def test_the_reading_says_when_the_interval_holds_zero(gained: int, lost: int, same: int) -> None:
    found, mirrored = (
        predict(TAXONOMY, DIVERGENCE, (1, 2), outcomes(*counts, same), "test").verdict
        for counts in ((gained, lost), (lost, gained))
    )
    transplant = found.get("transplant", {})
    if "low" in transplant:
        assert found["record"] == RECORD
        assert ("holds zero" in found["reading"]) == (transplant["low"] <= 0 <= transplant["high"])
        assert f"{100 * transplant['change']:+.1f} points" in found["reading"]
        assert found["tasks"]["currency"] == {key: transplant[key] for key in ("change", "low", "high")}
        assert mirrored["transplant"]["change"] == pytest.approx(-transplant["change"])


def test_what_was_not_measured_is_no_number() -> None:
    assert predict(TAXONOMY, [], (0, 1), [], "test").verdict["reading"] == "The transplant test was not run."
    one = predict(TAXONOMY, [], (0, 1), outcomes(1, 0, 0), "test").verdict
    assert "too few examples" in one["reading"]
    assert one["tasks"]["currency"]["low"] is None


def test_the_same_example_in_more_languages_adds_no_certainty() -> None:
    one = outcomes(9, 3, 10)
    six = [TransplantOutcome(o.id, o.task, lang, o.plain, o.transplanted) for o in one for lang in "abcdef"]
    narrow, wide = (predict(TAXONOMY, [], (0, 1), o, "test").verdict["transplant"] for o in (one, six))
    assert (wide["examples"], wide["ids"], narrow["examples"]) == (132, 22, 22)
    for key in ("change", "low", "high", "p"):
        assert wide[key] == pytest.approx(narrow[key])


def test_each_row_has_its_own_numbers_and_none_where_nothing_was_measured() -> None:
    tested = outcomes(4, 1, 5)
    found = predict(TAXONOMY, DIVERGENCE, (1, 2), tested, "test")
    rows = {(row.task, row.language): row for row in found.rows}
    assert list(rows) == [(task, language) for task in ("currency", "month") for language in ("sw", "tr")]
    own = rows["currency", "tr"]
    expected = paired_proportions([o.transplanted for o in tested], [o.plain for o in tested])
    assert (own.target_accuracy, own.transplant_accuracy) == (0.6, 0.9)
    assert (own.transplant_change, own.transplant_low, own.transplant_high) == (
        expected.change,
        expected.low,
        expected.high,
    )
    assert own.divergence == pytest.approx(0.15)
    assert own.ci_share == 0.5
    assert rows["currency", "sw"].transplant_change is None
    assert rows["currency", "sw"].divergence is None


def test_zone_divergence_leaves_out_undefined_layers() -> None:
    rows = [DivergenceRow("tr", 0, 1, 0.3, 5, 0), DivergenceRow("tr", 1, 2, None, 0, 5)]
    assert zone_divergence(rows, "tr", (0, 1)) == 0.3
    assert zone_divergence(rows, "tr", (1, 1)) is None


def test_the_papers_correlation_is_quoted_with_its_interval_and_no_slope() -> None:
    text = predict(TAXONOMY, [], (0, 1), [], "test").verdict["paper"]
    # An interval for the same r and n, from points built to have exactly that correlation.
    x = [math.cos(2 * math.pi * k / PAPER_N) for k in range(PAPER_N)]
    y = [
        PAPER_R * c + math.sqrt(1 - PAPER_R**2) * math.sin(2 * math.pi * k / PAPER_N) for k, c in enumerate(x)
    ]
    exact = pearson(x, y)
    assert exact is not None
    assert exact.r == pytest.approx(PAPER_R)
    assert exact.p == pytest.approx(0.001, abs=5e-4)
    for part in ("r = 0.70", "we infer", f"{exact.low:.2f} to {exact.high:.2f}", "no slope"):
        assert part in text


def test_another_split_is_refused_with_those_found() -> None:
    with pytest.raises(RamoeError, match="no pairs of split 'dev', found test; score that split"):
        predict(TAXONOMY, DIVERGENCE, (0, 1), [], "dev")


def test_the_document_is_valid_with_and_without_a_test(tmp_path: Path) -> None:
    for tested in ([], outcomes(1, 0, 0), outcomes(0, 0, 3), outcomes(5, 1, 9)):
        prediction = predict(TAXONOMY, DIVERGENCE, (0, 3), tested, "test")
        save_document(tmp_path / "predict.json", "ramoe-prediction", prediction.document())
        assert load_document(tmp_path / "predict.json", "ramoe-prediction")["verdict"] == prediction.verdict
        assert prediction.limits
