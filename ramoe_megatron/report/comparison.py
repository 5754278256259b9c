"""comparison.json: many methods over many seeds and several base models, from the run folders that `ramoe run` wrote."""

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.files import atomic_write_text, package_version, save_document
from ramoe_megatron.report import comparison_relations as relations
from ramoe_megatron.report import comparison_tables as tables
from ramoe_megatron.report.comparison_ablation import ablation
from ramoe_megatron.report.comparison_costs import costs
from ramoe_megatron.report.inputs import Evaluation, RunInputs, load_run

NEEDED = {
    "recipe.yaml": "data",
    "manifest.json": "data",
    "taxonomy.json": "taxonomy",
    "experts.safetensors": "profile",
    "predict.json": "predict",
    "evaluations/base.json": "evaluate/base",
}
"""File of a run folder -> the stage that writes it (`ramoe run` itself writes the first two when it starts)."""

PRESETS = ("sft", "ra-moe", "ra-moe-shuffled")
"""Methods with a meaning of their own; the caller knows more of them."""


@dataclass(frozen=True)
class Claim:
    """What a control is to show: the method does better than the control, or the claim falls."""

    claim: str
    control: str
    method: str = "ra-moe"


CLAIMS = (
    Claim("task experts matter", "random-experts"),
    Claim("middle layers matter", "all-layers"),
    Claim("middle layers matter", "outside-zone"),
    Claim("the target's content matters", "ra-moe-shuffled"),
    Claim("direction matters", "reversed"),
)
OFF = "coeff-zero"
"""The control that must equal the reference bit for bit."""


def compare(
    folders: Sequence[Path],
    reference: str = "sft",
    main: str = "ra-moe",
    claims: Sequence[Claim] = CLAIMS,
    presets: Collection[str] = PRESETS,
    command: str = "",
) -> dict[str, Any]:
    """The contents of comparison.json.

    Args:
        folders: run folders, one a base model, each finished.
        reference: the method that all others are compared with.
        main: the method whose transplant table and claims are of interest.
        claims: controls; one that was not run gives no row.
        presets: methods that are no ablation; controls of `claims` are none either.
        command: the command line that made the comparison, to be quoted.

    Raises:
        RamoeError: a folder or a file of it is missing (with the stage to run) or malformed; anchors or splits differ.
    """
    runs = _load([Path(folder) for folder in folders], reference)
    anchor = _same(runs, "anchor language", lambda run: run.anchor)
    split = _same(runs, "evaluated split", lambda run: str(run.evaluated_split()))
    evaluations = [e for run in runs.values() for e in run.evaluations]
    order = dict.fromkeys(["base", reference, main, *(m for run in runs.values() for m in run.methods)])
    by_method = {m: own for m in order if (own := [e for e in evaluations if e.method == m])}
    study = tables.Study(runs, by_method, anchor, reference, main)
    known = {"base", reference, main, OFF, *presets, *(claim.control for claim in claims)}
    headline = tables.headline(study)
    return {
        "package_version": package_version(),
        "command": command,
        "reference": reference,
        "main": main,
        "anchor": anchor,
        "split": split,
        "languages": study.targets,
        "tasks": study.tasks,
        "methods": list(by_method),
        "bases": [tables.base_row(name, run) for name, run in runs.items()],
        "headline": headline,
        "claims": tables.claims(study, claims),
        "cells": tables.cells(study),
        "english": tables.english(study),
        "cost": costs(study),
        "mass": tables.mass(study),
        "ci_gain": relations.ci_gain(study),
        "transplant": relations.transplant(study),
        "coefficient_zero": tables.equality(study, OFF),
        "ablation": ablation(study, headline, known),
    }


def write_comparison(folders: Sequence[Path], out: Path, **options: Any) -> Path:
    """Write comparison.json, comparison.html, experiment.md and comparison-plots/ under `out`; returns the page's path.

    `options` are those of `compare`.
    """
    from ramoe_megatron.report.comparison_document import write_document
    from ramoe_megatron.report.comparison_page import render
    from ramoe_megatron.report.comparison_plots import plot_comparison

    out = Path(out)
    comparison = compare(folders, **options)
    save_document(out / "comparison.json", "ramoe-comparison", comparison)
    write_document(comparison, out / "experiment.md")
    page = out / "comparison.html"
    atomic_write_text(page, render(comparison, plot_comparison(comparison, out / "comparison-plots")))
    return page


def _load(folders: Sequence[Path], reference: str) -> dict[str, RunInputs]:
    """Run folders by label: the folder's name, with its parent's where two are alike."""
    if not folders:
        raise RamoeError("comparison: found no run folder, expected at least one; give the folders that `ramoe run` wrote")
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise RamoeError(f"comparison: a run folder is given twice among {', '.join(map(str, folders))}; give each once")
    names = [path.name for path in paths]
    labels = [path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}" for path in paths]
    if len(set(labels)) < len(labels):
        raise RamoeError(f"comparison: folders of the same name, {', '.join(map(str, folders))}; rename one of them")
    return {label: _complete(folder, label, reference) for label, folder in zip(labels, folders, strict=True)}


def _complete(folder: Path, label: str, reference: str) -> RunInputs:
    run = load_run(folder)
    missing = [(name, stage) for name, stage in NEEDED.items() if not (run.root / name).exists()]
    found = {(e.method, e.seed) for e in run.evaluations}
    methods = run.recipe_methods
    if run.recipe and reference not in methods:
        raise RamoeError(
            f"{run.root / 'recipe.yaml'}: found methods {', '.join(methods) or 'none'}, expected {reference} among them, which "
            "the others are compared with; add it and run the recipe again"
        )
    started = (run.manifest or {}).get("stages", {})
    for seed in run.recipe.get("seeds") or [1]:
        for method in [m for m in methods if (m, None) not in found and (m, seed) not in found]:
            name = method if f"evaluate/{method}" in started else f"{method}-seed{seed}"  # without a seed: nothing is trained
            missing.append((f"evaluations/{name}.json", f"evaluate/{name}"))
    missing = list(dict.fromkeys(missing))
    if missing:
        told = "\n".join(f"  {run.root / name}: stage {stage}" for name, stage in missing)
        raise RamoeError(
            f"{run.root}: the run is not finished, {len(missing)} file{'s are' if len(missing) > 1 else ' is'} missing; run its recipe "
            f"again with --out {run.root}, which makes only what is missing\n{told}"
        )
    evaluations: list[Evaluation] = [dataclasses.replace(e, base=label) for e in run.evaluations]
    return dataclasses.replace(run, evaluations=evaluations)


def _same(runs: dict[str, RunInputs], what: str, of: Any) -> str:
    found = {name: of(run) for name, run in runs.items()}
    if len(set(found.values())) > 1:
        told = ", ".join(f"{name}: {value}" for name, value in found.items())
        raise RamoeError(f"comparison: the run folders differ in {what} ({told}); compare folders that agree")
    return str(next(iter(found.values())))
