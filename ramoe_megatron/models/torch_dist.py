"""Megatron's `torch_dist` checkpoints, read and written piece by piece without Megatron and its ranks.

The format is PyTorch's distributed checkpoint. A tensor is stored in chunks of any shape, each a `torch.save`
at some offset of a `.distcp` file, and `.metadata` lists them. torch's own writer needs whole tensors in
memory; this one needs only the piece at hand.
"""

import contextlib
import io
import itertools
import json
import os
import pickle
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from ramoe_megatron.artifacts.files import atomic_write_text
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.models.operations import Shape

METADATA = ".metadata"
BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
COMMON = "common_state/shard_0_1"
VERSION = 3.0
"""Megatron's checkpoint_version."""


@dataclass(frozen=True, slots=True)
class Written:
    """A chunk or an object in a file."""

    key: str
    offsets: Shape | None
    """Place of the chunk in its tensor; None for an object."""
    sizes: Shape
    dtype: str
    """Such as "bfloat16"; empty for an object."""
    offset: int
    length: int


class ChunkFile:
    """One `.distcp` file that is being written."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self.written: list[Written] = []

    def add(self, key: str, place: Shape, tensor: Tensor) -> None:
        """Append a chunk: all of a tensor at these leading indices."""
        begin = self._file.tell()
        chunk = tensor.reshape((1,) * len(place) + tuple(tensor.shape))
        with _without_checksums():
            torch.save(chunk, self._file)
        offsets = (*place, *(0,) * tensor.dim())
        name = str(tensor.dtype).removeprefix("torch.")
        self.written.append(Written(key, offsets, tuple(chunk.shape), name, begin, self._file.tell() - begin))

    def add_object(self, key: str, value: object) -> None:
        """Append an object."""
        begin = self._file.tell()
        torch.save(value, self._file)
        self.written.append(Written(key, None, (), "", begin, self._file.tell() - begin))

    def close(self) -> None:
        """Write everything to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


