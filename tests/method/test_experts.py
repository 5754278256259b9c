"""Laws of task-expert selection."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.experts import (
    FrequencySum,
    Rule,
    Tau,
    TopM,
    delta,
    describe_empty,
    empty_layers,
    parse_rule,
    rule_from,
    task_experts,
)

seeds = st.integers(0, 2**31)


def topk_counts(n: int, layers: int, experts: int, k: int, tokens: torch.Tensor, seed: int) -> torch.Tensor:
    """Counts [n, L, E] of a random router that sends each token to k experts."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(n, layers, experts)
    for i in range(n):
        chosen = torch.rand(int(tokens[i]), layers, experts, generator=generator).topk(k, dim=-1).indices
        counts[i] = torch.zeros(int(tokens[i]), layers, experts).scatter(-1, chosen, 1.0).sum(0)
    return counts


@given(seeds, st.integers(1, 3))
def test_frequencies_sum_to_k_and_long_sequences_weigh_as_much_as_short_ones(seed: int, k: int) -> None:
    tokens = torch.tensor([1, 7, 3, 0])
    group = torch.tensor([0, 1, 0, 1])
    counts = topk_counts(4, 2, 5, k, tokens, seed)
    total = FrequencySum(2, 2, 5)
    total.add(group, counts, tokens)
    mean = total.mean()
    assert total.sequences.tolist() == [2, 1]
    torch.testing.assert_close(mean.sum(-1), torch.full((2, 2), float(k)))
    torch.testing.assert_close(mean[0], (counts[0] / 1 + counts[2] / 3) / 2)
    torch.testing.assert_close(mean[1], counts[1] / 7)


@given(seeds, st.integers(0, 6))
def test_ranks_add_up_to_one_pass(seed: int, cut: int) -> None:
    tokens = torch.tensor([2, 3, 1, 4, 2, 5])
    group = torch.tensor([0, 1, 0, 0, 1, 2])
    counts = topk_counts(6, 2, 4, 2, tokens, seed)
    whole, first, second = (FrequencySum(3, 2, 4) for _ in range(3))
    whole.add(group, counts, tokens)
    first.add(group[:cut], counts[:cut], tokens[:cut])
    second.add(group[cut:], counts[cut:], tokens[cut:])
    first.sums += second.sums
    first.sequences += second.sequences
    torch.testing.assert_close(first.mean(), whole.mean())


def test_a_group_without_sequences_is_zero_not_nan() -> None:
    assert FrequencySum(1, 2, 3).mean().tolist() == [[[0.0] * 3] * 2]


@given(seeds)
def test_delta_rows_sum_to_zero_and_stay_within_one(seed: int) -> None:
    tokens = torch.tensor([3, 4])
    total = FrequencySum(2, 3, 6)
    total.add(torch.tensor([0, 1]), topk_counts(2, 3, 6, 2, tokens, seed), tokens)
    task, general = total.mean()
    difference = delta(task.expand(2, 3, 6), general)
    torch.testing.assert_close(difference.sum(-1), torch.zeros(2, 3), atol=1e-5, rtol=0)
    assert difference.abs().max() <= 1


@given(seeds, st.floats(-1, 0.99))
def test_tau_takes_exactly_the_experts_above_it_and_fewer_as_it_rises(seed: int, tau: float) -> None:
    values = torch.rand(2, 3, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    chosen = task_experts(values, Tau(tau))
    assert (values[chosen] > tau).all()
    assert (values[~chosen] <= tau).all()
    assert not (task_experts(values, Tau(tau + 0.01)) & ~chosen).any()


def test_tau_itself_is_not_above_tau() -> None:
    assert task_experts(torch.tensor([[0.25, 0.5, 0.75]]), Tau(0.5)).tolist() == [[False, False, True]]


@given(seeds, st.integers(1, 8))
def test_top_m_takes_m_of_every_layer_none_smaller_than_one_left_out(seed: int, m: int) -> None:
    values = torch.randint(-3, 3, (2, 3, 8), generator=torch.Generator().manual_seed(seed)).float()
    chosen = task_experts(values, TopM(m))
    assert (chosen.sum(-1) == m).all()
    smallest_in = values.masked_fill(~chosen, 9).amin(-1)
    largest_out = values.masked_fill(chosen, -9).amax(-1)
    assert (smallest_in >= largest_out).all()


def test_top_m_gives_ties_to_the_lower_index_and_refuses_more_than_there_are() -> None:
    assert task_experts(torch.zeros(1, 50), TopM(3)).nonzero().tolist() == [[0, 0], [0, 1], [0, 2]]
    with pytest.raises(RamoeError, match="top-m=5, expected at most 4"):
        task_experts(torch.zeros(1, 4), TopM(5))


def test_empty_layers_are_reported_by_task() -> None:
    mask = torch.tensor([[[True, False], [False, False]], [[True, True], [False, True]]])
    assert empty_layers(mask[0]) == [1]
    assert empty_layers(mask[1]) == []
    sentences = describe_empty(mask, ["currency", "month"], Tau(0.3))
    assert len(sentences) == 1
    assert "'currency': tau=0.3 chooses no expert in 1 of 2 MoE layers (1)" in sentences[0]


@given(
    st.one_of(st.builds(Tau, st.sampled_from([-1.0, 0.25, 0.3, 0.999])), st.builds(TopM, st.integers(1, 300)))
)
def test_a_rule_survives_its_text_and_its_file_entry(rule: Rule) -> None:
    assert parse_rule(str(rule)) == rule
    assert rule_from(rule.as_dict()) == rule


@pytest.mark.parametrize("text", ["tau", "tau=", "tau=1", "tau=nan", "top-m=0", "top-m=2.5", "best=3", "0.3"])
def test_other_rules_are_refused_with_the_forms_known(text: str) -> None:
    with pytest.raises(RamoeError, match=rf"found '{text}', expected tau=X .* or top-m=M"):
        parse_rule(text)
