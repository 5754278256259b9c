"""No ci samples on a rank, in a micro-batch or in a whole step; and the batches of the small world."""

from pathlib import Path

import pytest
import sentencepiece
import torch
from layout_rows import PLACED, PLACEMENTS, ROWS
from small_run import SAMPLES, SEQUENCE, gradients, outcome, weights

from ramoe_megatron.artifacts.records import read_taxonomy
from ramoe_megatron.data.parallel import Example, load_examples
from ramoe_megatron.data.sampler import order


def first_batch(world: Path) -> list[Example]:
    examples = load_examples([str(world / "parallel.jsonl")], split="train")
    return [examples[index] for index in order(examples, SAMPLES, 7)]


def lengths(world: Path, batch: list[Example]) -> tuple[list[int], list[int]]:
    """Tokens of each prompt, and loss tokens: the response and the end of document."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(world / "tokenizer.model"))
    return [len(pieces.encode(e.prompt)) for e in batch], [len(pieces.encode(e.response)) + 1 for e in batch]


def test_the_small_world_is_that_of_fine_tuning(layouts: Path) -> None:
    """At least three quarters of the real tokens of the compared batch are prompt and carry no loss; samples
    are padded, differ in length and in loss tokens; and each of two sequence-parallel ranks holds the last
    prompt token of aligned samples."""
    batch = first_batch(layouts)
    prompt, loss_tokens = lengths(layouts, batch)
    # the last token of a sample is only a label
    tokens = [p + n - 1 for p, n in zip(prompt, loss_tokens, strict=True)]
    assert 1 - sum(loss_tokens) / sum(tokens) >= 0.75
    assert max(tokens) < SEQUENCE
    assert len(set(loss_tokens)) > 1
    assert len(set(tokens)) > 1
    ci = {(row.id, row.language) for row in read_taxonomy(layouts / "taxonomy.jsonl") if row.category == "ci"}
    last = [
        length - 1
        for length, example in zip(prompt, batch, strict=True)
        if (example.id, example.language) in ci
    ]
    assert min(last) < SEQUENCE // 2 <= max(last)


@pytest.mark.parametrize("place", PLACEMENTS)
@pytest.mark.parametrize("layout", PLACED)
def test_ci_samples_lie_where_the_row_says(layouts: Path, place: str, layout: str) -> None:
    """The share that is logged is the share of the draws that the taxonomy of the row makes ci."""
    chosen = [
        draw
        for draw, example in enumerate(first_batch(layouts))
        if draw in PLACEMENTS[place] and example.language != "en"
    ]
    logged = outcome(layouts, f"{place}-{layout}-alone")["first"]
    assert logged["ramoe/aligned_share"] == pytest.approx(len(chosen) / SAMPLES)
    if place == "none":
        assert not chosen
    else:
        by_rank = [sum(draw // 4 % 2 == rank for draw in chosen) for rank in (0, 1)]
        assert by_rank[0] > 0
        assert (by_rank[1] == 1) if place == "uneven" else (by_rank[1] == 0)


def test_per_token_loss_weighs_a_sample_by_its_loss_tokens(layouts: Path) -> None:
    """A single ci sample's share changes from 1 / N to n / sum of n; gradient and metric change with it."""
    loss_tokens = lengths(layouts, first_batch(layouts))[1]
    factor = SAMPLES * loss_tokens[PLACEMENTS["single"][0]] / sum(loss_tokens)
    assert factor > 1.5
    samples, tokens = (gradients(layouts, f"single-one-{kind}") for kind in ("alone", "alone-tokens"))
    for layer, gradient in samples.items():
        torch.testing.assert_close(tokens[layer], factor * gradient, rtol=1e-5, atol=1e-7)
    figures = [
        outcome(layouts, f"single-one-{kind}")["first"]["routing_alignment_loss"]
        for kind in ("alone", "alone-tokens")
    ]
    assert figures[1] == pytest.approx(factor * figures[0], rel=1e-6)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.ci == "none" and "alone" in name])
def test_no_ci_sample_in_the_step_is_exactly_zero(layouts: Path, name: str) -> None:
    found = outcome(layouts, name)["steps"]
    assert len(found) == 3
    for figures in found:
        assert (
            figures["routing_alignment_loss"]
            == figures["ramoe/aligned_share"]
            == figures["ramoe/task_expert_mass_ci"]
            == 0
        )
        assert 0 < figures["ramoe/task_expert_mass_other"] < 1
    assert not any(gradient.any() for gradient in gradients(layouts, name).values())  # NaN counts as not zero


@pytest.mark.parametrize("layout", ["one", "dp", "pp"])
def test_no_ci_sample_leaves_plain_fine_tuning(layouts: Path, layout: str) -> None:
    """Three steps with alignment on and nothing to align end at plain fine-tuning's weights, bit for bit."""
    plain, none = weights(layouts, f"plain-{layout}-whole"), weights(layouts, f"none-{layout}-whole")
    assert plain.keys() == none.keys()
    assert all(torch.equal(none[key], weight) for key, weight in plain.items())


def test_a_stage_without_an_aligned_or_a_moe_layer_logs_with_the_others(layouts: Path) -> None:
    """Three steps each, so that a figure reduced by one stage alone would be waited for."""
    for name in ("last-stage-pp", "half-pp-whole", "mtp-pp-whole"):
        steps = outcome(layouts, name)["steps"]
        assert len(steps) == 3
        assert all(figures["routing_alignment_loss"] > 0 for figures in steps)
