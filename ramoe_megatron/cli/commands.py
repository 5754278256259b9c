"""The `ramoe` command. Heavy imports are inside the commands, so that `ramoe --help` is fast."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from ramoe_megatron.artifacts.files import refuse_unwritable
from ramoe_megatron.cli import models
from ramoe_megatron.cli.show import DOCUMENT, EXISTING, FILE, FILE_COMMANDS, FOLDER, wide_console
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.unfinished import STATUS

FROM_SAMPLES = "--from-samples"
PASS_THROUGH = {"ignore_unknown_options": True, "help_option_names": ["--help", "-h"]}


class RamoeGroup(click.Group):
    """Commands that print a user's error as red text on stderr, with exit status 2 and no traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the named command."""
        try:
            refuse_unwritable(sys.argv[1:], "command line")
            return super().invoke(ctx)
        except RamoeError as error:
            click.secho(f"ramoe: error: {error}", fg="red", err=True)
            ctx.exit(2)
        except KeyboardInterrupt as stop:  # Ctrl-C, or a signal that says its name
            click.secho(f"ramoe: stopped{f' by {stop}' if str(stop) else ''}", fg="red", err=True)
            ctx.exit(STATUS if getattr(stop, "resumes", False) else 130)


@click.group(cls=RamoeGroup, context_settings={"help_option_names": ["--help", "-h"]})
@click.version_option(package_name="ramoe-megatron", prog_name="ramoe")
def main() -> None:
    """Routing-aligned fine-tuning (RA-MoE) of Mixture-of-Experts models on Megatron-Core.

    `ramoe run RECIPE.yaml` runs an experiment from data to report. Each stage is also a separate command,
    which takes Megatron's flags.
    """


@main.command()
@click.argument("recipe", type=FILE)
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="KEY.PATH=VALUE",
    help="Change a value of the recipe. The value is YAML. Repeatable.",
)
@click.option(
    "--from",
    "first",
    metavar="STAGE",
    help="Begin with this stage: it runs in any case, and earlier stages are left as they are.",
)
@click.option("--until", "last", metavar="STAGE", help="End after this stage.")
@click.option("--out", type=FOLDER, help="Run folder.  [default: runs/NAME]")
@click.option(
    "--launcher",
    type=click.Choice(["local", "slurm"]),
    help="Run here, or submit one Slurm job for each stage.  [default: the recipe's]",
)
@click.option(
    "--dry-run", is_flag=True, help="Only print what would run and why, with the command lines and scripts."
)
def run(
    recipe: Path,
    changes: tuple[str, ...],
    first: str | None,
    last: str | None,
    out: Path | None,
    launcher: str | None,
    dry_run: bool,
) -> None:
    """Run a recipe.

    The stages are data, pretrain, convert, taxonomy, profile, priors, anchors, predict, finetune, steer,
    evaluate, results and report. A second run skips stages with an up-to-date result; a changed setting
    reruns the stages that depend on it. STAGE is a stage from this list, or a single one, such as
    finetune/sft-seed1.
    """
    from ramoe_megatron.recipe.runner import run_recipe
    from ramoe_megatron.recipe.stages import StageFailed

    changes += (f"launch.launcher={launcher}",) if launcher else ()
    try:
        run_recipe(recipe, changes, out, first, last, dry_run)
    except StageFailed as failure:
        click.secho(failure.text, fg="red", err=True)
        sys.exit(failure.status)


