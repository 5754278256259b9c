"""Laws of the expert selections, and of the usage that they read."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from ramoe_megatron.artifacts.tensors import ModelShape
from ramoe_megatron.artifacts.usage import UsageFile, UsageSum
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.selection import esft, overlap, rise, specificity, zones

seeds = st.integers(0, 2**31)
SHAPE = ModelShape(num_moe_layers=3, num_experts=4, topk=2, score_function="softmax", hidden_size=8)


def usage(seed: int, languages: int = 3, layers: int = 5, experts: int = 6) -> torch.Tensor:
    """Frequencies of which all are different, some experts unused."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(languages, layers, experts, generator=generator, dtype=torch.float64)
    return values * (torch.rand(layers, experts, generator=generator) > 0.2)


def test_the_zones_are_cut_at_three_and_five_eighths() -> None:
    assert zones(8).tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert zones(4).tolist() == [0, 1, 1, 2]
    assert zones(1).tolist() == [1]
    assert torch.bincount(zones(48)).tolist() == [18, 12, 18]  # 37.5 % and 62.5 % of 48
    assert torch.bincount(zones(32)).tolist() == [12, 8, 12]


@given(st.integers(1, 100))
def test_the_zones_are_symmetric(layers: int) -> None:
    assert torch.equal(zones(layers), 2 - zones(layers).flip(0))


def test_the_scores_by_hand() -> None:
    frequency = torch.tensor([[[0.2, 0.0, 0.3]], [[0.6, 0.0, 0.3]]])  # mean 0.4, 0, 0.3; deviation 0.2, 0, 0
    torch.testing.assert_close(specificity(frequency, [1]), torch.tensor([[1.5 * 7.0, 0.0, 4.0]]).double())
    torch.testing.assert_close(
        specificity(frequency, [0, 1]), torch.tensor([[(0.5 * 3 + 1.5 * 7) / 2, 0.0, 4.0]]).double()
    )
    torch.testing.assert_close(overlap(frequency), torch.tensor([[1 / 1.5 * 5, 0.0, 4.0]]).double())


def test_rise_by_hand() -> None:
    """Three layers, one a zone: the specific expert of the outer two, the shared one of the middle."""
    frequency = torch.tensor([[0.5, 0.4, 0.1], [0.1, 0.4, 0.5]])[:, None].expand(2, 3, 3)
    assert rise(frequency, [1], 3).tolist() == [
        [False, False, True],
        [False, True, False],
        [False, False, True],
    ]
    assert rise(frequency, [0], 3).tolist() == [
        [True, False, False],
        [False, True, False],
        [True, False, False],
    ]
    assert rise(frequency, [1], 3, split=(0, 1, 2)).tolist() == [
        [False] * 3,
        [False, True, False],
        [False, True, True],
    ]


def test_ties_go_to_the_lower_pair() -> None:
    assert rise(torch.full((2, 8, 2), 0.5), [1], 4).nonzero().tolist() == [[0, 0], [0, 1], [3, 0], [5, 0]]
    assert esft(torch.full((1, 4), 0.25), 0.5).tolist() == [[True, True, False, False]]


@given(seeds, st.integers(1, 30))
def test_rise_meets_its_budget_in_every_zone(seed: int, budget: int) -> None:
    chosen = rise(usage(seed), [1, 2], budget)
    assert chosen.sum() == budget
    for zone, layers in enumerate(torch.bincount(zones(5)).tolist()):
        assert abs(int(chosen[zones(5) == zone].sum()) - budget * layers / 5) < 1


@given(seeds, st.integers(1, 20))
def test_rise_follows_a_permutation_of_experts_and_ignores_one_of_languages(seed: int, budget: int) -> None:
    no_ties = 1e-3 * torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(seed))
    frequency = usage(seed, experts=6).clamp(min=no_ties)
    generator = torch.Generator().manual_seed(seed + 1)
    experts, languages = torch.randperm(6, generator=generator), torch.randperm(3, generator=generator)
    chosen = rise(frequency, [0, 2], budget)
    assert torch.equal(rise(frequency[:, :, experts], [0, 2], budget), chosen[:, experts])
    places = languages.argsort().tolist()
    assert torch.equal(rise(frequency[languages], [places[2], places[0]], budget), chosen)


@given(seeds, st.integers(1, 30))
def test_an_expert_that_no_language_uses_comes_last(seed: int, budget: int) -> None:
    frequency = usage(seed)
    chosen = rise(frequency, [1], budget)
    for zone in range(3):
        rows = zones(5) == zone
        used = frequency.mean(0)[rows] > 0
        if (chosen[rows] & ~used).any():
            special = zone != 1
            assert (chosen[rows] | ~used | (special & (frequency[1][rows] == 0))).all()
    assert torch.isfinite(specificity(frequency, [1])).all()
    assert torch.isfinite(overlap(frequency)).all()


@pytest.mark.parametrize(
    ("budget", "targets", "split"),
    [(0, [1], None), (31, [1], None), (3, [], None), (3, [1], (1, 1, 2)), (9, [1], (0, 9, 0))],
)
def test_rise_refuses_what_the_layers_cannot_hold(
    budget: int, targets: list[int], split: tuple[int, ...] | None
) -> None:
    with pytest.raises(RamoeError, match="RISE"):
        rise(usage(1), targets, budget, split)


