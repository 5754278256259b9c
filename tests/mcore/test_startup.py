"""The startup messages: each number in them, from settings built with Megatron's own configuration."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from artefact_files import expert_file
from data_rows import example
from megatron.core.transformer.transformer_config import TransformerConfig

from ramoe_megatron.mcore.align.resolve import ResolvedAlignment
from ramoe_megatron.mcore.align.startup import alignment_block, balancing, samples_block
from ramoe_megatron.mcore.arguments import RoutingAlignmentConfig

NUMBERS = [2, 4, 6, 8]


def model_config(**changes: Any) -> TransformerConfig:
    settings = {
        "num_layers": 8,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_moe_experts": 6,
        "moe_layer_freq": 2,
    }
    return TransformerConfig(**(settings | {"moe_aux_loss_coeff": 0.01, "add_bias_linear": False} | changes))


def alignment(tasks: int = 2, **changes: Any) -> ResolvedAlignment:
    config = RoutingAlignmentConfig(
        **({"coeff": 2.5, "experts": "e", "taxonomy": "t", "priors": "p"} | changes)
    )
    mask = torch.zeros(tasks, 4, 6, dtype=torch.bool)
    mask[:, :, :3] = True
    mask[0, 2] = False  # the first task has no expert in MoE layer 2,
    mask[0, 1, 3] = True  # and four in layer 1
    names = tuple(f"task{n}" for n in range(tasks))
    experts = dataclasses.replace(expert_file(), tasks=names, expert_mask=mask)
    return ResolvedAlignment(config, experts, (1, 2, 3), dict.fromkeys((1, 2, 3), 1.0))


def rows(text: str) -> dict[str, str]:
    """The block's columns: name to text."""
    pairs = (line.strip().split("  ", 1) for line in text.splitlines()[1:])
    return {pair[0]: pair[-1].strip() for pair in pairs}


def test_every_loss_and_the_zone_with_megatrons_numbers_beside() -> None:
    found = rows(alignment_block(alignment(), NUMBERS, model_config(moe_z_loss_coeff=1e-3)))
    assert found == {
        "coefficient": "2.5 x mean over all samples, of the global batch",
        "divergence": "lumped-kl of each sample from its own English view (target example)",
        "tokens": "the last prompt token, pooled",
        "examples": "ci",
        "layers": "MoE layers 1-3 of 0-3 (Megatron's 4, 6, 8)",
        "task task0": "0-4 of 6 experts a layer; none in MoE layers 2",
        "task task1": "3 of 6 experts a layer",
        "load balancing": "aux_loss, coefficient 0.01",
        "z-loss": "coefficient 0.001",
    }


def test_the_columns_are_aligned_and_the_block_is_short() -> None:
    lines = alignment_block(
        alignment(tasks=57), NUMBERS, model_config(moe_router_load_balancing_type="none")
    ).splitlines()
    assert len(lines) <= 20
    start = lines[1].index("2.5")
    notes = [line for line in lines if line.startswith("  note: ")]
    assert all(line[start - 1] == " " and line[start] != " " for line in lines[1 : len(lines) - len(notes)])
    assert any("51 more tasks" in line for line in lines)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [("aux_loss", 0.01)]),
        ({"moe_router_load_balancing_type": "none"}, []),
        (
            {
                "moe_router_load_balancing_type": ["seq_aux_loss", "global_aux_loss"],
                "moe_aux_loss_coeff": [1e-4, 0.0],
            },
            [("seq_aux_loss", 1e-4), ("global_aux_loss", 0.0)],
        ),
    ],
)
def test_load_balancing_is_read_as_megatrons_router_reads_it(
    changes: dict[str, Any], expected: list[tuple[str, float]]
) -> None:
    assert balancing(model_config(**changes)) == expected


