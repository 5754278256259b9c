"""Artefacts with rows of text: ``taxonomy.jsonl``, ``divergence.csv`` and ``evaluations/NAME.jsonl``."""

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any, get_type_hints

from ramoe_megatron.artifacts.files import atomic_write_text, refuse_unwritable
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.categories import TaxonomyRow
from ramoe_megatron.method.divergence import DivergenceRow

_TAXONOMY_TYPES = get_type_hints(TaxonomyRow)
_EXAMPLE_TYPES = {"id": str, "task": str, "language": str, "correct": bool}
_DIVERGENCE_COLUMNS = [f.name for f in fields(DivergenceRow) if f.name != "task"]
_TASK_COLUMNS = ["task", *_DIVERGENCE_COLUMNS]


def write_taxonomy(path: str | os.PathLike[str], rows: Iterable[TaxonomyRow]) -> None:
    """Write ``taxonomy.jsonl``, whole or not at all: one row per line, in the given order."""
    lines = (json.dumps({**asdict(row), "category": row.category}, ensure_ascii=False) for row in rows)
    atomic_write_text(path, "".join(f"{line}\n" for line in lines))


def read_taxonomy(path: str | os.PathLike[str]) -> list[TaxonomyRow]:
    """Read ``taxonomy.jsonl``. Raises RamoeError as `taxonomy_rows`."""
    return list(taxonomy_rows(path))


def taxonomy_rows(path: str | os.PathLike[str]) -> Iterator[TaxonomyRow]:
    """The rows of ``taxonomy.jsonl``, one by one.

    Raises:
        RamoeError: with file and line, for a line that is not JSON, lacks a key, has a value of the wrong
            type, has a category that contradicts the two outcomes, or repeats an (id, language).
    """
    again = "score the examples again (ramoe taxonomy)"
    for where, found in _records(path, _TAXONOMY_TYPES, again):
        row = TaxonomyRow(**{key: found[key] for key in _TAXONOMY_TYPES})
        if found.get("category") != row.category:
            raise RamoeError(
                f"{where}: key 'category': found {found.get('category')!r}, "
                f"expected {row.category!r} by the two outcomes; {again}"
            )
        yield row


