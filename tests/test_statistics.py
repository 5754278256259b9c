"""Laws of proportions' intervals, effective sizes, tests and corrections, with closed forms by hand."""

import random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.statistics import effective_size, false_discovery, fisher, holm, wilson

Z = 1.959963984540054


@given(st.integers(0, 200), st.integers(1, 200))
def test_wilson_holds_the_share_mirrors_and_solves_its_equation(correct: int, n: int) -> None:
    assume(correct <= n)
    low, high = wilson(correct, n)
    share = correct / n
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    assert wilson(n - correct, n) == pytest.approx((1 - high, 1 - low))
    for end in (low, high):  # the ends are where |share - end| is 1.96 standard errors of the end itself
        assert (share - end) ** 2 == pytest.approx(Z**2 * end * (1 - end) / n, abs=1e-9)


answers = st.lists(st.integers(0, 1), min_size=2, max_size=30)


@given(answers, st.integers(2, 6), st.integers(1, 3))
def test_facts_answered_alike_in_all_languages_are_as_many_as_in_one(
    right: list[int], languages: int, seeds: int
) -> None:
    one = effective_size([{str(i): [value] for i, value in enumerate(right)}] * seeds)
    alike = effective_size([{str(i): [value] * languages for i, value in enumerate(right)}] * seeds)
    assert one == pytest.approx(len(right))
    assert alike == pytest.approx(len(right) if len(set(right)) > 1 else len(right) * languages)


def test_independent_answers_leave_an_interval_close_to_wilsons_and_never_narrower() -> None:
    draw = random.Random(0)
    sizes = []
    for _ in range(40):
        run = {str(i): [draw.randint(0, 1) for _ in range(6)] for i in range(300)}
        sizes.append(effective_size([run]))
    assert max(sizes) <= 1800
    assert sum(sizes) / len(sizes) > 0.93 * 1800
    # Each fact right in one language of two: no variance is left, and still 20 rows.
    opposed = {str(i): [0, 1] for i in range(10)}
    assert effective_size([opposed]) == 20
    assert effective_size([]) == 0


def test_effective_size_worked_by_hand() -> None:
    """Facts right in (2, 1, 0) of 2 languages: p = 1/2, variance (1 + 0 + 1) / 36, or (1/4) / 6 for rows."""
    assert effective_size([{"a": [1, 1], "b": [1, 0], "c": [0, 0]}]) == pytest.approx(6 * (1 / 24) / (2 / 36))


def test_wilson_narrows_with_n_knows_nothing_at_zero_and_refuses_the_impossible() -> None:
    widths = [high - low for low, high in (wilson(n // 2, n) for n in (10, 100, 1000))]
    assert widths == sorted(widths, reverse=True)
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(RamoeError, match="found 3 of 2"):
        wilson(3, 2)


def test_fisher_worked_by_hand_and_none_without_a_margin() -> None:
    """Margins 4 and 2, 3 and 3: the table is one of 4 in 20, and so is its mirror."""
    assert fisher([[3, 1], [0, 2]]) == pytest.approx(8 / 20)
    assert fisher([[10, 0], [0, 0]]) is None
    assert fisher([[5, 3], [0, 0]]) is None
    assert fisher([[5, 0], [3, 0]]) is None


def test_corrections_worked_by_hand() -> None:
    """Sorted: 0.005, 0.01, 0.03, 0.04. Holm: times 4, 3, 2, 1 with a running maximum.

    Benjamini-Hochberg: times n / rank with a running minimum.
    """
    p = [0.01, 0.04, 0.03, 0.005]
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert false_discovery(p) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert holm([0.5, 0.4]) == pytest.approx([0.8, 0.8])
    assert (holm([]), false_discovery([])) == ([], [])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.randoms())
def test_corrections_follow_their_tests_and_only_raise_p(p: list[float], draw: random.Random) -> None:
    order = draw.sample(range(len(p)), len(p))
    for correct in (holm, false_discovery):
        found = correct(p)
        assert correct([p[place] for place in order]) == pytest.approx([found[place] for place in order])
        assert all(own - 1e-12 <= adjusted <= 1 for own, adjusted in zip(p, found, strict=True))
        assert [found[place] for place in sorted(range(len(p)), key=p.__getitem__)] == sorted(found)
    assert all(
        strict >= discovery - 1e-12 for strict, discovery in zip(holm(p), false_discovery(p), strict=True)
    )
    assert holm(p[:1]) == false_discovery(p[:1]) == p[:1]
