"""Folders of safetensors files as Hugging Face writes them: which tensors there are, and their values.

Tensors are read by position rather than mapped into memory, so a reader holds only the tensors in use.
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.models.operations import Shape

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000
"""Limit of the safetensors format, in bytes."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies."""

    file: Path
    offset: int
    """First byte of the values in the file."""
    dtype: torch.dtype
    shape: Shape

    @property
    def bytes(self) -> int:
        """Size of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFolder:
    """The tensors of a folder: of `model.safetensors`, or of the files that the index names."""

    def __init__(self, folder: Path) -> None:
        """Read the headers of all files.

        Raises:
            RamoeError: there is no weight file; the index names absent files or tensors; a file is cut short;
                a tensor has a type that is not supported.
        """
        self.folder = folder
        self.tensors: dict[str, Stored] = {}
        self._open: dict[Path, int] = {}
        named = self._named()
        for file in dict.fromkeys(named.values()) if named else [SINGLE]:
            self.tensors |= read_header(folder / file)
        if named and (absent := [name for name in named if name not in self.tensors]):
            raise RamoeError(
                f"{folder / INDEX}: {len(absent)} tensors are in no file, first {', '.join(absent[:5])}; "
                "download the folder again"
            )

    def _named(self) -> Mapping[str, str]:
        """Tensor -> file, from the index. Empty without an index."""
        path = self.folder / INDEX
        if not path.is_file():
            if not (self.folder / SINGLE).is_file():
                raise RamoeError(
                    f"{self.folder}: no {SINGLE} and no {INDEX}. Expected a folder that save_pretrained "
                    "wrote or that was downloaded from the hub"
                )
            return {}
        try:
            named = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise RamoeError(
                f"{path}: not an index of safetensors files ({error}); download it again"
            ) from error
        absent = sorted({file for file in named.values() if not (self.folder / file).is_file()})
        if absent:
            raise RamoeError(
                f"{path} names files that are not in the folder: {', '.join(absent)}; "
                "download the folder again"
            )
        return named

    def read(self, name: str, index: Shape = ()) -> Tensor:
        """A tensor, or its slice at these leading indices.

        Raises:
            RamoeError: the file is shorter than its header says.
        """
        stored = self.tensors[name]
        shape = stored.shape[len(index) :]
        size = math.prod(shape) * stored.dtype.itemsize
        place = 0
        for number, length in zip(index, stored.shape, strict=False):
            place = place * length + number
        out = torch.empty(shape, dtype=stored.dtype)
        if stored.file not in self._open:
            self._open[stored.file] = os.open(stored.file, os.O_RDONLY)
        read_into(self._open[stored.file], stored.offset + place * size, out, stored.file)
        return out

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")


def read_into(descriptor: int, offset: int, out: Tensor, file: Path) -> None:
    """Fill a contiguous tensor from a file. Raises RamoeError when the file ends too early."""
    memory, done = bytes_of(out), 0
    while done < len(memory):
        count = os.preadv(descriptor, [memory[done:]], offset + done)
        if count == 0:
            raise RamoeError(
                f"{file}: ends at byte {offset + done}, in the middle of a tensor; the file was cut short: "
                "copy or download it again"
            )
        done += count


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one file, in the order of their bytes.

    Raises:
        RamoeError: the file is missing, cut short or no safetensors file, or has an unsupported type.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > LONGEST_HEADER:
                raise ValueError(f"the header says it has {length} bytes")
            header = json.loads(file.read(length))
            total = os.fstat(file.fileno()).st_size
        header.pop("__metadata__", None)
        begin = 8 + length
        ends = [entry["data_offsets"][1] for entry in header.values()]
    except FileNotFoundError as error:
        raise RamoeError(f"{path}: no such file") from error
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise RamoeError(
            f"{path}: not a whole safetensors file ({error}); copy or download it again"
        ) from error
    if total < begin + max(ends, default=0):
        raise RamoeError(
            f"{path}: has {total} bytes, its header says {begin + max(ends)}; the file was cut short: "
            "copy or download it again"
        )
    found = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
        if entry["dtype"] not in DTYPES:
            raise RamoeError(
                f"{path}: tensor {name} has type {entry['dtype']}; expected one of {', '.join(DTYPES)}. "
                "Give the unquantised model"
            )
        offset = begin + entry["data_offsets"][0]
        found[name] = Stored(path, offset, DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return found


def header_of(tensors: Iterable[tuple[str, torch.dtype, Shape]]) -> bytes:
    """The first bytes of a safetensors file with these tensors, whose values follow in this order."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text
