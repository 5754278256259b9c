"""`ramoe doctor` of a recipe: files still to be written are no fault, equal findings are shown once."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from doctor_world import paths, ramoe, told, write
from small_run import model_flags

from ramoe_megatron.mcore.findings import Finding
from ramoe_megatron.recipe import doctor


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("doctor"))


def recipe(world: Path, folder: Path, **changes: Any) -> Path:
    model: dict[str, Any] = {}
    name = ""
    for word in model_flags(world):
        if word.startswith("--"):
            name, word = word.removeprefix("--"), True
        if not name.startswith("tokenizer"):
            model[name] = word
    train = {
        "train-iters": 4,
        "micro-batch-size": 2,
        "global-batch-size": 8,
        "lr": 1e-3,
        "eval-iters": 0,
        "eval-interval": 1000,
    }
    whole = {
        "name": "small",
        "model": model,
        "train": train,
        "pretrain": {"train-iters": 8},
        "data": {"world": {}},
        "alignment": {"coeff": 1},
        "methods": ["sft", "ra-moe"],
        "seeds": 2,
        **changes,
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(whole))
    return path


def test_a_recipe_whose_files_are_still_to_be_written_is_healthy(world: Path, tmp_path: Path) -> None:
    """Files of an earlier run are going to be replaced, so they are no fault either."""
    path, out = recipe(world, tmp_path), tmp_path / "run"
    out.mkdir()
    manifest = {
        "format": "ramoe-manifest",
        "version": 1,
        "recipe": "small",
        "megatron_flags": {},
        "stages": {},
    }
    (out / "manifest.json").write_text(json.dumps(manifest))
    for name in ("experts.safetensors", "divergence.csv"):
        (out / name).write_text("of another model")
    before = paths(tmp_path)
    result = ramoe(str(path), "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "fatal" not in result.output
    rows = {row.split("│")[1].strip(): row for row in result.output.splitlines() if row.startswith("│")}
    assert "written by stage data" in rows["tokenizer"]
    assert "written by stage profile" in rows["expert file"]
    assert paths(tmp_path) == before


def test_a_fault_of_one_stage_is_told_of_that_stage_and_no_other(world: Path, tmp_path: Path) -> None:
    methods = [
        "sft",
        {"name": "ra-moe", "train": {"lr": "fast"}},
        {"name": "long", "train": {"sequence-lenght": 3}},
    ]
    path = recipe(world, tmp_path, methods=methods, seeds=2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").write_text("no run folder")
    found = doctor.recipe_findings(path, ["train.global-batch-size=9"], tmp_path / "run", os.environ)
    flags = told(found, "flags")
    assert flags.state == "fatal"
    assert flags.found.splitlines() == [
        "finetune (2): argument --lr: invalid float value: 'fast' (`--help` lists the flags)",
        "finetune (2): unrecognized arguments: --sequence-lenght 3 (`--help` lists the flags)",
    ]
    assert "sequence-lenght" in told(found, "flag names").found
    assert "9 would have to be a multiple of" in told(found, "recipe").found
    assert "no run folder" in told(found, "run folder").found
    assert told(found, "layout").found.startswith("pretrain, finetune (2): --global-batch-size 9")
    assert told(found, "tokenizer").state == "ok"


def test_a_checkpoint_that_a_recipe_names_in_vain_is_fatal_and_no_usage_error(
    world: Path, tmp_path: Path
) -> None:
    path = recipe(world, tmp_path)
    found = doctor.recipe_findings(
        path, ["checkpoint=no/where", "pretrain=null"], tmp_path / "run", os.environ
    )
    assert "no Megatron checkpoint folder" in told(found, "recipe").found


def test_findings_of_stages_are_merged_into_a_line_a_check() -> None:
    ok, low, bad = (
        Finding("a", "ok", "fine"),
        Finding("a", "warning", "slow", "hurry"),
        Finding("a", "fatal", "gone", "look"),
    )
    assert doctor.merged_findings({"x/1": [ok], "x/2": [ok]}) == [ok]
    assert doctor.merged_findings({"x/1": [bad], "x/2": [bad]}) == [bad]
    assert doctor.merged_findings({"x/1": [ok], "y": [bad], "x/2": [bad]}) == [
        Finding("a", "fatal", "y, x/2: gone", "look")
    ]
    assert doctor.merged_findings({"x/1": [low], "y": [bad]}) == [
        Finding("a", "fatal", "x/1: slow\ny: gone", "look")
    ]
    waits = [Finding("a", "ok", f"written by stage finetune/{n}") for n in (1, 2)]
    assert (
        doctor.merged_findings({f"evaluate/{n}": [f] for n, f in enumerate(waits)})[0].found
        == "written by stage finetune (2)"
    )
    assert [doctor.healthy(f) for f in ([ok, low], [ok, bad])] == [True, False]


def test_space_is_reckoned_for_the_fine_tunes_to_come(world: Path, tmp_path: Path) -> None:
    from ramoe_megatron.recipe.load import load_recipe
    from ramoe_megatron.recipe.manifest import Manifest
    from ramoe_megatron.recipe.plan import make_plan

    base = tmp_path / "base"
    (base / "iter_0000003").mkdir(parents=True)
    (base / "iter_0000003" / "weights").write_bytes(bytes(1000))
    (base / "latest_checkpointed_iteration.txt").write_text("3")
    path = recipe(world, tmp_path, pretrain=None, checkpoint=str(base))
    plan = make_plan(load_recipe(path), tmp_path / "run", tmp_path)
    coming = doctor.coming_files(plan, Manifest(tmp_path / "run", "small"))
    assert doctor.expected_bytes(plan, coming) == 4 * 1000
    assert doctor.expected_bytes(plan, {stage.name: {} for stage in plan}) == 0
