"""The commands about methods: which there are, and how they compare."""

from pathlib import Path

import click

from ramoe_megatron.cli.files import FILE, FOLDER, wide_console


def _numbers(_context: click.Context, parameter: click.Parameter, value: str | None) -> list[int]:
    try:
        found = [int(part) for part in value.split(",")] if value else []
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: expected whole numbers, such as 1,2", param=parameter) from error
    if len(set(found)) < len(found):
        raise click.BadParameter(f"{value!r}: names one twice; give each once", param=parameter)
    return found


@click.command()
@click.argument("recipe", type=FILE)
@click.option("--seeds", type=click.IntRange(1), help="Fine-tuning seeds 1 to N of every method.  [default: the recipe's]")
@click.option("--bases", callback=_numbers, metavar="SEED,...", help="Seeds of the data and the base model, one run each.  [default: seed]")
@click.option("--set", "changes", multiple=True, metavar="KEY.PATH=VALUE", help="Change a value of the recipe, as `ramoe run` does.")
@click.option("--out", type=FOLDER, help="Folder of the runs and of what they come to.  [default: runs/NAME]")
@click.option("--document", type=FILE, help="Also write the Markdown document here, its data beside it as .json.")
@click.option("--dry-run", is_flag=True, help="Tell what would run, and why.")
def compare(
    recipe: Path, seeds: int | None, bases: list[int], changes: tuple[str, ...], out: Path | None, document: Path | None, dry_run: bool
) -> None:
    """Run a recipe's methods over seeds and base models, and compare all with sft: comparison.json, .html and experiment.md.

    The same data, seeds and layout for each; the same steps unless a method says otherwise. A second call goes on where the first stopped.
    """
    from ramoe_megatron.recipe.compare import compare_recipe
    from ramoe_megatron.recipe.stages import StageFailed

    try:
        compare_recipe(recipe, changes, seeds, bases, out, document, dry_run)
    except StageFailed as failure:
        click.secho(failure.text, fg="red", err=True)
        raise SystemExit(failure.status) from None


@click.command()
def methods() -> None:
    """What each method trains and adds to the loss, its source, and what of it is our reading."""
    from rich.table import Table

    from ramoe_megatron.recipe.catalogue import METHODS

    table = Table("method", "trains", "adds to the loss", "source", "our reading", show_lines=True)
    for name, entry in METHODS.items():
        table.add_row(name if entry.kind == "method" else f"{name} (control)", entry.trains, entry.adds, entry.source, entry.reading)
    wide_console().print(table)
