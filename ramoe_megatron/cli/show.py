"""Commands of `ramoe` that read files and start nothing. Heavy imports are inside the functions."""

from pathlib import Path
from typing import Any

import click

from ramoe_megatron.errors import RamoeError

FILE = click.Path(path_type=Path)
FOLDER = click.Path(path_type=Path, file_okay=False)
DOCUMENT = click.option(
    "--document", type=FILE, help="Also write the Markdown document here, and its data beside it as .json."
)
EXISTING = click.Path(path_type=Path, file_okay=False, exists=True)


@click.command()
@click.argument("run_folder", metavar="RUN", type=EXISTING)
def status(run_folder: Path) -> None:
    """Show how far each stage of RUN is.

    For each stage: state, Slurm job and nodes, last iteration, and last line of its log.
    """
    from ramoe_megatron.recipe.status import run_status, status_table

    wide_console().print(status_table(run_status(run_folder.resolve())))


@click.command()
@click.argument("run_folder", metavar="RUN", type=EXISTING)
def predict(run_folder: Path) -> None:
    """Predict whether alignment can help RUN.

    Shows the ci share, the divergence and the transplant test, which `ramoe run` measures before fine-tuning.
    """
    path = run_folder / "predict.json"
    if not path.exists():
        raise RamoeError(
            f"{path} does not exist: write it with `ramoe run RECIPE --until predict --out {run_folder}`"
        )
    _show(path)


@click.command()
@click.argument("file", type=FILE)
def inspect(file: Path) -> None:
    """Show an artefact in readable form.

    FILE is a taxonomy, experts, priors, anchors, divergence, evaluation, steering, prediction or results
    file.
    """
    _show(file)


@click.command()
@click.option(
    "--taxonomy",
    type=FILE,
    required=True,
    help="taxonomy.jsonl, with the other anchors among its target languages.",
)
@click.option(
    "--anchor", required=True, help="The language that `english_correct` in the taxonomy refers to."
)
@click.option(
    "--priors",
    "named",
    multiple=True,
    required=True,
    metavar="LANGUAGE=FILE",
    help="An anchor and its priors.safetensors (from ramoe profile --ramoe-save-priors). Repeatable; "
    "give the preferred anchor first.",
)
@click.option(
    "--split", default="", help="Splits of the taxonomy to use, separated by commas.  [default: all]"
)
@click.option(
    "--out",
    type=FOLDER,
    required=True,
    help="Folder for taxonomy.jsonl, taxonomy.json, priors.safetensors and anchors.json.",
)
@click.option("--replace", is_flag=True, help="Overwrite these files in --out.")
def anchors(
    taxonomy: Path, anchor: str, named: tuple[str, ...], split: str, out: Path, replace: bool
) -> None:
    """Choose one of several anchor languages for each example.

    Each example is aligned to the first anchor in which the model answers it correctly. Fine-tune with the
    files in --out as --ramoe-taxonomy and --ramoe-priors, and with --ramoe-target example.
    """
    from ramoe_megatron.artifacts.anchor_files import write_anchors

    priors: dict[str, Path] = {}
    for text in named:
        language, _, file = text.partition("=")
        if not language or not file or language in priors:
            raise RamoeError(
                f"--priors {text}: expected LANGUAGE=FILE, and each language once, "
                "as in en=priors.safetensors"
            )
        priors[language] = Path(file)
    splits = [name.strip() for name in split.split(",") if name.strip()]
    write_anchors(taxonomy, anchor, priors, out, splits, replace)
    _show(out / "anchors.json")


@click.command("map")
@click.argument(
    "comparisons", metavar="COMPARISON...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option("--out", type=FOLDER, default=Path("runs/map"), show_default=True, help="Folder of the map.")
@DOCUMENT
def gain_map(comparisons: tuple[Path, ...], out: Path, document: Path | None) -> None:
    """Show where alignment helps: comparisons of several worlds, side by side.

    COMPARISON is a folder that `ramoe compare` wrote, or its comparison.json. The map has what alignment adds
    to the same training without it, by world, by number of examples (ids-per-task) and by ci share. Writes
    map.json, map.html and map.md.
    """
    from ramoe_megatron.report.comparison.gain_map import write_map

    click.echo(f"map: {write_map(comparisons, out, document)}")


FILE_COMMANDS = (status, predict, inspect, anchors, gain_map)
"""`commands.py` adds them to `ramoe`."""


def wide_console() -> Any:
    """A console for tables wider than 80 columns. A terminal and COLUMNS keep their width."""
    import os

    from rich.console import Console

    console = Console()
    return console if console.is_terminal or os.environ.get("COLUMNS") else Console(width=200)


def _show(path: Path) -> None:
    from ramoe_megatron.report.inspect import describe

    wide_console().print(describe(path))
