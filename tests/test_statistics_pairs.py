"""Laws of correlations and differences of paired values, with closed forms worked out by hand."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.statistics import (
    clustered_difference,
    paired_proportions,
    pearson,
    stratified_difference,
)

Z = stats.norm.ppf(0.975)
values = st.lists(st.integers(-50, 50).map(float), min_size=3, max_size=20)
outcomes = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)


@given(values, st.data())
def test_pearson_is_symmetric_scale_free_and_turns_with_the_sign(x: list[float], data: st.DataObject) -> None:
    y = data.draw(st.lists(st.integers(-50, 50).map(float), min_size=len(x), max_size=len(x)))
    found = pearson(x, y)
    if found is None:
        assert min(len(set(x)), len(set(y))) == 1
        return
    assert -1 <= found.low <= found.r <= found.high <= 1
    mirrored = pearson(y, [-3 * v + 1 for v in x])
    assert mirrored is not None
    assert mirrored.r == pytest.approx(-found.r, abs=1e-9)
    assert mirrored.p == pytest.approx(found.p, abs=1e-6)
    if len(x) > 3 and abs(found.r) < 0.999:
        assert math.atanh(found.high) - math.atanh(found.low) == pytest.approx(2 * Z / math.sqrt(len(x) - 3))


def test_pearson_of_a_line_is_one_and_of_too_little_is_none() -> None:
    line = pearson([0.0, 1.0, 2.0, 3.0], [1.0, 3.0, 5.0, 7.0])
    assert line is not None
    assert (line.r, line.low, line.high) == pytest.approx((1, 1, 1))
    assert pearson([0.0, 1.0], [0.0, 1.0]) is None
    assert pearson([1.0, 1.0, 1.0], [0.0, 1.0, 2.0]) is None
    three = pearson([0.0, 1.0, 2.0], [0.0, 1.0, 1.0])
    assert three is not None
    assert (three.low, three.high) == (-1.0, 1.0)
    with pytest.raises(RamoeError, match="found 3 and 2 values"):
        pearson([1.0, 2.0, 3.0], [1.0, 2.0])


def test_pearson_within_groups_worked_by_hand_and_blind_to_what_sets_groups_apart() -> None:
    """Minus the groups' means: x -1 0 1 -1 0 1, y -1 1 0 -1 0 1, so r = 3 / 4.

    Six points minus two groups give z the deviation 1 / sqrt(2).
    """
    x, y, groups = [1.0, 2.0, 3.0, 11.0, 12.0, 13.0], [0.0, 2.0, 1.0, 40.0, 41.0, 42.0], ["a"] * 3 + ["b"] * 3
    found = pearson(x, y, groups)
    assert found is not None
    half = Z / math.sqrt(2)
    assert (found.r, found.n) == (pytest.approx(0.75), 6)
    assert (found.low, found.high) == pytest.approx(
        (math.tanh(math.atanh(0.75) - half), math.tanh(math.atanh(0.75) + half))
    )
    # T = 0.75 sqrt(3 / (1 - 0.75^2)) = 1.964 with 3 degrees of freedom.
    assert found.p == pytest.approx(0.144, abs=1e-3)
    moved = pearson([v + 100 * (g == "b") for v, g in zip(x, groups, strict=True)], y, groups)
    assert moved is not None
    assert (moved.r, moved.low, moved.p) == pytest.approx((found.r, found.low, found.p))
    assert pearson(x, y, ["a"] * 6) == pearson(x, y)
    assert pearson([1.0, 1.0, 2.0, 2.0, 2.0], [1.0, 2.0, 3.0, 4.0, 5.0], ["a", "a", "b", "b", "b"]) is None


def test_pearson_of_one_group_is_scipys() -> None:
    draw = random.Random(1)
    x, y = ([draw.gauss(0, 1) for _ in range(12)] for _ in range(2))
    found, expected = pearson(x, y), stats.pearsonr(x, y)
    assert found is not None
    assert (found.r, found.p) == pytest.approx((expected.statistic, expected.pvalue))
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))


def pairs(x: list[float], y: list[float]) -> dict[str, list[float]]:
    return {"": [a - b for a, b in zip(x, y, strict=True)]}


@given(values, st.data())
def test_a_difference_turns_with_its_sides(x: list[float], data: st.DataObject) -> None:
    y = data.draw(st.lists(st.integers(-50, 50).map(float), min_size=len(x), max_size=len(x)))
    there, back = stratified_difference(pairs(x, y)), stratified_difference(pairs(y, x))
    assert there.change == pytest.approx(sum(x) / len(x) - sum(y) / len(y), abs=1e-9)
    assert back.change == -there.change
    if there.low is not None and there.high is not None and back.low is not None:
        assert there.low <= there.change <= there.high
        assert back.low == pytest.approx(-there.high, abs=1e-9)
        assert there.p is not None
        if there.p != pytest.approx(0.05, abs=1e-6) and there.low != there.high:
            assert (there.p < 0.05) == (there.low > 0 or there.high < 0)


def test_a_difference_of_five_seeds_worked_by_hand() -> None:
    found = stratified_difference({"base": [1.0, 2.0, 3.0, 4.0, 5.0]})
    half = 2.776445 * math.sqrt(2.5 / 5)
    assert (found.change, found.low, found.high) == pytest.approx((3.0, 3.0 - half, 3.0 + half), abs=1e-5)


@given(values)
def test_one_stratum_is_the_paired_t_test(x: list[float]) -> None:
    found = stratified_difference({"base": x})
    if len(set(x)) == 1:
        assert found.low is None or x[0] == found.low == 0
        return
    expected = stats.ttest_1samp(x, 0.0)
    interval = expected.confidence_interval()
    assert (found.p, found.low, found.high) == pytest.approx(
        (expected.pvalue, interval.low, interval.high), abs=1e-9
    )


@given(values, values, st.integers(-50, 50))
def test_what_strata_differ_by_moves_the_mean_and_not_its_width(
    x: list[float], y: list[float], apart: int
) -> None:
    found = stratified_difference({"one": x, "two": y})
    moved = stratified_difference({"one": x, "two": [value + apart for value in y]})
    assert moved.change == pytest.approx(found.change + apart * len(y) / (len(x) + len(y)), abs=1e-9)
    if len(set(x)) > 1:
        assert found.low is not None
        assert moved.low is not None
        assert moved.change - moved.low == pytest.approx(found.change - found.low)


def test_two_strata_worked_by_hand() -> None:
    """Deviations -1 1 and -2 0 2 from the strata's means: squares 10, 5 - 2 degrees, Student's 3.182."""
    found = stratified_difference({"one": [0.0, 2.0], "two": [8.0, 10.0, 12.0]})
    half = 3.182446 * math.sqrt(10 / 3 / 5)
    assert (found.change, found.low, found.high, found.n) == pytest.approx(
        (6.4, 6.4 - half, 6.4 + half, 5), abs=1e-5
    )


def test_too_little_to_judge_gives_no_interval_and_equality_gives_zero() -> None:
    assert stratified_difference({"one": [1.0]}).low is None
    assert stratified_difference({"one": [1.0], "two": [5.0]}).low is None
    assert stratified_difference({"one": [1.0, 1.0]}).p is None
    assert stratified_difference({"one": [0.1, 0.1, 0.1], "two": [0.7, 0.7]}).p is None
    same = stratified_difference({"one": [0.0, 0.0], "two": [0.0]})
    assert (same.change, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    assert clustered_difference({"a": [0.5, 0.7]}).low is None
    with pytest.raises(RamoeError, match="found no pairs"):
        paired_proportions([], [])
    for refused in (stratified_difference, clustered_difference):
        with pytest.raises(RamoeError, match="found no pairs"):
            refused({"a": []})


@given(values, st.data())
def test_clusters_of_one_are_plain_pairs_and_copies_add_no_certainty(
    x: list[float], data: st.DataObject
) -> None:
    y = data.draw(st.lists(st.integers(-50, 50).map(float), min_size=len(x), max_size=len(x)))
    plain = stratified_difference(pairs(x, y))
    single = clustered_difference({str(i): [a - b] for i, (a, b) in enumerate(zip(x, y, strict=True))})
    tripled = clustered_difference({str(i): [a - b] * 3 for i, (a, b) in enumerate(zip(x, y, strict=True))})
    assert tripled.n == 3 * plain.n
    for found in (single, tripled):
        for name in ("change", "low", "high", "p"):
            expected = getattr(plain, name)
            assert getattr(found, name) == (
                expected if expected is None else pytest.approx(expected, abs=1e-9)
            )


@given(outcomes)
def test_paired_proportions_hold_the_change_and_turn_with_their_sides(pairs: list[tuple[bool, bool]]) -> None:
    after, before = [a for a, _ in pairs], [b for _, b in pairs]
    there, back = paired_proportions(after, before), paired_proportions(before, after)
    assert there.change == pytest.approx((sum(after) - sum(before)) / len(pairs))
    assert there.low is not None
    assert there.high is not None
    assert back.low is not None
    assert -1 <= there.low < there.high <= 1
    assert back.low == pytest.approx(-there.high)
    assert back.p == there.p


def test_mcnemar_is_exact_and_no_change_still_has_a_width() -> None:
    found = paired_proportions([True] * 5 + [False] * 5, [False] * 10)
    assert found.p == pytest.approx(2 / 2**5)
    small, large = (paired_proportions([True] * n, [True] * n) for n in (5, 500))
    assert small.low is not None
    assert large.low is not None
    assert small.p == 1.0
    assert small.low < large.low < 0 < large.change + 0.1
    assert small.change == 0.0
