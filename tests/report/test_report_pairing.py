"""Laws of paired differences: shared examples, swapped sides, and parallel rows that add no certainty."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramoe_megatron.report.inputs import Evaluation
from ramoe_megatron.report.pairing import pair_up, paired_change, pooled


def evaluation(method: str, seed: int | None, answers: dict[tuple[str, str], bool]) -> Evaluation:
    return Evaluation(method=method, seed=seed, split="test", rows=[], mass=[], examples=answers)


answers = st.dictionaries(
    st.tuples(st.text(max_size=3), st.sampled_from(["en", "es", "tr"])), st.booleans(), min_size=1
)


@given(answers)
def test_a_method_does_not_differ_from_itself(own: dict[tuple[str, str], bool]) -> None:
    runs = [evaluation("a", 1, own), evaluation("a", 2, {key: not value for key, value in own.items()})]
    change = paired_change(runs, runs, {"en", "es", "tr"})
    assert change is not None
    assert (change.change, change.seeds_higher, change.seeds_lower) == (0.0, 0, 0)
    assert (change.low, change.high, change.p) in {(0.0, 0.0, 1.0), (None, None, None)}


@given(answers, st.data())
def test_swapping_the_methods_turns_the_difference_round(
    own: dict[tuple[str, str], bool], data: st.DataObject
) -> None:
    other = {key: data.draw(st.booleans()) for key in own}
    one, two = [evaluation("a", 1, own)], [evaluation("b", 1, other)]
    forth, back = (paired_change(x, y, {"en", "es", "tr"}) for x, y in ((one, two), (two, one)))
    assert forth is not None
    assert back is not None
    assert forth.change == pytest.approx(-back.change)
    assert (forth.seeds_higher, forth.seeds_lower) == (back.seeds_lower, back.seeds_higher)
    if forth.low is not None and back.high is not None:
        assert forth.low == pytest.approx(-back.high)


def test_parallel_rows_of_one_example_add_no_certainty() -> None:
    """The same answers in a second language, with the same ids, do not narrow the interval."""
    right = {str(place): value for place, value in enumerate([1, 0, 0, 1, 0, 1, 1, 0])}
    one = {(key, "es"): bool(value) for key, value in right.items()}
    two = one | {(key, "tr"): bool(value) for key, value in right.items()}
    half, whole = (
        paired_change(
            [evaluation("a", 1, own)], [evaluation("b", 1, dict.fromkeys(own, False))], {"es", "tr"}
        )
        for own in (one, two)
    )
    assert half is not None
    assert whole is not None
    assert (half.change, half.low, half.high) == pytest.approx((whole.change, whole.low, whole.high))
    assert half.low is not None
    assert half.low < half.change == 0.5


def test_parallel_rows_of_one_example_do_not_narrow_an_accuracy_either() -> None:
    right = {(str(place), language): place < 3 for place in range(8) for language in ("es", "tr", "en")}
    one, both = (
        pooled([evaluation("a", seed, right) for seed in (1, 2)], languages)
        for languages in ("es", {"es", "tr"})
    )
    assert one is not None
    assert both is not None
    assert (both["n"], both["accuracy"]) == (2 * one["n"], one["accuracy"])
    assert (both["low"], both["high"], both["effective"]) == pytest.approx((one["low"], one["high"], 8))


def test_only_pairs_that_both_answered_count() -> None:
    method = [
        evaluation("a", 1, {("x", "es"): True, ("y", "es"): False}),
        evaluation("a", 2, {("x", "es"): True}),
    ]
    sft = [evaluation("sft", 1, {("x", "es"): False})]
    change = paired_change(method, sft, {"es"})
    assert change is not None
    assert (change.change, change.seeds_higher) == (1.0, 1)
    assert paired_change(method, sft, {"tr"}) is None


def test_an_outcome_without_a_seed_is_paired_with_every_seed_of_its_own_base_model() -> None:
    seeds = [evaluation("sft", seed, {("x", "es"): seed == 1}) for seed in (1, 2, 3)]
    steered = [evaluation("steering", None, {("x", "es"): True})]
    change = paired_change(steered, seeds, {"es"})
    assert change is not None
    assert (change.change, change.seeds_higher, change.seeds_lower, change.seeds_paired) == (
        pytest.approx(2 / 3),
        2,
        0,
        3,
    )
    back = paired_change(seeds, steered, {"es"})
    assert back is not None
    assert (back.change, back.seeds_lower, back.seeds_paired) == (pytest.approx(-2 / 3), 2, 3)
    elsewhere = [dataclasses.replace(steered[0], base="another model")]
    assert paired_change(elsewhere, seeds, {"es"}) is None
    assert [(pair.base, pair.seed) for pair in pair_up(steered, seeds[::-1])] == [("", 1), ("", 2), ("", 3)]
