"""Digests by which a stage knows whether what it read has changed."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ramoe_megatron.artifacts.files import sha256

SAMPLE = 1 << 16  # bytes read at either end of a checkpoint's files
CHECKPOINT_MARK = "latest_checkpointed_iteration.txt"


def digest_value(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def digest_path(path: Path, maker: str | None = None) -> str | None:
    """Digest of a file, a folder or a checkpoint; None when it does not exist.

    A file: its bytes. A folder: the names and digests of its files. A checkpoint folder: see
    `digest_checkpoint`, with `maker`, the identity of the stage that made it.
    """
    if path.is_file():
        return sha256(path)
    if (path / CHECKPOINT_MARK).is_file():
        return digest_checkpoint(path, maker)
    if path.is_dir():
        return digest_value([[str(file.relative_to(path)), sha256(file)] for file in _files(path)])
    return None


def digest_checkpoint(path: Path, maker: str | None = None) -> str:
    """Cheap digest of a Megatron checkpoint folder, whatever its size.

    Covers latest_checkpointed_iteration.txt and, of the iteration that it names, each file's name, size and
    first and last 64 KiB (small files, such as metadata.json and .metadata, are thereby read whole). Weights
    may differ between the samples only, so a checkpoint made by a stage also carries `maker`, the digest of
    that stage's settings and inputs.
    """
    mark, folder = latest_checkpoint(path)
    files = [[str(file.relative_to(path)), file.stat().st_size, _sample(file)] for file in _files(folder)]
    return digest_value({"mark": mark, "files": files, "maker": maker})


def latest_checkpoint(path: Path) -> tuple[str, Path]:
    """What a checkpoint folder's tracker file says, and the folder of that iteration."""
    mark = (path / CHECKPOINT_MARK).read_text(encoding="utf-8").strip()
    return mark, path / (mark if mark == "release" else f"iter_{int(mark):07d}" if mark.isdigit() else ".")


def _sample(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(SAMPLE)
        if path.stat().st_size > SAMPLE:
            file.seek(max(SAMPLE, path.stat().st_size - SAMPLE))
            content += file.read(SAMPLE)
    return hashlib.sha256(content).hexdigest()


def _files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
