"""Laws of the jobs on real Megatron, over gloo ranks started twice: one rank, then two.

The scale chain that the gradient laws check. A rank attaches coeff / Z * sum_i w_i u_i D_i to each aligned layer of a micro-batch, with
u_i = 1 / B, or the sample's loss tokens n_i under per-token loss. Megatron's `MoEAuxLossAutoScaler` multiplies its gradient by
grad_scale * cp / micro-batches (per-token: grad_scale). Sequence-parallel pieces of the router's gradient are summed over TP; DDP
averages over DP x CP (per-token: sums); `finalize_model_grads` divides by the loss tokens of the global batch under per-token loss. What
is left is coeff / Z / N * sum over the N samples of the global batch, or the same weighted by n_i / sum n.

Not covered here: context parallelism, virtual pipelining, HybridModel, packed sequences, reduced precision.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_run import (
    LANGUAGES,
    LAYERS,
    SAMPLES,
    aligned_flags,
    load_flags,
    offline_flags,
    profile_flags,
    run_table,
    training_flags,
    write_world,
)

from ramoe_megatron.data.parallel import load_examples
from ramoe_megatron.data.sampler import order
from ramoe_megatron.method.artefacts import ExpertFile, Priors, read_divergence, read_taxonomy

TP, PP = ("--tensor-model-parallel-size", "2", "--sequence-parallel"), ("--pipeline-model-parallel-size", "2")
EP, FULL = ("--expert-model-parallel-size", "2"), ("--recompute-granularity", "full", "--recompute-method", "uniform")
FULL = (*FULL, "--recompute-num-layers", "1")
SELECTIVE = ("--recompute-granularity", "selective", "--recompute-modules", "moe")
PER_TOKEN = ("--calculate-per-token-loss",)
BARE = ("--moe-router-load-balancing-type", "none")  # Megatron's own loss is not linear in the micro-batch
PROFILE_TARGET = ("--ramoe-target", "profile")
HERE = Path(__file__).parent

ONE_RANK: dict[str, tuple[str, ...]] = {
    "one": (),
    "one-bare": BARE,
    "one-micro1": (*BARE, "--micro-batch-size", "1"),
    "one-micro16": (*BARE, "--micro-batch-size", "16"),
    "one-full": FULL,
    "one-selective": SELECTIVE,
    "one-tokens": PER_TOKEN,
    "one-bare-tokens": (*BARE, *PER_TOKEN),
    "one-tokens-micro1": (*BARE, *PER_TOKEN, "--micro-batch-size", "1"),
    "one-ci": ("--ramoe-normalize", "ci"),
    "one-ci-tokens": ("--ramoe-normalize", "ci", *PER_TOKEN),
    "one-all": ("--ramoe-examples", "all"),
    "one-profile": PROFILE_TARGET,
    "one-kl": (*PROFILE_TARGET, "--ramoe-divergence", "kl", "--ramoe-tokens", "prompt", "--ramoe-examples", "ci+cc"),
    "one-js": (*PROFILE_TARGET, "--ramoe-divergence", "js", "--ramoe-tokens", "response"),
    "one-mass": (*PROFILE_TARGET, "--ramoe-divergence", "mass", "--ramoe-tokens", "all"),
}
TWO_RANKS: dict[str, tuple[str, ...]] = {
    "dp": (),
    "tp": TP,
    "ep": EP,
    "pp": PP,
    "dp-full": FULL,
    "pp-full": (*PP, *FULL),
    "pp-selective": (*PP, *SELECTIVE),
    "dp-tokens": PER_TOKEN,
    "tp-tokens": (*TP, *PER_TOKEN),
    "pp-tokens": (*PP, *PER_TOKEN),
    "tp-prompt": (*TP, *ONE_RANK["one-kl"]),
    "tp-token-pooling": (*TP, "--ramoe-pooling", "token", "--ramoe-tokens", "prompt", *PROFILE_TARGET),
    "dp-token-pooling": ("--ramoe-pooling", "token", "--ramoe-tokens", "prompt", *PROFILE_TARGET),
}
SAME_AS = {
    **{name: "one" for name in ("one-full", "one-selective", "dp", "tp", "ep", "pp")},
    **{name: "one" for name in ("dp-full", "pp-full", "pp-selective")},
    **{name: "one-bare" for name in ("one-micro1", "one-micro16")},
    "one-tokens-micro1": "one-bare-tokens",
    **{name: "one-tokens" for name in ("dp-tokens", "tp-tokens", "pp-tokens")},
    "tp-prompt": "one-kl",
    "tp-token-pooling": "dp-token-pooling",
}

@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    train = training_flags(folder, "--train-iters", "4", "--save", str(folder / "base"), "--save-interval", "4")
    stock = [*load_flags(folder), "--train-iters", "3"]
    reference = str(HERE / "reference_job.py")
    run_table(
        1,
        [
            {"name": "base", "job": "finetune", "argv": train},
            {"name": "taxonomy", "job": "taxonomy", "argv": offline_flags(folder, "taxonomy", "--ramoe-split", "train,test")},
            {"name": "profile", "job": "profile", "argv": profile_flags(folder, "profile")},
            {"name": "reference", "job": reference, "argv": offline_flags(folder, "reference")},
            *({"name": n, "job": "finetune", "argv": aligned_flags(folder, *more)} for n, more in ONE_RANK.items()),
            {"name": "script", "job": str(HERE.parent / "examples/pretrain_gpt.py"), "argv": aligned_flags(folder)},
            {"name": "stock", "job": str(HERE / "stock_gpt.py"), "argv": training_flags(folder, *stock)},
            {"name": "off", "job": "finetune", "argv": training_flags(folder, *stock)},
            {"name": "off-flags", "job": "finetune", "argv": aligned_flags(folder, "--ramoe-coeff", "0", "--train-iters", "3")},
            {"name": "evaluate", "job": "evaluate", "argv": _evaluate(folder)},
            {"name": "predict", "job": "predict", "argv": _predict(folder)},
            {"name": "other-model", "job": "finetune", "argv": aligned_flags(folder, "--num-experts", "4", *_from_scratch())},
            {"name": "bad-layers", "job": "finetune", "argv": aligned_flags(folder, "--ramoe-layers", "2-9")},
            {"name": "bad-tokens", "job": "finetune", "argv": aligned_flags(folder, "--ramoe-tokens", "all")},
            {"name": "absent", "job": "taxonomy", "argv": [*offline_flags(folder, "x"), "--load", str(folder / "nowhere")]},
            {"name": "other-shape", "job": "taxonomy", "argv": [*offline_flags(folder, "x"), "--hidden-size", "64"]},
            {"name": "absent-base", "job": "finetune", "argv": training_flags(folder, "--pretrained-checkpoint", str(folder / "nowhere"))},
        ],
        folder,
    )
    run_table(
        2,
        [
            *({"name": n, "job": "finetune", "argv": aligned_flags(folder, *more)} for n, more in TWO_RANKS.items()),
            *(
                {"name": f"{job}-{layout}", "job": job_path, "argv": make(folder, f"{job}-{layout}", *flags)}
                for layout, flags in (("tp", TP), ("pp", PP), ("ep", EP))
                for job, job_path, make in (("profile", "profile", profile_flags), ("reference", reference, offline_flags))
            ),
        ],
        folder,
    )
    return folder


def _from_scratch() -> tuple[str, ...]:
    return ("--pretrained-checkpoint", "", "--train-iters", "1")


def _evaluate(folder: Path) -> list[str]:
    experts = str(folder / "profile/experts.safetensors")
    return offline_flags(folder, "evaluations", "--ramoe-split", "test", "--ramoe-experts", experts, "--ramoe-method", "base")


def _predict(folder: Path) -> list[str]:
    profile = folder / "profile"
    files = ["--ramoe-experts", str(profile / "experts.safetensors"), "--ramoe-divergence-file", str(profile / "divergence.csv")]
    files += ["--ramoe-taxonomy", str(folder / "taxonomy.jsonl"), "--ramoe-layers", "1-2", "--ramoe-split", "test"]
    return offline_flags(folder, "predict", *files)


def outcome(folder: Path, name: str) -> dict[str, Any]:
    result = json.loads((folder / f"{name}.json").read_text())
    assert "error" not in result, result
    return result


def gradients(folder: Path, name: str) -> dict[int, torch.Tensor]:
    """Router gradient of each layer; every rank that holds a layer must have the same one."""
    found: dict[int, torch.Tensor] = {}
    for path in sorted(folder.glob(f"{name}.[0-9].safetensors")):
        for key, tensor in load_file(path).items():
            if key.startswith("grad."):
                layer = int(key.removeprefix("grad."))
                torch.testing.assert_close(tensor, found.setdefault(layer, tensor), rtol=0, atol=0)
    return found


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / f"{name}.0.safetensors")
    return {key: tensor for key, tensor in tensors.items() if key.startswith("weight.")}


@pytest.mark.parametrize("name", SAME_AS)
def test_one_coefficient_means_the_same_in_every_layout(world: Path, name: str) -> None:
    expected, found = gradients(world, SAME_AS[name]), gradients(world, name)
    assert sorted(found) == sorted(expected) == [1, 2, 3, 4]
    for layer, gradient in expected.items():
        error = (found[layer] - gradient).norm() / gradient.norm()
        assert error < 1e-5, f"layer {layer}: relative error {error}"
    logged = outcome(world, name)["first"]
    for figure, value in outcome(world, SAME_AS[name])["first"].items():
        assert logged[figure] == pytest.approx(value, rel=1e-5, abs=1e-9), figure


def test_the_alignment_moves_the_gradient(world: Path) -> None:
    """The comparison above would be empty if the loss did not reach the routers, or reached other layers."""
    aligned, plain = gradients(world, "one"), gradients(world, "off")
    for layer in (1, 2, 3, 4):
        change = (aligned[layer] - plain[layer]).norm() / plain[layer].norm()
        # MoE layers 1 and 2 (Megatron's 2 and 3) are aligned; what lies before them gets a gradient through them
        assert change > 1e-2 if layer in (2, 3) else (change > 0) == (layer == 1)


def reference_loss(folder: Path, name: str, divergence: Any, tokens: str, target: str, chosen: set[str], **how: bool) -> float:
    """The logged value of the first step, by hand in float64 from the routing of each example."""
    examples = load_examples([str(folder / "parallel.jsonl")], split="train")
    found = load_file(folder / "reference/reference.safetensors")
    experts, priors = (
        ExpertFile.load(folder / "profile/experts.safetensors"),
        Priors.load(folder / "profile/priors.safetensors"),
    )
    category = {(row.id, row.language): row.category for row in read_taxonomy(folder / "taxonomy.jsonl")}
    total = unit_total = aligned_total = 0.0
    for index in order(examples, 2 * SAMPLES, 7)[:SAMPLES]:
        example = examples[index]
        unit = float(found["loss_tokens"][index]) if how.get("per_token") else 1.0
        unit_total += unit
        if category.get((example.id, example.language)) not in chosen:
            continue
        aligned_total += unit
        task = experts.tasks.index(example.task)
        q_en = priors.rows([example.id])[0] if target == "example" else experts.english_pattern[tokens][task]
        for layer in LAYERS:
            p = q_en[layer].double().numpy()
            q = found[f"pooled.{tokens}"][index, layer].double().numpy()
            total += unit * divergence(p, q, experts.expert_mask[task, layer].numpy()) / len(LAYERS)
    return total / (aligned_total if how.get("by_aligned") else unit_total)


def kl(p: np.ndarray, q: np.ndarray, _: Any = None) -> float:
    return float((p * np.log(p / q)).sum())


def lump(p: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.append(p[mask], p[~mask].sum())


def two(p: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.array([p[mask].sum(), p[~mask].sum()])


BY_HAND = {
    "lumped-kl": lambda p, q, mask: kl(lump(p, mask), lump(q, mask)),
    "mass": lambda p, q, mask: kl(two(p, mask), two(q, mask)),
    "kl": kl,
    "js": lambda p, q, _: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
}


@pytest.mark.parametrize(
    ("name", "divergence", "tokens", "target", "chosen", "how"),
    [
        ("one", "lumped-kl", "last", "example", {"ci"}, {}),
        ("one-tokens", "lumped-kl", "last", "example", {"ci"}, {"per_token": True}),
        ("one-ci", "lumped-kl", "last", "example", {"ci"}, {"by_aligned": True}),
        ("one-ci-tokens", "lumped-kl", "last", "example", {"ci"}, {"by_aligned": True, "per_token": True}),
        ("one-all", "lumped-kl", "last", "example", {"cc", "ci", "ic", "ii"}, {}),
        ("one-profile", "lumped-kl", "last", "profile", {"ci"}, {}),
        ("one-kl", "kl", "prompt", "profile", {"ci", "cc"}, {}),
        ("one-js", "js", "response", "profile", {"ci"}, {}),
        ("one-mass", "mass", "all", "profile", {"ci"}, {}),
    ],
)
def test_the_logged_loss_is_the_formula(
    world: Path, name: str, divergence: str, tokens: str, target: str, chosen: set[str], how: dict[str, bool]
) -> None:
    first_step = json.loads((world / f"{name}.json").read_text())["first"]
    expected = reference_loss(world, name, BY_HAND[divergence], tokens, target, chosen, **how)
    assert expected > 0
    assert first_step["routing_alignment_loss"] == pytest.approx(expected, rel=1e-4, abs=1e-8)  # float32 logarithms of near-equal numbers


def test_off_is_stock_megatron_bit_for_bit(world: Path) -> None:
    stock = weights(world, "stock")
    for name in ("off", "off-flags"):
        found = weights(world, name)
        assert found.keys() == stock.keys()
        assert all(torch.equal(found[key], stock[key]) for key in stock)


def test_a_users_own_script_trains_the_same(world: Path) -> None:
    ours, script = weights(world, "one"), weights(world, "script")
    assert ours.keys() == script.keys() == weights(world, "stock").keys()  # state-dict keys are Megatron's own
    assert all(torch.equal(ours[key], script[key]) for key in ours)


@pytest.mark.parametrize("layout", ["tp", "pp", "ep"])
def test_profiles_agree_between_layouts(world: Path, layout: str) -> None:
    for file in ("experts", "priors"):
        one, other = (load_file(world / folder / f"{file}.safetensors") for folder in ("profile", f"profile-{layout}"))
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(other[key], tensor, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
    curve, other_curve = (read_divergence(world / folder / "divergence.csv") for folder in ("profile", f"profile-{layout}"))
    assert [r.divergence for r in other_curve] == pytest.approx([r.divergence for r in curve], rel=1e-3)


@pytest.mark.parametrize("layout", ["tp", "pp", "ep"])
def test_scores_agree_between_layouts(world: Path, layout: str) -> None:
    one, other = (load_file(world / f / "reference.safetensors") for f in ("reference", f"reference-{layout}"))
    for key, tensor in one.items():
        torch.testing.assert_close(other[key], tensor, rtol=1e-4, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


def test_scoring_laws(world: Path) -> None:
    found = load_file(world / "reference/reference.safetensors")
    assert (found["likelihood"] < 0).all()
    torch.testing.assert_close(found["likelihood.small_batches"], found["likelihood"], rtol=1e-5, atol=1e-5)
    # routing a prompt by its own logits changes nothing; by another prompt's it does
    torch.testing.assert_close(found["likelihood.own_routing"], found["likelihood"], rtol=1e-5, atol=1e-5)
    assert torch.equal(found["answers.own_routing"], found["answers"])
    assert ((found["likelihood.other_routing"] - found["likelihood"]).abs() > 1e-4).any()
    # counts of K experts for each token; distributions sum to one
    torch.testing.assert_close(found["frequency"].sum(-1), torch.full(found["frequency"].shape[:2], 2.0))
    for tokens in ("prompt", "response", "all", "last"):
        torch.testing.assert_close(found[f"pooled.{tokens}"].sum(-1), torch.ones(found["frequency"].shape[:2]))
    torch.testing.assert_close(found["logits"].softmax(-1), found["pooled.last"], rtol=1e-4, atol=1e-6)


def test_job_files(world: Path) -> None:
    rows = read_taxonomy(world / "taxonomy/taxonomy.jsonl")
    assert {(row.id, row.language) for row in rows} == {(f"sum/{n}", language) for n in range(36) for language in ("es", "tr")}
    evaluation = json.loads((world / "evaluations/base.json").read_text())
    assert sum(row["n"] for row in evaluation["rows"]) == 12 * len(LANGUAGES)
    assert len((world / "evaluations/base.jsonl").read_text().splitlines()) == 12 * len(LANGUAGES)
    experts = ExpertFile.load(world / "profile/experts.safetensors")
    assert experts.tasks == ("even", "odd")
    assert experts.expert_mask.sum(-1).unique().tolist() == [3]
    assert experts.layer_number.tolist() == [1, 2, 3, 4]
    assert json.loads((world / "predict/predict.json").read_text())["rows"]
    assert not list(world.glob("taxonomy/.*"))  # finished shards are gone


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other-model", ["experts.safetensors", "num_experts is 8 in the file, 4 in the model"]),
        ("bad-layers", ["2-9", "0 to 3"]),
        ("bad-tokens", ["priors.safetensors", "'last'", "'all'"]),
        ("absent", ["nowhere", "latest_checkpointed_iteration.txt"]),
        ("absent-base", ["nowhere", "--pretrained-checkpoint"]),
        ("other-shape", ["base", "does not fit the model flags"]),
    ],
)
def test_bad_input_is_told(world: Path, name: str, words: list[str]) -> None:
    error = json.loads((world / f"{name}.json").read_text())["error"]
    for word in words:
        assert word in error, error
