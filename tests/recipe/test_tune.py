"""The trials of a comparison: equal numbers for every method, one change each, and the best one is taken."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from plans import BASE

from ramoe_megatron.cli import main
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.recipe.load import set_value, validate
from ramoe_megatron.recipe.methods import Method
from ramoe_megatron.recipe.schema import Recipe
from ramoe_megatron.recipe.tune import Setting, settings, trial_changes, trial_rows, tuned_changes

METHODS: list[Any] = [
    "sft",
    "ra-moe",
    "coeff-zero",
    "router-only",
    {"name": "wide", "alignment": {"examples": "ci+cc", "divergence": "kl"}, "train": {"lr": 3.0e-4}},
    {"name": "own-scale", "preset": ["sara"]},
    "steering-soft",
    {"name": "steered", "preset": ["steering-soft"], "on": "sft"},
]
TUNED = ["sft", "ra-moe", "router-only", "wide", "own-scale"]
TUNE = {
    "lr": [1e-5, 2e-5, 5e-5, 1e-4],
    "coeff": [1, 10, 100],
    "methods": {"own-scale": {"coeff": [0.5, 1.5]}},
    "budget": 4,
    "bases": [7],
}
GIVEN = {"alignment": {"coeff": 10, "target": "example", "layers": "1-2"}, "seeds": [1, 2]}


def raw(**changes: Any) -> dict[str, Any]:
    return {**BASE, **GIVEN, "methods": METHODS, "tune": {**TUNE, **changes.pop("tune", {})}, **changes}


def recipe(**changes: Any) -> Recipe:
    return validate(raw(**changes), "r")


def changed(changes: list[str]) -> Recipe:
    found = raw()
    for change in changes:
        found = set_value(found, change)
    return validate(found, "r")


def outcome(accuracy: dict[str, float]) -> dict[str, Any]:
    rows = [{"method": name, "group": "target", "accuracy": value} for name, value in accuracy.items()]
    return {"summary": [*rows, {"method": "base", "group": "english", "accuracy": 1.0}]}


def without(method: Method, owner: Recipe) -> dict[str, Any]:
    """All that a method does, but for learning rate and coefficient."""
    alignment = owner.alignment_of(method, 5).model_dump()
    flags = owner.train_of(method)
    return {
        "alignment": {key: value for key, value in alignment.items() if key != "coeff"},
        "train": {key: value for key, value in flags.items() if key != "lr"},
        "selection": owner.selection_of(method).model_dump(),
        "aligns": method.aligns,
    }


@given(budget=st.integers(1, 4), seed=st.integers(1, 99))
def test_every_trained_method_has_as_many_trials(budget: int, seed: int) -> None:
    found = settings(recipe(tune={"budget": budget}, seed=seed))
    assert list(found) == TUNED
    for name, own in found.items():
        assert len(set(own)) == len(own) == budget
        coeffs = {"ra-moe": TUNE["coeff"], "wide": TUNE["coeff"], "own-scale": [0.5, 1.5]}.get(name, [None])
        assert all(each.lr in TUNE["lr"] and each.coeff in coeffs for each in own)
    assert found == settings(recipe(tune={"budget": budget}, seed=seed))


def test_trials_are_drawn_over_the_whole_grid() -> None:
    drawn = {each for seed in range(1, 40) for each in settings(recipe(seed=seed))["ra-moe"]}
    assert drawn == {Setting(lr, coeff) for lr in TUNE["lr"] for coeff in TUNE["coeff"]}


def test_a_trial_changes_learning_rate_and_coefficient_and_nothing_else() -> None:
    given_recipe = recipe()
    trials = changed(trial_changes(given_recipe))
    assert (trials.tune, trials.seeds, trials.evaluate.split) == (None, [101], "validation")
    assert trials.taxonomy.splits == ["train", "validation"]
    for name, own in settings(given_recipe).items():
        for number, setting in enumerate(own):
            trial = trials.method(f"{name}.{number}")
            assert trials.train_of(trial)["lr"] == setting.lr
            expected = setting.coeff or given_recipe.alignment_of(given_recipe.method(name)).coeff
            assert trials.alignment_of(trial).coeff == expected
            assert without(trial, trials) == without(given_recipe.method(name), given_recipe)
    assert len(trials.methods) == len(TUNED) * TUNE["budget"]


ACCURACY = st.lists(st.integers(0, 3), min_size=4, max_size=4)


@given(first=ACCURACY, second=ACCURACY)
def test_the_highest_mean_is_chosen_and_of_equal_ones_the_first(first: list[int], second: list[int]) -> None:
    own = recipe()
    bases = {
        base: outcome({f"{name}.{n}": part / 4 for name in TUNED for n, part in enumerate(parts)})
        for base, parts in (("base7", first), ("base8", second))
    }
    rows = trial_rows(own, bases)
    sums = [one + other for one, other in zip(first, second, strict=True)]
    place = sums.index(max(sums))
    for name in TUNED:
        found = [row for row in rows if row["method"] == name]
        assert [row["chosen"] for row in found] == [n == place for n in range(4)]
        assert [row["accuracy"] for row in found] == pytest.approx([part / 8 for part in sums])
    chosen = {name: each[place] for name, each in settings(own).items()}
    tuned = changed(tuned_changes(own, rows))
    assert [method.name for method in tuned.methods] == [method.name for method in own.methods]
    for method in tuned.methods:
        before = own.method(method.name)
        assert without(method, tuned) == without(before, own)
        if method.steered:
            assert method == before
            continue
        setting = chosen.get(method.name, Setting(chosen["sft"].lr, None))
        assert tuned.train_of(method)["lr"] == setting.lr
        coeff = own.alignment_of(before).coeff
        assert tuned.alignment_of(method).coeff == (coeff if setting.coeff is None else setting.coeff)
    assert tuned.alignment_of(tuned.method("coeff-zero")).coeff == 0
    assert tuned.train_of(tuned.method("coeff-zero")) == tuned.train_of(tuned.method("sft"))


def test_a_choice_at_the_edge_of_what_was_tried_is_told() -> None:
    own = recipe(methods=["sft"], tune={"methods": {}})
    told = []
    for best in range(4):
        rows = trial_rows(own, {"b": outcome({f"sft.{n}": float(n == best) for n in range(4)})})
        told.append(next(row["at_edge"] for row in rows if row["chosen"]))
    assert told == [True, False, False, True]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tune": {"seeds": [2]}}, "tune.seeds and seeds both have 2"),
        ({"tune": {"split": "test"}}, "tune.split and evaluate.split are both 'test'"),
        ({"tune": {"bases": []}}, "tune.bases is missing"),
        ({"tune": {"methods": {"sarra": {}}}}, "tune.methods: sarra is no method"),
        ({"tune": {"lr": []}}, "tune.lr"),
    ],
)
def test_what_cannot_be_fair_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(RamoeError, match=told):
        recipe(**changes)


def test_fewer_settings_than_trials_are_refused() -> None:
    with pytest.raises(RamoeError, match="method sft has 4 settings, fewer than the budget of 5"):
        settings(recipe(tune={"budget": 5}))


def test_compare_tells_its_trials_and_run_refuses_them(tmp_path: Path) -> None:
    path = tmp_path / "tuned.yaml"
    path.write_text(yaml.safe_dump(raw()))
    words = [str(path), "--out", str(tmp_path / "out"), "--dry-run"]
    shown = CliRunner().invoke(main, ["compare", *words])
    assert shown.exit_code == 0, shown.output
    assert "tuning: 20 trials; base models 7; seeds 101" in shown.output
    assert "finetune/own-scale.3-seed101" in shown.output
    assert "seed1\n" not in shown.output
    shown = CliRunner().invoke(main, ["compare", *words, "--bases", "7"])
    assert "tune.bases and the comparison both have the base model 7" in shown.output
    shown = CliRunner().invoke(main, ["run", *words])
    assert shown.exit_code == 2
    assert "the section tune is for `ramoe compare`" in shown.output
