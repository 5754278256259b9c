"""Laws of routing steering (arXiv 2510.04694, eq. 4-5) and of the search for its setting."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.refusals import refuse_hard_steering
from ramoe_megatron.method.artefacts import ExpertFile, ModelShape
from ramoe_megatron.method.divergence import Zone
from ramoe_megatron.method.statistics import clustered_difference, paired_proportions
from ramoe_megatron.method.steering import KINDS, LEAST_RISE, NO_STEERING, NOISE_VARIANCE, Steering, steer, steering_noise
from ramoe_megatron.method.steering_search import Answer, Candidate, best, candidates, parse_tau, table

TYPES = st.sampled_from([torch.float32, torch.bfloat16])
NONE = torch.zeros(())


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [T, E] of some scale and offset, with zeros of both signs; a mask [T, E]; noise [E]."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tokens, experts = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    scale, offset = draw(st.sampled_from([1e-3, 1.0, 50.0])), draw(st.sampled_from([0.0, -3.0, 200.0]))
    z = torch.randn(tokens, experts, generator=generator) * scale + offset
    z = torch.where(torch.rand(z.shape, generator=generator) < 0.1, torch.tensor(-0.0), z)
    mask = torch.rand(z.shape, generator=generator) < draw(st.sampled_from([0.0, 0.2, 0.7]))
    noise = torch.randn(experts, generator=generator) * NOISE_VARIANCE**0.5
    return z.to(draw(TYPES)), mask, noise


@given(cases(), st.sampled_from(KINDS), st.floats(-2, 2))
def test_what_is_not_steered_keeps_its_bits_and_type(case: tuple[torch.Tensor, ...], kind: str, strength: float) -> None:
    z, mask, noise = case
    steered = steer(kind, z, mask, strength, noise)
    assert steered.dtype == z.dtype
    assert torch.equal(bits(steered)[~mask], bits(z)[~mask])
    assert torch.equal(bits(steer(kind, z, torch.zeros_like(mask), strength, noise)), bits(z))


@given(cases())
def test_soft_of_strength_zero_keeps_every_bit(case: tuple[torch.Tensor, ...]) -> None:
    z, mask, noise = case
    assert torch.equal(bits(steer("soft", z, mask, 0.0, noise)), bits(z))
    assert torch.equal(bits(steer("soft", z, mask, -0.0, noise)), bits(z))


@given(cases(), st.integers(1, 12))
def test_hard_puts_every_steered_expert_above_all_others_and_into_the_top_k_while_there_is_room(
    case: tuple[torch.Tensor, ...], k: int
) -> None:
    z, mask, noise = case
    steered = steer("hard", z, mask, 0.0, noise)
    k = min(k, z.shape[-1])
    for row, chosen, before in zip(steered, mask, z, strict=True):
        assert (row[chosen] > before.max()).all()
        top = set(row.topk(k).indices.tolist())
        steered_experts = set(chosen.nonzero().flatten().tolist())
        assert (steered_experts <= top) if len(steered_experts) <= k else (top <= steered_experts)


SCORES = {
    "softmax-after": {"score_function": "softmax", "use_pre_softmax": False},
    "softmax-before": {"score_function": "softmax", "use_pre_softmax": True},
    "sqrtsoftplus": {"score_function": "sqrtsoftplus"},
}
WIDE = torch.randn(256, 16, generator=torch.Generator().manual_seed(0)) * 8
STEERED = torch.rand(256, 16, generator=torch.Generator().manual_seed(1)).argsort(-1) < 4  # four of each token


def chosen_by_megatron(z: torch.Tensor, mask: torch.Tensor, noise: torch.Tensor, k: int, **settings: Any) -> torch.Tensor:
    """Megatron's top-k of the steered logits; bool [T, E]"""
    return topk_routing_with_score_function(steer("hard", z, mask, 0.0, noise), k, **settings)[1]


@pytest.mark.parametrize("scores", SCORES)
@given(
    seed=st.integers(0, 2**31), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), experts=st.integers(2, 64),
    scale=st.sampled_from([1e-3, 1.0, 8.0, 50.0, 1e3, 1e4, 1e6]), offset=st.sampled_from([0.0, -60.0, 20.0, 200.0]), k=st.integers(1, 12),
    steered=st.integers(1, 12), eps=st.sampled_from([0.0, 1e-9, 1e-6, 1.0]),
)  # fmt: skip
def test_hard_fills_the_top_k_of_megatrons_router(
    scores: str, seed: int, dtype: torch.dtype, experts: int, scale: float, offset: float, k: int, steered: int, eps: float
) -> None:
    """With as many steered experts as places too, where one tie with an unsteered expert would take a place."""
    generator = torch.Generator().manual_seed(seed)
    k, steered = min(k, experts), min(steered, experts)
    z = torch.randn(32, experts, generator=generator) * scale + offset
    z[:, 0].clamp_(min=-80.0)  # sqrt(softplus) of nothing but large negative numbers is 0
    mask = torch.rand(z.shape, generator=generator).argsort(-1) < steered
    noise = torch.randn(experts, generator=generator) * NOISE_VARIANCE**0.5 * eps
    chosen = chosen_by_megatron(z.to(dtype), mask, noise, k, **SCORES[scores])
    assert (chosen.sum(-1) == k).all()
    assert not (mask & ~chosen if steered <= k else chosen & ~mask).any()


