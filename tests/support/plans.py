"""A small recipe, and its plan by stage."""

from pathlib import Path
from typing import Any

from ramoe_megatron.recipe.load import validate
from ramoe_megatron.recipe.plan import make_plan
from ramoe_megatron.recipe.stage import Stage

BASE: dict[str, Any] = {
    "name": "small",
    "model": {"num-layers": 2, "num-experts": 4},
    "train": {"train-iters": 4, "micro-batch-size": 2, "global-batch-size": 8, "lr": 1e-3},
    "pretrain": {"train-iters": 8, "lr": 1e-2},
    "alignment": {"coeff": 10, "target": "example"},
    "data": {"world": {}},
    "methods": ["sft", "ra-moe"],
    "seeds": [1, 2],
}


def plan(out: Path, folder: Path | None = None, **changes: Any) -> dict[str, Stage]:
    return {stage.name: stage for stage in make_plan(validate({**BASE, **changes}, "r"), out, folder or out)}


def option(stage: Stage, flag: str) -> list[str] | None:
    """Values of a flag on a command line."""
    if flag not in stage.command:
        return None
    values = []
    for word in stage.command[stage.command.index(flag) + 1 :]:
        if word.startswith("--"):
            break
        values.append(word)
    return values