@contextlib.contextmanager
def _without_checksums() -> Iterator[None]:
    """Leave out the checksums of `torch.save`, which no reader checks and which take longer than writing."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def write_metadata(folder: Path, files: Mapping[str, Sequence[Written]]) -> None:
    """Write `.metadata` and `metadata.json`, which make the `.distcp` files of a folder a checkpoint.

    Args:
        files: name of each file -> what was written to it.
    """
    tensors: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for name, entries in files.items():
        for entry in entries:
            info = _StorageInfo(name, entry.offset, entry.length)
            if entry.offsets is None:
                tensors[entry.key] = BytesStorageMetadata()
                storage[MetadataIndex(entry.key)] = info
                continue
            found = tensors.setdefault(
                entry.key,
                TensorStorageMetadata(
                    TensorProperties(dtype=getattr(torch, entry.dtype)),
                    torch.Size([0] * len(entry.sizes)),
                    [],
                ),
            )
            ends = [a + b for a, b in zip(entry.offsets, entry.sizes, strict=True)]
            found.size = torch.Size(max(a, b) for a, b in zip(found.size, ends, strict=True))
            found.chunks.append(ChunkStorageMetadata(torch.Size(entry.offsets), torch.Size(entry.sizes)))
            storage[MetadataIndex(entry.key, torch.Size(entry.offsets))] = info
    metadata = Metadata(
        tensors,
        planner_data=None,
        storage_data=storage,
        storage_meta=StorageMeta(save_id=str(uuid.uuid4())),
        version="1.0.0",
    )
    metadata.all_local_plans = None  # type: ignore[attr-defined] # Megatron reads the attribute
    atomic_write_text(folder / "metadata.json", json.dumps(BACKEND))
    with (folder / METADATA).open("wb") as file:
        pickle.dump(metadata, file)
        file.flush()
        os.fsync(file.fileno())


Chunk = tuple[Shape, Shape, _StorageInfo]
"""Offsets and sizes of a chunk, and where it is stored."""


class TorchDist:
    """The tensors of a `torch_dist` checkpoint."""

    def __init__(self, folder: Path) -> None:
        """Open the folder of one iteration.

        Raises:
            RamoeError: the folder is no `torch_dist` checkpoint, or a file is missing or cut short.
        """
        self.folder = folder
        path = folder / METADATA
        if not path.is_file():
            raise RamoeError(
                f"{folder}: no {METADATA}, so it is no torch_dist checkpoint. "
                "Save with --ckpt-format torch_dist"
            )
        try:
            with path.open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, ValueError) as error:
            raise RamoeError(
                f"{path}: cannot be read ({error}); the file was cut short or is not ours"
            ) from error
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._chunks: dict[str, list[Chunk]] = {}
        self._by_place: dict[tuple[str, int], dict[Shape, list[Chunk]]] = {}
        # Kept open for the next read, because the system reads ahead only in a file that stays open.
        self._open: tuple[str, BinaryIO] | None = None
        ends: dict[str, int] = {}
        for info in metadata.storage_data.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in ends.items():
            size = (folder / name).stat().st_size if (folder / name).is_file() else -1
            if size < end:
                told = "is missing" if size < 0 else f"has {size} bytes, expected at least {end}"
                raise RamoeError(f"{folder / name} {told}; copy the checkpoint again")
        for key, found in metadata.state_dict_metadata.items():
            if not isinstance(found, TensorStorageMetadata):
                continue
            self.shapes[key], self.dtypes[key] = tuple(found.size), found.properties.dtype
            self._chunks[key] = [
                (
                    tuple(chunk.offsets),
                    tuple(chunk.sizes),
                    metadata.storage_data[MetadataIndex(key, chunk.offsets)],
                )
                for chunk in found.chunks
            ]

    def read(self, key: str, place: Shape = ()) -> Tensor:
        """A tensor at these leading indices, put together from its chunks."""
        shape = self.shapes[key]
        wanted = [(number, 1) for number in place] + [(0, length) for length in shape[len(place) :]]
        out = torch.empty([length for _, length in wanted], dtype=self.dtypes[key])
        for offsets, sizes, info in self._chunks_at(key, place):
            theirs, ours = [], []
            for (begin, length), offset, size in zip(wanted, offsets, sizes, strict=True):
                first, last = max(begin, offset), min(begin + length, offset + size)
                theirs.append(slice(first - offset, last - offset))
                ours.append(slice(first - begin, last - begin))
            values = self._load(info)[tuple(theirs)]
            if values.shape == out.shape:
                out = values  # one chunk has it all: no copy
            else:
                out[tuple(ours)] = values
        return out.reshape(shape[len(place) :])

    def close(self) -> None:
        """Close the file that was read last."""
        if self._open is not None:
            self._open[1].close()
        self._open = None

    def _chunks_at(self, key: str, place: Shape) -> Sequence[Chunk]:
        """The chunks that have a value at these leading indices."""
        found = self._by_place.get((key, len(place)))
        if found is None:
            found = self._by_place[key, len(place)] = {}
            for chunk in self._chunks[key]:
                offsets, sizes, _ = chunk
                ranges = [range(o, o + s) for o, s in zip(offsets, sizes, strict=True)][: len(place)]
                for at in itertools.product(*ranges):
                    found.setdefault(at, []).append(chunk)
        return found.get(place, ())

    def _load(self, info: _StorageInfo) -> Tensor:
        if self._open is None or self._open[0] != info.relative_path:
            self.close()
            self._open = info.relative_path, (self.folder / info.relative_path).open("rb")
        file = cast(io.IOBase, self._open[1])
        part = cast(BinaryIO, _create_file_view(file, info.offset, info.length))
        return torch.load(part, map_location="cpu", weights_only=True)


class _MetadataUnpickler(pickle.Unpickler):
    """Reads `.metadata`, which is a pickle, and creates nothing but the classes of torch's metadata."""

    def find_class(self, module: str, name: str) -> Any:
        """Raise UnpicklingError for any class that a checkpoint's metadata has no use for."""
        if module.startswith("torch.distributed.checkpoint.") or (module, name) in _PLAIN:
            return super().find_class(module, name)
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


_PLAIN = {
    ("torch.serialization", "_get_layout"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
}