def test_balancing_without_a_loss_has_no_coefficient() -> None:
    config = model_config(moe_router_load_balancing_type="quantile_balancing", moe_aux_loss_coeff=0.0)
    assert rows(alignment_block(alignment(), NUMBERS, config))["load balancing"] == "quantile_balancing"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moe_router_load_balancing_type": "none"}, "load balancing is none"),
        ({"moe_aux_loss_coeff": 0.0}, "aux_loss has coefficient 0"),
        ({"calculate_per_token_loss": True}, "stronger than the coefficient says"),
        ({"moe_router_load_balancing_type": "global_aux_loss"}, "on 2 ranks it acts half as strongly"),
        ({"moe_expert_capacity_factor": 1.0}, "--moe-expert-capacity-factor counts padding"),
        ({"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}, "expert bias"),
        ({}, None),
    ],
)
def test_inherited_surprises_are_told_in_words(changes: dict[str, Any], words: str | None) -> None:
    notes = [
        line
        for line in alignment_block(alignment(), NUMBERS, model_config(**changes)).splitlines()
        if "note:" in line
    ]
    assert len(notes) == (words is not None)
    assert words is None or words in notes[0]


def test_what_is_aligned_to_what_is_said() -> None:
    block = alignment_block(
        alignment(target="example", shuffle_targets=3, pooling="token", tokens="all", normalize="ci"),
        NUMBERS,
        model_config(calculate_per_token_loss=True),
    )  # fmt: skip
    found = rows(block)
    assert "shuffled, seed 3" in found["divergence"]
    assert found["tokens"] == "all tokens, each token separately"
    assert (
        found["coefficient"]
        == "2.5 x mean over the aligned samples, weighted by loss tokens, of the global batch"
    )


KINDS = {0: "cc", 1: "ci", 2: "ic", 3: "ii"}


def table(
    tasks: int, languages: tuple[str, ...], taxonomy: bool = True
) -> tuple[list[str], dict[str, list[int]]]:
    examples = [
        example(f"t{t}/{n}", lang, f"t{t}")
        for t in range(tasks)
        for n in range(6)
        for lang in ("en", *languages)
    ]
    target = [e.language != "en" for e in examples]
    category = [
        KINDS[int(e.id.split("/")[1]) % 4] if on and taxonomy else ""
        for e, on in zip(examples, target, strict=True)
    ]
    aligned = np.array([kind == "ci" if taxonomy else on for kind, on in zip(category, target, strict=True)])
    order = np.flatnonzero(aligned)[[0, 0, 0]].tolist() + [0] * 9  # three of twelve draws
    lines = samples_block(examples, category, aligned, np.array(order), "en").splitlines()
    return lines, {
        line[: line.rfind("  ")].split("  ")[1]: [int(w) for w in line.split() if w.isdigit()]
        for line in lines[2:]
    }


def test_samples_are_counted_by_task_language_and_category() -> None:
    lines, counts = table(2, ("es", "tr"))
    assert lines[0] == "ramoe: 36 training examples of 2 tasks (12 in en), 12 draws, 25.0% of them aligned"
    assert lines[1].split() == ["all", "cc", "ci", "ic", "ii", "aligned"]
    assert counts == {
        **{f"t{t} / {language}": [6, 2, 2, 1, 1, 2] for t in (0, 1) for language in ("es", "tr")},
        "total": [36, 8, 8, 4, 4, 8],
    }
    assert len({len(line) for line in lines[1:]}) == 1  # right-aligned columns


def test_many_pairs_are_summed_by_language_and_then_into_one_line() -> None:
    assert list(table(4, ("es", "tr"))[1]) == ["es", "tr", "total"]
    lines, counts = table(4, tuple("abcdefgh"))
    assert list(counts) == [*"abcde", "3 more", "total"]
    assert counts["3 more"][1:] == [3 * value for value in counts["a"]]
    assert len(lines) <= 10


def test_without_a_taxonomy_there_are_no_categories() -> None:
    lines, counts = table(1, ("es",), taxonomy=False)
    assert lines[1].split() == ["all", "aligned"]
    assert counts == {"t0 / es": [6, 6], "total": [12, 6]}


def test_nothing_to_align_is_told() -> None:
    examples = [example("a", "en"), example("a", "es")]
    text = samples_block(examples, ["", "cc"], np.zeros(2, dtype=bool), np.array([0, 1]), "en")
    assert "no training example is aligned" in text
