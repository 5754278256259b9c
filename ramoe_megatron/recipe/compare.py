"""`ramoe compare`: run a recipe's methods over seeds and base models, and compare the results."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ramoe_megatron.artifacts.files import read_json
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.recipe.load import load_recipe
from ramoe_megatron.recipe.manifest import Manifest
from ramoe_megatron.recipe.plan import make_plan
from ramoe_megatron.recipe.runner import run_recipe


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

    Args:
        changes: changes to the recipe, as `--set` gives them.
        seeds: fine-tuning seeds 1 to N. Default: the recipe's seeds.
        bases: seeds of the data and the base model. Default: the recipe's seed.
        out: folder of the runs, comparison.json, comparison.html and experiment.md. Default: runs/NAME.
        document: a second place for the Markdown document. Its data is written beside it, with the suffix
            .json.

    Raises:
        RamoeError: as `run_recipe`; the recipe has no method `sft` to compare with; several base models are
            asked of a recipe that trains none.
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
    folders = {root / f"base{base}": [*changes, f"seed={base}"] for base in bases or [recipe.seed]}
    for folder, own in folders.items():
        console.print(f"[bold]{folder.name}[/bold]", highlight=False)
        run_recipe(path, own, folder, dry_run=dry_run, console=console)
    if dry_run:
        return
    if waiting := [folder.name for folder, own in folders.items() if not _done(path, own, folder)]:
        console.print(
            f"{', '.join(waiting)}: submitted; repeat this command when its jobs have ended",
            highlight=False,
        )
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
    page = write_comparison(list(folders), root, presets=tuple(METHODS), command=shlex.join(words))
    if document is not None:
        write_document(read_json(root / "comparison.json"), document)
    console.print(f"comparison: {page}", soft_wrap=True, highlight=False)
    written = document or root / "experiment.md"
    data = document.with_suffix(".json") if document else root / "comparison.json"
    console.print(f"document: {written}, data: {data}", soft_wrap=True, highlight=False)


def _done(path: Path, changes: Sequence[str], folder: Path) -> bool:
    recipe = load_recipe(path, changes)
    manifest = Manifest(folder, recipe.name)
    return all(manifest.reason_to_run(stage) is None for stage in make_plan(recipe, folder, path.parent))