@pytest.mark.parametrize(
    ("config", "words", "settings"),
    [
        ({"moe_router_score_function": "sigmoid"}, "score-function sigmoid: large logits", {"score_function": "sigmoid"}),
        (
            {"moe_router_score_function": "sqrtsoftplus", "moe_router_enable_expert_bias": True},
            "enable-expert-bias: experts are chosen by",
            {"score_function": "sqrtsoftplus", "expert_bias": torch.arange(16) * 0.05},
        ),
        ({"moe_router_num_groups": 4, "moe_router_group_topk": 2}, "group-topk 2: an expert outside", {"num_groups": 4, "group_topk": 2}),
        ({"moe_router_topk_limited_devices": 2}, "topk-limited-devices 2: an expert outside", {"num_groups": 4, "group_topk": 2}),
    ],
)  # fmt: skip
def test_hard_is_refused_where_megatrons_router_leaves_steered_experts_out(
    config: dict[str, Any], words: str, settings: dict[str, Any]
) -> None:
    chosen = chosen_by_megatron(WIDE, STEERED, torch.zeros(16), 4, **settings)
    assert (STEERED & ~chosen).any(-1).float().mean() > 0.1
    with pytest.raises(RamoeError, match=rf"^hard steering .*--moe-router-{words}.*Steer soft"):
        refuse_hard_steering(SimpleNamespace(**config))


@pytest.mark.parametrize("balancing", ["sinkhorn", "quantile_balancing", ["aux_loss", "sinkhorn"]])
def test_hard_is_refused_where_balancing_chooses(balancing: str | list[str]) -> None:
    with pytest.raises(RamoeError, match=r"--moe-router-load-balancing-type \w+: it chooses experts"):
        refuse_hard_steering(SimpleNamespace(moe_router_load_balancing_type=balancing))


@pytest.mark.parametrize("scores", ["softmax", "sqrtsoftplus"])
def test_hard_is_let_through_where_the_largest_logits_are_chosen(scores: str) -> None:
    absent = {"moe_router_enable_expert_bias": False, "moe_router_num_groups": 4, "moe_router_group_topk": None}
    refuse_hard_steering(SimpleNamespace(moe_router_score_function=scores, moe_router_load_balancing_type=["aux_loss"], **absent))


def test_soft_and_hard_by_hand() -> None:
    z = torch.tensor([[1.0, 2.0, 3.0, 6.0]])  # mean 3, squares 4 + 1 + 0 + 9 = 14
    mask = torch.tensor([True, False, True, False])
    assert steer("soft", z, mask, 0.5, NONE)[0].tolist() == pytest.approx([1 + 0.5 * 3.5**0.5, 2, 3 + 0.5 * 3.5**0.5, 6])
    assert steer("soft", z, mask, -1.0, NONE)[0].tolist() == pytest.approx([1 - 3.5**0.5, 2, 3 - 3.5**0.5, 6])
    noise = torch.tensor([-0.25, 9.0, 0.0, 9.0])
    found = steer("hard", z, mask, 0.0, noise)[0]
    assert found.tolist() == [6.25, 2, 6 + 6 * LEAST_RISE, 6]
    assert steer("hard", z.bfloat16(), mask, 0.0, noise / 1000)[0].tolist() == [6.03125, 2, 6.03125, 6]  # 8 bits: steps of 1/32


@given(cases(), st.sampled_from(KINDS), st.randoms())
def test_steering_does_not_look_at_the_numbers_of_experts(case: tuple[torch.Tensor, ...], kind: str, random: object) -> None:
    z, mask, noise = (tensor.double() if tensor.is_floating_point() else tensor for tensor in case)
    order = list(range(z.shape[-1]))
    random.shuffle(order)  # type: ignore[attr-defined]
    torch.testing.assert_close(steer(kind, z[:, order], mask[:, order], 0.5, noise[order]), steer(kind, z, mask, 0.5, noise)[:, order])


