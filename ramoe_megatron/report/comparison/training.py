"""Which methods did not train by the reference's flags: for those, a comparison at equal steps, batch and rate is none."""

from typing import Any

from ramoe_megatron.report.comparison.contrasts import Row
from ramoe_megatron.report.comparison.study import Study
from ramoe_megatron.report.inputs import RunInputs

ABSENT = "not given"


def training(study: Study) -> list[Row]:
    """A row for each training flag of a method (train-iters, lr, ...) that differs from the reference's: method, flag, value, reference.

    The flags are those of the recipe, which every folder has alike. That a target paired at the current weights doubles the batch is
    not among them: half of its places are views, and the samples are the same.
    """
    run = next(iter(study.runs.values()))
    expected = _flags(run, study.reference)
    rows = []
    for method in study.others:
        own = _flags(run, method)
        for flag in [flag for flag in {**expected, **own} if own.get(flag) != expected.get(flag)]:
            values = {name: _told(flags.get(flag)) for name, flags in (("value", own), ("reference", expected))}
            rows.append({"method": method, "flag": flag, **values})
    return rows


def _flags(run: RunInputs, method: str) -> dict[str, Any]:
    own = next((e for e in run.recipe.get("methods") or [] if isinstance(e, dict) and e["name"] == method), {})
    if own.get("on"):  # steering: whose checkpoints it acts on
        return _flags(run, own["on"])
    return {**(run.recipe.get("train") or {}), **(own.get("train") or {})}


def _told(value: Any) -> str:
    return ABSENT if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)
