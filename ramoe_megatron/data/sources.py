"""Rows of a data source, each with the place it came from: JSONL by this file, all else by the `datasets` library."""

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ramoe_megatron.errors import RamoeError

# suffix -> the name of its builder in `datasets`
BUILDERS = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")


def read_source(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) for each row of a file, a folder or a hub data set; the place is for messages ("FILE, line 3").

    Raises:
        RamoeError: for a source that is not there, a kind of file that is not read, a line that is no JSON object.
    """
    path = Path(source)
    if path.is_dir():
        names = local_files(source)
        if not names:
            raise RamoeError(f"{source}: the folder holds no data file (.jsonl, {', '.join(BUILDERS)}).")
        for name in names:
            yield from _read_file(name)
    elif path.exists():
        yield from _read_file(path)
    elif _HUB_NAME.fullmatch(source) and path.suffix not in {".jsonl", ".json", *BUILDERS}:
        yield from _read_hub(source)
    else:
        raise RamoeError(f"{source}: no such file or folder. Expected a path, or a hub name such as owner/name.")


def local_files(source: str) -> list[Path]:
    """The files behind a path, in the order they are read; none for a hub name."""
    path = Path(source)
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.suffix == ".jsonl" or p.suffix in BUILDERS)
    return [path] if path.exists() else []


def _read_file(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix == ".jsonl":
        yield from _read_jsonl(path)
        return
    if path.suffix not in BUILDERS:
        raise RamoeError(f"{path}: cannot read {path.suffix!r} files. Expected .jsonl, {', '.join(BUILDERS)}.")
    # the library copies what it reads into a cache: a temporary one, so that nothing of the user's disk is kept
    with tempfile.TemporaryDirectory() as cache:
        from datasets import load_dataset  # importing it takes seconds

        try:
            table = load_dataset(
                BUILDERS[path.suffix], data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True
            )
        except Exception as error:
            raise RamoeError(f"{path}: not readable as {path.suffix[1:]}: {error.__cause__ or error}") from error
        rows = table.to_list()
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def _read_hub(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    from datasets import load_dataset  # importing it takes seconds

    name, _, configuration = source.partition(":")
    try:
        splits = load_dataset(name, configuration or None)
    except Exception as error:
        raise RamoeError(f"{source}: no such file or folder, and as a hub name it failed: {error}") from error
    for split, table in splits.items():
        for number, row in enumerate(table, 1):
            # hub data sets keep the split beside the rows
            yield f"{source}, split {split}, row {number}", {"split": str(split), **row}


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # split at b"\n" alone: str.splitlines also splits at characters that JSON strings may hold
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise RamoeError(f"{place}, byte {error.start + 1}: not UTF-8 ({error.reason}).") from error
        except json.JSONDecodeError as error:
            raise RamoeError(
                f"{place}, column {error.colno}: malformed JSON ({error.msg}). Expected one JSON object a line."
            ) from error
        if not isinstance(row, dict):
            raise RamoeError(f"{place}, column 1: found {type(row).__name__}, expected one JSON object a line.")
        yield place, row
