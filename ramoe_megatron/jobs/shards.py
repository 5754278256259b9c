"""Shards: an offline job that was killed continues after its last finished shard.

A job divides its work into numbered shards. After each shard, rank 0 saves the job's state so far, bit for
bit. A restart with the same command loads the state on every rank and repeats at most one shard. The order of
operations and the rounding do not change, so the output files are identical to those of an uninterrupted run,
provided that the model itself is deterministic. On GPUs this needs Megatron's --deterministic-mode.
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
"""Number of example ids in a shard; a shard holds all languages of its ids. A shard takes a real model
seconds to minutes, so the cost of saving a few megabytes is negligible. The routing of one shard is held in
memory."""

INCIDENTAL = frozenset(
    {"rank", "local_rank", "distributed_timeout_minutes", "ramoe_output", "ramoe_select", "ramoe_layers"}
)
"""Arguments that do not change a shard: rank, timeout, output folder, and rules that use the final sums."""


def depends_on(args: Any, sources: Sequence[str], examples: Sequence[Example]) -> dict[str, Any]:
    """Key of a job's shards: everything that the result of an offline job depends on, to the bit.

    The key holds every argument of Megatron and of the job except the `INCIDENTAL` ones, and the digests of
    files and tokenizer folders that arguments name. It also holds the data, the state of the checkpoint, the
    package versions and the device.

    Args:
        args: parsed arguments, including `load`.
        sources: files, folders and Hugging Face names that the examples were read from.
        examples: all examples that are run. They identify the content of a Hugging Face data set.

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
        # the address of an object differs between runs
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
    """State of a checkpoint folder without reading the weights: names, sizes and times of its files."""
    root = Path(folder)
    return sorted(
        (str(path.relative_to(root)), path.stat().st_size, path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file()
    )


class Shards:
    """The finished shards of one job, in a hidden folder inside the output folder, stored by their key.

    Used as a context manager, which locks the output folder: a second job that would write the same files is
    rejected. Only rank 0 reads and writes; it broadcasts the state, so all ranks skip the same shards.
    """

    done: int
    """Number of finished shards, which is also the number of the next shard to run."""
    state: dict[str, Tensor]
    """The state that `save` stored last, on every rank. On the CPU if an earlier run stored it. Empty before
    the first shard is done."""

    def __init__(self, output: Path, job: str, total: int, key: Callable[[], Mapping[str, Any]]) -> None:
        """
        Args:
            output: output folder of the job.
            job: name of the job. Jobs that share an output folder and write different files need different
                names.
            total: number of shards.
            key: returns what the shards depend on (`depends_on`). Called only on rank 0.
        """
        self.output, self.job, self.total, self._key = output, job, total, key
        self.root = output / f".{job}-shards"
        self._lock = filelock.FileLock(self.root / "lock", fallback_to_soft=False)

    def __enter__(self) -> Self:
        """Lock the folder and load the state.

        Raises:
            RamoeError: on every rank, when another job has locked the folder, or when a stored shard is
                damaged or has another key.
        """
        try:
            self.done, self.state = _broadcast_from_rank_0(self._open)
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
        except (filelock.Timeout, FileNotFoundError):  # not found: the other job is removing its folder
            raise RamoeError(
                f"{self.output}: another {self.job} job is at work in this folder; "
                "wait for it to end, stop it (its ranks too), or give another --ramoe-output"
            ) from None
        for left in self.root.glob("*.finished"):  # left by a job that was killed while it removed its shards
            shutil.rmtree(left)
        self.folder = self.root / key
        if not self._state_path.exists():
            return 0, {}
        done, state = self._read(self._state_path, self.total)
        for path in sorted(self.folder.glob("[0-9]*.safetensors")):
            self._opened(path)  # report a damaged file now rather than after all the work
        return done, state

    @property
    def _state_path(self) -> Path:
        return self.folder / "state.safetensors"

    def save(
        self, number: int, state: Mapping[str, Tensor], kept: Mapping[str, Tensor] | None = None
    ) -> None:
        """Mark shard `number` as done. All ranks call this method; only rank 0 writes.

        Args:
            state: the job's state after the shards 0 to `number`. It replaces the state saved before.
            kept: tensors of this shard alone. They are kept until the job has written its files.
        """
        self.done, self.state = number + 1, dict(state)
        if not is_rank_0():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {"key": self.folder.name, "done": number + 1}
        if kept:
            save_tensors(self._kept_path(number), "ramoe-shard", kept, about)
        # last, because only the state file marks the shard as done
        save_tensors(self._state_path, "ramoe-shard", state, about)

    def kept(self, number: int) -> dict[str, Tensor]:
        """The tensors that `save` kept for a shard. Only on rank 0.

        Raises:
            RamoeError: the file is missing or damaged, or has another key.
        """
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
        # Cloned, because the file is memory-mapped and will be replaced.
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
            f"{path}: cannot go on from this shard ({why}). Check the disk, then remove {self.folder}; "
            "the job will start from the beginning"
        )

    def remove(self) -> None:
        """Remove this job's shards after its files are written. Shards with another key stay."""
        if not is_rank_0():
            return
        if self.folder.exists():
            # Renamed first: a restart after a kill must not find only some of the shards.
            finished = self.folder.rename(self.folder.with_suffix(".finished"))
            shutil.rmtree(finished)
        if [path.name for path in self.root.iterdir()] == ["lock"]:
            shutil.rmtree(self.root)


def _broadcast_from_rank_0[T](look: Callable[[], T]) -> T:
    """Call `look` on rank 0 and return its result on every rank.

    A RamoeError on rank 0 is raised on every rank, so no rank waits for a rank that has stopped.
    """
    result: list[Any] = [None, None]  # value, error
    if is_rank_0():
        try:
            result[0] = look()
        except RamoeError as error:
            result[1] = str(error)
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(result, src=0)
    if result[1] is not None:
        raise RamoeError(result[1])
    return result[0]
