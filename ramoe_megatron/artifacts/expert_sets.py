"""One expert file from several: all their task experts (`merge`), or those that they share (`intersect`).

Experts found with one set of languages or data are applied to others (arXiv 2605.28306); whether two sets agree, or add to each other,
is for the user to see. How files are combined is our reading.

G tasks, L MoE layers, E routed experts. Layers are 0-based places among the MoE layers.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.tensors import TOKENS
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.divergence import NoZone, Zone
from ramoe_megatron.method.experts import Combined, delta, rule_from

_MEANS = ("task_frequency", "general_frequency")


def merge(files: Sequence[ExpertFile]) -> ExpertFile:
    """The tasks of any file, and for each the experts that any of its files chose; the zone is the smallest range that covers theirs.

    Frequencies and patterns are those of all sequences together: means weighted by the numbers of sequences. A file given twice counts
    once, but sequences profiled in two different files count twice.

    Raises:
        RamoeError: fewer than two files, models that differ in shape or layer numbers, files of different anchors or tokens, or a
            file without its numbers of sequences.
    """
    return _combine("merge", files)


def intersect(files: Sequence[ExpertFile]) -> ExpertFile:
    """The tasks of every file, and for each the experts that all files chose; the zone is the overlap of theirs.

    Means as in `merge`. Layers may be left without experts (`experts.describe_empty` tells which), and the model without a zone.

    Raises:
        RamoeError: as `merge`, or no task in common.
    """
    return _combine("intersect", files)


def _combine(name: str, files: Sequence[ExpertFile]) -> ExpertFile:
    if len(files) < 2:
        raise RamoeError(f"{name}: found {len(files)} expert file, expected two or more")
    for file in files[1:]:
        _check_alike(files[0], file)
    anchor = _anchor(files)
    files = _distinct(files)
    tasks = _tasks(name, files)
    with_task = [[file for file in files if task in file.tasks] for task in tasks]
    masks = [[_of(file, "expert_mask", task) for file in having] for task, having in zip(tasks, with_task, strict=True)]
    fold = torch.logical_or if name == "merge" else torch.logical_and
    counted = {
        key: [[_count(file, key, task) for file in having] for task, having in zip(tasks, with_task, strict=True)]
        for key in ("english_task", "english_correct")
    }
    general = [_count(file, "general") for file in files]
    task_frequency = torch.stack(
        [
            _mean([_of(file, "task_frequency", task) for file in having], counts)
            for task, having, counts in zip(tasks, with_task, counted["english_task"], strict=True)
        ]
    )
    general_frequency = _mean([file.general_frequency for file in files], general)
    patterns = {
        tokens: torch.stack(
            [
                _mean([file.english_pattern[tokens][file.task_index(task)] for file in having], counts)
                for task, having, counts in zip(tasks, with_task, counted["english_correct"], strict=True)
            ]
        )
        for tokens in TOKENS
        if all(tokens in file.english_pattern for file in files)  # else some task would have no pattern, as if English were never right
    }
    sequences: dict[str, Any] = {key: dict(zip(tasks, map(sum, counts), strict=True)) for key, counts in counted.items()}
    sequences["general"] = sum(general)
    if all("pairs" in file.sequences for file in files):
        sequences["pairs"] = sum(file.sequences["pairs"] for file in files)
    return ExpertFile(
        tasks=tasks,
        shape=files[0].shape,
        expert_mask=torch.stack([reduce(fold, found) for found in masks]),
        delta=delta(task_frequency, general_frequency),  # by its definition, not a mean of deltas: general text weighs differently
        task_frequency=task_frequency,
        general_frequency=general_frequency,
        english_pattern=patterns,
        layer_number=files[0].layer_number,
        rule=Combined(name, tuple((str(file.path), rule_from(file.rule)) for file in files)).as_dict(),
        zone=_zone(name, files),
        checkpoint=" + ".join(dict.fromkeys(file.checkpoint for file in files)),
        data=tuple({(entry["path"], entry["sha256"]): entry for file in files for entry in file.data}.values()),
        sequences=sequences,
        anchor=anchor,
        select_tokens=files[0].select_tokens,
    )


def _check_alike(first: ExpertFile, other: ExpertFile) -> None:
    if first.select_tokens != other.select_tokens:
        raise RamoeError(
            f"{first.path} and {other.path}: frequencies over other tokens, {first.select_tokens!r} and {other.select_tokens!r}, have no "
            "mean. Give files of the same --ramoe-select-tokens"
        )
    mine, theirs = ({**asdict(file.shape), "layer_number": file.layer_number.tolist()} for file in (first, other))
    differences = [f"{key} is {mine[key]!r} and {theirs[key]!r}" for key in mine if mine[key] != theirs[key]]
    if differences:
        raise RamoeError(
            f"{first.path} and {other.path}: made from different models: {'; '.join(differences)}. Give files profiled on one model"
        )


def _anchor(files: Sequence[ExpertFile]) -> str | None:
    """The files' one anchor; None where some do not say theirs."""
    by_anchor = {file.anchor: file.path for file in files}
    if len(said := [(path, anchor) for anchor, path in by_anchor.items() if anchor is not None]) > 1:
        told = ", ".join(f"{path} {anchor!r}" for path, anchor in said)
        raise RamoeError(f"patterns of different anchor languages are no mean of one: {told}. Give files profiled against one anchor")
    return files[0].anchor if len(by_anchor) == 1 else None


