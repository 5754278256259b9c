"""The run folders of a comparison: each must be finished, and all must agree where a comparison needs it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.report.inputs import Evaluation, RunInputs, load_run

NEEDED = {
    "recipe.yaml": "data",
    "manifest.json": "data",
    "taxonomy.json": "taxonomy",
    "experts.safetensors": "profile",
    "predict.json": "predict",
    "evaluations/base.json": "evaluate/base",
}
"""File of a run folder -> the stage that writes it (`ramoe run` itself writes the first two when it
starts)."""

SECTIONS = ("train", "alignment", "selection", "steering")
"""Sections of the recipe that must agree, so that methods with the same name are the same method."""


def load_folders(folders: Sequence[Path], reference: str) -> dict[str, RunInputs]:
    """Run folders by label: the folder's name, preceded by its parent's name when two names are equal.

    Raises:
        RamoeError: there is no folder; a file is missing (the message names the stage to run) or malformed;
            an evaluation has other examples than the reference of its folder; folders differ in anchor,
            split, methods, tasks, languages or training.
    """
    if not folders:
        raise RamoeError(
            "comparison: found no run folder, expected at least one; give the folders that `ramoe run` wrote"
        )
    paths = [Path(folder).resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise RamoeError(
            f"comparison: a run folder is given twice among {', '.join(map(str, folders))}; give each once"
        )
    names = [path.name for path in paths]
    labels = [
        path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}" for path in paths
    ]
    if len(set(labels)) < len(labels):
        raise RamoeError(
            f"comparison: folders of the same name, {', '.join(map(str, folders))}; rename one of them"
        )
    runs = {label: _complete(path, label, reference) for label, path in zip(labels, paths, strict=True)}
    for run in runs.values():
        _same_examples(run, reference)
    _alike(runs)
    return runs


def _complete(folder: Path, label: str, reference: str) -> RunInputs:
    run = load_run(folder)
    missing = [(name, stage) for name, stage in NEEDED.items() if not (run.root / name).exists()]
    found = {(e.method, e.seed) for e in run.evaluations}
    methods = run.recipe_methods
    if run.recipe and reference not in methods:
        raise RamoeError(
            f"{run.root / 'recipe.yaml'}: found methods {', '.join(methods) or 'none'}, expected {reference} "
            "among them, which the others are compared with; add it and run the recipe again"
        )
    started = (run.manifest or {}).get("stages", {})
    for seed in run.recipe.get("seeds") or [1]:
        for method in [m for m in methods if (m, None) not in found and (m, seed) not in found]:
            # Without a seed: nothing is trained.
            name = method if f"evaluate/{method}" in started else f"{method}-seed{seed}"
            missing.append((f"evaluations/{name}.json", f"evaluate/{name}"))
    missing = list(dict.fromkeys(missing))
    if missing:
        told = "\n".join(f"  {run.root / name}: stage {stage}" for name, stage in missing)
        raise RamoeError(
            f"{run.root}: the run is not finished, {len(missing)} "
            f"file{'s are' if len(missing) > 1 else ' is'} missing; run its recipe again with --out "
            f"{run.root}, which makes only what is missing\n{told}"
        )
    evaluations: list[Evaluation] = [dataclasses.replace(e, base=label) for e in run.evaluations]
    return dataclasses.replace(run, evaluations=evaluations)


def _same_examples(run: RunInputs, reference: str) -> None:
    """Raise RamoeError for an evaluation with another split or other examples than the reference.

    The difference would silently be over a part of the examples.
    """
    first = next(e for e in run.evaluations if e.method == reference)
    for e in run.evaluations:
        missing, more = first.tasks.keys() - e.tasks.keys(), e.tasks.keys() - first.tasks.keys()
        if e.split != first.split:
            found, expected = f"split {e.split}", first.split
        elif missing or more:
            languages = ", ".join(sorted({language for _, language in missing | more}))
            found = f"{len(e.tasks)} examples, {len(missing)} missing and {len(more)} more, in {languages}"
            expected = f"the {len(first.tasks)}"
        elif e.tasks != first.tasks:
            key = next(key for key in first.tasks if e.tasks[key] != first.tasks[key])
            found, expected = f"task {e.tasks[key]} of example {key[0]}", first.tasks[key]
        else:
            continue
        raise RamoeError(
            f"{_file(run, e)}: found {found}, expected {expected} of {_file(run, first).name}; remove the "
            f"one that is wrong, and run the recipe again with --out {run.root}"
        )


def _file(run: RunInputs, e: Evaluation) -> Path:
    return run.root / "evaluations" / f"{e.method if e.seed is None else f'{e.method}-seed{e.seed}'}.json"


def _alike(runs: Mapping[str, RunInputs]) -> None:
    """Raise RamoeError for folders that differ where a mean over base models needs them equal."""
    checks: dict[str, Callable[[RunInputs], Any]] = {
        "anchor language": lambda run: run.anchor,
        "evaluated split": lambda run: run.evaluated_split(),
        "methods": lambda run: sorted(run.recipe_methods),
        "tasks": lambda run: sorted({task for e in run.evaluations for task in e.tasks.values()}),
        "languages": lambda run: sorted({language for e in run.evaluations for _, language in e.tasks}),
        **{f"{name} section": functools.partial(_section, name) for name in SECTIONS},
        "settings of a method": _method_settings,
    }
    expected, *others = runs
    for what, of in checks.items():
        for name in others:
            found, wanted = of(runs[name]), of(runs[expected])
            if found != wanted:
                raise RamoeError(
                    f"{runs[name].root}: the run folders differ in {what}: found {_told(found, wanted)}, "
                    f"expected {_told(wanted, found)} as in {runs[expected].root}; compare folders that "
                    "agree, or run both recipes again with the same"
                )


def _section(name: str, run: RunInputs) -> Any:
    return run.recipe.get(name) or {}


def _method_settings(run: RunInputs) -> dict[str, Any]:
    """Method -> the recipe's settings of it, without its name."""
    entries = [
        {"name": entry} if isinstance(entry, str) else entry for entry in run.recipe.get("methods") or []
    ]
    return {entry["name"]: {key: value for key, value in entry.items() if key != "name"} for entry in entries}


def _told(own: Any, other: Any) -> str:
    """A value as text. When two values differ only in some entries, only these entries."""
    if isinstance(own, dict):
        own = [
            f"{key} {own.get(key, 'not given')}" for key in {**own, **other} if own.get(key) != other.get(key)
        ]
    return ", ".join(map(str, own)) if isinstance(own, list) else str(own)
