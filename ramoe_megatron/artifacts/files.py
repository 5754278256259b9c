"""Atomic writing of files, and JSON documents with a format name and a version."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ramoe_megatron.errors import RamoeError

FORMATS: dict[str, tuple[int, tuple[str, ...]]] = {
    "ramoe-taxonomy": (1, ("anchor", "checkpoint", "data", "package_version", "pairs")),
    "ramoe-anchors": (1, ("anchor", "anchors", "checkpoint", "data", "package_version", "tasks")),
    "ramoe-evaluation": (1, ("method", "seed", "checkpoint", "split", "data", "rows", "mass", "examples")),
    "ramoe-prediction": (2, ("rows", "verdict", "limits")),
    "ramoe-steering": (1, (
        "anchor", "checkpoint", "split", "data", "experts", "package_version", "settings", "skipped", "best",
    )),
    "ramoe-results": (1, ("recipe", "anchor", "methods", "seeds", "rows", "summary", "mass", "ci_gain")),
    "ramoe-comparison": (2, (
        "bases", "methods", "reference", "headline", "claims", "cells", "english", "cost", "mass",
        "transplant",
    )),
    "ramoe-map": (1, ("worlds", "rows", "bands", "correlations", "cells")),
    "ramoe-tuning": (1, ("split", "seeds", "bases", "budget", "rows")),
    "ramoe-stage": (1, ("recipe", "stage")),
    "ramoe-slurm": (1, ("recipe", "jobs")),
    "ramoe-experts": (1, ()),
    "ramoe-priors": (1, ()),
    "ramoe-usage": (1, ()),
    "ramoe-shard": (1, ("key", "done")),
    "ramoe-data": (1, ("benchmarks", "package_version")),
    "ramoe-model": (1, ("family", "modules", "source", "package_version")),
}  # fmt: skip
"""Version and required keys of every format. The classes of the safetensors formats check their own keys."""


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file whole or not at all: yields a temporary path, which is renamed to ``path`` at the end.

    The temporary file is in the same folder and is synced before it is renamed. On any exception, Ctrl-C
    included, the temporary file is removed and an existing file at ``path`` is kept. Missing folders are
    made. The caller opens the yielded path, in any mode, and closes it.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(target.parent)  # so that the rename survives a power cut


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all; line ends are kept."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as hexadecimal text.

    Raises:
        RamoeError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def digests(paths: Iterable[str | os.PathLike[str]]) -> list[dict[str, str]]:
    """The ``data`` entry of the artefacts: path and SHA-256 of every file."""
    return [{"path": str(path), "sha256": sha256(path)} for path in paths]


def package_version() -> str:
    """The installed version of this package, for the artefacts' ``package_version``."""
    try:
        return version("ramoe-megatron")
    except PackageNotFoundError:
        return "unknown (run from a source tree, not installed)"


def save_document(path: str | os.PathLike[str], format_name: str, body: Mapping[str, Any]) -> None:
    """Write a JSON document of one of `FORMATS`, whole or not at all.

    Raises:
        RamoeError: a required key is missing, or a number is not finite (JSON has no NaN).
    """
    number, keys = FORMATS[format_name]
    missing = [key for key in keys if key not in body]
    if missing:
        raise RamoeError(f"{path}: {format_name} to be written lacks {', '.join(missing)}")
    try:
        text = json.dumps(
            {"format": format_name, "version": number, **body}, ensure_ascii=False, indent=1, allow_nan=False
        )
    except ValueError as error:
        raise RamoeError(f"{path}: {format_name} to be written holds a number that is not finite") from error
    atomic_write_text(path, text + "\n")


def load_document(path: str | os.PathLike[str], format_name: str) -> dict[str, Any]:
    """Read a JSON document and check that it is of this format, of a known version, and complete.

    Raises:
        RamoeError: the file cannot be read, is not JSON, or is not a complete document of this format and
            version.
    """
    return check_document(path, read_json(path), format_name)


def check_document(path: str | os.PathLike[str], document: Any, format_name: str) -> dict[str, Any]:
    """The check of `load_document`, for a parsed document; ``path`` is used in messages only."""
    number, keys = FORMATS[format_name]
    if not isinstance(document, dict) or document.get("format") != format_name:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise RamoeError(f"{path}: found format {found!r}, expected {format_name!r}; give the right file")
    if document.get("version") != number:
        raise RamoeError(
            f"{path}: found {format_name} version {document.get('version')!r}, expected {number}; "
            "write the file again with this version of ramoe-megatron, "
            f"or use the version that wrote it ({document.get('package_version', 'not recorded')})"
        )
    missing = [key for key in keys if key not in document]
    if missing:
        raise RamoeError(
            f"{path}: {format_name} lacks {', '.join(missing)}; the file is incomplete, write it again"
        )
    return document


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of any JSON file.

    Raises:
        RamoeError: the file cannot be read, is not JSON (with line and column), or has text that is not valid
            Unicode (with the key).
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise _unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise RamoeError(
            f"{path}: not UTF-8 text at byte {error.start}, expected JSON; give the right file"
        ) from error
    except json.JSONDecodeError as error:
        raise RamoeError(
            f"{path}: line {error.lineno} column {error.colno}: {error.msg}; "
            "the file is not JSON or was cut short: write it again"
        ) from error
    refuse_unwritable(found, str(path))
    return found


def refuse_unwritable(value: Any, where: str) -> None:
    """Refuse text that cannot be written as UTF-8: text with half of a surrogate pair.

    JSON and YAML can spell half of a surrogate pair ("\\ud800"). Python also uses one for a byte of the
    command line that is not UTF-8.

    Args:
        value: a text, or lists and mappings with texts at any depth; keys are checked too.
        where: the file and line, or the flag, for the message.

    Raises:
        RamoeError: some text cannot be written. The message names ``where``, the key and the character.
    """
    for path, text in _texts(value, ()):
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                key = f": {'.'.join(map(repr, path))}" if path else ""
                raise RamoeError(
                    f"{where}{key}: character {error.start + 1} of {text[:60]!r} is {text[error.start]!r}, "
                    "half of a surrogate pair or a byte that is not UTF-8, expected Unicode text; "
                    "write the whole character, or remove it"
                ) from error


def _texts(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _texts(key, path)
            yield from _texts(entry, (*path, key))
    elif isinstance(value, (list, tuple)):
        for number, entry in enumerate(value):
            yield from _texts(entry, (*path, number))


def _unreadable(path: str | os.PathLike[str], error: OSError) -> RamoeError:
    return RamoeError(
        f"{path}: cannot be read ({error.strerror}); check the path, or run the stage that writes it"
    )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


ANCHOR_FILES = ("taxonomy.jsonl", "taxonomy.json", "priors.safetensors", "anchors.json")
"""The files that `ramoe anchors` writes."""


def files_by_tokens(name: str, tokens: Sequence[str]) -> dict[str, str]:
    """Token choice -> file: NAME.safetensors for the first choice, NAME-TOKENS.safetensors for the others."""
    return {
        choice: f"{name}.safetensors" if choice == tokens[0] else f"{name}-{choice}.safetensors"
        for choice in tokens
    }