@main.command(context_settings=PASS_THROUGH)
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="KEY.PATH=VALUE",
    help="RECIPE: change a value of it, as in `ramoe run`.",
)
@click.option("--out", type=FILE, help="RECIPE: its run folder.  [default: runs/NAME]")
@click.option("--ranks", type=click.IntRange(1), help="JOB: ranks per node.  [default: 1]")
@click.option("--nodes", type=click.IntRange(1), help="JOB: nodes.  [default: 1]")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[RECIPE | JOB FLAGS...]")
def doctor(
    changes: tuple[str, ...], out: Path | None, ranks: int | None, nodes: int | None, words: tuple[str, ...]
) -> None:
    """Check a node, a job or a recipe before it starts.

    Without arguments: check this node (versions, GPUs, ports, Slurm, output folder). With RECIPE: check its
    stages too. With JOB (taxonomy, profile, finetune, evaluate, steer or predict) and its FLAGS: check that
    job too. The exit status is 1 when a finding is fatal.
    """
    import os

    from ramoe_megatron.recipe.doctor import (
        JOB_NAMES,
        environment_findings,
        findings_table,
        healthy,
        job_findings,
        recipe_findings,
    )

    target = words[0] if words else None
    if target in JOB_NAMES:
        if changes or out:
            raise RamoeError(
                f"doctor {target}: --set and --out belong to a recipe; give a job's folder among its flags"
            )
        found = job_findings(target, words[1:], ranks or 1, nodes or 1, os.environ)
    elif target is None:
        if changes:
            raise RamoeError("doctor: --set needs a recipe: name the recipe")
        found = environment_findings(ranks or 1, nodes or 1, out or Path("runs"), os.environ)
    elif target.startswith("-") or not Path(target).is_file() or len(words) > 1:
        raise RamoeError(
            f"doctor {' '.join(words)}: expected one recipe file, or a job ({', '.join(JOB_NAMES)}) followed "
            "by its flags"
        )
    elif ranks or nodes:
        raise RamoeError("doctor: --ranks and --nodes belong to a job; a recipe sets them under launch")
    else:
        found = recipe_findings(Path(target), changes, out, os.environ)
    sound = healthy(found)
    # On several nodes, only the first reports that everything is well.
    if not sound or os.environ.get("SLURM_NODEID", "0") == "0":
        wide_console().print(findings_table(found))
    sys.exit(0 if sound else 1)


def _job(name: str, summary: str, more: str = "") -> None:
    """Add a command that starts a job's ranks with the given flags."""

    @main.command(
        name, context_settings=PASS_THROUGH, short_help=summary, help=_job_help(name, summary, more)
    )
    @click.option("--ranks", type=click.IntRange(1), default=1, show_default=True, help="Ranks per node.")
    @click.option(
        "--nodes",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="Number of nodes. Start the same command on each node.",
    )
    @click.argument("flags", nargs=-1, type=click.UNPROCESSED)
    def command(ranks: int, nodes: int, flags: tuple[str, ...]) -> None:
        if name == "taxonomy" and any(word.partition("=")[0] == FROM_SAMPLES for word in flags):
            _plain_job("ramoe_megatron.jobs.from_samples", *flags)
        _start_ranks(name, flags, ranks, nodes)


def _start_ranks(name: str, flags: Sequence[str], ranks: int, nodes: int) -> NoReturn:
    """Run a job's ranks to their end."""
    import os
    import shlex

    from ramoe_megatron.recipe.launcher import Place, launch, python_command, rank_environment
    from ramoe_megatron.recipe.processes import stop_signals

    place = Place.from_environment(nodes, os.environ)
    words = python_command((f"ramoe_megatron.jobs.{name}", *flags), ranks, place)
    place.refuse_taken(0)
    if place.node == 0:
        click.echo(f"ramoe: {shlex.join(words)}", err=True)
    with stop_signals():
        outcome = launch(words, rank_environment(ranks, os.environ))
    if outcome.unfinished and place.node == 0:
        click.secho(f"ramoe: unfinished: {outcome.unfinished}", fg="yellow", err=True)
    sys.exit(outcome.status)


def _job_help(name: str, summary: str, more: str) -> str:
    return (
        f"{summary}\n\nFLAGS are Megatron's flags and ours (--ramoe-...), "
        f"passed to `torchrun -m ramoe_megatron.jobs.{name}`; `ramoe {name} -- --help` lists them. "
        "On several nodes, NODE_RANK (or SLURM_NODEID), MASTER_ADDR and MASTER_PORT identify this node."
    ) + (f"\n\n{more}" if more else "")


_job(
    "taxonomy",
    "Score parallel examples in each language: cc, ci, ic, ii.",
    f"`ramoe taxonomy {FROM_SAMPLES} en=FILE sw=FILE ...` takes the outcomes from sample files of "
    f"lm-evaluation-harness and starts no ranks; `ramoe taxonomy -- {FROM_SAMPLES} --help` lists its flags.",
)
_job("profile", "Find the task experts, English routing and alignment zone.")
_job("finetune", "Fine-tune with Megatron's training loop and the alignment loss.")
_job("evaluate", "Measure accuracy and routing mass of a checkpoint.")
_job("steer", "Search, on a validation split, for the best steering setting.")


