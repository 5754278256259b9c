"""Steering settings and the experts that they steer; the settings, the counts and the winner of a search."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.tensors import ModelShape
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.jobs.steer import Answer, Candidate, best, candidates, parse_tau, search_table
from ramoe_megatron.method.divergence import Zone
from ramoe_megatron.method.steering import NO_STEERING, Steering
from ramoe_megatron.statistics import clustered_difference, paired_proportions

# --- settings ---

DELTA = torch.zeros(2, 4, 6)
DELTA[0, 1, 0], DELTA[0, 2, 5], DELTA[1, 2, 3], DELTA[1, 3, 3] = 0.45, 0.35, 0.28, 0.9


def expert_file() -> ExpertFile:
    return ExpertFile(
        tasks=("even", "odd"), shape=ModelShape(4, 6, 2, "softmax", 8), expert_mask=DELTA > 0.4, delta=DELTA,
        task_frequency=DELTA,
        general_frequency=DELTA[0], english_pattern={}, layer_number=torch.arange(1, 5),
        rule={"name": "tau", "tau": 0.4},
        zone=Zone(1, 2, "auto", "floor"),
        checkpoint="base", path=Path("experts.safetensors"),
    )  # fmt: skip


def places(mask: torch.Tensor) -> list[list[int]]:
    return mask.nonzero().tolist()


def test_the_experts_are_the_files_or_those_above_tau_inside_the_layers() -> None:
    file = expert_file()
    assert places(file.steered_by(Steering("hard", None, None, (0, 3)))) == [[0, 1, 0], [1, 3, 3]]
    assert places(file.steered_by(Steering("hard", None, 0.3, (1, 2)))) == [[0, 1, 0], [0, 2, 5]]
    assert places(file.steered_by(Steering("hard", None, 0.25, (2, 2)))) == [[0, 2, 5], [1, 2, 3]]
    with pytest.raises(RamoeError, match="MoE layers 2 to 4, but the model has 0 to 3"):
        file.steered_by(Steering("hard", None, 0.25, (2, 4)))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (("firm", 0.5, None), "kind 'firm', expected soft or hard"),
        (("soft", None, None), "strength None"),
        (("soft", float("nan"), None), "strength nan"),
        (("hard", 0.5, None), "hard, which takes none"),
        (("soft", 0.5, 1.5), "tau 1.5"),
    ],
)
def test_a_setting_that_is_none_is_refused(
    values: tuple[str, float | None, float | None], words: str
) -> None:
    with pytest.raises(RamoeError, match=words):
        Steering(*values, (0, 1))  # type: ignore[arg-type]


def test_a_setting_comes_back_from_its_document() -> None:
    for setting in (Steering("soft", 0.5, 0.3, (1, 2)), Steering("hard", None, None, (0, 3))):
        assert Steering.from_document(setting.document(), "x") == setting
    assert Steering.from_document(NO_STEERING, "x") is None
    for bad in (
        {},
        {"kind": "soft"},
        Steering("hard", None, None, (0, 3)).document() | {"layers": 3},
        {**NO_STEERING, "kind": "soft"},
    ):
        with pytest.raises(RamoeError, match=r"steering\.json: bad setting"):
            Steering.from_document(bad, "steering.json")


# --- the search ---


def test_every_combination_is_tried_once_and_what_is_left_out_is_told() -> None:
    tried, skipped = candidates(
        expert_file(), {"even", "odd"}, ["soft", "hard"], [0.3, 0.34, 0.95, None], [0.5, 1.0], ["auto", "0-3"]
    )
    assert tried[0] == Candidate(None, None, 0)
    settings = [
        (c.steering.kind, c.steering.strength, c.steering.tau, c.steering.layers, c.experts)
        for c in tried[1:]
    ]  # type: ignore[union-attr]
    sets = [(0.3, (1, 2), 2), (None, (1, 2), 1), (0.3, (0, 3), 3), (None, (0, 3), 2)]
    expected = [("soft", strength, *own) for own in sets for strength in (0.5, 1.0)] + [
        ("hard", None, *own) for own in sets
    ]
    assert settings == expected
    assert [line.split(";")[0] for line in skipped] == [
        "tau=0.34 in MoE layers 1-2: the experts of an earlier setting",
        "tau=0.95 in MoE layers 1-2: no expert to steer",
        "tau=0.34 in MoE layers 0-3: the experts of an earlier setting",
        "tau=0.95 in MoE layers 0-3: no expert to steer",
    ]


def test_only_the_tasks_of_the_data_count() -> None:
    (_, only), skipped = candidates(expert_file(), {"odd", "third"}, ["hard"], [0.3], [], ["0-3"])
    assert (only.experts, skipped) == (1, [])
    with pytest.raises(RamoeError, match=r"even, odd, none of which is in the data \(third\)"):
        candidates(expert_file(), {"third"}, ["hard"], [0.3], [], ["auto"])
    with pytest.raises(RamoeError, match=r"nothing to try .*no expert to steer"):
        candidates(expert_file(), {"odd"}, ["hard"], [0.3], [], ["auto"])
    with pytest.raises(RamoeError, match="3-9"):
        candidates(expert_file(), {"odd"}, ["hard"], [0.3], [], ["3-9"])


@pytest.mark.parametrize("text", ["1", "nan", "best", "-2", ""])
def test_a_tau_that_is_none_is_refused(text: str) -> None:
    assert (parse_tau("file"), parse_tau("0.25"), parse_tau("-1")) == (None, 0.25, -1.0)
    with pytest.raises(RamoeError, match="--ramoe-taus"):
        parse_tau(text)


def tried(count: int) -> list[Candidate]:
    return [
        Candidate(None, None, 0),
        *(Candidate(Steering("soft", 0.1 * n, None, (1, 2)), "auto", 3) for n in range(1, count)),
    ]


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=30))
def test_a_row_counts_the_targets_alone_and_compares_them_with_no_steering(
    outcomes: list[tuple[bool, bool]],
) -> None:
    answers = [Answer(f"q{n}", "es") for n in range(len(outcomes))] + [Answer("q0", "en"), Answer("q1", "en")]
    plain, steered = [p for p, _ in outcomes], [s for _, s in outcomes]
    rows = search_table(tried(2), answers, [[*plain, True, True], [*steered, True, False]], "en")
    change = paired_proportions(steered, plain)
    assert (rows[1]["n"], rows[1]["correct"], rows[1]["accuracy"]) == (
        len(outcomes),
        sum(steered),
        sum(steered) / len(outcomes),
    )
    assert (rows[1]["change"], rows[1]["low"], rows[1]["high"], rows[1]["p"]) == (
        change.change,
        change.low,
        change.high,
        change.p,
    )
    assert [row["anchor_correct"] for row in rows] == [2, 1]
    assert rows[0]["change"] == 0
    assert rows[1]["languages"] == [{"language": "es", "n": len(outcomes), "correct": sum(steered)}]


def test_parallel_rows_of_one_example_are_no_independent_draws() -> None:
    answers = [Answer(f"q{n}", language) for n in range(6) for language in ("es", "tr")]
    plain, steered = [False] * 12, [n < 4 for n in range(12)]
    row = search_table(tried(2), answers, [plain, steered], "en")[1]
    change = clustered_difference({f"q{n}": [float(n < 2)] * 2 for n in range(6)})
    assert (row["change"], row["low"], row["high"]) == pytest.approx((change.change, change.low, change.high))
    assert row["anchor_accuracy"] is None
    with pytest.raises(RamoeError, match="only 'es' examples"):
        search_table(tried(1), [Answer("q", "es")], [[True]], "es")


def test_the_best_is_the_most_right_and_of_equals_the_gentlest() -> None:
    def row(kind: str, strength: float | None, experts: int, correct: int) -> dict[str, object]:
        return {"kind": kind, "strength": strength, "experts": experts, "correct": correct}

    none, half, minus = row("none", None, 0, 5), row("soft", 0.5, 3, 5), row("soft", -0.25, 3, 5)
    hard, few, more = row("hard", None, 1, 5), row("soft", 0.5, 2, 5), row("soft", 2.0, 9, 6)
    assert best([hard, half, none, minus]) is none
    assert best([hard, half, minus]) is minus
    assert best([hard, half, few]) is few
    assert best([none, hard, half, few, more]) is more