def _distinct(files: Sequence[ExpertFile]) -> list[ExpertFile]:
    """The files without repeats: a profile says no more for being given twice."""
    kept: list[ExpertFile] = []
    for file in files:
        if not any(_same(file, other) for other in kept):
            kept.append(file)
    return kept


def _same(a: ExpertFile, b: ExpertFile) -> bool:
    facts = ("tasks", "rule", "zone", "checkpoint", "sequences", "anchor", "select_tokens")
    if any(getattr(a, key) != getattr(b, key) for key in facts) or list(a.data) != list(b.data):
        return False
    if set(a.english_pattern) != set(b.english_pattern):
        return False
    tensors = [(getattr(a, key), getattr(b, key)) for key in ("expert_mask", *_MEANS)]
    return all(torch.equal(x, y) for x, y in [*tensors, *((a.english_pattern[key], b.english_pattern[key]) for key in a.english_pattern)])


def _tasks(name: str, files: Sequence[ExpertFile]) -> tuple[str, ...]:
    """In the order of the files."""
    every = tuple(dict.fromkeys(task for file in files for task in file.tasks))
    if name == "merge":
        return every
    common = tuple(task for task in every if all(task in file.tasks for file in files))
    if not common:
        found = "; ".join(f"{file.path} has {', '.join(file.tasks)}" for file in files)
        raise RamoeError(f"intersect: no task in common ({found}). Give files that share a task, or merge them")
    return common


def _of(file: ExpertFile, tensor: str, task: str) -> Tensor:
    return getattr(file, tensor)[file.task_index(task)]


def _count(file: ExpertFile, key: str, task: str | None = None) -> int:
    try:
        found = file.sequences[key]
        return int(found if task is None else found[task])
    except (KeyError, TypeError, ValueError) as error:
        of = key if task is None else f"{key} of task {task!r}"
        raise RamoeError(f"{file.path}: sequences lacks the number {of}, by which means are weighted; profile again") from error


def _mean(values: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Mean of float32 [L, E] tensors weighted by numbers of sequences, in float64; zeros where nothing was counted."""
    # Rows without any token counted nothing, whatever the number of sequences: a mean over them would not sum to 1.
    weights = [count * value.any(dim=-1, keepdim=True).double() for value, count in zip(values, counts, strict=True)]
    total = torch.stack([weight * value.double() for weight, value in zip(weights, values, strict=True)]).sum(0)
    number = torch.stack(weights).sum(0)
    return (total / torch.where(number > 0, number, 1.0)).float()


def _zone(name: str, files: Sequence[ExpertFile]) -> Zone | NoZone:
    if all(file.zone == files[0].zone for file in files):
        return files[0].zone
    zones = [file.zone for file in files if isinstance(file.zone, Zone)]
    told = "; ".join(
        f"{file.path} has " + (f"{file.zone.first}-{file.zone.last}" if isinstance(file.zone, Zone) else f"none ({file.zone.reason})")
        for file in files
    )
    if name == "merge":
        if not zones:
            return NoZone(f"none of the merged files has a zone: {told}")
        return Zone(min(z.first for z in zones), max(z.last for z in zones), name, f"smallest range that covers the files' zones: {told}")
    if len(zones) < len(files):
        return NoZone(f"not every intersected file has a zone: {told}")
    first, last = max(z.first for z in zones), min(z.last for z in zones)
    if first > last:
        return NoZone(f"the zones of the intersected files do not overlap: {told}")
    return Zone(first, last, name, f"overlap of the files' zones: {told}")
