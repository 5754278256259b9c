"""Laws of the taxonomy."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramoe_megatron.method.categories import CATEGORIES, TaxonomyRow, category, summarise
from ramoe_megatron.statistics import wilson

rows_strategy = st.lists(
    st.builds(
        TaxonomyRow,
        id=st.text(max_size=3),
        task=st.sampled_from(["currency", "month"]),
        language=st.sampled_from(["tr", "sw"]),
        split=st.sampled_from(["train", "test"]),
        english_correct=st.booleans(),
        target_correct=st.booleans(),
    ),
    max_size=30,
)


@pytest.mark.parametrize(
    ("english", "target", "expected"),
    [(True, True, "cc"), (True, False, "ci"), (False, True, "ic"), (False, False, "ii")],
)
def test_english_comes_first(english: bool, target: bool, expected: str) -> None:
    assert category(english, target) == expected


@given(rows_strategy)
def test_every_row_is_counted_once_in_its_own_pair(rows: list[TaxonomyRow]) -> None:
    pairs = summarise(rows)
    counted = Counter({(p.task, p.language, p.split, c): getattr(p, c) for p in pairs for c in CATEGORIES})
    assert +counted == Counter((r.task, r.language, r.split, r.category) for r in rows)
    for pair in pairs:
        assert pair.n == pair.cc + pair.ci + pair.ic + pair.ii > 0
        assert pair.ci_share == pair.ci / pair.n
        assert (pair.ci_low, pair.ci_high) == wilson(pair.ci, pair.n)


@given(rows_strategy, st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(rows: list[TaxonomyRow], random: object) -> None:
    before = summarise(rows)
    random.shuffle(rows)  # type: ignore[attr-defined]
    assert summarise(rows) == before
