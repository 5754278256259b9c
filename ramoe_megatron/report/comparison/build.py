"""comparison.json: many methods over many seeds and several base models, from the run folders that `ramoe run` wrote."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ramoe_megatron.artifacts.files import atomic_write_text, package_version, save_document
from ramoe_megatron.report.comparison import relations, tables
from ramoe_megatron.report.comparison.ablation import ablation
from ramoe_megatron.report.comparison.costs import costs
from ramoe_megatron.report.comparison.folders import load_folders
from ramoe_megatron.report.comparison.training import training

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
        RamoeError: a folder or a file of it is missing (with the stage to run) or malformed, or folders or evaluations are not
            alike where they have to be.
    """
    runs = load_folders(folders, reference)
    first = next(iter(runs.values()))
    evaluations = [e for run in runs.values() for e in run.evaluations]
    order = dict.fromkeys(["base", reference, main, *(m for run in runs.values() for m in run.methods)])
    by_method = {m: own for m in order if (own := [e for e in evaluations if e.method == m])}
    study = tables.Study(runs, by_method, first.anchor, reference, main)
    known = {"base", reference, main, OFF, *presets, *(claim.control for claim in claims)}
    headline = tables.headline(study)
    return {
        "package_version": package_version(),
        "command": command,
        "reference": reference,
        "main": main,
        "anchor": first.anchor,
        "split": first.evaluated_split(),
        "languages": study.targets,
        "tasks": study.tasks,
        "methods": list(by_method),
        "bases": [tables.base_row(name, run) for name, run in runs.items()],
        "training": training(study),
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
    from ramoe_megatron.report.comparison.document import write_document
    from ramoe_megatron.report.comparison.page import render
    from ramoe_megatron.report.comparison.plots import plot_comparison

    out = Path(out)
    comparison = compare(folders, **options)
    save_document(out / "comparison.json", "ramoe-comparison", comparison)
    write_document(comparison, out / "experiment.md")
    page = out / "comparison.html"
    reports = {}
    for base, folder in zip(comparison["bases"], folders, strict=True):
        if (report := Path(folder).resolve() / "report.html").is_file():
            reports[base["base"]] = report.relative_to(out.resolve(), walk_up=True).as_posix()
    atomic_write_text(page, render(comparison, plot_comparison(comparison, out / "comparison-plots"), reports))
    return page
