"""``usage.safetensors``: how much each language uses each expert, for the selections of `method.selection`.

Shapes: G languages, L MoE layers, E routed experts, N sequences. MoE layers are numbered from 0.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from ramoe_megatron.artifacts.files import package_version
from ramoe_megatron.artifacts.tensors import (
    ModelShape,
    Profiled,
    bad_metadata,
    check_tensor,
    open_tensors,
    save_tensors,
    shape_from,
)
from ramoe_megatron.errors import RamoeError

_TENSORS = ("tokens", "frequency", "gate", "layer_number")


@dataclass(frozen=True, slots=True)
class UsageFile(Profiled):
    """``usage.safetensors``: by language, each expert's share of the tokens and of the gate weight."""

    languages: tuple[str, ...]
    """Names of the G languages, in the order of the tensors; the anchor is one of them."""
    shape: ModelShape
    tokens: Tensor
    """Number of tokens without padding; int64 [G]."""
    frequency: Tensor
    """Top-k count / tokens over all tokens of a language, in [0, 1] (arXiv 2604.03592); float32 [G, L, E]. A
    row sums to K, or to less when the model drops tokens."""
    gate: Tensor
    """Mean gate weight of each expert over a language's tokens; float32 [G, L, E]. The weight is 0 for a
    token that does not choose the expert (arXiv 2407.01906)."""
    layer_number: Tensor
    """Megatron's layer number (1-based) of each MoE layer; int64 [L]."""
    checkpoint: str
    data: Sequence[Mapping[str, str]] = ()
    """Path and sha256 of every profiled file."""
    package_version: str = field(default_factory=package_version)
    path: Path | None = None
    """The path that the file was loaded from, for messages; not written."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all; raises RamoeError when the tensors are inconsistent."""
        self._validate(Path(path))
        tensors = {
            "tokens": self.tokens.to(torch.int64),
            "frequency": self.frequency.float(),
            "gate": self.gate.float(),
            "layer_number": self.layer_number.to(torch.int64),
        }
        meta = {
            **asdict(self.shape),
            "languages": list(self.languages),
            "checkpoint": self.checkpoint,
            "data": [dict(entry) for entry in self.data],
            "package_version": self.package_version,
        }
        # Clones, because the format rejects tensors that share memory.
        save_tensors(path, "ramoe-usage", {name: tensor.clone() for name, tensor in tensors.items()}, meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read and check the file; raises RamoeError when the file is damaged or inconsistent."""
        path = Path(path)
        handle, meta = open_tensors(path, "ramoe-usage")
        # Clones, because a tensor mapped into memory changes when the file changes.
        tensors = {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118
        missing = [name for name in _TENSORS if name not in tensors]
        if missing:
            raise RamoeError(f"{path}: no tensor {', '.join(missing)}; the file is incomplete, profile again")
        try:
            usage = cls(
                languages=tuple(meta["languages"]),
                shape=shape_from(meta),
                checkpoint=meta["checkpoint"],
                data=tuple(meta["data"]),
                package_version=meta["package_version"],
                path=path,
                **{name: tensors[name] for name in _TENSORS},
            )
        except (KeyError, TypeError) as error:
            raise bad_metadata(path, error) from error
        usage._validate(path)
        return usage

    def places(self, languages: Sequence[str]) -> list[int]:
        """Indices of the languages; raises RamoeError, with the known languages, if any is absent."""
        absent = [language for language in languages if language not in self.languages]
        if absent:
            raise RamoeError(
                f"{self.path}: no language {', '.join(map(repr, absent))}, "
                f"the file was profiled on {', '.join(self.languages)}; profile with data of every language "
                "(ramoe profile -- --ramoe-save-usage), or leave out the examples without a profile"
            )
        return [self.languages.index(language) for language in languages]

    def mean(self, kind: str, languages: Sequence[str]) -> Tensor:
        """Mean ``frequency`` or ``gate`` (``kind``) of the languages, weighted by tokens. float64 [L, E]"""
        places = self.places(languages)
        weight = self.tokens[places].double()
        values: Tensor = getattr(self, kind)
        return torch.einsum("g,gle->le", weight / weight.sum(), values[places].double())

    def _validate(self, path: Path) -> None:
        languages, layers, experts = len(self.languages), self.shape.num_moe_layers, self.shape.num_experts
        if not languages or len(set(self.languages)) != languages:
            raise RamoeError(
                f"{path}: found the languages {list(self.languages)}, expected different names; profile again"
            )
        whole = (languages, layers, experts)
        for name, shape in zip(_TENSORS, ((languages,), whole, whole, (layers,)), strict=True):
            check_tensor(path, name, getattr(self, name), shape)
        if not bool((self.tokens > 0).all()):
            raise RamoeError(
                f"{path}: tokens is {self.tokens.tolist()}, expected counts above 0; profile again"
            )
        for name in ("frequency", "gate"):
            if bool((getattr(self, name) < 0).any()):
                raise RamoeError(f"{path}: {name} has values below 0; profile again")
        most = float(self.frequency.double().sum(-1).max())
        if most > self.shape.topk + 1e-3:
            raise RamoeError(
                f"{path}: a row of frequency sums to {most:g}, expected at most {self.shape.topk} (top-k); "
                "profile again"
            )


class UsageSum:
    """Accumulates a usage file, sequence by sequence. Every rank has the same sums."""

    def __init__(
        self, languages: Sequence[str], layers: int, experts: int, device: torch.device | None = None
    ) -> None:
        shape = (len(languages), layers, experts)
        self.languages = tuple(languages)
        self.tokens = torch.zeros(len(languages), dtype=torch.int64, device=device)
        self.counts = torch.zeros(shape, dtype=torch.int64, device=device)
        self.gate = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, language: str, frequency_NLE: Tensor, gate_NLE: Tensor, tokens_N: Tensor) -> None:
        """Add N sequences of one language: means over their tokens, and numbers of tokens (int64 [N])."""
        place, tokens_N11 = self.languages.index(language), tokens_N.double()[:, None, None]
        self.tokens[place] += tokens_N.sum()
        # Rounding restores the exact counts, because the error of a float32 mean is far below half a count.
        self.counts[place] += (frequency_NLE.double() * tokens_N11).round().long().sum(0)
        self.gate[place] += (gate_NLE.double() * tokens_N11).sum(0)

    def state(self) -> dict[str, Tensor]:
        """The sums by name, for saving and restoring."""
        return {"usage_tokens": self.tokens, "usage_counts": self.counts, "usage_gate": self.gate}

    def file(
        self,
        shape: ModelShape,
        layer_numbers: Sequence[int],
        checkpoint: str,
        data: Sequence[Mapping[str, str]],
    ) -> UsageFile:
        """The usage file of all added sequences."""
        tokens_G11 = self.tokens.double()[:, None, None]
        return UsageFile(
            languages=self.languages,
            shape=shape,
            tokens=self.tokens.cpu(),
            frequency=(self.counts / tokens_G11).float().cpu(),
            gate=(self.gate / tokens_G11).float().cpu(),
            layer_number=torch.tensor(layer_numbers),
            checkpoint=checkpoint,
            data=data,
        )
