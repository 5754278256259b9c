"""What every section of a recipe is made of."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Scalar = bool | int | float | str
FlagValue = Scalar | list[Scalar] | None


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def _as_list(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_as_list)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, keys are written with dashes."""

    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=_kebab, use_attribute_docstrings=True)
