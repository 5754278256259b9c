"""`ramoe run`: run the stages of a recipe whose results are absent or out of date."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml
from rich.console import Console

from ramoe_megatron.artifacts.files import atomic_write_text
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.recipe import chain
from ramoe_megatron.recipe import megatron_flags as flags
from ramoe_megatron.recipe.digests import digest_value
from ramoe_megatron.recipe.launcher import Place, python_command
from ramoe_megatron.recipe.load import load_recipe, nearest
from ramoe_megatron.recipe.manifest import Manifest, locked
from ramoe_megatron.recipe.nodes import Leader, follow
from ramoe_megatron.recipe.plan import make_plan
from ramoe_megatron.recipe.processes import stop_signals
from ramoe_megatron.recipe.schema import Recipe
from ramoe_megatron.recipe.stage import Stage
from ramoe_megatron.recipe.stages import StageFailed, check_inputs, run_stages

LOCK_SECONDS = 2.0  # `ramoe status` holds the lock for a short time


def run_recipe(
    path: Path,
    changes: Sequence[str] = (),
    out: Path | None = None,
    first: str | None = None,
    last: str | None = None,
    dry_run: bool = False,
    console: Console | None = None,
) -> None:
    """Run a recipe's stages, or submit them when `launch.launcher` is slurm.

    Args:
        changes: changes to the recipe, as `--set` gives them.
        out: run folder. Default: runs/NAME.
        first: stage to begin with. It runs even if its result is up to date; the stages before it are left as
            they are.
        last: stage to end with. `first` and `last` name a stage ("finetune/sft-seed1") or a kind ("finetune":
            its first or last stage).
        dry_run: only print what would run.

    Raises:
        RamoeError: an error that the user can correct was found before anything started.
        StageFailed: a stage failed.
    """
    console = console or Console()
    recipe = load_recipe(path, changes)
    if recipe.tune is not None:
        raise RamoeError(
            f"{path}: the section tune is for `ramoe compare`; start that, or run the recipe's own settings "
            "with --set tune=null"
        )
    folder = (out or Path("runs") / recipe.name).resolve()
    submits = recipe.launch.launcher == "slurm"
    # The devices of a login node do not matter.
    flags.check_layout(recipe, None if submits else flags.cuda_devices(os.environ))
    plan = make_plan(recipe, folder, path.parent)
    begin, end = select_stages(plan, first, last)
    if submits:
        if dry_run:
            manifest = Manifest(folder, recipe.name)
            chain.tell(
                plan[begin:end],
                chain.links(plan[begin:end], manifest, first is not None),
                recipe,
                manifest,
                console,
            )
        else:
            _submit(recipe, path, plan, plan[begin:end], folder, first is not None, console)
        return
    place = Place.from_environment(recipe.launch.nodes, os.environ)
    if dry_run:
        _tell(plan[begin:end], Manifest(folder, recipe.name), first is not None, console, place)
        return
    with stop_signals():
        if place.node > 0:
            if status := follow(place, folder):
                raise StageFailed("unfinished: see node 0", status)
            return
        with locked(folder, patience=LOCK_SECONDS), Leader(place) as leader:
            manifest = Manifest(folder, recipe.name)
            chain.refuse_live(folder, manifest)
            chain.forget(folder)
            _prepare(recipe, path, plan, manifest)
            run_stages(
                plan, begin, end, manifest, console, first is not None, place, leader, recipe.launch.at_once
            )


def _submit(
    recipe: Recipe,
    path: Path,
    plan: Sequence[Stage],
    stages: Sequence[Stage],
    folder: Path,
    force: bool,
    console: Console,
) -> None:
    """Submit the stages as a chain of Slurm jobs."""
    with locked(folder, patience=LOCK_SECONDS):
        manifest = Manifest(folder, recipe.name)
        chain.refuse_live(folder, manifest)
        _prepare(recipe, path, plan, manifest)
        after = chain.links(stages, manifest, force)
        for stage in (stage for stage in stages if stage.name in after):
            check_inputs(stage, plan, manifest, made=[s for s in stages if s.name in after])
        chain.submit_chain(stages, after, recipe, manifest, console, stages[0].name if force else None)


def select_stages(plan: Sequence[Stage], first: str | None, last: str | None) -> tuple[int, int]:
    """[begin, end) of the stages to run. Raises RamoeError for a name that is neither a stage nor a kind."""
    begin = _places(plan, first)[0] if first else 0
    end = _places(plan, last)[-1] + 1 if last else len(plan)
    if begin >= end:
        raise RamoeError(
            f"--from {first} comes after --until {last}, so nothing is left to run: correct one of them"
        )
    return begin, end


def _places(plan: Sequence[Stage], name: str) -> list[int]:
    found = [place for place, stage in enumerate(plan) if name in (stage.name, stage.kind)]
    if not found:
        names = dict.fromkeys([stage.kind for stage in plan] + [stage.name for stage in plan])
        raise RamoeError(f"this recipe has no stage {name!r}{nearest(name, names)}")
    return found


def _prepare(recipe: Recipe, path: Path, plan: Iterable[Stage], manifest: Manifest) -> None:
    """Check Megatron's flags and prepare the run folder.

    Evaluations that the recipe no longer plans are moved aside; manifest.json and the resolved recipe.yaml
    are written.
    """
    names = digest_value({key: sorted(group) for key, group in flags.sections(recipe).items()})
    if manifest.flags != {"checked": names, "megatron": _megatron_version()}:
        flags.check_names(recipe, str(path), flags.megatron_flags())
        manifest.flags = {"checked": names, "megatron": _megatron_version()}
    planned = {stage.name for stage in plan}
    for name in [name for name in manifest.stages if name not in planned and name.startswith("evaluate/")]:
        # results.json is made of all files in evaluations/, so only this recipe's may remain there.
        manifest.supersede(tuple(manifest.folder / output for output in manifest.stages[name].outputs), name)
        del manifest.stages[name]
    manifest.write()
    resolved = yaml.safe_dump(
        recipe.model_dump(by_alias=True, exclude_none=True), sort_keys=False, allow_unicode=True
    )
    atomic_write_text(
        manifest.folder / "recipe.yaml",
        f"# Written by `ramoe run {path}`: the recipe with every default and --set.\n{resolved}",
    )


def _megatron_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("megatron-core")


def _tell(
    stages: Sequence[Stage], manifest: Manifest, force_first: bool, console: Console, place: Place
) -> None:
    """The dry run: print each stage, whether and why it would run, and its command line."""
    import shlex

    pending: dict[Path, str] = {}
    for number, stage in enumerate(stages):
        reason = manifest.reason_to_run(stage)
        if force_first and number == 0:
            reason = reason or "asked for by --from"
        upstream = sorted({pending[path] for path in stage.inputs if path in pending})
        if reason is None and upstream:
            reason = f"if {', '.join(upstream)} gives another result"
        pending |= {path: stage.name for path in stage.outputs} if reason else {}
        console.print(f"[bold]{stage.name}[/bold]: {reason or 'up to date'}", soft_wrap=True, highlight=False)
        if reason:
            command = shlex.join(python_command(stage.arguments(), stage.ranks, place))
            console.print(f"  {command}", soft_wrap=True, highlight=False, markup=False)