@main.command("lm-eval", context_settings=PASS_THROUGH)
@click.option("--ranks", type=click.IntRange(1), help="Ranks per node.  [default: what the sizes need]")
@click.option(
    "--nodes",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Number of nodes, as in `ramoe profile`.",
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def lm_eval(ranks: int | None, nodes: int, words: tuple[str, ...]) -> None:
    """Run tasks of lm-evaluation-harness on a Megatron checkpoint, over ranks.

    WORDS are lm_eval's, with the model `ramoe`: `--tasks`, `--output_path`, `--log_samples` and so on;
    `ramoe lm-eval -- --help` lists them. In `--model_args`: checkpoint=DIR (from `ramoe convert`),
    tensor_parallel, pipeline_parallel, expert_parallel, dtype, batch_tokens, and any flag of Megatron.
    """
    from ramoe_megatron.jobs.harness import require_lm_eval

    require_lm_eval()
    if not words or words[0] in ("ls", "validate", "--help", "-h"):
        _plain_job("lm_eval", *words)
    from ramoe_megatron.cli.lm_eval_command import job_words

    line, needed = job_words(words)
    _start_ranks("harness", line, ranks or needed, nodes)


@main.command()
@click.option("--out", type=FOLDER, required=True, help="Folder for the data and the tokenizer.")
@click.option("--config", default="{}", help="JSON object, or a JSON file: the fields of WorldConfig.")
def world(out: Path, config: str) -> None:
    """Write the embedded world, which needs no download.

    It holds parallel, pretraining and general text from CLDR, and a tokenizer.
    """
    _plain_job("ramoe_megatron.jobs.generate", "world", "--config", config, "--out", str(out))


@main.command()
@click.option(
    "--source", type=EXISTING, help="Folder that holds a folder per language. Replaces `source` in --config."
)
@click.option("--out", type=FOLDER, required=True, help="Folder for the data and the tokenizer.")
@click.option("--config", default="{}", help="JSON object, or a JSON file: the fields of SibConfig.")
def sib200(source: Path | None, out: Path, config: str) -> None:
    """Convert SIB-200 and train a tokenizer on it.

    Writes parallel, pretraining and general text.
    """
    import json

    if source is not None:
        from ramoe_megatron.artifacts.files import read_json

        try:
            given = json.loads(config) if config.lstrip().startswith("{") else read_json(config)
        except json.JSONDecodeError as error:
            raise RamoeError(f"--config: column {error.colno}: malformed JSON ({error.msg})") from error
        config = json.dumps({**given, "source": str(source)})
    _plain_job("ramoe_megatron.jobs.generate", "sib200", "--config", config, "--out", str(out))


@main.command()
@click.argument("benchmark", required=False)
@click.option("--list", "listed", is_flag=True, help="List the benchmarks, with licence and paper.")
@click.option("--source", help="Folder or file as published, or a name on the Hugging Face hub.")
@click.option(
    "--out", type=FILE, help="JSONL file of the rows. NAME.json beside it says where they are from."
)
@click.option(
    "--languages", default="", metavar="LANGUAGE,...", help="Languages, by any name.  [default: all]"
)
@click.option(
    "--anchor", default="", metavar="LANGUAGE", help="Language that has every id.  [default: English]"
)
@click.option("--split", default="", metavar="SPLIT,...", help="Splits to write.  [default: all]")
@click.option(
    "--splits",
    multiple=True,
    metavar="SPLIT=FROM",
    help="Make a split that the benchmark lacks, of a share of the ids of test (train=0.4) or of another "
    "split (train=validation). Repeatable.",
)
@click.option(
    "--shots", type=click.IntRange(0), default=0, show_default=True, help="Answered examples in a prompt."
)
@click.option("--chat", is_flag=True, help="Write messages instead of prompt and response.")
@click.option(
    "--between",
    type=click.Choice(["line", "space", "none"]),
    default="line",
    show_default=True,
    help="Between prompt and response.",
)
@click.option("--limit", type=click.IntRange(1), help="Maximum number of ids in each split.  [default: all]")
@click.option("--seed", type=int, default=1, show_default=True, help="Seed of --splits, --shots and --limit.")
@click.option("--replace", is_flag=True, help="Replace the file --out.")
def data(
    benchmark: str | None,
    listed: bool,
    source: str | None,
    out: Path | None,
    languages: str,
    anchor: str,
    split: str,
    splits: tuple[str, ...],
    replace: bool,
    **options: Any,
) -> None:
    """Write a published benchmark as parallel data.

    BENCHMARK is a name that --list shows. The source is read as its authors publish it.
    """
    from ramoe_megatron.cli import benchmarks

    if listed:
        wide_console().print(benchmarks.listing())
        return
    if benchmark is None or source is None or out is None:
        raise RamoeError("data: give BENCHMARK, --source and --out; `ramoe data --list` has the benchmarks")
    names = {"languages": languages, "split": split}
    lists = {key: [name for name in text.split(",") if name] for key, text in names.items()}
    values = {"benchmark": benchmark, "source": source, "anchor": anchor, **lists, **options}
    wide_console().print(benchmarks.write({**values, "splits": benchmarks.shares(splits)}, out, replace))


@main.command()
@click.argument("run_folder", metavar="RUN", type=EXISTING)
def report(run_folder: Path) -> None:
    """Write RUN's report.html and plots again."""
    _plain_job("ramoe_megatron.report.write", "report", "--run", str(run_folder))


def _plain_job(name: str, *arguments: str) -> NoReturn:
    """Run a module in one process to its end."""
    import os

    from ramoe_megatron.recipe.launcher import launch, python_command
    from ramoe_megatron.recipe.processes import stop_signals

    with stop_signals():
        sys.exit(launch(python_command((name, *arguments), ranks=0), os.environ).status)


def _numbers(_context: click.Context, parameter: click.Parameter, value: str | None) -> list[int]:
    try:
        found = [int(part) for part in value.split(",")] if value else []
    except ValueError as error:
        raise click.BadParameter(
            f"{value!r}: expected whole numbers, such as 1,2", param=parameter
        ) from error
    if len(set(found)) < len(found):
        raise click.BadParameter(f"{value!r}: names one twice; give each once", param=parameter)
    return found


@main.command()
@click.argument("recipe", type=FILE)
@click.option(
    "--seeds",
    type=click.IntRange(1),
    help="Fine-tuning seeds 1 to N of every method.  [default: the recipe's]",
)
@click.option(
    "--bases",
    callback=_numbers,
    metavar="SEED,...",
    help="Seeds of the data and the base model, with one run for each.  [default: the recipe's seed]",
)
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="KEY.PATH=VALUE",
    help="Change a value of the recipe, as in `ramoe run`.",
)
@click.option("--out", type=FOLDER, help="Folder of the runs and of the comparison.  [default: runs/NAME]")
@DOCUMENT
@click.option("--dry-run", is_flag=True, help="Only print what would run and why.")
def compare(
    recipe: Path,
    seeds: int | None,
    bases: list[int],
    changes: tuple[str, ...],
    out: Path | None,
    document: Path | None,
    dry_run: bool,
) -> None:
    """Compare a recipe's methods with sft, over seeds and base models.

    Writes comparison.json, comparison.html and experiment.md. All methods have the same data, seeds and
    layout, and the same number of steps unless a method changes it. A second call resumes where the first one
    stopped.
    """
    from ramoe_megatron.recipe.compare import compare_recipe
    from ramoe_megatron.recipe.stages import StageFailed

    try:
        compare_recipe(recipe, changes, seeds, bases, out, document, dry_run)
    except StageFailed as failure:
        click.secho(failure.text, fg="red", err=True)
        raise SystemExit(failure.status) from None


@main.command()
def methods() -> None:
    """List the methods.

    For each: what it trains, what it adds to the loss, its source, and our reading where the source is open.
    """
    from rich.table import Table

    from ramoe_megatron.recipe.methods import METHODS

    table = Table("method", "trains", "adds to the loss", "source", "our reading", show_lines=True)
    for name, entry in METHODS.items():
        table.add_row(
            name if entry.kind == "method" else f"{name} (control)",
            entry.trains,
            entry.adds,
            entry.source,
            entry.reading,
        )
    wide_console().print(table)


for _command in (*FILE_COMMANDS, models.convert, models.export):
    main.add_command(_command)
