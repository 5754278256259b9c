"""What the two safetensors artefacts share: the model's shape, and reading and writing tensors with checks.

The files hold tensors and one JSON text, under the metadata key "ramoe"; never pickle.
"""

import json
import os
from collections.abc import Mapping
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
"""Token choices of pooling; ``last`` is the last prompt token."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What must agree between a model and the artefacts profiled on it."""

    num_moe_layers: int
    num_experts: int
    topk: int
    score_function: str
    """softmax, or sigmoid (where the distribution is the scores divided by their sum: our reading)."""
    hidden_size: int

    def check(self, path: Path | None, **model: int | str) -> None:
        """Raise RamoeError, naming every difference, unless the given fields of the model at hand equal these."""
        differences = [
            f"{name} is {getattr(self, name)!r} in the file, {value!r} in the model"
            for name, value in model.items()
            if getattr(self, name) != value
        ]
        if differences:
            raise RamoeError(
                f"{path}: made from another model: {'; '.join(differences)}. Profile this checkpoint (ramoe profile), "
                f"or give the file that was profiled on it"
            )


def shape_from(meta: Mapping[str, Any]) -> ModelShape:
    """The shape fields of an artefact's metadata; KeyError when one is absent."""
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


def open_tensors(path: Path, format_name: str) -> tuple[Any, dict[str, Any]]:
    """Open a safetensors file without reading its tensors, and check its format and version.

    Returns:
        The open file (``keys``, ``get_tensor``, ``get_slice``) and its metadata.

    Raises:
        RamoeError: when the file is missing, cut short, no safetensors, or of another format or version.
    """
    handle, meta = open_any(path, format_name)
    return handle, check_document(path, meta, format_name)


def open_any(path: Path, expected: str) -> tuple[Any, Any]:
    """`open_tensors` without the check of format and version; ``expected`` is for the message only."""
    try:
        handle = safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise RamoeError(f"{path}: no such file; check the path, or make it with ramoe profile") from error
    except (SafetensorError, OSError) as error:
        raise RamoeError(
            f"{path}: not a whole safetensors file ({error}); it was cut short or is something else: profile again"
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
    """The refusal of a file whose metadata lacks a key or holds the wrong type."""
    return RamoeError(f"{path}: bad metadata ({type(error).__name__}: {error}); profile again")


def check_tensor(path: Path, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise RamoeError unless the tensor has this shape and every value is finite."""
    if tuple(tensor.shape) != shape:
        raise RamoeError(f"{path}: {name} has shape {tuple(tensor.shape)}, expected {shape}; profile again")
    if not bool(torch.isfinite(tensor).all()):
        raise RamoeError(
            f"{path}: {name} holds values that are not finite; check the checkpoint, then profile again"
        )
