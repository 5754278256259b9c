"""comparison.json: methods over seeds and base models, from the run folders of `ramoe run`."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ramoe_megatron.artifacts.files import atomic_write_text, package_version, save_document
from ramoe_megatron.report.comparison import contrasts
from ramoe_megatron.report.comparison.ablation import ablation_rows, added_rows, training_rows
from ramoe_megatron.report.comparison.contrasts import CLAIMS, Claim
from ramoe_megatron.report.comparison.costs import cost_rows
from ramoe_megatron.report.comparison.document import comparison_markdown, comparison_page
from ramoe_megatron.report.comparison.figures import plot_comparison
from ramoe_megatron.report.comparison.folders import load_folders
from ramoe_megatron.report.comparison.relations import ci_gain_rows, divergence_gap_rows, transplant_rows
from ramoe_megatron.report.comparison.study import Study
from ramoe_megatron.report.vocabulary import Record

PRESETS = ("sft", "ra-moe", "ra-moe-shuffled")
"""Methods with a fixed meaning. The caller may pass more."""


OFF = "coeff-zero"
"""The control that must equal the reference bit for bit."""


def compare(
    folders: Sequence[Path],
    reference: str = "sft",
    main: str | None = None,
    claims: Sequence[Claim] = CLAIMS,
    presets: Collection[str] = PRESETS,
    command: str = "",
    tuning: Record | None = None,
) -> dict[str, Any]:
    """The contents of comparison.json.

    Args:
        folders: run folders, one a base model, each finished.
        reference: the method that all others are compared with.
        main: the method whose transplant table and claims are of interest. Default: ra-moe, or the first
            method beside the reference where ra-moe was not run.
        claims: controls; one that was not run gives no row.
        presets: methods that are no ablation; controls of `claims` are none either.
        command: the command line that made the comparison, to be quoted.
        tuning: the contents of tuning.json, if the methods' settings were chosen by trials.

    Raises:
        RamoeError: a folder or a file of it is missing (with the stage to run) or malformed, or folders or
        evaluations are not
            alike where they have to be.
    """
    runs = load_folders(folders, reference)
    first = next(iter(runs.values()))
    evaluations = [e for run in runs.values() for e in run.evaluations]
    ran = [method for run in runs.values() for method in run.methods]
    others = [method for method in ran if method not in ("base", reference)]
    main = main or ("ra-moe" if "ra-moe" in ran else next(iter(others), "ra-moe"))
    order = dict.fromkeys(["base", reference, main, *ran])
    by_method = {m: own for m in order if (own := [e for e in evaluations if e.method == m])}
    study = Study(runs, by_method, first.anchor, reference, main)
    known = {"base", reference, main, OFF, *presets, *(claim.control for claim in claims)}
    headline = contrasts.headline_rows(study)
    added = added_rows(study, tuned=tuning is not None)
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
        "bases": [contrasts.base_row(name, run) for name, run in runs.items()],
        "training": training_rows(study),
        "tuning": tuning,
        "headline": headline,
        "claims": contrasts.claims_rows(study, claims),
        "cells": contrasts.cells_rows(study),
        "english": contrasts.english_rows(study),
        "cost": cost_rows(study),
        "mass": contrasts.mass_rows(study),
        "ci_gain": ci_gain_rows(study),
        "divergence_gap": divergence_gap_rows(study),
        "transplant": transplant_rows(study),
        "coefficient_zero": contrasts.zero_rows(study, OFF),
        "added": added,
        "ablation": ablation_rows(study, headline, known, added),
        "counts": contrasts.counts_table(study),
    }


def write_comparison(folders: Sequence[Path], out: Path, **options: Any) -> Path:
    """Write comparison.json, comparison.html, experiment.md and comparison-plots/ under `out`; returns the
    page's path.

    `options` are those of `compare`.
    """
    out = Path(out)
    comparison = compare(folders, **options)
    save_document(out / "comparison.json", "ramoe-comparison", comparison)
    atomic_write_text(out / "experiment.md", comparison_markdown(comparison, "comparison.json"))
    reports = {}
    for base, folder in zip(comparison["bases"], folders, strict=True):
        if (report := Path(folder).resolve() / "report.html").is_file():
            reports[base["base"]] = report.relative_to(out.resolve(), walk_up=True).as_posix()
    page, plots = out / "comparison.html", plot_comparison(comparison, out / "comparison-plots")
    atomic_write_text(page, comparison_page(comparison, plots, reports))
    return page
