"""Shards: how far a forward-only job is, so that one that is killed goes on from its last finished shard.

A job cuts its work into numbered shards. After each, rank 0 writes what the job has gathered so far, bit for
bit; a restart with the same command takes that up on every rank and repeats at most one shard. Order and
rounding are then those of a run that nothing stopped: the files have the same bytes wherever two runs of the
model have (on GPUs, with Megatron's --deterministic-mode).
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import filelock
import torch
from torch import Tensor

from ramoe_megatron.artifacts.files import digests, package_version, sha256
from ramoe_megatron.artifacts.tensors import open_tensors, save_tensors
from ramoe_megatron.data.parallel import Example
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.jobs.offline_job import data_digests
from ramoe_megatron.mcore.launch import is_rank_0

SHARD_EXAMPLES = 256
"""Examples (ids) of a shard, each with all its languages: thousands of sequences, so seconds to minutes of a
real model's forward passes, beside which a file of some megabytes costs nothing. Also the examples whose
routing is held in memory at once."""

INCIDENTAL = frozenset(
    {"rank", "local_rank", "distributed_timeout_minutes", "ramoe_output", "ramoe_select", "ramoe_layers"}
)
"""Arguments that no shard depends on: who asks, how long ranks wait, where it lies, and what is read off the finished sums."""


def depends_on(args: Any, sources: Sequence[str], examples: Sequence[Example]) -> dict[str, Any]:
    """Everything that the result of a forward-only job depends on, to the bit: the key of its shards.

    Every argument of Megatron and of the job counts (data choices, model, layout, size of a micro-batch) but
    `INCIDENTAL` ones; a file that an argument names, and a tokenizer's folder, count by their bytes. So do
    the data, the checkpoint, the packages and the device.

    Args:
        args: parsed arguments, `load` among them.
        sources: files, folders and hub names that examples were read from.
        examples: all examples that are run: what a hub name stood for.

    Raises:
        RamoeError: when a file cannot be read.
    """
    flags = {name: value for name, value in vars(args).items() if name not in INCIDENTAL}
    named = {
        name: sha256(value)
        for name, value in flags.items()
        if isinstance(value, str) and os.path.isfile(value)
    }
    folders = {
        name: digests(sorted(path for path in Path(value).rglob("*") if path.is_file()))
        for name, value in flags.items()
        if name.startswith("tokenizer") and isinstance(value, str) and os.path.isdir(value)
    }
    content = hashlib.sha256()
    for example in examples:
        content.update(repr(example).encode())
    cuda = torch.cuda.is_available()
    return {
        # an object's address is another one in every run
        "flags": {name: re.sub(r" at 0x[0-9a-f]+", "", repr(value)) for name, value in flags.items()},
        "files": named | folders,
        "data": data_digests(sources),
        "examples": content.hexdigest(),
        "checkpoint": checkpoint_state(args.load),
        "packages": [package_version(), *(version(name) for name in ("torch", "megatron-core"))],
        "device": torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} threads",
        "shard": SHARD_EXAMPLES,
    }


def checkpoint_state(folder: str) -> list[Any]:
    """What tells one state of a checkpoint folder from another without reading the weights: names, sizes and times of its files."""
    root = Path(folder)
    return sorted(
        (str(path.relative_to(root)), path.stat().st_size, path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file()
    )


class Shards:
    """The finished shards of one job, in a hidden folder beside its output, under the key of what they depend
    on.

    Used as a context, which holds the output folder for this job: a second one that would write the same
    files is refused. Rank 0 alone reads and writes, and tells the others, so that all ranks skip the same
    shards.
    """

    done: int
    """Shards that need not be run again; the first to run has this number."""
    state: dict[str, Tensor]
    """What `save` was given last, by this run or an earlier one (then on the CPU), on every rank; empty before the first shard."""

    def __init__(self, output: Path, job: str, total: int, key: Callable[[], Mapping[str, Any]]) -> None:
        """`job` names the files that are written: it must differ between jobs that may share a folder. `key` is asked on rank 0 only."""
        self.output, self.job, self.total, self._key = output, job, total, key
        self.root = output / f".{job}-shards"
        self._lock = filelock.FileLock(self.root / "lock", fallback_to_soft=False)

    def __enter__(self) -> Self:
        """Raises RamoeError, on every rank, when another job holds the folder, or a shard there is damaged or foreign."""
        try:
            self.done, self.state = _told_by_rank_0(self._open)
        except BaseException:
            self._lock.release()
            raise
        if self.done and is_rank_0():
            print(f"ramoe: goes on after {self.done} of {self.total} shards", flush=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def _open(self) -> tuple[int, dict[str, Tensor]]:
        key = hashlib.sha256(json.dumps(self._key(), sort_keys=True).encode()).hexdigest()[:16]
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except (filelock.Timeout, FileNotFoundError):  # the other job may be taking its folder away
            raise RamoeError(
                f"{self.output}: another {self.job} job is at work in this folder; "
                "wait for it to end, stop it (its ranks too), or give another --ramoe-output"
            ) from None
        for left in self.root.glob("*.finished"):  # by a job that was killed while it tidied up
            shutil.rmtree(left)
        self.folder = self.root / key
        if not self._state_path.exists():
            return 0, {}
        done, state = self._read(self._state_path, self.total)
        for path in sorted(self.folder.glob("[0-9]*.safetensors")):
            self._opened(path)  # now, and not when all the work is done
        return done, state

    @property
    def _state_path(self) -> Path:
        return self.folder / "state.safetensors"

    def save(
        self, number: int, state: Mapping[str, Tensor], kept: Mapping[str, Tensor] | None = None
    ) -> None:
        """Shard `number` is done (all ranks call, rank 0 writes).

        Args:
            state: what the job has gathered over the shards 0 to `number`; replaces what stood there before.
            kept: what belongs to this shard alone, and stays until the job's files stand.
        """
        self.done, self.state = number + 1, dict(state)
        if not is_rank_0():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {"key": self.folder.name, "done": number + 1}
        if kept:
            save_tensors(self._kept_path(number), "ramoe-shard", kept, about)
        save_tensors(
            self._state_path, "ramoe-shard", state, about
        )  # last: it alone says that the shard is done

    def kept(self, number: int) -> dict[str, Tensor]:
        """What `save` was told to keep of a shard; only on rank 0. Raises RamoeError when the file is absent, damaged or foreign."""
        path = self._kept_path(number)
        done, tensors = self._read(path, number + 1)
        if done != number + 1:
            raise self._refusal(path, f"found shard {done - 1}, expected {number}")
        return tensors

    def _kept_path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def _read(self, path: Path, most: int) -> tuple[int, dict[str, Tensor]]:
        handle, done = self._opened(path)
        if not 1 <= done <= most:
            raise self._refusal(path, f"found {done} finished shards, expected 1 to {most}")
        # Cloned: the file lies mapped into memory and will be replaced.
        return done, {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118

    def _opened(self, path: Path) -> tuple[Any, int]:
        try:
            handle, about = open_tensors(path, "ramoe-shard")
        except RamoeError as error:
            raise self._refusal(path, str(error)) from error
        if about["key"] != self.folder.name or not isinstance(about["done"], int):
            raise self._refusal(path, f"found key {about['key']!r}, expected {self.folder.name!r}")
        return handle, about["done"]

    def _refusal(self, path: Path, why: str) -> RamoeError:
        return RamoeError(
            f"{path}: cannot go on from this shard ({why}). Check the disk, then remove {self.folder}: "
            "the job starts from the beginning"
        )

    def remove(self) -> None:
        """Remove this job's shards, once its files stand (on rank 0). Those of another key stay."""
        if not is_rank_0():
            return
        if self.folder.exists():
            # Renamed first: a job killed half-way must not find some of its shards.
            finished = self.folder.rename(self.folder.with_suffix(".finished"))
            shutil.rmtree(finished)
        if [path.name for path in self.root.iterdir()] == ["lock"]:
            shutil.rmtree(self.root)


def _told_by_rank_0[T](look: Callable[[], T]) -> T:
    """What `look` gives on rank 0, on every rank; so is its RamoeError, and no rank waits for one that was refused."""
    told: list[Any] = [None, None]
    if is_rank_0():
        try:
            told[0] = look()
        except RamoeError as error:
            told[1] = str(error)
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise RamoeError(told[1])
    return told[0]
