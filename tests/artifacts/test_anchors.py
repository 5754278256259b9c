"""Laws of several anchors: which one an example is pulled to, and the taxonomy and priors that follow."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from anchor_tables import SHAPE, by_hand, save_priors, tables
from hypothesis import given
from hypothesis import strategies as st

from ramoe_megatron.artifacts.anchor_files import gather
from ramoe_megatron.artifacts.priors import Priors
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.anchors import anchored, answered, choose, counts
from ramoe_megatron.method.categories import TaxonomyRow

orders = st.lists(st.sampled_from(["en", "zh", "es"]), min_size=1, max_size=3, unique=True)


def ci(rows: Sequence[TaxonomyRow]) -> set[tuple[str, str]]:
    return {(row.id, row.language) for row in rows if row.category == "ci"}


@given(tables())
def test_the_taxonomys_own_anchor_alone_changes_nothing(rows: list[TaxonomyRow]) -> None:
    assert anchored(rows, answered(rows, "en", ["en"])) == rows


@given(tables(), orders)
def test_an_outcome_is_right_iff_another_anchor_is(rows: list[TaxonomyRow], order: list[str]) -> None:
    right = {(row.id, row.language): row.target_correct for row in rows} | {
        (row.id, "en"): row.english_correct for row in rows
    }
    made = anchored(rows, answered(rows, "en", order))
    assert len(made) == len(rows)
    for before, after in zip(rows, made, strict=True):
        assert replace(after, english_correct=before.english_correct) == before
        assert after.english_correct == any(
            right[before.id, name] for name in order if name != before.language
        )


@given(tables(), orders)
def test_more_anchors_only_add_ci_rows_and_their_order_does_not_matter(
    rows: list[TaxonomyRow], order: list[str]
) -> None:
    found = [ci(anchored(rows, answered(rows, "en", order[: n + 1]))) for n in range(len(order))]
    assert all(few <= many for few, many in itertools.pairwise(found))
    assert anchored(rows, answered(rows, "en", order[::-1])) == anchored(rows, answered(rows, "en", order))
    gained = sum(entry["ci_gained"] for entry in counts(rows, answered(rows, "en", order)))
    assert gained == len(found[-1] - found[0])


@given(tables(), orders)
def test_a_ci_row_is_pulled_to_a_right_answer_in_another_language(
    rows: list[TaxonomyRow], order: list[str]
) -> None:
    right = answered(rows, "en", order)
    chosen, made = choose(right), anchored(rows, right)
    for id_, language in ci(made):
        assert chosen[id_] != language
        assert right[id_][chosen[id_]]
    for row in made:
        if chosen[row.id] == row.language and any(right[row.id].values()):
            assert row.category in ("cc", "ic")


@given(tables(), orders)
def test_the_first_right_anchor_is_chosen_else_the_first(rows: list[TaxonomyRow], order: list[str]) -> None:
    right = answered(rows, "en", order)
    for id_, name in choose(right).items():
        assert list(right[id_]) == order
        before = order[: order.index(name)]
        assert not any(right[id_][other] for other in before)
        assert right[id_][name] or (name == order[0] and not any(right[id_].values()))
    for entry in counts(rows, right):
        assert (
            entry["examples"]
            == len({row.id for row in rows if row.task == entry["task"]})
            == sum(entry["chosen"].values())
        )
        assert entry["chosen"][order[0]] >= entry["none_right"]


def test_rows_and_counts_by_hand() -> None:
    rows = by_hand()
    right = answered(rows, "en", ["en", "zh"])
    assert choose(right) == {"a": "en", "b": "zh", "c": "en", "d": "en"}
    made = {(row.id, row.language): row.category for row in anchored(rows, right)}
    assert made == {
        ("a", "zh"): "ci", ("a", "sw"): "ci", ("b", "zh"): "ic", ("b", "sw"): "ci",
        ("c", "zh"): "ii", ("c", "sw"): "ii", ("d", "zh"): "cc", ("d", "sw"): "cc",
    }  # fmt: skip
    expected = {
        "task": "t",
        "examples": 4,
        "chosen": {"en": 3, "zh": 1},
        "none_right": 1,
        "ci_first": 2,
        "ci": 3,
        "ci_gained": 1,
    }
    assert counts(rows, right) == [expected]
    assert choose(answered(rows, "en", ["zh", "en"])) == {"a": "en", "b": "zh", "c": "zh", "d": "zh"}


def test_each_prior_is_the_chosen_anchors(tmp_path: Path) -> None:
    files = {
        "en": Priors(save_priors(tmp_path / "en", "dcxa", 0.25)),
        "zh": Priors(save_priors(tmp_path / "zh", "ebd", 0.5)),
    }
    ids, rows = gather(files, {"a": "en", "b": "zh", "c": "en", "d": "zh"})
    assert ids == ["d", "c", "x", "a", "b"], (
        "those of the first file in its order, x without a choice, then the others"
    )
    torch.testing.assert_close(rows[:, 0, 0], torch.tensor([0.52, 0.26, 0.27, 0.28, 0.51]))
    torch.testing.assert_close(rows[:, 1], rows[:, 0])
    with pytest.raises(
        RamoeError, match=r"zh: 2 examples, first c, a, have no routing in 'zh', their chosen anchor"
    ):
        gather(files, {"a": "zh", "b": "zh", "c": "zh"})


def test_priors_of_other_models_tokens_or_checkpoints_are_refused(tmp_path: Path) -> None:
    first = Priors(save_priors(tmp_path / "en", "ab", 0.25))
    others = {
        "tokens is 'last' and 'all'": save_priors(tmp_path / "all", "ab", 0.5, tokens="all"),
        "checkpoint is 'base' and 'other'": save_priors(tmp_path / "other", "ab", 0.5, checkpoint="other"),
        "topk is 1 and 2": save_priors(tmp_path / "model", "ab", 0.5, shape=replace(SHAPE, topk=2)),
    }
    for told, path in others.items():
        with pytest.raises(
            RamoeError, match=f"{tmp_path}/en and {path}: {told}; profile both anchors in the same way"
        ):
            gather({"en": first, "zh": Priors(path)}, {"a": "en"})


def test_tables_that_do_not_tell_about_an_anchor_are_refused() -> None:
    rows = by_hand()
    with pytest.raises(RamoeError, match=r"2 of 3 not in the taxonomy: es, tr; the taxonomy has en, sw, zh"):
        answered(rows, "en", ["es", "zh", "tr"])
    with pytest.raises(RamoeError, match="found zh, zh, expected languages, each once"):
        answered(rows, "en", ["zh", "zh"])
    with pytest.raises(RamoeError, match="found none"):
        answered(rows, "en", [])
    with pytest.raises(
        RamoeError, match=r"4 examples, first a, b, c, d, have rows in 'zh', so 'zh' is not the anchor"
    ):
        answered(rows, "zh", ["zh"])
    kept = [row for row in rows if (row.id, row.language) not in {("a", "zh"), ("c", "zh")}]
    with pytest.raises(RamoeError, match=r"2 examples, first a, c, have no row in the anchor 'zh'"):
        answered(kept, "en", ["en", "zh"])
    many = [
        TaxonomyRow(f"x{n}", "t", language, "train", language == "zh", True)
        for n in range(7)
        for language in ("zh", "sw")
    ]
    with pytest.raises(
        RamoeError, match=r"7 examples, first x0, x1, x2, x3, x4, are both right and wrong in 'en'"
    ):
        answered(many, "en", ["en"])
