"""The method on converted models: alignment against float64, selection, steering, refresh, packs, evaluation.

Each job runs once, on a family with modules of its own where the job meets them.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_reference import (
    checkpoint_place,
    float64_model,
    log_likelihoods,
    lumped_kl,
    megatron_gradients,
    router_logits,
    steered_phimoe,
)
from family_rows import (
    ALIGNED,
    COEFF,
    HYBRID,
    STRENGTHS,
    ZONE,
    examples,
    packed,
    padded,
    samples,
    table,
    tokenizer,
    write_choices,
)
from safetensors.torch import load_file
from small_run import SAMPLES, outcome, run_table

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.records import read_taxonomy
from ramoe_megatron.data.encode import encode, encode_choices
from ramoe_megatron.data.sampler import order
from ramoe_megatron.models.convert import export_checkpoint, plan_export

BOUND = 1e-4
"""Relative error of float32 against float64."""


@pytest.fixture(scope="module")
def runs(families: tuple[Path, dict[str, Any]]) -> Path:
    folder, _ = families
    write_choices(folder)
    rows = [*table(folder), packed(folder, 1), padded(folder, "padded-1", 1, of=1)]
    run_table(1, [*rows, padded(folder, "padded-of-2", 1, of=2)], folder, "methods")
    run_table(2, [packed(folder, 2), padded(folder, "padded-2", 2, of=2)], folder, "methods-2")
    return folder


def recorded(folder: Path, row: str, kind: str) -> dict[str, torch.Tensor]:
    """What a row's first rank recorded of all weights, by the name in Megatron's model."""
    outcome(folder, row)
    prefix = f"{kind}.0.module."
    found = load_file(folder / f"{row}.0.safetensors")
    return {key.removeprefix(prefix): tensor for key, tensor in found.items() if key.startswith(prefix)}


def aligned_loss(folder: Path, name: str, model: Any) -> torch.Tensor:
    """The first step's loss: mean over the batch, and over the layers, of the divergence at the last token.

    The distributions are softmaxes over all of transformers' router logits. English has no gradient.
    """
    read, rows = tokenizer(folder), examples(folder, "train")
    english = {example.id: example for example in rows if example.language == "en"}
    category = {(row.id, row.language): row.category for row in read_taxonomy(folder / "taxonomy.jsonl")}
    experts = ExpertFile.load(folder / f"{name}-profile/experts.safetensors")

    def last(chosen: list[Any]) -> list[torch.Tensor]:
        """L x [B, E]"""
        encoded = [encode(example, read) for example in chosen]
        end = [sequence.prompt_length - 1 for sequence in encoded]
        found = router_logits(model, [sequence.ids for sequence in encoded])
        return [logits[range(len(end)), end].softmax(-1) for logits in found]

    drawn = [rows[index] for index in order(rows, SAMPLES, 7)]
    chosen = [example for example in drawn if category.get((example.id, example.language)) in ("ci", "cc")]
    assert 5 < len(chosen) < SAMPLES
    p_LBE, q_LBE = last([english[example.id] for example in chosen]), last(chosen)
    divergences = [
        lumped_kl(p_LBE[layer][place].detach(), q_LBE[layer][place], mask.bool())
        for place, example in enumerate(chosen)
        for layer in ZONE
        for mask in [experts.expert_mask[experts.tasks.index(example.task), layer]]
    ]
    return torch.stack(divergences).sum() / len(ZONE) / SAMPLES


@pytest.mark.parametrize("name", ALIGNED)
def test_alignment_and_its_gradient_are_those_of_transformers_routers(
    name: str, runs: Path, tmp_path: Path
) -> None:
    """Of every weight: what transformers' model in float64 gives for the formula on its router logits.

    The distribution is the softmax over all logits. So it is not SparseMixer's two weights, and it has
    GPT-OSS's router bias.
    """
    model = float64_model(name)
    expected = aligned_loss(runs, name, model)
    (COEFF * expected).backward()
    assert expected > 1e-4
    logged = outcome(runs, f"{name}-aligned")["first"]["routing_alignment_loss"]
    assert logged == pytest.approx(expected.item(), rel=BOUND)
    right = megatron_gradients(model, tmp_path)
    moved = set()
    for weight, found in recorded(runs, f"{name}-aligned", "gradient").items():
        gradient = right.read(*checkpoint_place(weight))
        assert gradient.dtype == torch.float64
        error = (found.double() - gradient).norm()
        assert error <= BOUND * gradient.norm(), f"{weight}: {error} of {gradient.norm()}"
        if gradient.any():
            moved.add(weight)
    for layer in ZONE:
        assert f"decoder.layers.{layer}.mlp.router.weight" in moved
        assert (f"decoder.layers.{layer}.mlp.router.bias" in moved) == (name == "gpt-oss")
    assert {"embedding.word_embeddings.weight", "decoder.layers.0.self_attention.linear_qkv.weight"} < moved
    assert "output_layer.weight" not in moved


def test_selected_experts_of_a_converted_model_are_all_that_changes(runs: Path) -> None:
    """In the exported model too, bit for bit."""
    outcome(runs, "phimoe-selective")
    export_checkpoint(plan_export(runs / "phimoe-selective"), runs / "phimoe-selective-hf")
    before, after = (
        load_file(runs / f"{name}/model.safetensors") for name in ("phimoe-hf", "phimoe-selective-hf")
    )
    chosen = ExpertFile.load(runs / "phimoe-profile/experts.safetensors").expert_mask.any(0)
    assert 0 < chosen.sum() < chosen.numel()
    expected = {
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"
        for layer, expert in chosen.nonzero().tolist()
        for matrix in ("w1", "w2", "w3")
    }
    assert before.keys() == after.keys()
    assert {key for key in before if not torch.equal(before[key], after[key])} == expected


def evaluated(runs: Path, method: str) -> tuple[dict[tuple[str, str], bool], dict[str, Any]]:
    """The decision on each example, and the document."""
    outcome(runs, f"phimoe-evaluate-{method}")
    lines = (runs / f"phimoe-evaluations/{method}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    document = json.loads((runs / f"phimoe-evaluations/{method}.json").read_text())
    return {(row["id"], row["language"]): row["correct"] for row in rows}, document


@pytest.mark.parametrize(("method", "strength"), [("base", 0.0), *STRENGTHS.items()])
def test_an_evaluation_decides_by_transformers_log_likelihoods(
    runs: Path, method: str, strength: float
) -> None:
    """SparseMixer chooses by the steered logits, and the mass on the task experts is theirs."""
    found, document = evaluated(runs, method)
    model, read = float64_model("phimoe"), tokenizer(runs)
    experts = ExpertFile.load(runs / "phimoe-profile/experts.safetensors")
    rows = examples(runs, "validation")
    task = [experts.tasks.index(example.task) for example in rows]
    mask_BLE = experts.expert_mask[task].bool()
    pairs = [choice for example in rows for choice in encode_choices(example, read)]
    raised_LBE = mask_BLE.repeat_interleave(2, 0).transpose(0, 1).clone()
    raised_LBE[0] = False  # only layers 1 and 2 are steered
    with steered_phimoe(raised_LBE, strength) as logits_LBSE:
        scores = log_likelihoods(model, pairs, read.processor.vocab_size())
    right = [gold > other for gold, other in zip(scores[::2], scores[1::2], strict=True)]
    assert found == {(row.id, row.language): decision for row, decision in zip(rows, right, strict=True)}
    assert len(set(right)) == 2
    mass: dict[tuple[str, str], list[torch.Tensor]] = {}
    for place, example in enumerate(rows):
        last = pairs[2 * place].prompt_length - 1
        q_LE = torch.stack([logits[2 * place, last].softmax(-1) for logits in logits_LBSE])
        own = (q_LE * mask_BLE[place]).sum(-1)
        mass.setdefault((example.task, example.language), []).append(own)
    for row in document["mass"]:
        expected = torch.stack(mass.pop((row["task"], row["language"]))).mean(0)
        assert row["mass"] == pytest.approx(expected.tolist(), rel=BOUND)
    assert not mass


def test_steering_with_strength_zero_is_no_steering(runs: Path) -> None:
    zero, base, steered = (evaluated(runs, method) for method in ("zero", "base", "steered"))
    assert zero[0] == base[0] != steered[0]
    assert zero[1]["mass"] == base[1]["mass"]


def test_a_refresh_gives_the_taxonomy_of_a_job_on_the_same_weights(runs: Path) -> None:
    outcome(runs, "olmoe-refresh")
    outcome(runs, "olmoe-taxonomy")
    (file,) = (runs / "olmoe-refresh/ramoe-refresh").glob("*.jsonl")
    assert file.name == "0000002.jsonl"
    job = {(row.id, row.language): row for row in read_taxonomy(runs / "olmoe-taxonomy/taxonomy.jsonl")}
    rows = read_taxonomy(file)
    assert len({row.id for row in rows}) == 10
    assert rows == [job[row.id, row.language] for row in rows]
    assert len({row.category for row in rows}) > 1


@pytest.mark.parametrize(
    ("name", "ranks", "like"),
    [("packed-1", 1, "padded-1"), ("padded-2", 2, "padded-of-2"), ("packed-2", 2, "padded-of-2")],
)
def test_window_sinks_and_yarn_are_the_same_in_packs_and_on_two_context_parallel_ranks(
    name: str, ranks: int, like: str, runs: Path
) -> None:
    """The gradients of all weights of GPT-OSS, of the language-model loss and alignment together."""
    expected, found = (recorded(runs, row, "gradient") for row in (like, name))
    assert found.keys() == expected.keys()
    assert any("softmax_offset" in weight for weight in found)
    for weight, gradient in expected.items():
        assert (found[weight] - gradient).norm() <= 1e-5 * gradient.norm(), weight
    first, other = (outcome(runs, row)["first"] for row in (like, name))
    assert other == pytest.approx(first, rel=1e-5)
    assert samples(runs, ranks) > 4  # several samples in a pack


@pytest.mark.parametrize("name", HYBRID)
def test_a_hybrid_model_of_the_same_checkpoint_computes_the_same(
    name: str, runs: Path, families: tuple[Path, dict[str, Any]]
) -> None:
    outcome(runs, f"{name}-hybrid")
    found = load_file(runs / f"{name}-hybrid/family.safetensors")
    expected = families[1][name]
    assert found.keys() == expected.keys()
    for key, right in expected.items():
        if key.startswith("choice"):
            assert torch.equal(found[key], right), key
        else:
            torch.testing.assert_close(found[key], right, atol=1e-4, rtol=0, msg=key)
    (answers,) = json.loads((runs / f"{name}-hybrid/answers.json").read_text())
    assert answers["rows"]
    for kind in ("plain", "steered", "transplant"):
        assert answers[f"{kind}-cached"] == answers[f"{kind}-whole"]
        assert answers[f"{kind}-shared"] == pytest.approx(answers[f"{kind}-apart"], abs=1e-4)
