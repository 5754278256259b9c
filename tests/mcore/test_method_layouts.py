"""All methods of one recipe on real Megatron: each stage's own command line, on one rank, under PP 2, and
under TP 2 x EP 2.

Beside them are runs that measure the unit of a coefficient, refresh the taxonomy, warm the coefficient up and
weigh the layers.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from method_rows import COMBINED, LAYOUTS, rows
from small_run import (
    ALONE,
    LAYERS,
    aligned_flags,
    alignment_flags,
    bases_argv,
    gradients,
    load_flags,
    outcome,
    run_table,
    training_flags,
    weights,
    write_world,
)  # fmt: skip

from ramoe_megatron.artifacts.records import read_divergence, read_taxonomy
from ramoe_megatron.mcore.cpu.backend import cpu_command_line
from ramoe_megatron.method.divergence import mean_curve
from ramoe_megatron.method.layer_weights import divergence_weights
from ramoe_megatron.recipe.methods import METHODS

TRAINED = [name for name, entry in METHODS.items() if not entry.steering]
STEERED = [name for name, entry in METHODS.items() if entry.steering]
FROZEN_ROUTERS = (
    "rise",
    "esft-gate",
    "esft-token",
    "aligned-experts",
)  # tests/mcore/test_selective.py looks at their experts
MADE = (
    "taxonomy.jsonl",
    "experts.safetensors",
    "divergence.csv",
    "priors.safetensors",
    "priors-all.safetensors",
)
SCRIPT = Path(__file__).parents[2] / "examples/pretrain_gpt.py"
PARITY = ("--ramoe-coeff", "1", "--ramoe-coeff-unit", "lm-loss", "--train-iters", "3")
REFRESH = ("--ramoe-refresh-interval", "2", "--ramoe-refresh-examples", "10", "--train-iters", "6")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    write_world(folder)
    run_table(1, [{"name": "base", "job": "finetune", "argv": bases_argv(folder)}], folder, "base")
    evaluated = [
        row
        for row in rows(folder, "one", "evaluate")
        if any(name in row["name"] for name in ("-sft-", "coeff-zero", "steering"))
    ]
    (folder / "run-one").mkdir()
    # a base model of four steps answers nothing: written by hand
    shutil.copy(folder / "taxonomy.jsonl", folder / "run-one")
    run_table(1, [*rows(folder, "one", "profile", "finetune"), *evaluated, *beside(folder)], folder)
    for layout in ("pp", "tp-ep"):
        (folder / f"run-{layout}").mkdir()
        for name in (*MADE, "usage.safetensors"):
            shutil.copy(folder / "run-one" / name, folder / f"run-{layout}" / name)
        table = [*rows(folder, layout, "finetune"), *steered(folder, layout)]
        if layout == "pp":
            stages = ("--pipeline-model-parallel-size", "2")
            table += [
                parity(folder, "parity-pp", *stages),
                refreshed(folder, "refresh-pp", *stages),
                refreshed(folder, "refresh-dp"),
            ]
        run_table(LAYOUTS[layout][0], table, folder, layout)
    return folder


def steered(folder: Path, layout: str) -> list[dict[str, Any]]:
    return [row for row in rows(folder, layout, "evaluate") if "steering" in row["name"]]


def beside(folder: Path) -> list[dict[str, Any]]:
    """Runs from the shared profile whose flags no method has."""
    made = folder / "run-one"
    (folder / "profile").symlink_to(made)
    curve = ["--ramoe-layer-weights", str(made / "divergence.csv")]
    schedule = ["--ramoe-coeff-warmup-iters", "2", "--ramoe-coeff-decay", "cosine", "--train-iters", "4"]
    table = {
        "refresh-resumed": resumed(folder, "refresh", 3, *REFRESH),
        "refresh-none": aligned_flags(folder, "--train-iters", "6"),
        "parity-resumed": resumed(folder, "parity", 2, *PARITY),
    }
    alone = {
        f"layer-{layer}": ["--ramoe-layers", f"{layer}-{layer}", "--train-iters", "1"] for layer in LAYERS
    }
    alone["scheduled"] = [*curve, *schedule]
    rows = [
        {"name": name, "job": "finetune", "argv": cpu_command_line(words)[0]} for name, words in table.items()
    ]
    rows += [
        {"name": name, "job": "finetune", "argv": alignment_alone(folder, *flags), "lm": 0}
        for name, flags in alone.items()
    ]
    script = {
        "name": "parity-script",
        "job": str(SCRIPT),
        "argv": cpu_command_line(aligned_flags(folder, *PARITY))[0],
    }
    return [refreshed(folder, "refresh"), parity(folder, "parity"), script, *rows]


def alignment_alone(folder: Path, *more: str) -> list[str]:
    """Alignment beside no other loss at the routers."""
    return training_flags(folder, *load_flags(folder), *alignment_flags(folder), *more, losses=ALONE)


def resumed(folder: Path, name: str, step: int, *more: str) -> list[str]:
    """The run of that name from its checkpoint at a step, saving nothing."""
    flags = [
        flag
        for flag in aligned_flags(folder)
        if flag not in ("--finetune", "--no-load-optim", "--no-load-rng")
    ]
    place = flags.index("--pretrained-checkpoint")
    return [
        *flags[:place],
        *flags[place + 2 :],
        "--load",
        str(folder / name),
        "--ckpt-step",
        str(step),
        *more,
    ]


def refreshed(folder: Path, name: str, *more: str) -> dict[str, Any]:
    flags = ["--save", str(folder / name), "--save-interval", "3", *REFRESH, *more]
    return {"name": name, "job": "finetune", "argv": cpu_command_line(aligned_flags(folder, *flags))[0]}


def parity(folder: Path, name: str, *more: str) -> dict[str, Any]:
    flags = [*PARITY, "--save", str(folder / name), "--save-interval", "2", *more]
    return {"name": name, "job": "finetune", "argv": cpu_command_line(aligned_flags(folder, *flags))[0]}


@pytest.mark.parametrize("layout", ["pp", "tp-ep"])
@pytest.mark.parametrize("method", [*TRAINED, COMBINED["name"]])
def test_each_method_gives_the_gradients_and_figures_of_one_rank(
    runs: Path, layout: str, method: str
) -> None:
    one, other = (outcome(runs, f"{name}-finetune-{method}-seed1")["first"] for name in ("one", layout))
    assert other == pytest.approx(one, rel=1e-4, abs=1e-6)
    expected, found = (gradients(runs, f"{name}-finetune-{method}-seed1") for name in ("one", layout))
    assert found.keys() == expected.keys()
    assert bool(expected) == (method not in FROZEN_ROUTERS)
    for layer, gradient in expected.items():
        assert (found[layer] - gradient).norm() <= 2e-5 * gradient.norm(), layer


@pytest.mark.parametrize("layout", ["pp", "tp-ep"])
@pytest.mark.parametrize("method", STEERED)
def test_steering_answers_as_on_one_rank(runs: Path, layout: str, method: str) -> None:
    one, other = ((runs / f"run-{name}/evaluations/{method}.jsonl").read_text() for name in ("one", layout))
    assert one == other


def test_coefficient_zero_ends_with_the_weights_of_sft(runs: Path) -> None:
    zero, sft, aligned = (
        weights(runs, f"one-finetune-{name}-seed1") for name in ("coeff-zero", "sft", "ra-moe")
    )
    assert zero.keys() == sft.keys()
    assert all(torch.equal(zero[name], weight) for name, weight in sft.items())
    assert any(not torch.equal(aligned[name], weight) for name, weight in sft.items())
    digests = {
        n: json.loads((runs / f"run-one/evaluations/{n}-seed1.json").read_text())["weights_sha256"]
        for n in ("coeff-zero", "sft")
    }
    assert digests["coeff-zero"] == digests["sft"]


def test_no_two_methods_train_the_same(runs: Path) -> None:
    ends = {
        method: weights(runs, f"one-finetune-{method}-seed1") for method in TRAINED if method != "coeff-zero"
    }
    names = [name for name in ends["sft"] if "router" in name or "experts" in name]
    for number, method in enumerate(ends):
        for other in list(ends)[:number]:
            assert any(not torch.equal(ends[method][name], ends[other][name]) for name in names), (
                method,
                other,
            )


def test_parity_makes_the_term_as_large_as_the_language_model_loss(runs: Path) -> None:
    measured, on_stages = (
        json.loads((runs / name / "ramoe-parity.json").read_text()) for name in ("parity", "parity-pp")
    )
    assert measured["iteration"] == 0
    assert measured["parity"] * outcome(runs, "parity")["first"]["routing_alignment_loss"] == pytest.approx(
        measured["lm_loss"], rel=1e-5
    )
    assert on_stages == pytest.approx(measured, rel=1e-5)
    assert 3 < measured["lm_loss"] < 7  # about log(384), of a model that knows little


def test_a_refresh_moves_examples_between_the_categories(runs: Path) -> None:
    files = sorted((runs / "refresh/ramoe-refresh").glob("*.jsonl"))
    assert [int(path.stem) for path in files] == [2, 4]
    before = {(row.id, row.language): row.category for row in read_taxonomy(runs / "taxonomy.jsonl")}
    refreshed = [row for path in files for row in read_taxonomy(path)]
    assert {row.language for row in refreshed} == {"es", "tr"}
    assert len({row.id for row in read_taxonomy(files[0])}) == 10
    assert any(before[row.id, row.language] != row.category for row in refreshed)
    plain, moved = weights(runs, "refresh-none"), weights(runs, "refresh")
    assert any(not torch.equal(moved[name], weight) for name, weight in plain.items())


@pytest.mark.parametrize("layout", ["pp", "dp"])
def test_two_ranks_refresh_alike(runs: Path, layout: str) -> None:
    for name in ("0000002.jsonl", "0000004.jsonl"):
        assert (runs / f"refresh-{layout}/ramoe-refresh" / name).read_text() == (
            runs / "refresh/ramoe-refresh" / name
        ).read_text()


def test_a_users_own_script_measures_the_same_unit(runs: Path) -> None:
    ours, script = weights(runs, "parity"), weights(runs, "parity-script")
    assert all(torch.equal(script[key], weight) for key, weight in ours.items())
    assert outcome(runs, "parity")["steps"] == outcome(runs, "parity-script")["steps"]


@pytest.mark.parametrize("name", ["refresh", "parity"])
def test_a_run_that_resumes_has_the_categories_and_the_unit_that_it_had(runs: Path, name: str) -> None:
    through, later = weights(runs, name), weights(runs, f"{name}-resumed")
    assert all(torch.equal(later[key], weight) for key, weight in through.items())
    assert outcome(runs, name)["figures"] == outcome(runs, f"{name}-resumed")["figures"]


def test_layer_weights_and_the_warm_up_scale_the_gradients_of_each_layers_loss(runs: Path) -> None:
    """Each aligned layer's loss also reaches earlier routers, so the law is for the sum over the layers."""
    curve = mean_curve(read_divergence(runs / "run-one/divergence.csv"))
    weight = dict(zip(LAYERS, divergence_weights(curve, tuple(LAYERS)).tolist(), strict=True))
    assert abs(weight[1] - weight[2]) > 0.1
    single = {layer: gradients(runs, f"layer-{layer}") for layer in LAYERS}
    for router, found in gradients(runs, "scheduled").items():
        # the first of two of warm-up
        expected = sum(weight[layer] * single[layer][router] for layer in LAYERS) / len(LAYERS) / 3
        assert (found - expected).norm() <= 1e-6 + 2e-5 * expected.norm(), router


def test_the_log_shows_the_coefficient_of_each_step(runs: Path) -> None:
    """20 times 1/3 and 2/3 of the warm-up, then half a cosine over two iterations: 1 and 1/2."""
    steps = [step["ramoe/coefficient"] for step in outcome(runs, "scheduled")["steps"]]
    assert steps == pytest.approx([20 / 3, 40 / 3, 20, 10], rel=1e-6)
    first, *later = (step["ramoe/coefficient"] for step in outcome(runs, "parity")["steps"])
    assert first == 0
    assert later == pytest.approx(
        [json.loads((runs / "parity/ramoe-parity.json").read_text())["parity"]] * 2, rel=1e-6
    )


def test_before_the_first_refresh_nothing_differs(runs: Path) -> None:
    plain, refreshed = (gradients(runs, name) for name in ("refresh-none", "refresh"))
    assert all(torch.equal(refreshed[layer], gradient) for layer, gradient in plain.items())
