"""Rows of a data source, each with the place it came from.

This file reads JSONL, JSON and CSV, so that text is never taken for a number, a date or an absent value. The
`datasets` library, which reads them with pandas, finds the files of a hub data set, and reads Parquet and
Arrow files, whose columns have types.
"""

import csv
import io
import json
import re
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ramoe_megatron.errors import RamoeError

# suffix -> the name of its builder in `datasets`
BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
SUFFIXES = (".jsonl", ".parquet", ".csv", ".arrow")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")


def read_source(source: str, optional: Collection[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) for each row of a file, a folder or a hub data set; the place is for messages ("FILE, line 3").

    Args:
        optional: columns that a row may lack. CSV has no other way to say so than an empty cell, which is
            None in these columns; in any other column an empty cell is an empty text.

    Raises:
        RamoeError: for a source that is not there, a kind of file that is not read, a line that is no JSON
            object, a CSV file that is not well formed.
    """
    path = Path(source)
    if path.is_dir():
        names = local_files(source)
        if not names:
            raise RamoeError(f"{source}: the folder holds no data file ({', '.join(SUFFIXES)}).")
        for name in names:
            yield from _read_file(name, optional)
    elif path.exists():
        yield from _read_file(path, optional)
    elif _HUB_NAME.fullmatch(source) and path.suffix not in {".json", *SUFFIXES}:
        yield from _read_hub(source, optional)
    else:
        raise RamoeError(
            f"{source}: no such file or folder. Expected a path, or a hub name such as owner/name."
        )


def local_files(source: str) -> list[Path]:
    """The files behind a path, in the order they are read; none for a hub name."""
    path = Path(source)
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
    return [path] if path.exists() else []


def _read_file(path: Path, optional: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix not in SUFFIXES:
        raise RamoeError(f"{path}: cannot read {path.suffix!r} files. Expected {', '.join(SUFFIXES)}.")
    if path.suffix == ".jsonl":
        yield from _read_jsonl(path, str(path))
    elif path.suffix == ".csv":
        yield from _read_csv(path, str(path), optional)
    else:
        yield from _read_typed(path)


def _read_typed(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # the library copies what it reads into a cache: a temporary one, so that nothing of the user's disk is kept
    with tempfile.TemporaryDirectory() as cache:
        from datasets import load_dataset  # importing it takes seconds

        try:
            table = load_dataset(
                BUILDERS[path.suffix],
                data_files=str(path),
                split="train",
                cache_dir=cache,
                keep_in_memory=True,
            )
            rows = table.to_list()
        except Exception as error:
            raise RamoeError(
                f"{path}: not readable as {path.suffix[1:]}: {error.__cause__ or error}"
            ) from error
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def _read_hub(source: str, optional: Collection[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    from datasets import DownloadManager, load_dataset, load_dataset_builder  # importing it takes seconds
    from datasets.packaged_modules.csv.csv import CsvConfig
    from datasets.packaged_modules.json.json import JsonConfig

    name, _, configuration = source.partition(":")
    try:
        config = load_dataset_builder(name, configuration or None).config
        if as_text := isinstance(config, (CsvConfig, JsonConfig)):
            manager = DownloadManager()
            splits = {
                split: manager.download_and_extract(list(files)) for split, files in config.data_files.items()
            }
        else:
            splits = load_dataset(name, configuration or None)
    except Exception as error:
        raise RamoeError(f"{source}: no such file or folder, and as a hub name it failed: {error}") from error
    for split, found in splits.items():
        place = f"{source}, split {split}"
        if as_text:
            rows = (
                row
                for file in manager.iter_files(found)
                for row in _read_text(Path(file), place, config, optional)
            )
        else:
            rows = ((f"{place}, row {number}", row) for number, row in enumerate(found, 1))
        for where, row in rows:
            # hub data sets keep the split beside the rows
            yield where, {**row, "split": row.get("split") or str(split)}


def _read_text(
    path: Path, where: str, config: Any, optional: Collection[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a CSV or JSON file of a hub data set, read by the settings that its card may give."""
    where, sep = f"{where}, {path.name}", getattr(config, "sep", None)
    plain = type(config)(sep=sep) if sep else type(config)()
    ours = {"name", "version", "data_dir", "data_files", "description", "delimiter", "chunksize"}
    for key, value in vars(config).items():
        if key not in ours and value != getattr(plain, key):
            raise RamoeError(
                f"{where}: the data set sets {key} to {value!r}, which is not read here; download it, and "
                "give files."
            )
    if sep:
        yield from _read_csv(path, where, optional, sep)
    elif path.read_bytes().lstrip()[:1] == b"[":
        yield from _read_json(path, where)
    else:
        yield from _read_jsonl(path, where)


def _read_csv(
    path: Path, where: str, optional: Collection[str], sep: str = ","
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a CSV file: the first names the columns, and every cell is the text in the file."""
    text = _decode(path.read_bytes(), where)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=sep, strict=True)
    columns: list[str] = []
    while True:
        place = f"{where}, line {lines.line_num + 1}"
        try:
            cells = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            raise RamoeError(
                f"{place}: malformed CSV ({error}). A cell with {sep!r}, a quote or a line break is quoted."
            ) from error
        if not cells:
            continue
        if not columns:
            columns = cells
            if twice := [column for column in columns if columns.count(column) > 1]:
                raise RamoeError(
                    f"{place}: two columns are called {twice[0]!r}. Give each column a name of its own."
                )
            continue
        if len(cells) != len(columns):
            raise RamoeError(
                f"{place}: found {len(cells)} cells, expected {len(columns)} ({', '.join(columns)})."
            )
        row = dict(zip(columns, cells, strict=True))
        yield place, {key: None if cell == "" and key in optional else cell for key, cell in row.items()}


def _read_json(path: Path, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = json.loads(_decode(path.read_bytes(), where))
    except json.JSONDecodeError as error:
        raise RamoeError(
            f"{where}, line {error.lineno}, column {error.colno}: malformed JSON ({error.msg})."
        ) from error
    for number, row in enumerate(rows, 1):
        place = f"{where}, row {number}"
        yield place, _object(row, place, "a list of JSON objects")


def _read_jsonl(path: Path, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    # split at b"\n" alone: str.splitlines also splits at characters that JSON strings may hold
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        place = f"{where}, line {number}"
        try:
            row = json.loads(_decode(line, place, "utf-8-sig" if number == 1 else "utf-8"))
        except json.JSONDecodeError as error:
            raise RamoeError(
                f"{place}, column {error.colno}: malformed JSON ({error.msg}). Expected one JSON object a line."
            ) from error
        yield place, _object(row, f"{place}, column 1", "one JSON object a line")


def _object(row: Any, place: str, expected: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise RamoeError(f"{place}: found {type(row).__name__}, expected {expected}.")
    return row


def _decode(content: bytes, place: str, encoding: str = "utf-8-sig") -> str:
    """The text of a file (with a byte order mark or without), or of a line in it."""
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise RamoeError(f"{place}, byte {error.start + 1}: not UTF-8 ({error.reason}).") from error
