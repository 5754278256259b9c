"""Entries on disk that one process of a node makes and all processes map: rows and tokens of the data."""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ramoe_megatron.artifacts.files import atomic_write_text, sha256
from ramoe_megatron.errors import RamoeError

SIZES = "sizes.json"
"""Beside the files of an entry: their sizes, by which a file that was cut short is found."""
DIGESTS = "digests.json"


def default_folder() -> Path:
    """The folder for a run without `--data-cache-path`: "ramoe" in the cache of the `datasets` library."""
    caches = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", os.path.join(caches, "huggingface"))
    return Path(os.environ.get("HF_DATASETS_CACHE", os.path.join(home, "datasets"))).expanduser() / "ramoe"


def key_of(value: Any) -> str:
    """A name for a JSON value: equal values, and in practice only these, have equal names."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


class Cache:
    """A folder of entries. An entry is a folder of files that never change; its name tells its content.

    Attributes:
        folder: the folder.
        keeps: whether new entries are kept. Without, as in a check, which writes nothing, a new entry is made
            in a temporary folder and lives as long as this process.
    """

    def __init__(self, folder: Path, keeps: bool = True) -> None:
        self.folder, self.keeps = folder, keeps

    def entry(self, name: str, make: Callable[[Path], None], kept: bool = True) -> Path:
        """The folder of an entry. The first process that asks makes it; others wait for that process.

        Args:
            name: name of the entry.
            make: writes the files of the entry into a folder. The folder may have files of an attempt that
                was killed.
            kept: whether the name tells the whole content, so that the entry can serve later runs.

        Raises:
            RamoeError: the folder cannot be written, or a file of the entry is damaged; and as `make`.
        """
        final = self.folder / name
        if kept and final.is_dir():
            return _whole(final)
        if not (kept and self.keeps):
            return _temporary(name, make)
        with self._locked(name):
            if not final.is_dir():
                work = self.folder / f".{name}.making"
                work.mkdir(exist_ok=True)
                try:
                    make(work)
                except RamoeError:
                    shutil.rmtree(work)  # other data or flags will have another name
                    raise
                _seal(work)
                os.replace(work, final)
        return _whole(final)

    def digest(self, path: Path) -> str:
        """SHA-256 of a file. A file of the same path, size and time as at an earlier start is not read."""
        found = path.stat()
        state = [str(path.resolve()), found.st_size, found.st_mtime_ns]
        known = self._digests().get(key_of(state))
        if known is None:
            known = _digest(*state)
            if self.keeps:
                with self._locked("digests"):
                    atomic_write_text(
                        self.folder / DIGESTS, json.dumps({**self._digests(), key_of(state): known})
                    )
        return known

    def _digests(self) -> dict[str, str]:
        try:
            return json.loads((self.folder / DIGESTS).read_text())
        except (OSError, ValueError):
            return {}

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold the lock of one entry, and tell a user whose disk is full or not writable."""
        import filelock

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(self.folder / f".{name}.lock", fallback_to_soft=False):
                yield
        except OSError as error:
            raise RamoeError(
                f"{error.filename or self.folder}: the cache of the data cannot be written "
                f"({error.strerror}); give a folder with room (--data-cache-path)"
            ) from error


@functools.lru_cache(maxsize=1024)
def _digest(path: str, size: int, changed: int) -> str:
    return sha256(path)


_made: dict[str, tempfile.TemporaryDirectory[str]] = {}
"""Entries of this process alone."""


def _temporary(name: str, make: Callable[[Path], None]) -> Path:
    if name not in _made:
        folder = tempfile.TemporaryDirectory(prefix="ramoe-data-")
        make(Path(folder.name))
        _made[name] = folder
    return Path(_made[name].name)


def _seal(folder: Path) -> None:
    """Write all files of an entry through to the disk, and note their sizes."""
    files = sorted(path for path in folder.iterdir() if path.name != SIZES)
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    atomic_write_text(folder / SIZES, json.dumps({path.name: path.stat().st_size for path in files}))


def _whole(folder: Path) -> Path:
    """The folder of an entry. Raises RamoeError when a file is missing or has another size than it had."""
    sizes = json.loads((folder / SIZES).read_text())
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise RamoeError(
                f"{path}: {'missing' if not path.is_file() else f'{path.stat().st_size} bytes'}, "
                f"expected {size} bytes; delete the folder {folder}, and the next start makes it again"
            )
    return folder


def mapped(path: Path) -> np.ndarray:
    """An array file (.npy), mapped into memory, so that all processes of a node share its pages."""
    return np.asarray(np.load(path, mmap_mode="r"))
