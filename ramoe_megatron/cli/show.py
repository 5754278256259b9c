"""Commands of `ramoe` that read files and start nothing: show them, and make new ones of them. Heavy imports stand inside."""

from pathlib import Path
from typing import Any

import click

from ramoe_megatron.errors import RamoeError

FILE = click.Path(path_type=Path)
FOLDER = click.Path(path_type=Path, file_okay=False)
EXISTING = click.Path(path_type=Path, file_okay=False, exists=True)


@click.command()
@click.argument("run_folder", metavar="RUN", type=EXISTING)
def status(run_folder: Path) -> None:
    """How far each stage of RUN is: state, Slurm job and nodes, last iteration, last line of its log."""
    from ramoe_megatron.recipe.status import run_status, status_table

    wide_console().print(status_table(run_status(run_folder.resolve())))


@click.command()
@click.argument("run_folder", metavar="RUN", type=EXISTING)
def predict(run_folder: Path) -> None:
    """Go or no-go before any training: ci share, divergence and the transplant test of RUN."""
    path = run_folder / "predict.json"
    if not path.exists():
        raise RamoeError(
            f"{path} does not exist: `ramoe run RECIPE --until predict --out {run_folder}` writes it"
        )
    _show(path)


@click.command()
@click.argument("file", type=FILE)
def inspect(file: Path) -> None:
    """Show any artefact readably: taxonomy, experts, priors, anchors, divergence, evaluation, steering, prediction, results."""
    _show(file)


@click.command()
@click.option(
    "--taxonomy",
    type=FILE,
    required=True,
    help="taxonomy.jsonl with the other anchors among its target languages.",
)
@click.option("--anchor", required=True, help="The language that `english_correct` of the taxonomy is about.")
@click.option(
    "--priors",
    "named",
    multiple=True,
    required=True,
    metavar="LANGUAGE=FILE",
    help="An anchor and its priors.safetensors (ramoe profile --ramoe-save-priors). Repeatable; the preferred anchor first.",
)
@click.option(
    "--split", default="", help="Splits of the taxonomy to take, separated by commas.  [default: all]"
)
@click.option(
    "--out",
    type=FOLDER,
    required=True,
    help="Folder for taxonomy.jsonl, taxonomy.json, priors.safetensors and anchors.json.",
)
@click.option("--replace", is_flag=True, help="Overwrite those files in --out.")
def anchors(
    taxonomy: Path, anchor: str, named: tuple[str, ...], split: str, out: Path, replace: bool
) -> None:
    """Pull each example to the first of several anchor languages that the model answers it correctly in.

    Fine-tune with the files in --out as --ramoe-taxonomy and --ramoe-priors (--ramoe-target example).
    """
    from ramoe_megatron.artifacts.anchor_files import write_anchors

    priors: dict[str, Path] = {}
    for text in named:
        language, _, file = text.partition("=")
        if not language or not file or language in priors:
            raise RamoeError(
                f"--priors {text}: expected LANGUAGE=FILE, each language once, as in en=priors.safetensors"
            )
        priors[language] = Path(file)
    splits = [name.strip() for name in split.split(",") if name.strip()]
    write_anchors(taxonomy, anchor, priors, out, splits, replace)
    _show(out / "anchors.json")


FILE_COMMANDS = (status, predict, inspect, anchors)
"""Added to `ramoe` by `cli.py`."""


def wide_console() -> Any:
    """A console for tables that 80 columns would cut; a terminal and COLUMNS keep their own width."""
    import os

    from rich.console import Console

    console = Console()
    return console if console.is_terminal or os.environ.get("COLUMNS") else Console(width=200)


def _show(path: Path) -> None:
    from ramoe_megatron.report.inspect import describe

    wide_console().print(describe(path))