@given(cases(), st.floats(-50, 50), st.floats(0.1, 10), st.floats(-2, 2))
def test_soft_moves_and_scales_with_the_logits(case: tuple[torch.Tensor, ...], shift: float, scale: float, strength: float) -> None:
    z, mask = case[0].double(), case[1]
    moved = steer("soft", z, mask, strength, NONE)
    torch.testing.assert_close(steer("soft", z + shift, mask, strength, NONE), moved + shift)
    torch.testing.assert_close(steer("soft", z * scale, mask, strength, NONE), moved * scale)


@given(cases(), st.sampled_from(KINDS), st.floats(-2, 2))
def test_reduced_precision_is_float32_rounded_once(case: tuple[torch.Tensor, ...], kind: str, strength: float) -> None:
    z, mask, noise = case[0].bfloat16(), case[1], case[2] * 100  # so that the next number above decides nothing
    expected = steer(kind, z.float(), mask, strength, noise).bfloat16()
    largest = z.amax(dim=-1, keepdim=True)
    rounded_away = (expected <= largest) & mask if kind == "hard" else torch.zeros_like(mask)
    assert torch.equal(steer(kind, z, mask, strength, noise)[~rounded_away], expected[~rounded_away])


def test_noise_is_the_same_every_time_and_of_the_stated_size() -> None:
    torch.manual_seed(5)
    noise = steering_noise(40, 128)
    torch.manual_seed(6)
    assert torch.equal(noise, steering_noise(40, 128))
    assert noise.std().item() == pytest.approx(1e-3, rel=0.05)
    assert noise.unique().numel() > 5000


# --- settings ---

DELTA = torch.zeros(2, 4, 6)
DELTA[0, 1, 0], DELTA[0, 2, 5], DELTA[1, 2, 3], DELTA[1, 3, 3] = 0.45, 0.35, 0.28, 0.9


def expert_file() -> ExpertFile:
    return ExpertFile(
        tasks=("even", "odd"), shape=ModelShape(4, 6, 2, "softmax", 8), expert_mask=DELTA > 0.4, delta=DELTA, task_frequency=DELTA,
        general_frequency=DELTA[0], english_pattern={}, layer_number=torch.arange(1, 5), rule={"name": "tau", "tau": 0.4},
        zone=Zone(1, 2, "auto", "floor"),
        checkpoint="base", path=Path("experts.safetensors"),
    )  # fmt: skip


def places(mask: torch.Tensor) -> list[list[int]]:
    return mask.nonzero().tolist()


def test_the_experts_are_the_files_or_those_above_tau_inside_the_layers() -> None:
    file = expert_file()
    assert places(Steering("hard", None, None, (0, 3)).experts(file)) == [[0, 1, 0], [1, 3, 3]]
    assert places(Steering("hard", None, 0.3, (1, 2)).experts(file)) == [[0, 1, 0], [0, 2, 5]]
    assert places(Steering("hard", None, 0.25, (2, 2)).experts(file)) == [[0, 2, 5], [1, 2, 3]]
    with pytest.raises(RamoeError, match="MoE layers 2 to 4, but the model has 0 to 3"):
        Steering("hard", None, 0.25, (2, 4)).experts(file)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (("firm", 0.5, None), "kind 'firm', expected soft or hard"),
        (("soft", None, None), "strength None"),
        (("soft", float("nan"), None), "strength nan"),
        (("hard", 0.5, None), "hard, which takes none"),
        (("soft", 0.5, 1.5), "tau 1.5"),
    ],
)
def test_a_setting_that_is_none_is_refused(values: tuple[str, float | None, float | None], words: str) -> None:
    with pytest.raises(RamoeError, match=words):
        Steering(*values, (0, 1))  # type: ignore[arg-type]


def test_a_setting_comes_back_from_its_document() -> None:
    for setting in (Steering("soft", 0.5, 0.3, (1, 2)), Steering("hard", None, None, (0, 3))):
        assert Steering.from_document(setting.document(), "x") == setting
    assert Steering.from_document(NO_STEERING, "x") is None
    for bad in ({}, {"kind": "soft"}, Steering("hard", None, None, (0, 3)).document() | {"layers": 3}, {**NO_STEERING, "kind": "soft"}):
        with pytest.raises(RamoeError, match=r"steering\.json: bad setting"):
            Steering.from_document(bad, "steering.json")


# --- the search ---


