"""Reads a recipe from YAML and `--set`. Errors name the file, the line, the key and the nearest valid key."""

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from ramoe_megatron.artifacts.files import refuse_unwritable
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.recipe.schema import HUGGING_FACE, Recipe

Location = tuple[int | str, ...]
SCALAR = (str, int, float)


class RecipeLoader(yaml.SafeLoader):
    """YAML with fewer implicit types, so that values are read as written.

    12:00:00 and 2026-01-31 are strings, not the number 43200 and a date. Only true and false are booleans, so
    the key `on` and the language `no` remain strings.
    """


_INTEGER = r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)"
_FLOAT = (
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?|\.(?:inf|Inf|INF))"
    r"|\.(?:nan|NaN|NAN)"
)
_BOOLEAN = "true|True|TRUE|false|False|FALSE"
_READ = {
    f"tag:yaml.org,2002:{kind}": pattern
    for kind, pattern in (("int", _INTEGER), ("float", _FLOAT), ("bool", _BOOLEAN))
}
_NOT_READ = {*_READ, "tag:yaml.org,2002:timestamp"}
RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NOT_READ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _READ.items():
    RecipeLoader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), list("-+0123456789.tTfF"))


def load_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with `key.path=value` changes applied.

    Raises RamoeError when the file is absent, is not YAML in UTF-8, or has an invalid key or value.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RamoeError(
            f"{path}: the recipe cannot be read ({error.strerror}); give the path of a YAML recipe"
        ) from error
    except UnicodeDecodeError as error:
        raise RamoeError(f"{path}: not UTF-8 text at byte {error.start}; save the recipe as UTF-8") from error
    try:
        tree = yaml.compose(text, Loader=RecipeLoader)
        lines = dict(_lines(tree, (), path)) if tree is not None else {}
        raw = yaml.load(text, Loader=RecipeLoader)
    except (
        yaml.YAMLError,
        ValueError,
    ) as error:  # ValueError: a tag, such as !!timestamp, that does not fit its value
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RamoeError(f"{where}: invalid YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(raw, dict):
        raise RamoeError(
            f"{path}: expected a mapping with keys such as name, model and data, found {type(raw).__name__}"
        )
    for change in changes:
        refuse_unwritable(change, "--set")
        raw = set_value(raw, change)
    refuse_unwritable(raw, str(path))
    return validate(with_model_of_folder(raw, path.parent), str(path), lines)


def with_model_of_folder(raw: dict[str, Any], recipe_folder: Path) -> dict[str, Any]:
    """The recipe with flags and tokenizer of the Hugging Face folder that `checkpoint` names, if it does.

    Keys that the recipe gives are kept. Raises RamoeError when the folder is absent or cannot be converted.
    """
    name = raw.get("checkpoint")
    if not isinstance(name, str) or not name.startswith(HUGGING_FACE):
        return raw
    from ramoe_megatron.models.families import family_of

    given = name.removeprefix(HUGGING_FACE)
    folder = next((place for place in (recipe_folder / given, Path(given)) if place.is_dir()), None)
    if folder is None:
        raise RamoeError(
            f"checkpoint: {given} is a folder neither in {recipe_folder.resolve()} nor in {Path.cwd()}; "
            "give a Hugging Face folder"
        )
    family, config = family_of(folder)
    resolved = str(folder.resolve())
    tokenizer = {"tokenizer-type": "HuggingFaceTokenizer", "tokenizer-model": resolved}
    return {
        "tokenizer": tokenizer,
        **raw,
        "checkpoint": f"{HUGGING_FACE}{resolved}",
        "model": {**family.flags(config), **(raw.get("model") or {})},
    }


def validate(raw: dict[str, Any], source: str, lines: dict[Location, int] | None = None) -> Recipe:
    """A recipe from plain data.

    Raises RamoeError that names `source`, the line where it is known, and each wrong key.
    """
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        problems = [_explain(item, source, lines or {}) for item in error.errors()]
        raise RamoeError("\n".join(dict.fromkeys(problems))) from None


def set_value(raw: dict[str, Any], change: str) -> dict[str, Any]:
    """A copy of `raw` with `key.path=value` applied. The value is YAML; a number in the path indexes a list.

    Raises RamoeError when there is no `=`, when the value is not YAML, or when the path leads through a value
    that is no mapping.
    """
    path, equals, text = change.partition("=")
    if not equals or not all(path.split(".")):
        raise RamoeError(f"--set {change}: expected key.path=value, such as --set train.lr=1e-4")
    try:
        value = yaml.load(text, Loader=RecipeLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise RamoeError(
            f"--set {change}: the value is invalid YAML ({error.__class__.__name__}); quote it"
        ) from error
    return _set(raw, path.split("."), value, change)


def _set(node: Any, keys: list[str], value: Any, change: str) -> Any:
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if node is None:
        node = {}
    if isinstance(node, list):
        if not key.isdigit() or int(key) >= len(node):
            raise RamoeError(
                f"--set {change}: {key} is no place in a list of {len(node)} items; places count from 0"
            )
        return [
            _set(item, rest, value, change) if place == int(key) else item for place, item in enumerate(node)
        ]
    if not isinstance(node, dict):
        raise RamoeError(f"--set {change}: {key} lies under {node!r}, which is not a mapping")
    return {**node, key: _set(node.get(key), rest, value, change)}


def _lines(node: yaml.Node, at: Location, path: Path) -> Iterable[tuple[Location, int]]:
    """Location and 1-based line of each key.

    Raises RamoeError for a repeated key, of which PyYAML would silently keep the last.
    """
    yield at, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise RamoeError(f"{path}:{line}: the key {key.value!r} is given twice; keep one")
            seen.add(key.value)
            yield from _lines(value, (*at, key.value), path)
            yield (*at, key.value), line
    elif isinstance(node, yaml.SequenceNode):
        for place, item in enumerate(node.value):
            yield from _lines(item, (*at, place), path)


def _explain(item: Any, source: str, lines: dict[Location, int]) -> str:
    location: Location = tuple(item["loc"])
    known = next((location[:n] for n in range(len(location), 0, -1) if location[:n] in lines), None)
    where = f"{source}:{lines[known]}" if known else source
    key = ".".join(map(str, location))
    if item["type"] == "extra_forbidden":
        valid = _keys_at(location[:-1])
        return f"{where}: {key} is no key of a recipe{nearest(str(location[-1]), valid)}"
    if item["type"] == "missing":
        return f"{where}: {key} is missing and has no default; add it"
    found = f" (found {item['input']!r})" if isinstance(item["input"], SCALAR) else ""
    message = item["msg"].removeprefix("Value error, ")
    return f"{where}: {key + ': ' if key else ''}{message}{found}"


def nearest(found: str, valid: Iterable[str]) -> str:
    """`; did you mean X?` with the nearest valid name, or the list of valid names when none is near."""
    valid = sorted(valid)
    close = difflib.get_close_matches(found, valid, n=1, cutoff=0.6) or difflib.get_close_matches(
        found.replace("_", "-"), valid, n=1, cutoff=0.6
    )
    if close:
        return f"; did you mean {close[0]}?"
    return f"; valid here: {', '.join(valid)}" if len(valid) <= 30 else ""


def _keys_at(location: Location) -> list[str]:
    model: Any = Recipe
    for part in location:
        if isinstance(part, int) or not (isinstance(model, type) and issubclass(model, BaseModel)):
            continue
        field = next((f for f in model.model_fields.values() if f.alias == part), None)
        model = _model_in(field.annotation) if field else None
    return _keys(model) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_in(annotation: Any) -> Any:
    """The section in `Section`, `Section | None` or `list[Section]`."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return annotation if issubclass(annotation, BaseModel) else None
    if get_origin(annotation) in (list, Union, UnionType):
        return next((found for arg in get_args(annotation) if (found := _model_in(arg))), None)
    return None