def test_esft_by_hand() -> None:
    score = torch.tensor([[0.1, 0.5, 0.4], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert esft(score, 0.5).tolist() == [[False, True, False], [True, False, False], [False] * 3]
    assert esft(score, 0.9).tolist() == [[False, True, True], [True, False, False], [False] * 3]
    assert esft(score, 0.91).tolist() == [[True] * 3, [True, False, False], [False] * 3]


@given(seeds, st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0.01, 100))
def test_esft_is_the_fewest_that_reach_the_share(
    seed: int, top_p: float, other: float, factor: float
) -> None:
    score = usage(seed)[0]
    chosen = esft(score, top_p)
    total = score.sum(-1)
    assert ((score * chosen).sum(-1) >= (top_p - 1e-5) * total).all()
    smallest = torch.where(chosen, score, torch.inf).amin(-1)
    without = (score * chosen).sum(-1) - torch.where(smallest.isfinite(), smallest, 0.0)
    assert ((without < top_p * total) | (total == 0)).all()
    assert (torch.where(chosen, -torch.inf, score).amax(-1) <= smallest).all()  # the largest ones
    assert torch.equal(esft(score * factor, top_p), chosen)  # normalised by the layer's own total
    more, fewer = esft(score, max(top_p, other)), esft(score, min(top_p, other))
    assert not (fewer & ~more).any()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(esft(score[:, order], top_p), chosen[:, order])


@given(seeds)
def test_a_share_of_one_takes_every_expert_with_a_score(seed: int) -> None:
    score = usage(seed)[0] ** 40  # shares far below what a float resolves beside 1
    assert torch.equal(esft(score, 1.0), score > 0)
    for top_p in (0.0, 1.5):
        with pytest.raises(RamoeError, match="top-p"):
            esft(score, top_p)


# --- usage ---


def made(path: Path, **changed: object) -> UsageFile:
    fields: dict[str, object] = {
        "languages": ("en", "tr"),
        "shape": SHAPE,
        "tokens": torch.tensor([1, 3]),
        "frequency": torch.full((2, 3, 4), 0.5),
        "gate": torch.tensor([0.25, 0.5])[:, None, None].expand(2, 3, 4),
        "layer_number": torch.tensor([1, 2, 3]),
        "checkpoint": "base@4",
    }
    UsageFile(**(fields | changed)).save(path)  # type: ignore[arg-type]
    return UsageFile.load(path)


def test_a_usage_file_comes_back_as_it_was(tmp_path: Path) -> None:
    found = made(tmp_path / "usage.safetensors")
    assert (found.languages, found.shape, found.tokens.tolist(), found.checkpoint) == (
        ("en", "tr"),
        SHAPE,
        [1, 3],
        "base@4",
    )
    assert found.gate[1, 2].tolist() == [0.5] * 4
    torch.testing.assert_close(
        found.mean("gate", ["tr", "en"]), torch.full((3, 4), (0.25 + 3 * 0.5) / 4).double()
    )
    assert "ramoe-usage" in safe_open(tmp_path / "usage.safetensors", "pt").metadata()["ramoe"]
    found.check_model(3, 4, 2, "softmax")
    with pytest.raises(RamoeError, match="num_experts is 4 in the file, 8 in the model"):
        found.check_model(3, 8, 2, "softmax")
    with pytest.raises(RamoeError, match="no language 'sw', the file was profiled on en, tr"):
        found.places(["en", "sw"])


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"languages": ("en", "en")}, "different names"),
        ({"tokens": torch.tensor([0, 3])}, "counts above 0"),
        ({"gate": -torch.ones(2, 3, 4)}, "below 0"),
        ({"frequency": torch.ones(2, 3, 4)}, "sums to 4, expected at most 2"),
        ({"frequency": torch.ones(2, 3, 5)}, "has shape"),
        ({"gate": torch.full((2, 3, 4), torch.nan)}, "not finite"),
    ],
)
def test_bad_usage_is_refused(tmp_path: Path, changed: dict[str, object], told: str) -> None:
    with pytest.raises(RamoeError, match=told):
        made(tmp_path / "usage.safetensors", **changed)


@given(seeds, st.integers(1, 5))
def test_usage_is_a_mean_over_tokens_however_they_are_cut_into_sequences(seed: int, cut: int) -> None:
    """Counts come back whole from float32 means."""
    generator = torch.Generator().manual_seed(seed)
    chosen_TLE = torch.rand(301, 2, 4, generator=generator).topk(2, dim=-1).indices
    map_TLE = torch.zeros(301, 2, 4).scatter(-1, chosen_TLE, 1.0)
    gate_TLE = map_TLE * torch.rand(301, 2, 4, generator=generator)
    total = UsageSum(["en", "tr"], 2, 4)
    lengths = [301 // cut] * (cut - 1) + [301 - 301 // cut * (cut - 1)]
    for part, gate in zip(map_TLE.split(lengths), gate_TLE.split(lengths), strict=True):
        total.add("tr", part.mean(0)[None], gate.mean(0)[None], torch.tensor([len(part)]))
    total.add("en", torch.full((1, 2, 4), 0.5), torch.zeros(1, 2, 4), torch.tensor([2]))
    shape = ModelShape(2, 4, 2, "softmax", 8)
    found = total.file(shape, [1, 2], "base@4", [])
    assert found.tokens.tolist() == [2, 301]
    assert torch.equal(found.frequency[1], (map_TLE.sum(0).double() / 301).float())
    torch.testing.assert_close(found.gate[1], gate_TLE.double().mean(0).float())