def test_every_combination_is_tried_once_and_what_is_left_out_is_told() -> None:
    tried, skipped = candidates(expert_file(), {"even", "odd"}, ["soft", "hard"], [0.3, 0.34, 0.95, None], [0.5, 1.0], ["auto", "0-3"])
    assert tried[0] == Candidate(None, None, 0)
    settings = [(c.steering.kind, c.steering.strength, c.steering.tau, c.steering.layers, c.experts) for c in tried[1:]]  # type: ignore[union-attr]
    sets = [(0.3, (1, 2), 2), (None, (1, 2), 1), (0.3, (0, 3), 3), (None, (0, 3), 2)]
    expected = [("soft", strength, *own) for own in sets for strength in (0.5, 1.0)] + [("hard", None, *own) for own in sets]
    assert settings == expected
    assert [line.split(";")[0] for line in skipped] == [
        "tau=0.34 in MoE layers 1-2: the experts of an earlier setting",
        "tau=0.95 in MoE layers 1-2: no expert to steer",
        "tau=0.34 in MoE layers 0-3: the experts of an earlier setting",
        "tau=0.95 in MoE layers 0-3: no expert to steer",
    ]


def test_only_the_tasks_of_the_data_count() -> None:
    (_, only), skipped = candidates(expert_file(), {"odd", "third"}, ["hard"], [0.3], [], ["0-3"])
    assert (only.experts, skipped) == (1, [])
    with pytest.raises(RamoeError, match=r"even, odd, none of which is in the data \(third\)"):
        candidates(expert_file(), {"third"}, ["hard"], [0.3], [], ["auto"])
    with pytest.raises(RamoeError, match=r"nothing to try .*no expert to steer"):
        candidates(expert_file(), {"odd"}, ["hard"], [0.3], [], ["auto"])
    with pytest.raises(RamoeError, match="3-9"):
        candidates(expert_file(), {"odd"}, ["hard"], [0.3], [], ["3-9"])


@pytest.mark.parametrize("text", ["1", "nan", "best", "-2", ""])
def test_a_tau_that_is_none_is_refused(text: str) -> None:
    assert (parse_tau("file"), parse_tau("0.25"), parse_tau("-1")) == (None, 0.25, -1.0)
    with pytest.raises(RamoeError, match="--ramoe-taus"):
        parse_tau(text)


def tried(count: int) -> list[Candidate]:
    return [Candidate(None, None, 0), *(Candidate(Steering("soft", 0.1 * n, None, (1, 2)), "auto", 3) for n in range(1, count))]


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=30))
def test_a_row_counts_the_targets_alone_and_compares_them_with_no_steering(outcomes: list[tuple[bool, bool]]) -> None:
    answers = [Answer(f"q{n}", "es") for n in range(len(outcomes))] + [Answer("q0", "en"), Answer("q1", "en")]
    plain, steered = [p for p, _ in outcomes], [s for _, s in outcomes]
    rows = table(tried(2), answers, [[*plain, True, True], [*steered, True, False]], "en")
    change = paired_proportions(steered, plain)
    assert (rows[1]["n"], rows[1]["correct"], rows[1]["accuracy"]) == (len(outcomes), sum(steered), sum(steered) / len(outcomes))
    assert (rows[1]["change"], rows[1]["low"], rows[1]["high"], rows[1]["p"]) == (change.change, change.low, change.high, change.p)
    assert [row["anchor_correct"] for row in rows] == [2, 1]
    assert rows[0]["change"] == 0
    assert rows[1]["languages"] == [{"language": "es", "n": len(outcomes), "correct": sum(steered)}]


def test_parallel_rows_of_one_example_are_no_independent_draws() -> None:
    answers = [Answer(f"q{n}", language) for n in range(6) for language in ("es", "tr")]
    plain, steered = [False] * 12, [n < 4 for n in range(12)]
    row = table(tried(2), answers, [plain, steered], "en")[1]
    change = clustered_difference({f"q{n}": [float(n < 2)] * 2 for n in range(6)})
    assert (row["change"], row["low"], row["high"]) == pytest.approx((change.change, change.low, change.high))
    assert row["anchor_accuracy"] is None
    with pytest.raises(RamoeError, match="only 'es' examples"):
        table(tried(1), [Answer("q", "es")], [[True]], "es")


def test_the_best_is_the_most_right_and_of_equals_the_gentlest() -> None:
    def row(kind: str, strength: float | None, experts: int, correct: int) -> dict[str, object]:
        return {"kind": kind, "strength": strength, "experts": experts, "correct": correct}

    none, half, minus = row("none", None, 0, 5), row("soft", 0.5, 3, 5), row("soft", -0.25, 3, 5)
    hard, few, more = row("hard", None, 1, 5), row("soft", 0.5, 2, 5), row("soft", 2.0, 9, 6)
    assert best([hard, half, none, minus]) is none
    assert best([hard, half, minus]) is minus
    assert best([hard, half, few]) is few
    assert best([none, hard, half, few, more]) is more
