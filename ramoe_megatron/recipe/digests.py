"""Digests of a stage's inputs and settings. They show whether a stage has to run again."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ramoe_megatron.artifacts.checkpoints import TRACKER, latest_checkpoint
from ramoe_megatron.artifacts.files import sha256

SAMPLE = 1 << 16  # bytes read at the start and at the end of each file of a checkpoint


def digest_value(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def digest_path(path: Path, maker: str | None = None) -> str | None:
    """Digest of a file, a folder or a checkpoint; None when the path does not exist.

    The digest of a file covers its bytes. That of a folder covers the names and digests of its files. That of
    a checkpoint folder is `digest_checkpoint`, where `maker` is the identity of the stage that wrote it.
    """
    if path.is_file():
        return sha256(path)
    if (path / TRACKER).is_file():
        return digest_checkpoint(path, maker)
    if path.is_dir():
        return digest_value([[str(file.relative_to(path)), sha256(file)] for file in _files(path)])
    return None


def digest_checkpoint(path: Path, maker: str | None = None) -> str:
    """Digest of a Megatron checkpoint folder that is cheap at any size.

    It covers latest_checkpointed_iteration.txt and the files of the iteration named there: name, size, and
    the first and last 64 KiB. Small files, such as metadata.json and .metadata, are read whole by this.
    Weights that differ only between the two ends would not change the digest. A checkpoint written by a stage
    therefore also carries `maker`, the digest of that stage's settings and inputs.
    """
    mark, folder = latest_checkpoint(path)
    files = [[str(file.relative_to(path)), file.stat().st_size, _sample(file)] for file in _files(folder)]
    return digest_value({"mark": mark, "files": files, "maker": maker})


def _sample(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(SAMPLE)
        if path.stat().st_size > SAMPLE:
            file.seek(max(SAMPLE, path.stat().st_size - SAMPLE))
            content += file.read(SAMPLE)
    return hashlib.sha256(content).hexdigest()


def _files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
