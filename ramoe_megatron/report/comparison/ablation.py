"""Rows of comparison.json on further methods, and on training flags that differ from the reference's."""

import re
from collections.abc import Collection, Sequence
from typing import Any

from ramoe_megatron.report.comparison.study import Row, Study
from ramoe_megatron.report.inputs import RunInputs

INCIDENTAL = {
    "save",
    "load",
    "tensorboard-dir",
    "pretrained-checkpoint",
    "seed",
    "save-interval",
    "ramoe-output",
    "ramoe-method",
    "ramoe-seed",
}
"""Flags that differ between any two stages, and say nothing of the method."""
CHOSEN_FILES = ("ramoe-experts", "ramoe-layer-weights", "ramoe-steering")
"""Flags of files that a method chooses. Other files follow from the method's other flags."""
ABSENT = "not given"
DRAWN = ("ramoe-languages", "ramoe-weights", "ramoe-ids-per-task")
"""Flags that say on which samples a method trains."""
COEFF = "ramoe-coeff"
"""The flag of every method that aligns."""


def added_rows(study: Study, tuned: bool) -> list[Row]:
    """What alignment adds to each method that aligns.

    A row has `added`, the method's change against the method that trains alike without alignment; the name of
    that method, `beside`; and `examples`, the number of ids of each task that both train on, None for all.

    Args:
        tuned: whether each method has a learning rate chosen for it, which then need not be the same.
    """
    rows = []
    for method in study.others:
        run = _first_run(study, method)
        beside = _without_alignment(study, run, method, {"lr"} if tuned else set())
        if beside is not None:
            flags = _stage_flags((run.manifest or {}).get("stages", {}), "finetune", method) or {}
            ids = flags.get("ramoe-ids-per-task")
            rows.append(
                {
                    "method": method,
                    "beside": beside,
                    "examples": None if ids is None else int(ids),
                    "added": study.against(method, beside, study.target_keys),
                }
            )
    return rows


def ablation_rows(
    study: Study, found: Sequence[Row], known: Collection[str], added: Sequence[Row]
) -> list[Row]:
    """The recipe's further methods: what each one changes, and its changes in accuracy.

    The changes are against the reference (with the p of the headline) and against the base model. A method
    that aligns also has `without` and `beside`, from `added_rows`.

    Args:
        found: rows of the headline.
        known: methods that are no further ones.
        added: rows of `added_rows`.
    """
    beside = {row["method"]: row for row in added}
    return [
        {
            "method": method,
            "settings": _settings(study, _first_run(study, method), method),
            "against": row["against"],
            "from_base": row["from_base"],
            "beside": beside.get(method, {}).get("beside"),
            "without": beside.get(method, {}).get("added"),
        }
        for row in found
        if (method := row["method"]) not in known
    ]


def _first_run(study: Study, method: str) -> RunInputs:
    return next(run for run in study.runs.values() if method in run.methods)


def _without_alignment(study: Study, run: RunInputs, method: str, free: Collection[str]) -> str | None:
    """The method that trains the same weights on the same data with the same Megatron flags, but for the free
    ones, and aligns nothing.

    None for a method that aligns nothing itself.
    """
    stages = (run.manifest or {}).get("stages", {})
    found = {name: _stage_flags(stages, "finetune", name) for name in study.by_method}
    training = {
        name: {flag: value for flag, value in training_flags(flags).items() if flag not in free}
        for name, flags in found.items()
        if flags is not None
    }
    if float((found.get(method) or {}).get(COEFF, 0)) == 0:
        return None
    return next(
        (
            name
            for name, own in training.items()
            if own == training[method] and COEFF not in (found[name] or {})
        ),
        None,
    )


def training_flags(flags: dict[str, str]) -> dict[str, str]:
    """Megatron's flags, and our flags that say which weights train and on which samples."""
    chosen = ("ramoe-experts", "ramoe-select") if flags.get("ramoe-train") == "task-experts" else ()
    return {
        flag: value
        for flag, value in flags.items()
        if not flag.startswith("ramoe-") or flag.startswith("ramoe-train") or flag in (*DRAWN, *chosen)
    }


def _settings(study: Study, run: RunInputs, method: str) -> list[str]:
    """Flags of the method's stage that differ from another run's, as run: `coeff 20 (ra-moe: 50)`.

    The other run is the main method, the reference when nothing is aligned, or the base model's evaluation
    when nothing is trained.
    """
    stages = (run.manifest or {}).get("stages", {})
    own = _stage_flags(stages, "finetune", method)
    other = study.main if COEFF in (own or {}) else study.reference
    beside = _stage_flags(stages, "finetune", other)
    if own is None:
        own, beside, other = (
            _stage_flags(stages, "evaluate", method),
            _stage_flags(stages, "evaluate", "base"),
            "base",
        )
    if own is None or beside is None:
        return []
    told = []
    for name in dict.fromkeys([*own, *beside]):
        if own.get(name) != beside.get(name):
            there = f"{other}: {beside.get(name, ABSENT)}"
            told.append(f"{name.removeprefix('ramoe-')} {own.get(name, ABSENT)} ({there})")
    return told


def _stage_flags(stages: dict[str, Any], kind: str, method: str) -> dict[str, str] | None:
    """Flags of the method's first stage of a kind, without those that differ between any two stages.

    Of the file flags, only `CHOSEN_FILES` are kept, by the files' names.
    """
    name = next(
        (name for name in sorted(stages) if re.fullmatch(rf"{kind}/{re.escape(method)}(-seed\d+)?", name)),
        None,
    )
    if name is None:
        return None
    flags: dict[str, list[str]] = {}
    for word in stages[name].get("command", [])[1:]:
        if word.startswith("--"):
            flags[word[2:]] = []
        elif flags:
            flags[next(reversed(flags))].append(word)
    return {
        name: " ".join(values if name in DRAWN else [value.rpartition("/")[2] for value in values]) or "on"
        for name, values in flags.items()
        if name not in INCIDENTAL
        and (name in (*CHOSEN_FILES, *DRAWN) or not any("/" in value for value in values))
    }


def training_rows(study: Study) -> list[Row]:
    """A row (method, flag, value, reference) for each training flag that differs from the reference's.

    The flags are those of the recipe (train-iters, lr, ...), which are the same in every folder. The doubled
    batch of target paired is not among them: half of its places are views, and the samples are the same.
    """
    run = next(iter(study.runs.values()))
    expected = _recipe_flags(run, study.reference)
    rows = []
    for method in study.others:
        own = _recipe_flags(run, method)
        for flag in [flag for flag in {**expected, **own} if own.get(flag) != expected.get(flag)]:
            values = {
                name: _flag_text(flags.get(flag)) for name, flags in (("value", own), ("reference", expected))
            }
            rows.append({"method": method, "flag": flag, **values})
    return rows


def _recipe_flags(run: RunInputs, method: str) -> dict[str, Any]:
    own = next(
        (e for e in run.recipe.get("methods") or [] if isinstance(e, dict) and e["name"] == method), {}
    )
    if own.get("on"):  # steering: the method whose checkpoints are steered
        return _recipe_flags(run, own["on"])
    data = {key: own[key] for key in ("replay", "ids-per-task") if key in own}
    return {**(run.recipe.get("train") or {}), **(own.get("train") or {}), **data}


def _flag_text(value: Any) -> str:
    return ABSENT if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)
