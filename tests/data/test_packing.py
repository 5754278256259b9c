"""Laws of packed samples: packs have whole samples in order, and routing is pooled as for padded samples."""

import itertools
import types
from typing import Any

import numpy as np
import pytest
import torch
from data_rows import SmallTokenizer, example
from hypothesis import given
from hypothesis import strategies as st

from ramoe_megatron.data.dataset import SFTDataset
from ramoe_megatron.data.packing import PackedDataset, next_fit
from ramoe_megatron.data.sampler import order
from ramoe_megatron.mcore.align.batch import loss_tokens
from ramoe_megatron.mcore.observe import TOKEN_CHOICES, TokenSelection, mean_over_tokens, pooled_distributions
from ramoe_megatron.mcore.placement import context_parallel_rows, local_rows

TOKENIZER = SmallTokenizer()
WORDS = ["one", "two", "three", "four", "five", "?"]
EXAMPLES = [
    example(str(n), prompt=" ".join(WORDS[: n % 6]), response=" ".join(["yes"] * (1 + n % 4)))
    for n in range(11)
]
SEQ, BATCH = 24, 3


def packed(packs: int = 9, **changes: Any) -> PackedDataset:
    return PackedDataset(EXAMPLES, TOKENIZER, SEQ, packs, 5, BATCH, **changes)


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
def test_next_fit_keeps_order_room_and_opens_a_pack_only_when_it_must(
    lengths: list[int], capacity: int
) -> None:
    first = next_fit(np.array(lengths, dtype=np.int64), capacity)
    assert first[0] == 0
    assert first[-1] == len(lengths)
    loads = [sum(lengths[a:b]) for a, b in itertools.pairwise(first)]
    assert max(loads) <= capacity
    for load, opening in zip(loads[:-1], first[1:-1], strict=True):
        assert load + lengths[opening] > capacity


@pytest.mark.parametrize("multiple", [1, 4])
def test_a_pack_is_its_samples_one_behind_the_other(multiple: int) -> None:
    found = packed(multiple=multiple)
    samples = SFTDataset(EXAMPLES, TOKENIZER, SEQ, len(found.order), 5)
    assert found.order.tolist() == order(EXAMPLES, len(found.order), 5).tolist()
    draw = 0
    for place in range(len(found)):
        item = found[place]
        borders = item["cu_seqlens"].tolist()
        assert item["cu_seqlens"].dtype == torch.int32
        assert (borders[0], borders[-1]) == (0, SEQ)
        assert int(item["max_seqlen"]) == max(np.diff(borders))
        assert all(border % multiple == 0 for border in borders)
        assert item["tokens"].shape == item["loss_mask"].shape == (SEQ,)
        for number, start in enumerate(item["start"].tolist()):
            alone = samples[draw]
            length = int(alone["length"])
            assert (int(item["length"][number]), int(item["prompt_length"][number])) == (
                length,
                int(alone["prompt_length"]),
            )
            for key in ("tokens", "labels", "loss_mask", "position_ids"):
                assert torch.equal(item[key][start : start + length], alone[key][:length]), key
            draw += 1
        outside = torch.ones(SEQ, dtype=torch.bool)
        for start, length in zip(item["start"].tolist(), item["length"].tolist(), strict=True):
            outside[start : start + length] = False
        assert not item["loss_mask"][outside].any()
    assert draw == len(found.order)
    assert 0.5 < found.fill <= 1


def test_shares_give_the_mean_over_the_samples_of_a_global_batch() -> None:
    """Each pack is a micro-batch of its own, and Megatron takes the mean over the packs of a global batch."""
    found = packed()
    values = np.random.default_rng(0).random(len(found.order))
    batches = found.global_batches(BATCH)
    for batch in range(3):
        packs = range(batch * BATCH, (batch + 1) * BATCH)
        mean = np.mean([float(found[p]["sample_share"]) * values[found.draws(p)].sum() for p in packs])
        assert mean == pytest.approx(values[batches == batch].mean(), rel=1e-6)


