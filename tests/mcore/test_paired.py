"""Laws of paired views: the draws are the same, each after its English view; and laws of their alignment."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_rows import SmallTokenizer
from label_files import EXAMPLES, config
from router_chunk import B, Chunk, E, S

from ramoe_megatron.data.dataset import SFTDataset
from ramoe_megatron.data.paired import PairedDataset
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.align.labels import AlignedDataset
from ramoe_megatron.mcore.align.options import RoutingAlignmentConfig

TOKENIZER = SmallTokenizer()
TARGETS = [e for e in EXAMPLES if e.language != "en"]
VIEWS = [e for e in EXAMPLES if e.language == "en"]


def paired(examples: Any = TARGETS, count: int = 32) -> PairedDataset:
    return PairedDataset(examples, VIEWS, TOKENIZER, 40, count, 3)


def test_odd_places_are_the_draws_of_plain_training_and_even_ones_their_views() -> None:
    plain, pairs = SFTDataset(TARGETS, TOKENIZER, 40, 16, 3), paired()
    for place in range(16):
        view, sample, drawn = pairs[2 * place], pairs[2 * place + 1], plain[place]
        for key in drawn:
            assert torch.equal(sample[key], drawn[key]), key
        english = pairs.examples[int(view["example"])]
        assert (english.id, english.language) == (TARGETS[int(sample["example"])].id, "en")
        assert view["loss_mask"].sum() == 0


def test_a_draw_of_the_anchor_is_its_own_view_and_more_draws_change_none() -> None:
    pairs = paired(EXAMPLES, 64)
    for place in range(0, 64, 2):
        view, sample = (pairs.examples[int(pairs.order[place + n])] for n in (0, 1))
        assert (view.id, view.language) == (sample.id, "en")
    assert np.array_equal(paired(EXAMPLES, 16).order, pairs.order[:16])


def test_examples_without_a_view_are_counted() -> None:
    with pytest.raises(
        RamoeError,
        match=r"16 training examples have no view .* currency/0, currency/1, .* use --ramoe-target example",
    ):
        PairedDataset(TARGETS, [], TOKENIZER, 40, 8, 3)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_weights_make_a_mean_over_the_samples_that_are_trained_on(
    files: dict[str, str], per_token: bool, reverse: bool
) -> None:
    settings = config(files, target="paired", priors=None, reverse=reverse)
    if reverse and per_token:
        with pytest.raises(RamoeError, match="--ramoe-reverse"):
            AlignedDataset(paired(), settings, "en", 8, per_token)
        return
    data = AlignedDataset(paired(), settings, "en", 8, per_token)
    plain = AlignedDataset(SFTDataset(TARGETS, TOKENIZER, 40, 16, 3), config(files), "en", 8, per_token)
    weights = torch.stack([data[place]["ramoe_weight"] for place in range(32)]).view(16, 2)
    expected = torch.stack([plain[place]["ramoe_weight"] for place in range(16)])
    assert torch.equal(weights[:, 0 if reverse else 1], expected * (1 if per_token else 2))
    assert not weights[:, 1 if reverse else 0].any()


class Pairs(Chunk):
    def run_pairs(self, weight: list[float]) -> torch.Tensor:
        micro = {
            "prompt_length": torch.tensor([3, 4, 2, 5]), "length": torch.full((4,), S),
            "loss_mask": torch.ones(4, S),
            "ramoe_weight": torch.tensor(weight), "ramoe_task": torch.zeros(4, dtype=torch.int64),
        }  # fmt: skip
        return self.gradient(micro, 4)


@pytest.mark.parametrize("tokens", ["all", "last"])
@pytest.mark.parametrize("divergence", ["kl", "js", "lumped-kl"])
def test_no_gradient_reaches_the_english_side(tokens: str, divergence: str) -> None:
    grad = Pairs(target="paired", tokens=tokens, divergence=divergence).run_pairs([0, 2, 0, 2])
    assert not grad[:, [0, 2]].any()
    assert grad[:, 1].any()
    assert grad[:, 3].any()


def test_reversed_it_reaches_the_english_side_alone() -> None:
    grad = Pairs(target="paired", reverse=True, tokens="all").run_pairs([2, 0, 0, 0])
    assert grad[:, 0].any()
    assert not grad[:, 1:].any()


def test_a_view_that_routes_alike_pulls_nowhere() -> None:
    chunk = Pairs(target="paired", tokens="all", divergence="kl")
    micro = {
        "prompt_length": torch.full((2,), 3), "length": torch.full((2,), S), "loss_mask": torch.ones(2, S),
        "ramoe_weight": torch.tensor([0.0, 2.0]), "ramoe_task": torch.zeros(2, dtype=torch.int64),
    }  # fmt: skip
    same = torch.linspace(0, 9, S * E).sin().view(S, 1, E).expand(S, 2, E)
    assert chunk.gradient(micro, 2, same).abs().max() < 1e-7
    assert B == 3  # an odd micro-batch cannot hold pairs
    with pytest.raises(RamoeError, match="even number"):
        chunk.gradient({key: torch.cat([value, value[:1]]) for key, value in micro.items()}, 3)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"target": "paired", "pooling": "token", "tokens": "all"}, "--ramoe-pooling token"),
        ({"target": "paired", "normalize": "ci"}, "--ramoe-normalize ci"),
        ({"reverse": True}, "--ramoe-reverse"),
        ({"missing_priors": "skip"}, "--ramoe-missing-priors"),
        ({"random_experts": 1, "divergence": "js"}, "--ramoe-random-experts"),
        ({"coeff_warmup_iters": -1}, "--ramoe-coeff-warmup-iters"),
    ],
)
def test_options_without_a_meaning_together_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(RamoeError, match=told):
        RoutingAlignmentConfig(**({"coeff": 1.0, "experts": "e", "taxonomy": "t"} | changes))


def test_samples_without_a_prior_contribute_exactly_nothing(files: dict[str, str], tmp_path: Path) -> None:
    settings = {"priors": files["few"], "examples": "ci+cc"}
    with pytest.raises(RamoeError, match="no English routing for 2 aligned examples"):
        AlignedDataset(SFTDataset(EXAMPLES, TOKENIZER, 40, 48, 3), config(files, **settings), "en", 8)
    data = AlignedDataset(
        SFTDataset(EXAMPLES, TOKENIZER, 40, 48, 3), config(files, **settings, missing_priors="skip"), "en", 8
    )
    whole = AlignedDataset(
        SFTDataset(EXAMPLES, TOKENIZER, 40, 48, 3), config(files, examples="ci+cc"), "en", 8
    )
    for place in range(48):
        id_ = EXAMPLES[int(data[place]["example"])].id
        if id_ in ("currency/1", "sum/5"):
            assert data[place]["ramoe_weight"] == 0
            assert not data[place]["ramoe_target"].any()
        else:
            assert data[place]["ramoe_weight"] == whole[place]["ramoe_weight"]
