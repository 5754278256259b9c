"""Configs of the data jobs: frozen dataclasses read from JSON. Unknown keys are errors."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ramoe_megatron.artifacts.files import read_json, refuse_unwritable
from ramoe_megatron.errors import RamoeError


def config_from_mapping[T](kind: type[T], values: Mapping[str, Any]) -> T:
    """A config dataclass from its field values. Lists become tuples; types are checked.

    Raises:
        RamoeError: a key is unknown (the message suggests the nearest key), a value has the wrong type or is
            out of range, or text is not valid Unicode.
    """
    refuse_unwritable(values, kind.__name__)
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise RamoeError(
                f"{kind.__name__}: unknown key {key!r}; did you mean {near[0]!r}? Keys: {', '.join(known)}."
            )
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "config"
        raise RamoeError(f"{kind.__name__}: {place} is {first['input']!r}: {first['msg']}.") from error


def config_from_json[T](kind: type[T], text: str) -> T:
    """A config from a JSON object, given as text (``{...}``) or as the path of a JSON file."""
    try:
        values = json.loads(text) if text.lstrip().startswith("{") else read_json(text)
    except json.JSONDecodeError as error:
        raise RamoeError(f"config: column {error.colno}: malformed JSON ({error.msg}).") from error
    if not isinstance(values, dict):
        raise RamoeError(f"config {text}: found {type(values).__name__}, expected a JSON object.")
    return config_from_mapping(kind, values)
