"""Trials of a comparison's methods: each trained method tries the same number of settings.

A trial is the method with another learning rate and, if it aligns, another coefficient. The best trial on the
validation split gives the method's settings in the comparison. A method with coefficient 0 must equal sft, so
it has no trials and gets the settings of sft.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from ramoe_megatron.data.sampler import named_rng
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.recipe.methods import Method
from ramoe_megatron.recipe.schema import Grid, Recipe, Tune

REFERENCE = "sft"


@dataclass(frozen=True)
class Setting:
    """What a trial changes. `coeff`: None for a method without alignment, or with its own coefficient."""

    lr: float
    coeff: float | None


def settings(recipe: Recipe) -> dict[str, list[Setting]]:
    """Method -> its trials, in the order of the grid.

    Raises:
        RamoeError: a method's grid has fewer settings than the budget, or the recipe has no `tune`.
    """
    tune = _tune(recipe)
    return {method.name: _drawn(recipe, tune, method) for method in recipe.methods if _tuned(recipe, method)}


def trial_changes(recipe: Recipe) -> list[str]:
    """The recipe of all trials, as changes to this recipe that `--set` takes."""
    tune, methods = _tune(recipe), {method.name: method for method in recipe.methods}
    trials = [
        _with(methods[name], setting, _trial(name, number))
        for name, found in settings(recipe).items()
        for number, setting in enumerate(found)
    ]
    scored = [split for split in recipe.taxonomy.splits if split not in (recipe.evaluate.split, tune.split)]
    return [
        "tune=null",
        f"taxonomy.splits={_flow([*scored, tune.split])}",  # `predict` reads the evaluated split there
        f"seeds={_flow(tune.seeds)}",
        f"evaluate.split={tune.split}",
        f"methods={_flow(trials)}",
    ]


def trial_rows(recipe: Recipe, results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each trial: its method and setting, its accuracy, and whether it was chosen.

    Of a method's trials the one with the highest mean accuracy over the base models is chosen, and of equal
    ones the first in the grid.

    Args:
        results: base model -> results.json of its trials. Accuracy is that of the target languages.

    Returns:
        Rows with `method`, `lr`, `coeff`, `accuracy` (the mean), `by_base`, `chosen` and `at_edge`: whether
        the learning rate or coefficient is the smallest or largest that the method tried.
    """
    rows: list[dict[str, Any]] = []
    for name, found in settings(recipe).items():
        own = []
        for number, setting in enumerate(found):
            by_base = {base: _accuracy(each, _trial(name, number)) for base, each in results.items()}
            mean = sum(by_base.values()) / len(by_base)
            own.append({"method": name, **asdict(setting), "accuracy": mean, "by_base": by_base})
        best = max(own, key=lambda row: row["accuracy"])  # the first of equal ones
        for row in own:
            edges = (_at_edge(row[key], [other[key] for other in own]) for key in ("lr", "coeff"))
            rows.append({**row, "chosen": row is best, "at_edge": any(edges)})
    return rows


def tuned_changes(recipe: Recipe, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The recipe of the comparison, as changes to this recipe: each method with the setting chosen for it."""
    chosen = {row["method"]: Setting(row["lr"], row["coeff"]) for row in rows if row["chosen"]}
    methods = []
    for method in recipe.methods:
        setting = chosen.get(method.name)
        if setting is None and not method.steered:  # coefficient 0
            setting = Setting(chosen[REFERENCE].lr, None)
        methods.append(_with(method, setting, method.name) if setting else _given(method))
    return ["tune=null", f"methods={_flow(methods)}"]


def _tune(recipe: Recipe) -> Tune:
    if recipe.tune is None:
        raise RamoeError(f"recipe {recipe.name}: tune is missing: give the settings to try")
    return recipe.tune


def _tuned(recipe: Recipe, method: Method) -> bool:
    return not method.steered and not (method.aligns and recipe.alignment_of(method).coeff == 0)


def _drawn(recipe: Recipe, tune: Tune, method: Method) -> list[Setting]:
    own = tune.methods.get(method.name, Grid())
    coeffs: Sequence[float | None] = own.coeff or tune.coeff if method.aligns else []
    grid = [Setting(*each) for each in itertools.product(own.lr or tune.lr, coeffs or [None])]
    if len(grid) < tune.budget:
        raise RamoeError(
            f"tune: method {method.name} has {len(grid)} settings, fewer than the budget of {tune.budget} "
            "trials that every method gets; give more learning rates or lower tune.budget"
        )
    drawn = named_rng(recipe.seed, f"tune {method.name}").choice(len(grid), tune.budget, replace=False)
    return [grid[place] for place in sorted(drawn.tolist())]


def _trial(method: str, number: int) -> str:
    return f"{method}.{number}"


def _given(method: Method) -> dict[str, Any]:
    return method.model_dump(by_alias=True)


def _with(method: Method, setting: Setting, name: str) -> dict[str, Any]:
    """The method under a name, with a setting, as a recipe has it."""
    found = {**_given(method), "name": name}
    if method.presets and name != method.name:
        found["preset"] = method.presets
    found["train"] = {**found.get("train", {}), "lr": setting.lr}
    if setting.coeff is not None:
        found["alignment"] = {**found.get("alignment", {}), "coeff": setting.coeff}
    return found


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=2**30).strip()


def _accuracy(results: Mapping[str, Any], trial: str) -> float:
    return next(
        row["accuracy"] for row in results["summary"] if (row["method"], row["group"]) == (trial, "target")
    )


def _at_edge(value: float | None, tried: Sequence[float | None]) -> bool:
    known = [each for each in tried if each is not None]
    return value is not None and len(set(known)) > 1 and value in (min(known), max(known))