def test_a_longer_run_starts_with_the_same_packs() -> None:
    long = packed(24)
    for packs in range(1, 24):
        # Also the last pack is complete.
        assert packed(packs).first.tolist() == long.first[: packs + 1].tolist(), packs
    short = packed(6)
    for place in range(6):
        a, b = short[place], long[place]
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def router(tp: int = 1, tp_rank: int = 0, cp: int = 1, cp_rank: int = 0) -> Any:
    def group(size: int, rank: int) -> Any:
        return types.SimpleNamespace(size=lambda: size, rank=lambda: rank)

    config = types.SimpleNamespace(sequence_parallel=tp > 1)
    return types.SimpleNamespace(
        config=config,
        score_function="softmax",
        tp_group=group(tp, tp_rank),
        cp_group=group(cp, cp_rank),
        tp_cp_group=None,
    )


def selection(item: dict[str, torch.Tensor]) -> TokenSelection:
    return TokenSelection(item["prompt_length"], item["length"], item["start"], item["cu_seqlens"])


@pytest.mark.parametrize("tokens", TOKEN_CHOICES)
def test_a_router_pools_a_packed_sample_as_a_padded_one(tokens: str) -> None:
    item = packed()[1]
    logits_S1E = torch.randn(SEQ, 1, 6, generator=torch.Generator().manual_seed(0))
    count = len(item["start"])
    logits_SBE = torch.zeros(SEQ, count, 6)
    for b, (start, length) in enumerate(zip(item["start"].tolist(), item["length"].tolist(), strict=True)):
        logits_SBE[:length, b] = logits_S1E[start : start + length, 0]
    padded = TokenSelection(item["prompt_length"], item["length"])
    pooled = [
        pooled_distributions(router(), x, s, (tokens,))[tokens]
        for x, s in ((logits_S1E, selection(item)), (logits_SBE, padded))
    ]
    torch.testing.assert_close(*pooled, rtol=1e-6, atol=1e-7)
    means = [
        mean_over_tokens(router(), x, s, tokens)
        for x, s in ((logits_S1E, selection(item)), (logits_SBE, padded))
    ]
    torch.testing.assert_close(*means, rtol=1e-5, atol=1e-6)
    assert torch.equal(selection(item).count(tokens), padded.count(tokens))


@pytest.mark.parametrize(("tp", "cp"), [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("tokens", TOKEN_CHOICES)
def test_pieces_of_a_pack_add_up(tokens: str, tp: int, cp: int) -> None:
    """Each token is on one tensor- and context-parallel rank; the sums over ranks are those of the pack."""
    item = packed(multiple=4)[2]
    values = torch.randn(SEQ, 1, 3, generator=torch.Generator().manual_seed(1))
    whole, total, rows = selection(item).local(router(), SEQ), torch.zeros(len(item["start"]), 3), []
    for c in range(cp):
        mine = context_parallel_rows(SEQ, cp, c, item["cu_seqlens"])
        for t in range(tp):
            piece, count = router(tp, t, cp, c), SEQ // tp // cp
            local = selection(item).local(piece, count)
            assert torch.equal(local.row_S, local_rows(piece, count, item["cu_seqlens"]))
            rows += local.row_S.tolist()
            part = values[mine][t * count : (t + 1) * count]
            total += local.sum(part, tokens)
            last, absent = local.last(part)
            torch.testing.assert_close(last.masked_fill(absent, 0.0), local.sum(part, "last"))
    assert sorted(rows) == list(range(SEQ))
    torch.testing.assert_close(total, whole.sum(values, tokens))


def test_every_context_parallel_rank_gets_two_slices_of_each_sample() -> None:
    """Megatron's order: slice r, then slice 2 cp - 1 - r, sample after sample."""
    borders = torch.tensor([0, 8, 12, 24], dtype=torch.int32)
    for rank, expected in enumerate(
        ([0, 1, 6, 7, 8, 11, 12, 13, 14, 21, 22, 23], [2, 3, 4, 5, 9, 10, 15, 16, 17, 18, 19, 20])
    ):
        assert context_parallel_rows(24, 2, rank, borders).tolist() == expected


def test_loss_tokens_are_counted_by_sample() -> None:
    found = packed()
    for place in range(len(found)):
        item = found[place]
        counted = loss_tokens(item["loss_mask"], item["length"], item["start"])
        assert counted.tolist() == found.encoded.loss_tokens[found.order[found.draws(place)]].tolist()
