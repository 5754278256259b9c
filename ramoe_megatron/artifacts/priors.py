"""``priors.safetensors``: the English routing of every example, for ``--ramoe-target example``.

Shapes: N examples, L MoE layers, E routed experts. MoE layers are numbered from 0.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from ramoe_megatron.artifacts.files import package_version
from ramoe_megatron.artifacts.tensors import (
    TOKENS,
    ModelShape,
    Profiled,
    bad_metadata,
    check_tensor,
    open_tensors,
    save_rows,
    shape_from,
)
from ramoe_megatron.artifacts.texts import ArrowTexts
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.layers import span

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def bytes_per_id(layers: int, experts: int, dtype: str = "float32") -> int:
    """Bytes of the file for each id: one distribution over the experts in each of the kept layers."""
    return layers * experts * DTYPES[dtype].itemsize


class Priors(Profiled):
    """An open ``priors.safetensors``: the pooled router distribution of each example's English view.

    The tensor stays on disk, mapped into memory; `rows` reads only the rows asked for. A copy sent to another
    process, such as a data-loader worker, opens the file again.
    """

    path: Path
    tokens: str
    """Token choice of the pooling, one of `TOKENS`."""
    shape: ModelShape
    layers: tuple[int, ...]
    """The MoE layers that the file has."""
    checkpoint: str
    data: tuple[Mapping[str, str], ...]
    """Path and sha256 of every profiled file."""
    package_version: str

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open and check the file; raises RamoeError when the file is damaged or of another format."""
        self.path = Path(path)
        handle, meta = open_tensors(self.path, "ramoe-priors")
        try:
            self.texts = ArrowTexts.of(json.loads(bytes(handle.get_tensor("ids").numpy())))
            self.tokens, self.shape, self.checkpoint = meta["tokens"], shape_from(meta), meta["checkpoint"]
            self.data, self.package_version = tuple(meta["data"]), meta["package_version"]
            self.layers = tuple(meta.get("layers", range(self.shape.num_moe_layers)))
            self._priors = handle.get_slice("priors")
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise bad_metadata(self.path, error) from error
        _check_ids(self.path, self.texts)
        found = tuple(self._priors.get_shape())
        expected = (len(self.texts), len(self.layers), self.shape.num_experts)
        if found != expected:
            raise RamoeError(f"{self.path}: priors has shape {found}, expected {expected}; profile again")

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the N examples, in the order of the rows."""
        return self.texts[:]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Priors":
        """The same as ``Priors(path)``."""
        return cls(path)

    @staticmethod
    def save(
        path: str | os.PathLike[str],
        ids: Sequence[str],
        priors: Tensor | Iterable[Tensor],
        *,
        tokens: str,
        shape: ModelShape,
        checkpoint: str,
        data: Sequence[Mapping[str, str]] = (),
        layers: Sequence[int] | None = None,
        dtype: str = "float32",
    ) -> None:
        """Write the file, whole or not at all.

        Args:
            ids: id of each row.
            priors: float32 [N, L, E], or parts of it along N, of which one at a time is in memory.
            layers: the L MoE layers of ``priors``. Default: all layers of ``shape``.
            dtype: "float32" or "bfloat16", in which the numbers are stored.

        Raises:
            RamoeError: the sizes differ, an id occurs twice, or a number is not finite.
        """
        path = Path(path)
        if tokens not in TOKENS:
            raise RamoeError(f"{path}: found tokens {tokens!r}, expected one of {', '.join(TOKENS)}")
        _check_ids(path, ids)
        text = json.dumps(list(ids), ensure_ascii=False).encode()
        meta: dict[str, Any] = {
            **asdict(shape),
            "tokens": tokens,
            "checkpoint": checkpoint,
            "data": [dict(entry) for entry in data],
        }
        meta |= {"layers": list(layers)} if layers is not None else {}
        size = (len(ids), shape.num_moe_layers if layers is None else len(layers), shape.num_experts)

        if isinstance(priors, Tensor):
            check_tensor(path, "priors", priors, size)

        def parts() -> Iterator[Tensor]:
            rows = 0
            for part in [priors] if isinstance(priors, Tensor) else priors:
                check_tensor(path, "priors", part, (len(part), *size[1:]))
                rows += len(part)
                yield part
            if rows != len(ids):
                raise RamoeError(f"{path}: priors has {rows} rows, expected {len(ids)}; profile again")

        save_rows(
            path,
            "ramoe-priors",
            ("priors", parts(), size, DTYPES[dtype]),
            {"ids": torch.frombuffer(bytearray(text), dtype=torch.uint8)},
            {**meta, "package_version": package_version()},
        )

    def check_ids(self, ids: Sequence[str]) -> None:
        """Raise RamoeError when examples have no row. The message counts the ids and names the first five."""
        self._places(ids)

    def _places(self, ids: Sequence[str]) -> np.ndarray:
        places = self.texts.find(ids)
        if (places < 0).any():
            missing = list(dict.fromkeys(ids[n] for n in np.flatnonzero(places < 0).tolist()))
            raise RamoeError(
                f"{self.path}: {len(missing)} of {len(set(ids))} examples have no English prior, "
                f"first {', '.join(missing[:5])}; profile again with data that has these examples "
                "(--ramoe-save-priors), or train on data with an English view of each example"
            )
        return places

    def rows(self, ids: Sequence[str], layers: Sequence[int] | None = None) -> Tensor:
        """The distributions of these examples, float32 [n, L, E], in the order of ``ids``, which may repeat.

        Args:
            layers: the L MoE layers to read. Default: all layers of the file.

        Raises:
            RamoeError: ids are missing, as `check_ids`; or layers, as `check_layers`.
        """
        return self.rows_at(self._places(ids).tolist(), layers)

    def rows_at(self, places: Sequence[int], layers: Sequence[int] | None = None) -> Tensor:
        """`rows` of the examples at these places of the file."""
        chosen = list(range(len(self.layers))) if layers is None else self._layer_places(layers)
        out = torch.empty(len(places), len(chosen), self.shape.num_experts)
        for n, place in enumerate(places):
            out[n] = self._priors[place : place + 1][0][chosen]
        return out

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raise RamoeError when the file lacks some of the MoE layers."""
        self._layer_places(layers)

    def _layer_places(self, layers: Sequence[int]) -> list[int]:
        if missing := [layer for layer in layers if layer not in self.layers]:
            raise RamoeError(
                f"{self.path}: has the MoE layers {span(self.layers)}, and not {span(missing)}; "
                "profile again with --ramoe-priors-for all, or align only layers of the file (--ramoe-layers)"
            )
        return [self.layers.index(layer) for layer in layers]

    def __reduce__(self) -> tuple[type["Priors"], tuple[Path]]:
        return Priors, (self.path,)


def _check_ids(path: Path, ids: Sequence[str]) -> None:
    texts = ids if isinstance(ids, ArrowTexts) else ArrowTexts.of(ids)
    if (texts.find(texts) != np.arange(len(ids))).any():
        twice = [id_ for id_, count in Counter(ids).items() if count > 1][:5]
        raise RamoeError(
            f"{path}: ids occur twice, first {', '.join(twice)}; expected one English view of each id, "
            "give each id once"
        )