def read_examples(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read ``evaluations/NAME.jsonl``: rows with id, task, language (str) and correct (bool).

    Raises:
        RamoeError: with file and line, as `read_taxonomy`.
    """
    return [found for _, found in _records(path, _EXAMPLE_TYPES, "evaluate again (ramoe evaluate)")]


def first_line(path: str | os.PathLike[str]) -> str:
    """The first line that is not blank; raises RamoeError for a file without such a line."""
    for _, line in _lines(path):
        return line
    raise RamoeError(f"{path}: no rows, expected one per line; run the stage that writes the file again")


def json_objects(path: str | os.PathLike[str], again: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(line number, "file:line", object) of every line of a JSONL file that is not blank.

    Args:
        again: what to do about a wrong line, for messages.

    Raises:
        RamoeError: the file cannot be read, a line is not one JSON object, or text is not valid Unicode.
    """
    for number, line in _lines(path):
        where = f"{path}:{number}"
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            raise RamoeError(
                f"{where}: column {error.colno}: {error.msg}, expected one JSON object; {again}"
            ) from error
        if not isinstance(found, dict):
            raise RamoeError(f"{where}: found {type(found).__name__}, expected one JSON object; {again}")
        if "\\u" in line:  # in UTF-8 only JSON's own spelling can be half of a surrogate pair
            refuse_unwritable(found, where)
        yield number, where, found


def _records(
    path: str | os.PathLike[str], types: Mapping[str, type], again: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of every line. Checks the types of the keys and that (id, language) is unique."""
    bits: dict[str, int] = {}
    seen: dict[str, int] = {}  # id -> one bit for each language read so far
    for _, where, found in json_objects(path, again):
        for key, kind in types.items():
            if not isinstance(found.get(key), kind):
                value = repr(found[key]) if key in found else "nothing"
                raise RamoeError(f"{where}: key {key!r}: found {value}, expected {kind.__name__}; {again}")
        id_, bit = found["id"], 1 << bits.setdefault(found["language"], len(bits))
        if seen.get(id_, 0) & bit:
            first = next(
                place
                for place, line in _lines(path)
                if (row := json.loads(line))["id"] == id_ and row["language"] == found["language"]
            )
            raise RamoeError(
                f"{where}: id {id_!r} in {found['language']!r} is on line {first} already; {again}"
            )
        seen[id_] = seen.get(id_, 0) | bit
        yield where, found
    if not seen:
        raise RamoeError(f"{path}: no rows, expected one per line; {again}")


def _lines(path: str | os.PathLike[str], whole: bool = False) -> Iterator[tuple[int, str]]:
    """(number, line) of the lines that are not blank.

    With ``whole``, all lines unchanged, because a cell of a CSV file may contain blank lines. A last line
    without a line end is then an error, because its last number may be cut short.
    """
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if whole and not line.endswith("\n"):
                    raise RamoeError(
                        f"{path}:{number}: no line end, so the file was cut short; "
                        "run the stage that writes the file again"
                    )
                if whole or line.strip():
                    yield number, line if whole else line.rstrip()
    except OSError as error:
        raise RamoeError(
            f"{path}: cannot be read ({error.strerror}); check the path, "
            "or run the stage that writes the file"
        ) from error
    except UnicodeDecodeError as error:
        raise RamoeError(f"{path}: not UTF-8 text at byte {error.start}; give the right file") from error


def write_divergence(path: str | os.PathLike[str], rows: Iterable[DivergenceRow]) -> None:
    """Write ``divergence.csv``, or ``divergence-by-task.csv`` for rows that have tasks, whole or not at all.

    An undefined mean is an empty field.
    """
    rows = list(rows)
    columns = _TASK_COLUMNS if any(row.task is not None for row in rows) else _DIVERGENCE_COLUMNS
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    atomic_write_text(path, buffer.getvalue())


def read_divergence(path: str | os.PathLike[str]) -> list[DivergenceRow]:
    """Read ``divergence.csv`` or ``divergence-by-task.csv``.

    Raises:
        RamoeError: with file and line, for other columns or a value that is not a number; also when the
            layers of a language, or of a task in it, are not 0, 1, ...
    """
    reader = csv.DictReader(line for _, line in _lines(path, whole=True))
    if reader.fieldnames is None or list(reader.fieldnames) not in (
        _DIVERGENCE_COLUMNS,
        _TASK_COLUMNS,
    ):
        raise RamoeError(
            f"{path}:1: found columns {', '.join(reader.fieldnames or []) or 'none'}, expected "
            f"{', '.join(_DIVERGENCE_COLUMNS)}; profile again"
        )
    rows: list[DivergenceRow] = []
    for record in reader:
        where = f"{path}:{reader.line_num}"
        try:
            rows.append(
                DivergenceRow(
                    language=record["language"],
                    moe_layer=int(record["moe_layer"]),
                    layer_number=int(record["layer_number"]),
                    divergence=_finite(record["divergence"]) if record["divergence"] else None,
                    pairs=int(record["pairs"]),
                    undefined_pairs=int(record["undefined_pairs"]),
                    task=record.get("task"),
                )
            )
        except (TypeError, ValueError) as error:
            raise RamoeError(f"{where}: {error}, expected a number; profile again") from error
    layers: dict[str, list[int]] = {}
    for row in rows:
        name = row.language if row.task is None else f"{row.task}/{row.language}"
        layers.setdefault(name, []).append(row.moe_layer)
    deepest = max((len(found) for found in layers.values()), default=0)
    for language, found in layers.items():
        if found != list(range(deepest)):
            raise RamoeError(
                f"{path}: language {language!r} has MoE layers {found}, expected 0 to {deepest - 1}; "
                "profile again"
            )
    if not rows:
        raise RamoeError(f"{path}: no rows, expected one per language and MoE layer; profile again")
    return rows


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"found {text!r}")
    return value
