"""Common parts of the safetensors artefacts: the model's shape, and checked reading and writing of tensors.

The files have tensors and one JSON text under the metadata key "ramoe". The files never contain pickle.
"""

import itertools
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ramoe_megatron.artifacts.files import FORMATS, atomic_write, check_document
from ramoe_megatron.errors import RamoeError

TOKENS = ("prompt", "response", "all", "last")
"""The tokens to pool over; ``last`` is the last token of the prompt."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The properties that must agree between a model and the artefacts profiled on it."""

    num_moe_layers: int
    num_experts: int
    topk: int
    score_function: str
    """softmax or sigmoid. With sigmoid, the distribution is the scores divided by their sum (our reading)."""
    hidden_size: int


class Profiled:
    """An artefact that was profiled on a model."""

    path: Path | None
    shape: ModelShape

    def check_model(self, num_moe_layers: int, num_experts: int, topk: int, score_function: str) -> None:
        """Raise RamoeError, with every difference, unless the file was profiled on a model of this shape."""
        model = {
            "num_moe_layers": num_moe_layers,
            "num_experts": num_experts,
            "topk": topk,
            "score_function": score_function,
        }
        differences = [
            f"{name} is {getattr(self.shape, name)!r} in the file, {value!r} in the model"
            for name, value in model.items()
            if getattr(self.shape, name) != value
        ]
        if differences:
            raise RamoeError(
                f"{self.path}: made from another model: {'; '.join(differences)}. "
                "Profile this checkpoint (ramoe profile), or give the file that was profiled on it"
            )


def shape_from(meta: Mapping[str, Any]) -> ModelShape:
    """The shape in an artefact's metadata; raises KeyError when a field is absent."""
    return ModelShape(**{f.name: meta[f.name] for f in fields(ModelShape)})


def save_tensors(
    path: str | os.PathLike[str], format_name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Write a safetensors file of this format, whole or not at all."""
    text = json.dumps({"format": format_name, "version": FORMATS[format_name][0], **meta}, ensure_ascii=False)
    with atomic_write(path) as temporary:
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, {"ramoe": text}
        )


def save_rows(
    path: str | os.PathLike[str],
    format_name: str,
    rows: tuple[str, Iterable[Tensor], tuple[int, ...], torch.dtype],
    small: Mapping[str, Tensor],
    meta: Mapping[str, Any],
) -> None:
    """Write a safetensors file of this format, whole or not at all, with one tensor that comes in parts.

    The bytes are those of `save_tensors`, but only one part is in memory.

    Args:
        rows: name, parts along the first dimension, shape and dtype of that tensor.
        small: the other tensors, of narrower dtypes.
    """
    name, parts, shape, dtype = rows
    text = json.dumps({"format": format_name, "version": FORMATS[format_name][0], **meta}, ensure_ascii=False)
    header: dict[str, Any] = {"__metadata__": {"ramoe": text}}
    end = 0
    for key, size, kind in [(name, shape, dtype), *((k, tuple(t.shape), t.dtype) for k, t in small.items())]:
        start, end = end, end + math.prod(size) * kind.itemsize
        header[key] = {"dtype": _DTYPES[kind], "shape": list(size), "data_offsets": [start, end]}
    head = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # the values begin at a multiple of 8
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for part in itertools.chain((part.to(dtype) for part in parts), small.values()):
            file.write(part.cpu().contiguous().view(torch.uint8).numpy().data)


_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}


def open_tensors(path: Path, format_name: str) -> tuple[Any, dict[str, Any]]:
    """Open a safetensors file without reading its tensors, and check its format and version.

    Returns:
        The open file (``keys``, ``get_tensor``, ``get_slice``) and its metadata.

    Raises:
        RamoeError: the file is missing, is cut short, is not safetensors, or has another format or version.
    """
    handle, meta = open_any(path, format_name)
    return handle, check_document(path, meta, format_name)


def open_any(path: Path, expected: str) -> tuple[Any, Any]:
    """`open_tensors` without the check of format and version; ``expected`` is used in messages only."""
    try:
        handle = safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise RamoeError(
            f"{path}: no such file; check the path, or make the file with ramoe profile"
        ) from error
    except (SafetensorError, OSError) as error:
        raise RamoeError(
            f"{path}: not a whole safetensors file ({error}); the file was cut short or has another format: "
            "profile again"
        ) from error
    text = (handle.metadata() or {}).get("ramoe")
    if text is None:
        raise RamoeError(
            f"{path}: a safetensors file without ramoe metadata, expected {expected}; give the right file"
        )
    try:
        return handle, json.loads(text)
    except json.JSONDecodeError as error:
        raise bad_metadata(path, error) from error


def bad_metadata(path: Path, error: Exception) -> RamoeError:
    """The error for metadata that lacks a key or has a value of the wrong type."""
    return RamoeError(f"{path}: bad metadata ({type(error).__name__}: {error}); profile again")


def check_tensor(path: Path, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise RamoeError unless the tensor has this shape and every value is finite."""
    if tuple(tensor.shape) != shape:
        raise RamoeError(f"{path}: {name} has shape {tuple(tensor.shape)}, expected {shape}; profile again")
    if not bool(torch.isfinite(tensor).all()):
        raise RamoeError(
            f"{path}: {name} has values that are not finite; check the checkpoint, then profile again"
        )
