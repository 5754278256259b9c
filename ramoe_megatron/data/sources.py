"""Reading the rows of a data source, each row with its place in the source.

JSONL, JSON and CSV are read here, because the ``datasets`` library reads them with pandas, which may take
text for a number, a date or an absent value. ``datasets`` finds the files of a hub data set, and reads
Parquet and Arrow files, which have typed columns.
"""

import csv
import functools
import io
import json
import re
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from ramoe_megatron.errors import RamoeError

# suffix -> name of the builder in `datasets`
BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
BLOCK = 4096  # rows of a typed file that are in memory at once
SUFFIXES = (".jsonl", ".parquet", ".csv", ".arrow")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")


def read_source(source: str, optional: Collection[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) for each row of a file, a folder or a hub data set.

    The place is for messages, for example "FILE, line 3".

    Args:
        source: a path, or the name of a hub data set.
        optional: columns that a row may lack. An empty CSV cell is None in these columns, and an empty text
            in other columns.

    Raises:
        RamoeError: the source does not exist, a file has an unknown suffix, a line is not a JSON object, or a
            CSV file is malformed.
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
    elif _is_hub_name(source):
        yield from _read_hub(source, optional)
    else:
        raise RamoeError(
            f"{source}: no such file or folder. Expected a path, or a hub name such as owner/name."
        )


def _is_hub_name(source: str) -> bool:
    return bool(_HUB_NAME.fullmatch(source)) and Path(source).suffix not in {".json", *SUFFIXES}


def local_files(source: str) -> list[Path]:
    """The data files at a path, in reading order; empty for a hub name."""
    path = Path(source)
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
    return [path] if path.exists() else []


def hub_version(source: str) -> str:
    """What tells one version of a hub data set from another.

    Raises:
        RamoeError: the source is neither a path nor a hub data set that can be found; as `read_source`.
    """
    if Path(source).exists() or not _is_hub_name(source):
        next(read_source(source), None)  # raises
    from datasets import load_dataset_builder  # importing it takes seconds

    name, _, configuration = source.partition(":")
    try:
        builder = load_dataset_builder(name, configuration or None)
    except Exception as error:
        raise _not_found(source, error) from error
    return repr((builder.hash, sorted((builder.config.data_files or {}).items(), key=str)))


def _not_found(source: str, error: Exception) -> RamoeError:
    return RamoeError(f"{source}: no such file or folder, and as a hub name it failed: {error}")


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
    # The library writes a cache of the rows; a temporary cache leaves nothing on the user's disk.
    with tempfile.TemporaryDirectory() as cache:
        from datasets import load_dataset  # importing it takes seconds

        def readable[Value](read: Callable[[], Value]) -> Value:
            try:
                return read()
            except Exception as error:
                raise RamoeError(
                    f"{path}: not readable as {path.suffix[1:]}: {error.__cause__ or error}"
                ) from error

        table = readable(
            lambda: load_dataset(BUILDERS[path.suffix], data_files=str(path), split="train", cache_dir=cache)
        )
        for start in range(0, len(table), BLOCK):
            block = range(start, min(start + BLOCK, len(table)))
            rows = readable(functools.partial(lambda block: table.select(block).to_list(), block))
            for number, row in enumerate(rows, start + 1):
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
        raise _not_found(source, error) from error
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
            # Hub data sets have the split as the name of the table, not as a column.
            yield where, {**row, "split": row.get("split") or str(split)}


def _read_text(
    path: Path, where: str, config: Any, optional: Collection[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a CSV or JSON file of a hub data set. The only supported setting of a card is ``sep``."""
    where, sep = f"{where}, {path.name}", getattr(config, "sep", None)
    plain = type(config)(sep=sep) if sep else type(config)()
    ours = {"name", "version", "data_dir", "data_files", "description", "delimiter", "chunksize"}
    for key, value in vars(config).items():
        if key not in ours and value != getattr(plain, key):
            raise RamoeError(
                f"{where}: the data set sets {key} to {value!r}, which is not supported; "
                "download the data set, and give its files."
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
    """The rows of a CSV file. The first row has the column names; every cell is the text in the file."""
    text = decode_text(path.read_bytes(), where)
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
                f"{place}: malformed CSV ({error}). Quote each cell that has {sep!r}, "
                "a quote or a line break."
            ) from error
        if not cells:
            continue
        if not columns:
            columns = cells
            if twice := [column for column in columns if columns.count(column) > 1]:
                raise RamoeError(
                    f"{place}: two columns are called {twice[0]!r}. Give each column a different name."
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
        rows = json.loads(decode_text(path.read_bytes(), where))
    except json.JSONDecodeError as error:
        raise RamoeError(
            f"{where}, line {error.lineno}, column {error.colno}: malformed JSON ({error.msg})."
        ) from error
    for number, row in enumerate(rows, 1):
        place = f"{where}, row {number}"
        yield place, _object(row, place, "a list of JSON objects")


def _read_jsonl(path: Path, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    # Split at b"\n" only: str.splitlines also splits at characters that JSON strings may contain.
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        place = f"{where}, line {number}"
        try:
            row = json.loads(decode_text(line, place, "utf-8-sig" if number == 1 else "utf-8"))
        except json.JSONDecodeError as error:
            raise RamoeError(
                f"{place}, column {error.colno}: malformed JSON ({error.msg}). "
                "Expected one JSON object per line."
            ) from error
        yield place, _object(row, f"{place}, column 1", "one JSON object per line")


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for line in file:
            yield line.removesuffix(b"\n")


def _object(row: Any, place: str, expected: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise RamoeError(f"{place}: found {type(row).__name__}, expected {expected}.")
    return row


def decode_text(content: bytes, place: str, encoding: str = "utf-8-sig") -> str:
    """The text of a file or line. A byte order mark at its start is dropped.

    Raises:
        RamoeError: the bytes are not text in the encoding. The message has the place and the byte.
    """
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise RamoeError(f"{place}, byte {error.start + 1}: not UTF-8 ({error.reason}).") from error
