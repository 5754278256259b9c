"""A converted checkpoint of each family computes with Megatron what transformers computes, in any layout."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import family_flags, write_checkpoint
from safetensors.torch import load_file
from small_run import outcome, run_table, write_world
from tiny_models import MODELS

SCRIPT = str(Path(__file__).parents[1] / "support/family_job.py")
TP = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "pp": (2, ("--pipeline-model-parallel-size", "2", "--decoder-first-pipeline-num-layers", "1")),
    "tp": (2, TP),
    "tp-ep": (4, (*TP, "--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1")),
}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("families")
    write_world(folder)
    return folder, {name: write_checkpoint(name, folder) for name in MODELS}


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest, families: tuple[Path, dict[str, Any]]) -> str:
    folder, _ = families
    ranks, flags = LAYOUTS[request.param]
    table = [
        {
            "name": f"{name}-{request.param}",
            "job": SCRIPT,
            "argv": [*family_flags(folder, name), *flags, "--load", str(folder / name), "--ramoe-batch-tokens",
                     "64", "--ramoe-output", str(folder / f"{name}-{request.param}")],
        }
        for name in MODELS
    ]  # fmt: skip
    run_table(ranks, table, folder, request.param)
    return request.param


@pytest.mark.parametrize("name", MODELS)
def test_computes_what_transformers_computes(
    name: str, layout: str, families: tuple[Path, dict[str, Any]]
) -> None:
    folder, expected = families
    outcome(folder, f"{name}-{layout}")
    found = load_file(folder / f"{name}-{layout}/family.safetensors")
    assert found.keys() == expected[name].keys()
    worst = 0.0
    for key, right in expected[name].items():
        if key.startswith("choice"):
            assert torch.equal(found[key], right), key
        elif key.startswith("weight"):
            torch.testing.assert_close(found[key], right, atol=1e-5, rtol=0)
        else:
            worst = max(worst, float((found[key] - right).abs().max() / right.std()))
            assert torch.equal(found[key].argmax(-1), right.argmax(-1)), key
    print(f"{name} {layout}: {worst:.1e}", file=sys.stderr)
    assert worst < 1e-4
