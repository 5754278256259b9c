"""What every section of a recipe is made of."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Scalar = bool | int | float | str
FlagValue = Scalar | list[Scalar] | None


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def _as_list(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_as_list)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


# Flags that the plan itself gives; each with the recipe key that is meant instead.
RESERVED_FLAGS = {
    "load": "checkpoint (a base model), or --out (the run folder)",
    "save": "--out (the run folder)",
    "pretrained-checkpoint": "checkpoint",
    "finetune": "checkpoint",
    "tensorboard-dir": "--out (the run folder)",
    "seed": "seed (data and base model) and seeds (fine-tuning)",
}
def _flags(flags: dict[str, FlagValue]) -> dict[str, FlagValue]:
    for name, value in flags.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            raise ValueError(f"{name!r} is no flag name: write Megatron's flag without the leading dashes, such as num-layers")
        if name in RESERVED_FLAGS:
            raise ValueError(f"{name} is set by the plan itself; use {RESERVED_FLAGS[name]}")
        if name.startswith("ramoe-"):
            raise ValueError(f"{name} is set by the plan itself; use the recipe's data, taxonomy, profile or alignment section")
        if value == []:
            raise ValueError(f"{name} is an empty list; use null to leave the flag out")
        if str(value).lower() in ("yes", "no", "on", "off"):
            raise ValueError(f"{name} is {value!r}; write true for a bare flag, false to leave it out")
    return flags


Flags = Annotated[dict[str, FlagValue], AfterValidator(_flags)]


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, keys are written with dashes."""

    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=_kebab, use_attribute_docstrings=True)
