"""Laws of the sampler: resumption is slicing, epochs are permutations, the mixture converges."""

import numpy as np
import pytest
from data_rows import example
from hypothesis import given
from hypothesis import strategies as st

from ramoe_megatron.data.parallel import Example
from ramoe_megatron.data.sampler import order, with_ids_per_task
from ramoe_megatron.errors import RamoeError

SIZES = {"currency/en": 7, "currency/fi": 3, "month/en": 4, "month/fi": 1, "names/en": 5}
WEIGHTS = {"names/*": 1.0, "*/en": 2.0, "*": 0.5}


def examples(sizes: dict[str, int] = SIZES) -> list[Example]:
    found = []
    # Groups are interleaved, because no law may depend on the order of the rows.
    for number in range(max(sizes.values())):
        for group, size in sizes.items():
            task, language = group.split("/")
            if number < size:
                found.append(example(f"{group}-{number}", language, task))
    return found


def group_of(found: list[Example], index: int) -> str:
    return f"{found[index].task}/{found[index].language}"


seeds = st.integers(0, 2**32)
weights = st.sampled_from([None, WEIGHTS, {"*": 1.0}])


@given(seeds, weights, st.integers(0, 200), st.integers(0, 200))
def test_resumption_is_slicing(seed: int, mix: dict[str, float] | None, short: int, more: int) -> None:
    found = examples()
    longer = order(found, short + more, seed, mix)
    assert longer.dtype == np.int64
    assert np.array_equal(longer[:short], order(found, short, seed, mix))


@given(seeds, weights)
def test_each_epoch_of_a_group_visits_each_example_once(seed: int, mix: dict[str, float] | None) -> None:
    found = examples()
    drawn = order(found, 400, seed, mix)
    groups = {"all": list(range(len(found)))}
    if mix is not None:
        groups = {g: [i for i in range(len(found)) if group_of(found, i) == g] for g in SIZES}
    for members in groups.values():
        visits = [int(i) for i in drawn if i in members]
        for start in range(0, len(visits) - len(members) + 1, len(members)):
            assert sorted(visits[start : start + len(members)]) == members


def test_epochs_and_seeds_differ() -> None:
    found = examples({"currency/en": 20})
    drawn = order(found, 40, 1)
    assert not np.array_equal(drawn[:20], drawn[20:])
    assert not np.array_equal(drawn, order(found, 40, 2))


def test_mixture_converges_to_the_weights_shared_by_size() -> None:
    found = examples()
    drawn = order(found, 40_000, 3, WEIGHTS)
    expected = {
        "names/en": 1.0 / 3.5,
        "currency/en": 2.0 / 3.5 * 7 / 11,
        "month/en": 2.0 / 3.5 * 4 / 11,
        "currency/fi": 0.5 / 3.5 * 3 / 4,
        "month/fi": 0.5 / 3.5 * 1 / 4,
    }
    names = np.array([group_of(found, i) for i in drawn])
    for group, share in expected.items():
        # five standard deviations of a draw by weight
        assert abs((names == group).mean() - share) < 5 * np.sqrt(share * (1 - share) / len(drawn))


def test_weight_zero_leaves_its_groups_out() -> None:
    found = examples()
    drawn = order(found, 2000, 1, {"currency/*": 0.0, "*": 1.0})
    assert not any(found[i].task == "currency" for i in drawn)


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({"currency/*": 1.0}, "no pattern matches the group 'month/en' \\(4 examples\\)"),
        ({"*": 1.0, "currency/sw": 1.0}, "'currency/sw' matches no group"),
        ({"*": 1.0, "currency/fi": 1.0}, "'currency/fi' matches no group, or only groups of earlier"),
        ({"*": -1.0}, "-1.0, expected a finite number"),
        ({"*": float("nan")}, "nan, expected a finite number"),
        ({"*": 0.0}, "all are 0"),
        ({}, "no pattern matches"),
    ],
)
def test_bad_weights_are_refused(mix: dict[str, float], message: str) -> None:
    with pytest.raises(RamoeError, match=message):
        order(examples(), 10, 1, mix)


def parallel_examples() -> list[Example]:
    """Ids of two tasks in three languages, of which the last has every other id, in no order."""
    found = [
        example(f"{task}-{number}", language, task)
        for language in ("en", "fi", "hi")
        for task, size in (("month", 5), ("currency", 8))
        for number in range(size)
        if language != "hi" or number % 2 == 0
    ]
    return [found[i] for i in np.random.default_rng(3).permutation(len(found))]


@given(seeds, st.integers(1, 5), st.integers(0, 4))
def test_ids_per_task_are_whole_ids_and_grow_by_inclusion(seed: int, count: int, fewer: int) -> None:
    found = parallel_examples()
    kept = with_ids_per_task(found, count, seed)
    ids = {e.id for e in kept}
    assert kept == [e for e in found if e.id in ids]  # in all languages, in the order of the data
    assert [sum(id_.startswith(task) for id_ in ids) for task in ("month", "currency")] == [count, count]
    if 0 < fewer <= count:
        assert {e.id for e in with_ids_per_task(found, fewer, seed)} <= ids


def test_ids_per_task_depend_on_the_seed_and_are_refused_where_they_lack() -> None:
    found = parallel_examples()
    assert len({tuple(e.id for e in with_ids_per_task(found, 2, seed)) for seed in range(20)}) > 5
    with pytest.raises(RamoeError, match="6 ids of each task were asked for, but task 'month' has 5"):
        with_ids_per_task(found, 6, 1)


def test_no_examples_are_refused() -> None:
    with pytest.raises(RamoeError, match="no examples"):
        order([], 10, 1)
