"""``experts.safetensors``: the task experts of a model, and the data and rule that chose them.

Shapes: G tasks, L MoE layers, E routed experts. MoE layers are numbered from 0.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ramoe_megatron.artifacts.files import package_version
from ramoe_megatron.artifacts.tensors import (
    TOKENS,
    ModelShape,
    Profiled,
    bad_metadata,
    check_tensor,
    open_tensors,
    save_tensors,
    shape_from,
)
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.divergence import NoZone, Zone
from ramoe_megatron.method.experts import parse_rule, task_experts
from ramoe_megatron.method.steering import Steering

_TENSORS = ("expert_mask", "delta", "task_frequency", "general_frequency", "layer_number")


@dataclass(frozen=True, slots=True)
class ExpertFile(Profiled):
    """The content of ``experts.safetensors``: task experts, their rule, and the English routing pattern."""

    tasks: tuple[str, ...]
    """Names of the G tasks, in the order of the tensors."""
    shape: ModelShape
    expert_mask: Tensor
    """Chosen task experts; bool [G, L, E] (uint8 in the file)."""
    delta: Tensor
    """task_frequency - general_frequency, in [-1, 1]; float32 [G, L, E]."""
    task_frequency: Tensor
    """Mean over sequences of top-k count / tokens on English task data; float32 [G, L, E]; rows sum to K."""
    general_frequency: Tensor
    """Mean over sequences of top-k count / tokens on general English text; float32 [L, E]; rows sum to K."""
    english_pattern: Mapping[str, Tensor]
    """Token choice (one of `TOKENS`) -> mean pooled router distribution, float32 [G, L, E]. The mean is over
    the English views of the examples with a correct English answer. A task without such examples has
    zeros."""
    layer_number: Tensor
    """Megatron's layer number (1-based) of each MoE layer; int64 [L]."""
    rule: Mapping[str, Any]
    """{"name": "tau", "tau": 0.3} or {"name": "top-m", "m": 4}."""
    zone: Zone | NoZone
    """The alignment zone that ``--ramoe-layers auto`` means."""
    checkpoint: str
    data: Sequence[Mapping[str, str]] = ()
    """Path and sha256 of every profiled file."""
    sequences: Mapping[str, Any] = field(default_factory=dict)
    """Number of sequences in each mean."""
    anchor: str | None = None
    """The anchor language, called "English" in the names here; None in older files without this entry."""
    select_tokens: str = "all"
    """The tokens of the task data whose counts chose the experts; "all" in files that do not record it."""
    package_version: str = field(default_factory=package_version)
    path: Path | None = None
    """The path that the file was loaded from, for messages; not written."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all; raises RamoeError when the tensors are inconsistent."""
        self._validate(Path(path))
        tensors = {
            "expert_mask": self.expert_mask.to(torch.uint8),
            "delta": self.delta.float(),
            "task_frequency": self.task_frequency.float(),
            "general_frequency": self.general_frequency.float(),
            "layer_number": self.layer_number.to(torch.int64),
            **{
                f"english_pattern.{tokens}": pattern.float()
                for tokens, pattern in self.english_pattern.items()
            },
        }
        none = {"first": None, "last": None, "how": "auto", "reason": self.zone.reason}
        zone = asdict(self.zone) if isinstance(self.zone, Zone) else none
        meta = {
            **asdict(self.shape),
            "tasks": list(self.tasks),
            "rule": dict(self.rule),
            "zone": zone,
            "checkpoint": self.checkpoint,
            "data": [dict(entry) for entry in self.data],
            "sequences": dict(self.sequences),
            "anchor": self.anchor,
            **({} if self.select_tokens == "all" else {"select_tokens": self.select_tokens}),
            "package_version": self.package_version,
        }
        # Clones, because the format rejects tensors that share memory, and a caller's means may share one
        # sum.
        save_tensors(path, "ramoe-experts", {name: tensor.clone() for name, tensor in tensors.items()}, meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read and check the file; raises RamoeError when the file is damaged or inconsistent."""
        path = Path(path)
        handle, meta = open_tensors(path, "ramoe-experts")
        # Clones, because a tensor mapped into memory changes when the file changes.
        tensors = {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118
        missing = [name for name in _TENSORS if name not in tensors]
        if missing:
            raise RamoeError(f"{path}: no tensor {', '.join(missing)}; the file is incomplete, profile again")
        patterns = {t: tensors[f"english_pattern.{t}"] for t in TOKENS if f"english_pattern.{t}" in tensors}
        try:
            zone = meta["zone"]
            experts = cls(
                tasks=tuple(meta["tasks"]),
                shape=shape_from(meta),
                english_pattern=patterns,
                rule=meta["rule"],
                zone=Zone(**zone) if zone["first"] is not None else NoZone(zone["reason"]),
                checkpoint=meta["checkpoint"],
                data=tuple(meta["data"]),
                sequences=meta["sequences"],
                anchor=meta.get("anchor"),
                select_tokens=meta.get("select_tokens", "all"),
                package_version=meta["package_version"],
                path=path,
                **{
                    name: tensors[name].bool() if name == "expert_mask" else tensors[name]
                    for name in _TENSORS
                },
            )
        except (KeyError, TypeError) as error:
            raise bad_metadata(path, error) from error
        experts._validate(path)
        return experts

    def steered_by(self, steering: Steering) -> Tensor:
        """The steered experts of each task; bool [G, L, E].

        Raises:
            RamoeError: the steered layers are outside the model.
        """
        try:
            return steering.experts(self.expert_mask, self.delta)
        except RamoeError as error:
            raise RamoeError(f"{self.path}: {error}") from error

    def chosen_by(self, rule: str | None) -> Self:
        """The file with its experts re-selected by ``rule`` (``tau=X`` or ``top-m=M``); the same file with
        None.

        Raises:
            RamoeError: the rule is invalid.
        """
        if rule is None:
            return self
        parsed = parse_rule(rule)
        return replace(self, expert_mask=task_experts(self.delta, parsed), rule=parsed.as_dict())

    def task_index(self, task: str) -> int:
        """Index of a task in the tensors; raises RamoeError, with the known tasks, for an unknown name."""
        if task not in self.tasks:
            raise RamoeError(
                f"{self.path}: no task {task!r}, the file was profiled on {', '.join(self.tasks)}; "
                f"profile with data that has task {task!r}, or leave out its examples"
            )
        return self.tasks.index(task)

    def profile_target(self, task: str, tokens: str) -> Tensor:
        """The English pattern of one task and token choice, [L, E]: the target of ``--ramoe-target profile``.

        Raises:
            RamoeError: the file has no pattern for these tokens, or the task has no English-correct example.
        """
        if tokens not in self.english_pattern:
            raise RamoeError(
                f"{self.path}: no English pattern for tokens {tokens!r}, "
                f"found {', '.join(self.english_pattern)}; profile again"
            )
        pattern = self.english_pattern[tokens][self.task_index(task)]
        if not pattern.any():
            raise RamoeError(
                f"{self.path}: task {task!r} has no English-correct example, "
                f"so no English pattern for {tokens!r}; leave out the task, or train the base model further"
            )
        return pattern

    def _validate(self, path: Path) -> None:
        tasks, layers, experts = len(self.tasks), self.shape.num_moe_layers, self.shape.num_experts
        expected: dict[str, tuple[int, ...]] = dict.fromkeys(_TENSORS, (tasks, layers, experts))
        expected |= {"general_frequency": (layers, experts), "layer_number": (layers,)}
        tensors = {name: getattr(self, name) for name in _TENSORS}
        for tokens, pattern in self.english_pattern.items():
            if tokens not in TOKENS:
                raise RamoeError(
                    f"{path}: found a pattern for tokens {tokens!r}, expected one of {', '.join(TOKENS)}; "
                    "profile again"
                )
            tensors[f"english_pattern.{tokens}"] = pattern
            expected[f"english_pattern.{tokens}"] = (tasks, layers, experts)
        for name, tensor in tensors.items():
            check_tensor(path, name, tensor, expected[name])
        if isinstance(self.zone, Zone) and not 0 <= self.zone.first <= self.zone.last < layers:
            raise RamoeError(
                f"{path}: found the zone {self.zone.first} to {self.zone.last}, "
                f"expected layers within 0 to {layers - 1}; profile again"
            )
        for name in (n for n in tensors if n.startswith("english_pattern")):
            totals = tensors[name].double().sum(-1)
            if not bool((((totals - 1).abs() < 1e-3) | (totals == 0)).all()):
                raise RamoeError(f"{path}: found rows of {name} that sum to neither 1 nor 0; profile again")
