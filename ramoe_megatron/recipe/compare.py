"""`ramoe compare`: run a recipe's methods over seeds and base models, and compare the results."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ramoe_megatron.artifacts.files import read_json, save_document
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.recipe.load import load_recipe
from ramoe_megatron.recipe.manifest import Manifest
from ramoe_megatron.recipe.plan import make_plan
from ramoe_megatron.recipe.runner import run_recipe, select_stages
from ramoe_megatron.recipe.schema import Recipe
from ramoe_megatron.recipe.tune import settings, trial_changes, trial_rows, tuned_changes


def compare_recipe(
    path: Path,
    changes: Sequence[str] = (),
    seeds: int | None = None,
    bases: Sequence[int] = (),
    out: Path | None = None,
    document: Path | None = None,
    dry_run: bool = False,
    console: Console | None = None,
) -> None:
    """Run the recipe once for each base model into OUT/baseSEED, as `ramoe run` does, and compare all runs.

    Every method has the same data, seeds and layout. It also has the recipe's training flags (steps, batch,
    learning rate), unless the method's `train` changes them; the documents report such changes. A second call
    resumes where the first one stopped.

    With a section `tune`, the trials of all methods run first, in OUT/tuning, and the comparison has the
    setting of each method that was best on the validation split (`recipe.tune`).

    Args:
        changes: changes to the recipe, as `--set` gives them.
        seeds: fine-tuning seeds 1 to N. Default: the recipe's seeds.
        bases: seeds of the data and the base model. Default: the recipe's seed.
        out: folder of the runs, comparison.json, comparison.html and experiment.md. Default: runs/NAME.
        document: a second place for the Markdown document. Its data is written beside it, with the suffix
            .json.

    Raises:
        RamoeError: as `run_recipe`; the recipe has no method `sft` to compare with; several base models are
            asked of a recipe that trains none; or a base model is tuned on and compared.
        StageFailed: a stage failed.
    """
    console = console or Console()
    given, changes = changes, [*changes, *([f"seeds={seeds}"] if seeds is not None else [])]
    recipe = load_recipe(path, changes)
    if "sft" not in [method.name for method in recipe.methods]:
        raise RamoeError(f"{path}: methods has no sft, which every other method is compared with: add it")
    if len(bases) > 1 and recipe.pretrain is None:
        raise RamoeError(
            f"{path}: checkpoint gives one base model, but --bases asks for {len(bases)}: "
            "give --bases one seed, or leave it out"
        )
    root = (out or Path("runs") / recipe.name).resolve()
    tuning, compared = None, [*bases] or [recipe.seed]
    if recipe.tune is not None:
        if both := sorted({*recipe.tune.bases} & {*compared}):
            raise RamoeError(
                f"{path}: tune.bases and the comparison both have the base model "
                f"{', '.join(map(str, both))}: give other seeds in tune.bases or --bases"
            )
        tuning = _tuned(path, changes, recipe, root / "tuning", dry_run, console)
        if tuning is None:
            return
        changes = [*changes, *tuned_changes(recipe, tuning["rows"])]
    folders = _ran(
        path, {root / f"base{base}": [*changes, f"seed={base}"] for base in compared}, dry_run, console
    )
    if folders is None:
        return
    from ramoe_megatron.recipe.methods import METHODS
    from ramoe_megatron.report.comparison.assemble import write_comparison  # matplotlib
    from ramoe_megatron.report.comparison.document import write_document

    words = [
        "ramoe",
        "compare",
        path.name if path.is_absolute() else str(path),
        *(["--seeds", str(seeds)] if seeds else []),
    ]
    words += ["--bases", ",".join(map(str, bases))] if bases else []
    words += [word for change in given for word in ("--set", change)]
    page = write_comparison(
        list(folders), root, presets=tuple(METHODS), command=shlex.join(words), tuning=tuning
    )
    if document is not None:
        write_document(read_json(root / "comparison.json"), document)
    console.print(f"comparison: {page}", soft_wrap=True, highlight=False)
    written = document or root / "experiment.md"
    data = document.with_suffix(".json") if document else root / "comparison.json"
    console.print(f"document: {written}, data: {data}", soft_wrap=True, highlight=False)


def _tuned(
    path: Path, changes: Sequence[str], recipe: Recipe, out: Path, dry_run: bool, console: Console
) -> dict[str, Any] | None:
    """Run the trials, and write and return tuning.json; None if they have not ended."""
    assert recipe.tune is not None
    asked = [*changes, *trial_changes(recipe)]
    bases = recipe.tune.bases or [recipe.seed]
    console.print(
        f"tuning: {sum(map(len, settings(recipe).values()))} trials; "
        f"base models {', '.join(map(str, bases))}; seeds {', '.join(map(str, recipe.tune.seeds))}",
        highlight=False,
    )
    folders = _ran(
        path, {out / f"base{base}": [*asked, f"seed={base}"] for base in bases}, dry_run, console, "results"
    )
    if folders is None:
        if dry_run:
            console.print("the comparison follows, with the settings that the trials choose", highlight=False)
        return None
    rows = trial_rows(recipe, {folder.name: read_json(folder / "results.json") for folder in folders})
    tuning = {
        "split": recipe.tune.split,
        "seeds": recipe.tune.seeds,
        "bases": [folder.name for folder in folders],
        "budget": recipe.tune.budget,
        "rows": rows,
    }
    save_document(out / "tuning.json", "ramoe-tuning", tuning)
    return tuning


def _ran(
    path: Path,
    folders: Mapping[Path, Sequence[str]],
    dry_run: bool,
    console: Console,
    last: str | None = None,
) -> list[Path] | None:
    """Run the recipe with each folder's changes, until its last stage or the one that is named.

    Returns:
        The folders, or None if they are not finished.
    """
    for folder, changes in folders.items():
        console.print(f"[bold]{folder.name}[/bold]", highlight=False)
        run_recipe(path, changes, folder, last=last, dry_run=dry_run, console=console)
    if dry_run:
        return None
    if waiting := [folder.name for folder, own in folders.items() if not _done(path, own, folder, last)]:
        console.print(
            f"{', '.join(waiting)}: submitted; repeat this command when its jobs have ended",
            highlight=False,
        )
        return None
    return list(folders)


def _done(path: Path, changes: Sequence[str], folder: Path, last: str | None) -> bool:
    recipe = load_recipe(path, changes)
    manifest, plan = Manifest(folder, recipe.name), make_plan(recipe, folder, path.parent)
    return all(manifest.reason_to_run(stage) is None for stage in plan[: select_stages(plan, None, last)[1]])
