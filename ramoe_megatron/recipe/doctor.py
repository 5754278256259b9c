"""`ramoe doctor`: find what would stop a job or a recipe. It starts nothing and leaves no files behind."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from ramoe_megatron.artifacts.checkpoints import TRACKER, latest_checkpoint
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.findings import ANSWER, STATES, WRITTEN, Finding, Line, attempt, reason
from ramoe_megatron.recipe import megatron_flags as flags
from ramoe_megatron.recipe.doctor_environment import environment_findings
from ramoe_megatron.recipe.launcher import rank_environment
from ramoe_megatron.recipe.load import load_recipe
from ramoe_megatron.recipe.manifest import Manifest, locked
from ramoe_megatron.recipe.plan import make_plan
from ramoe_megatron.recipe.stage import JOBS, Stage

JOB_NAMES = ("taxonomy", "profile", "finetune", "evaluate", "steer", "predict")
_COLOURS = {"ok": "green", "warning": "yellow", "fatal": "bold red"}


def job_findings(
    job: str, words: Sequence[str], ranks: int, nodes: int, environment: Mapping[str, str]
) -> list[Finding]:
    """Findings about this node and a job's command line.

    Args:
        words: the flags of the job, Megatron's and ours.
        ranks: ranks per node.
        environment: variables, as `os.environ` holds them.
    """
    folder = _value(words, "save" if job == "finetune" else "ramoe-output")
    local = _value(words, "transformer-impl") == "local"
    found = environment_findings(ranks, nodes, Path(folder) if folder else None, environment, local)
    _, answers = ask([Line(job, job, list(words), ranks, nodes)], environment)
    return found + answers[job]


def recipe_findings(
    path: Path, changes: Sequence[str], out: Path | None, environment: Mapping[str, str]
) -> list[Finding]:
    """Findings about this node and the stages of a recipe.

    Files that an earlier stage will write may be missing.

    Args:
        changes, out: arguments of `ramoe run`.
        environment: variables, as `os.environ` holds them.

    Raises:
        RamoeError: the recipe cannot be read, or is invalid.
    """
    recipe = load_recipe(path, changes)
    folder = (out or Path("runs") / recipe.name).resolve()
    try:
        plan, fault = make_plan(recipe, folder, path.parent), None
    except RamoeError as error:
        plan, fault = [], Finding("recipe", "fatal", reason(error), "correct the recipe")
    coming: dict[str, dict[str, str]] = {}
    try:
        coming = coming_files(plan, Manifest(folder, recipe.name))
        # without the file no run holds the lock, and `locked` would create the file
        if (folder / ".lock").is_file():
            with locked(folder):
                pass
        held = Finding("run folder", "ok", "goes on" if (folder / "manifest.json").is_file() else "new")
    except (RamoeError, OSError) as error:
        held = Finding("run folder", "fatal", reason(error), "give another --out")
        coming = {stage.name: _outputs(plan[:place]) for place, stage in enumerate(plan)}
    ranks = max([recipe.launch.ranks_per_node, *recipe.launch.ranks.values()])
    nodes = recipe.launch.nodes
    submits = recipe.launch.launcher == "slurm" and "SLURM_JOB_ID" not in environment
    # a node that only submits needs no devices
    here = (0, 1) if submits else (ranks, nodes)
    local = {**recipe.model, **recipe.train, **recipe.parallel}.get("transformer-impl") == "local"
    found = [*environment_findings(*here, folder, environment, local, expected_bytes(plan, coming)), held]

    def layout() -> str:
        flags.check_layout(recipe, None)  # the environment findings cover the devices
        return f"{nodes} x {ranks} ranks"

    found.append(fault or attempt("recipe", layout, "change launch, parallel or the batch sizes"))
    lines = [
        Line(
            stage.name,
            stage.command[0].removeprefix(f"{JOBS}."),
            stage.arguments()[1:],
            stage.ranks,
            stage.nodes,
            coming[stage.name],
        )
        for stage in plan
        if stage.ranks
    ]
    known, answers = ask(lines, environment)

    def names() -> str:
        flags.check_names(recipe, str(path), known)
        return "Megatron has them all"

    if known:
        found.append(attempt("flag names", names, "correct the name"))
    return found + merged_findings(answers)


def coming_files(plan: Sequence[Stage], manifest: Manifest) -> dict[str, dict[str, str]]:
    """For each stage: the files that earlier stages will write or overwrite -> name of the writing stage."""
    found: dict[str, dict[str, str]] = {}
    coming: dict[str, str] = {}
    for stage in plan:
        found[stage.name] = dict(coming)
        if any(str(path) in coming for path in stage.inputs) or manifest.reason_to_run(stage):
            coming |= _outputs([stage])
    return found


def _outputs(stages: Sequence[Stage]) -> dict[str, str]:
    return {str(path): stage.name for stage in stages for path in (*stage.outputs, *stage.traces)}


def expected_bytes(plan: Sequence[Stage], coming: Mapping[str, Mapping[str, str]]) -> int:
    """Estimate of the bytes that the fine-tunes to run will save: one copy of the base checkpoint each.

    0 if the base checkpoint does not exist yet.
    """
    report = plan[-1].name if plan else ""
    running = [
        stage for stage in plan if stage.kind == "finetune" and stage.name in coming.get(report, {}).values()
    ]
    base = Path((running and _value(running[0].command, "pretrained-checkpoint")) or "")
    if not running or not (base / TRACKER).is_file():
        return 0
    _, folder = latest_checkpoint(base)
    return len(running) * sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def ask(lines: Sequence[Line], environment: Mapping[str, str]) -> tuple[list[str], dict[str, list[Finding]]]:
    """Check command lines in one process, because Megatron is slow to import.

    Returns:
        All known flags, and the findings by name of the line.
    """
    if not lines:
        return [], {}
    done = subprocess.run(
        [sys.executable, "-m", f"{JOBS}.check"],
        input=json.dumps([asdict(line) for line in lines]),
        env=rank_environment(1, environment),
        capture_output=True,
        text=True,
        check=False,
    )
    for text in done.stdout.splitlines():
        if text.startswith(ANSWER):
            answer = json.loads(text.removeprefix(ANSWER))
            return answer["flags"], {
                name: [Finding(**f) for f in found] for name, found in answer["findings"].items()
            }
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    fault = Finding(
        "Megatron", "fatal", f"cannot be run: {last}", "check the installation of megatron-core and torch"
    )
    return [], {line.name: [fault] for line in lines}


def merged_findings(answers: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    """Merge the findings of all stages into one finding per check.

    The merged finding has the worst state. It names the stages if their findings differ.
    """
    checks: dict[str, dict[str, Finding]] = {}
    for stage, findings in answers.items():
        for finding in findings:
            checks.setdefault(finding.check, {})[stage] = finding
    return [_merge(check, by_stage) for check, by_stage in checks.items()]


def _merge(check: str, by_stage: Mapping[str, Finding]) -> Finding:
    worst = max((finding.state for finding in by_stage.values()), key=STATES.index)
    texts: dict[str, list[str]] = {}
    makers: dict[str, None] = {}
    for stage, finding in by_stage.items():
        if worst != "ok" and finding.state == "ok":
            continue
        text = finding.found
        if text.startswith(WRITTEN):  # one line for all: each evaluation reads another fine-tune
            makers |= dict.fromkeys(text.removeprefix(WRITTEN).split(", "))
            text = WRITTEN
        texts.setdefault(text, []).append(stage)
    if WRITTEN in texts:
        texts = {
            f"{WRITTEN}{_names(list(makers))}" if text == WRITTEN else text: stages
            for text, stages in texts.items()
        }
    everywhere = len(texts) == 1 and len(next(iter(texts.values()))) == len(by_stage)
    found = "\n".join(text if everywhere else f"{_names(stages)}: {text}" for text, stages in texts.items())
    advice = dict.fromkeys(
        finding.advice for finding in by_stage.values() if finding.state == worst and finding.advice
    )
    return Finding(check, worst, found, "; ".join(advice))


def _names(stages: Sequence[str]) -> str:
    kinds: dict[str, list[str]] = {}
    for stage in stages:
        kinds.setdefault(stage.partition("/")[0], []).append(stage)
    return ", ".join(
        names[0] if len(names) == 1 else f"{kind} ({len(names)})" for kind, names in kinds.items()
    )


def _value(words: Sequence[str], name: str) -> str | None:
    """The last value of a flag on a command line."""
    found = None
    for place, word in enumerate(words):
        if word.startswith(f"--{name}="):
            found = word.partition("=")[2]
        elif word == f"--{name}" and place + 1 < len(words):
            found = words[place + 1]
    return found


def findings_table(findings: Sequence[Finding]) -> Table:
    """A table of the findings, one row each."""
    shown = Table("check", "state", "found", "what to do")
    for finding in findings:
        state = f"[{_COLOURS[finding.state]}]{finding.state}[/]"
        shown.add_row(escape(finding.check), state, escape(finding.found), escape(finding.advice))
    return shown


def healthy(findings: Sequence[Finding]) -> bool:
    """Whether no finding is fatal."""
    return all(finding.state != "fatal" for finding in findings)
