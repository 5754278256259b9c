"""The `ramoe` command: its errors, its dry run, and the cost of `--help`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from ramoe_megatron.artifacts.files import save_document
from ramoe_megatron.cli import main

RECIPE: dict[str, Any] = {
    "name": "small",
    "model": {"num-layers": 2, "num-experts": 4},
    "train": {"train-iters": 4, "micro-batch-size": 2, "global-batch-size": 8},
    "pretrain": {"train-iters": 8},
    "data": {"world": {}},
    "methods": ["sft"],
}


def ramoe(*words: str) -> Result:
    return CliRunner().invoke(main, words)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def test_help_imports_neither_torch_nor_megatron() -> None:
    code = """
import sys
from click.testing import CliRunner
from ramoe_megatron.cli import main
for words in ("", "run", "finetune", "doctor", "anchors"):
    assert CliRunner().invoke(main, [*words.split(), "--help"]).exit_code == 0
heavy = ("torch", "megatron", "datasets", "pydantic", "scipy", "numpy", "rich")
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_the_checkpoint_writer_imports_again_is_light() -> None:
    code = (
        "import sys, ramoe_megatron.jobs.finetune; "
        "print([name for name in ('torch', 'megatron', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_error_is_a_text_on_stderr_and_status_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ramoe_megatron.cli", "run", "absent.yaml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("ramoe: error: absent.yaml: the recipe cannot be read")
    assert "Traceback" not in done.stderr


def test_a_dry_run_tells_each_stage_and_leaves_no_trace(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = ramoe(
        "run", str(recipe), "--out", str(out), "--dry-run", "--set", "seeds=2", "--until", "finetune"
    )
    assert result.exit_code == 0, result.output
    told = [line.split(":")[0] for line in result.output.splitlines() if not line.startswith(" ")]
    offline = ["data", "pretrain", "taxonomy", "profile", "evaluate/base", "predict"]
    assert told == [*offline, "finetune/sft-seed1", "finetune/sft-seed2"]
    assert "-m ramoe_megatron.jobs.finetune" in result.output
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--set", "trian.lr=1"], "trian is no key of a recipe; did you mean train?"),
        (["--set", "nothing"], "expected key.path=value"),
        (["--from", "finetuning"], "no stage 'finetuning'; did you mean finetune?"),
        (["--set", "launch.ranks-per-node=3"], "use fewer ranks"),
        (["--set", "checkpoint=no/where", "--set", "pretrain=null"], "no Megatron checkpoint folder"),
        (["--set", "methods=[ra-moe]"], "needs a coefficient"),
        (["--set", "launch.nodes=2"], "the environment does not say which one this is"),
    ],
)
def test_what_cannot_run_is_told_before_anything_starts(
    recipe: Path, tmp_path: Path, words: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NODE_RANK", "SLURM_NODEID", "GROUP_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    result = ramoe("run", str(recipe), "--out", str(tmp_path / "out"), *words)
    assert result.exit_code == 2
    assert told in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_folder_of_another_recipe_is_refused(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    manifest = {"format": "ramoe-manifest", "version": 1, "recipe": "big", "megatron_flags": {}, "stages": {}}
    (out / "manifest.json").write_text(json.dumps(manifest))
    result = ramoe("run", str(recipe), "--out", str(out))
    assert result.exit_code == 2
    assert "holds the results of the recipe 'big', not of 'small'" in result.stderr


def test_a_run_checks_flags_once_resolves_the_recipe_and_moves_foreign_evaluations_aside(
    recipe: Path, tmp_path: Path
) -> None:
    """Runs Megatron's parser, and builds a small world in the data stage."""
    out = tmp_path / "out"
    words = [
        "run",
        str(recipe),
        "--out",
        str(out),
        "--until",
        "data",
        "--set",
        "data.world={max-tokens: 60, vocab-size: 1200}",
    ]
    first = ramoe(*words)
    assert first.exit_code == 0, first.output
    assert "data runs (not run yet)" in first.output
    resolved = yaml.safe_load((out / "recipe.yaml").read_text())
    assert resolved["data"]["world"] == {"max-tokens": 60, "vocab-size": 1200}

    manifest = json.loads((out / "manifest.json").read_text())
    gone = {**manifest["stages"]["data"], "outputs": {"evaluations/gone-seed1.json": "0"}}
    manifest["stages"]["evaluate/gone-seed1"] = gone
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "evaluations").mkdir()
    (out / "evaluations" / "gone-seed1.json").write_text("{}")
    again = ramoe("run", str(out / "recipe.yaml"), "--out", str(out), "--until", "data")
    assert again.exit_code == 0, again.output
    assert "data is up to date" in again.output, "the resolved recipe is the same recipe"
    assert not list((out / "evaluations").iterdir())
    assert len(list((out / "superseded").rglob("gone-seed1.json"))) == 1


def test_jobs_get_their_flags_as_given() -> None:
    flags = ["--num-layers", "2", "--lr", "-1", "--bf16", "--ramoe-data", "a", "b"]
    job = main.commands["finetune"]
    for words in (["--ranks", "2", *flags], [*flags, "--ranks", "2"]):
        found = job.make_context("finetune", words).params
        assert (found["ranks"], found["nodes"], list(found["flags"])) == (2, 1, flags)


def test_a_jobs_refusal_and_status_come_through() -> None:
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "ramoe_megatron.cli",
            "sib200",
            "--out",
            "x",
            "--config",
            '{"no_such_key": 1}',
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "no_such_key" in result.stderr
    assert "Traceback" not in result.stderr


def test_data_lists_benchmarks_and_writes_one_without_replacing_a_file(tmp_path: Path) -> None:
    listed = ramoe("data", "--list")
    assert "2210.03057" in listed.output
    for code in ("en", "sw"):
        (tmp_path / f"mgsm_{code}.tsv").write_text("".join(f"{code} {n}?\t{n}\n" for n in range(8)))
    out = tmp_path / "rows.jsonl"
    words = ["data", "mgsm", "--source", str(tmp_path), "--out", str(out)]
    made = ramoe(*words, "--languages", "Swahili,en", "--splits", "train=0.5", "--shots", "2", "--chat")
    assert made.exit_code == 0, made.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [len(row["messages"]) for row in rows] == [6] * 16
    assert {row["language"] for row in rows} == {"Swahili", "en"}
    options = json.loads((tmp_path / "rows.json").read_text())["benchmarks"][0]["options"]
    assert (options["shots"], options["splits"]) == (2, {"train": 0.5})
    for more, told in (
        ([], "rows.jsonl exists"),
        (["--replace", "--splits", "train"], "expected SPLIT=SHARE"),
        (["--replace", "--languages", "fi"], "'fi'"),
    ):
        refused = ramoe(*words, *more)
        assert refused.exit_code == 2
        assert told in refused.stderr
    assert "--source" in ramoe("data", "mgsm").stderr
    assert len(out.read_text().splitlines()) == 16
    assert ramoe(*words, "--replace").exit_code == 0


def test_predict_shows_the_table_and_its_reading(tmp_path: Path) -> None:
    row = {
        "task": "currency",
        "language": "sw",
        "n": 40,
        "ci_share": 0.25,
        "ci_low": 0.125,
        "ci_high": 0.5,
        "divergence": 0.0625,
        "target_accuracy": 0.5,
        "transplant_accuracy": 0.625,
        "transplant_change": 0.125,
        "transplant_low": -0.0625,
        "transplant_high": None,
    }
    body = {
        "rows": [row],
        "verdict": {"reading": "The transplant test was not run."},
        "limits": ["a correlation, not a slope"],
    }
    save_document(tmp_path / "predict.json", "ramoe-prediction", body)
    result = ramoe("predict", str(tmp_path))
    assert result.exit_code == 0, result.output
    for text in ("25.0", "0.062", "+12.5", "was not run", "a correlation, not a slope"):
        assert text in result.output
    (tmp_path / "predict.json").unlink()
    refused = ramoe("predict", str(tmp_path))
    assert refused.exit_code == 2
    assert "--until predict" in refused.stderr
