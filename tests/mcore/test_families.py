"""A converted checkpoint of each family computes with Megatron what transformers computes, in any layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_models import computed, family_flags, write_checkpoint
from safetensors.torch import load_file
from small_run import ALONE, load_flags, outcome, run_table, write_world
from tiny_models import MODELS

from ramoe_megatron.models.convert import export, plan_export

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


def forward(folder: Path, name: str, layout: str, checkpoint: str) -> dict[str, Any]:
    """The row that computes the logits of a checkpoint in a layout: NAME-LAYOUT."""
    row = f"{name}-{layout}"
    flags = [*family_flags(folder, name), *LAYOUTS[layout.partition("-after")[0]][1]]
    files = ["--load", str(folder / checkpoint), "--ramoe-output", str(folder / row)]
    return {"name": row, "job": SCRIPT, "argv": [*flags, *files, "--ramoe-batch-tokens", "64"]}


def training(folder: Path, name: str, layout: str) -> dict[str, Any]:
    """The row that trains a family for three steps in a layout and saves to the folder NAME-LAYOUT-trained.

    --load is the folder of --save, as in a run that can resume.
    """
    row = f"{name}-{layout}-trained"
    steps = "--micro-batch-size 2 --global-batch-size 8 --train-iters 3 --lr 1e-3 --seed 7 --num-workers 0"
    unread = "--eval-iters 0 --eval-interval 1000 --log-interval 1 --distributed-timeout-minutes 3"
    saved = ["--save", str(folder / row), "--load", str(folder / row), "--save-interval", "3"]
    # no loss of Megatron's, whose value depends on how the batch is split
    flags = [*family_flags(folder, name), *LAYOUTS[layout][1], *ALONE, "--moe-aux-loss-coeff", "0"]
    start = [flag for flag in load_flags(folder, name) if flag != "--finetune"]
    data = ["--ramoe-data", str(folder / "parallel.jsonl")]
    argv = [*flags, *steps.split(), *unread.split(), *saved, *start, *data]
    return {"name": row, "job": "finetune", "argv": argv, "everything": True}


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest, families: tuple[Path, dict[str, Any]]) -> str:
    folder, _ = families
    table = [forward(folder, name, request.param, name) for name in MODELS]
    run_table(LAYOUTS[request.param][0], table, folder, request.param)
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
    assert worst < 1e-4


TRAINED = ("olmoe", "phimoe", "gpt-oss")
"""The families with modules of their own."""


@pytest.fixture(scope="module")
def trained(families: tuple[Path, dict[str, Any]]) -> Path:
    """Every family after three steps on one rank, and those with own modules in a layout of four ranks."""
    folder, _ = families
    table = [training(folder, name, "one") for name in MODELS]
    table += [forward(folder, name, "one-after", f"{name}-one-trained") for name in MODELS]
    run_table(1, table, folder, "trained")
    run_table(4, [training(folder, name, "tp-ep") for name in TRAINED], folder, "trained-4")
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_a_trained_model_is_exported_to_what_was_trained(name: str, trained: Path) -> None:
    checkpoint = trained / f"{name}-one-trained"
    assert len(outcome(trained, f"{name}-one-trained")["gradient_norms"]) == 3
    export(plan_export(checkpoint), trained / f"{name}-exported")
    model = transformers.AutoModelForCausalLM.from_pretrained(trained / f"{name}-exported").eval()
    model.set_attn_implementation("eager")
    found = load_file(trained / f"{name}-one-after/family.safetensors")
    for key, right in computed(model).items():
        torch.testing.assert_close(found[key].float(), right.float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_do_not_depend_on_the_layout(name: str, trained: Path) -> None:
    def whole(layout: str, ranks: int) -> dict[str, torch.Tensor]:
        files = [load_file(trained / f"{name}-{layout}-trained.{rank}.safetensors") for rank in range(ranks)]
        found = {}
        for key, own in files[0].items():
            if key.startswith("gradient.") and key.endswith(REPLICATED):
                found[key] = own
            elif key.startswith("gradient.") and key.endswith("output_layer.bias"):
                found[key] = torch.cat([file[key] for file in files[: min(ranks, 2)]])
        return found

    one, four = whole("one", 1), whole("tp-ep", 4)
    assert one.keys() == four.keys()
    assert len(one) >= 3 * len(REPLICATED[:1])
    for key, right in one.items():
        torch.testing.assert_close(four[key], right, atol=1e-5 * float(right.abs().max()), rtol=0)


REPLICATED = ("layernorm.weight", "layernorm.bias", "router.weight", "router.bias", "linear_proj.bias")
"""Ends of the names of weights that every tensor-parallel rank has whole."""
