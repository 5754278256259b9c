"""Merged and intersected expert files against figures worked out by hand, and how an emptied layer is told."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.expert_sets import intersect, merge
from ramoe_megatron.artifacts.tensors import ModelShape
from ramoe_megatron.method.divergence import Zone
from ramoe_megatron.method.experts import Tau, TopM, describe_empty, rule_from


def by_hand() -> tuple[ExpertFile, ExpertFile]:
    """Two files of one layer that share task b; 3 and 1 sequences of it, 1 and 0 right."""
    shape = ModelShape(num_moe_layers=1, num_experts=2, topk=1, score_function="softmax", hidden_size=8)

    def file(tasks: Sequence[str], mask: Any, frequency: Any, text: Any, pattern: Any, zone: Zone, **sequences: Any) -> ExpertFile:
        task_LE, general_LE = torch.tensor(frequency)[:, None], torch.tensor([text])
        return ExpertFile(
            tasks=tuple(tasks), shape=shape, expert_mask=torch.tensor(mask)[:, None], delta=task_LE - general_LE, task_frequency=task_LE,
            general_frequency=general_LE, english_pattern={"last": torch.tensor(pattern)[:, None]}, layer_number=torch.tensor([1]),
            rule=TopM(1).as_dict() if "c" in tasks else Tau(0.25).as_dict(), zone=zone, checkpoint="base", sequences=sequences,
            path=Path(f"{''.join(tasks)}.safetensors"),
        )  # fmt: skip

    zone = Zone(0, 0, "auto", "floor")
    first = file(
        "ab", [[True, False], [True, True]], [[1.0, 0.0], [0.75, 0.25]], [0.5, 0.5], [[0.5, 0.5], [0.25, 0.75]], zone,
        english_task={"a": 5, "b": 3}, english_correct={"a": 2, "b": 1}, general=10,
    )  # fmt: skip
    second = file(
        "bc", [[False, True], [False, True]], [[0.25, 0.75], [0.0, 1.0]], [0.25, 0.75], [[0.0, 0.0], [0.125, 0.875]], zone,
        english_task={"b": 1, "c": 4}, english_correct={"b": 0, "c": 4}, general=30,
    )  # fmt: skip
    return first, second


def test_merge_by_hand() -> None:
    made = merge(by_hand())
    assert made.tasks == ("a", "b", "c")
    assert made.expert_mask[:, 0].tolist() == [[True, False], [True, True], [False, True]]
    assert made.task_frequency[:, 0].tolist() == [[1.0, 0.0], [0.625, 0.375], [0.0, 1.0]]  # b: (3 x 0.75 + 1 x 0.25) / 4
    assert made.general_frequency[0].tolist() == [0.3125, 0.6875]  # (10 x 0.5 + 30 x 0.25) / 40
    assert made.delta[:, 0].tolist() == [[0.6875, -0.6875], [0.3125, -0.3125], [-0.3125, 0.3125]]
    assert made.english_pattern["last"][:, 0].tolist() == [[0.5, 0.5], [0.25, 0.75], [0.125, 0.875]]  # b: of the first alone
    assert made.sequences == {
        "english_task": {"a": 5, "b": 4, "c": 4},
        "english_correct": {"a": 2, "b": 1, "c": 4},
        "general": 40,
    }
    assert str(rule_from(made.rule)) == "merge of ab.safetensors (tau=0.25) and bc.safetensors (top-m=1)"


def test_intersect_by_hand() -> None:
    made = intersect(by_hand())
    assert made.tasks == ("b",)
    assert made.expert_mask[:, 0].tolist() == [[False, True]]
    assert made.task_frequency[:, 0].tolist() == [[0.625, 0.375]]
    assert made.delta[:, 0].tolist() == [[0.3125, -0.3125]]
    assert made.sequences == {"english_task": {"b": 4}, "english_correct": {"b": 1}, "general": 40}


def test_layers_that_an_intersection_empties_are_told() -> None:
    first, second = by_hand()
    made = intersect([replace(first, expert_mask=~second.expert_mask.flip(0)), second])
    assert not made.expert_mask.any()
    told = describe_empty(made.expert_mask, made.tasks, rule_from(made.rule))
    assert len(told) == 1
    assert "task 'b': intersect of ab.safetensors (tau=0.25) and bc.safetensors (top-m=1) chooses no expert in 1 of 1" in told[0]
    assert "Fewer files to intersect" in told[0]
