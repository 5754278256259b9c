"""Laws of the CPU backend's attention, on real Megatron over one gloo rank and then two.

A packed sample is computed as if it were alone, and a context-parallel rank's rows as if it held the whole
sequence. Gradients are those after `finalize_model_grads`, under per-token loss. Without it Megatron's
cross-entropy is a mean of the context-parallel ranks' means: that what alignment adds to the gradient is the
same then too, the rows `cp-alone` and `lm-cp` of `layout_rows` show.

Training on packs, and context parallelism beside other kinds: `test_layouts_packed.py`, `test_layouts.py`.
Not covered: attention dropout.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_run import aligned_flags, load_flags, profile_flags, run_table, training_flags, write_world

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.cpu.attention import _rows_of_ranks, masked_pairs

CP = ("--context-parallel-size", "2")
PER_TOKEN = ("--calculate-per-token-loss",)
PROMPT = ("--ramoe-tokens", "prompt", "--ramoe-target", "profile")  # a mean over rows of both ranks
JOB = str(Path(__file__).parents[1] / "support/attention_job.py")
PADDING = slice(24, 32)
EQUAL = ("plain", "aligned")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attention")
    write_world(folder)

    jobs = {
        "plain": training_flags(folder, *load_flags(folder), *PER_TOKEN),
        "aligned": aligned_flags(folder, *PER_TOKEN, *PROMPT),
    }

    def rows(ranks: int, *more: str) -> list[dict[str, Any]]:
        trained = [
            {"name": f"{name}{ranks}", "job": "finetune", "argv": [*flags, *more]}
            for name, flags in jobs.items()
        ]
        return [
            *trained,
            {"name": f"pack{ranks}", "job": JOB, "argv": [str(folder / f"pack{ranks}.safetensors")]},
        ]

    base = training_flags(folder, "--save", str(folder / "base"), "--save-interval", "2")
    profile = {"name": "profile", "job": "profile", "argv": profile_flags(folder, "profile")}
    run_table(1, [{"name": "base", "job": "finetune", "argv": base}, profile, *rows(1)], folder)
    run_table(2, rows(2, *CP), folder)
    return folder


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def prefixed(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def test_a_packed_sample_is_computed_as_if_alone(world: Path) -> None:
    found = load_file(world / "pack1.safetensors")
    packed, alone = prefixed(found, "packed."), prefixed(found, "alone.")
    assert packed.keys() == alone.keys() > {"output", "input gradient"}
    for name, expected in alone.items():
        assert relative_error(packed[name], expected) < 1e-5, name
    assert not packed["input gradient"][PADDING].any()


def test_a_pack_is_the_same_on_one_and_two_context_parallel_ranks(world: Path) -> None:
    one, two = (prefixed(load_file(world / f"pack{ranks}.safetensors"), "packed.") for ranks in (1, 2))
    assert one.keys() == two.keys()
    for name, expected in one.items():
        assert relative_error(two[name], expected) < 1e-5, name


@pytest.mark.parametrize("name", EQUAL)
def test_training_is_the_same_on_one_and_two_context_parallel_ranks(world: Path, name: str) -> None:
    one, *two = (load_file(world / f"{name}{place}.safetensors") for place in ("1.0", "2.0", "2.1"))
    assert {f"grad.{layer}" for layer in (1, 2, 3, 4)} < one.keys()
    for rank in two:
        assert rank.keys() == one.keys()
        for key, expected in one.items():
            assert relative_error(rank[key], expected) < 1e-5, key
    logged = [json.loads((world / f"{name}{ranks}.json").read_text()) for ranks in (1, 2)]
    assert all("error" not in outcome for outcome in logged)
    assert logged[1]["first"] == pytest.approx(logged[0]["first"], rel=1e-5, abs=1e-9)
    assert ("routing_alignment_loss" in logged[0]["first"]) == (name != "plain")


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.sampled_from([1, 2, 3]),
    st.none() | st.integers(0, 12),
)
def test_every_query_sees_the_rows_before_it_in_its_own_sample(
    units: list[int], cp: int, window: int | None
) -> None:
    """With a window, only the nearest of them."""
    lengths = [2 * cp * unit for unit in units]
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    rows = _rows_of_ranks(sum(lengths), cp, borders, None)
    keys = torch.cat(rows)
    seen = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool)
    for mine in rows:
        seen[mine[:, None], keys[None]] = ~masked_pairs(mine, keys, borders, window)
    expected = torch.block_diag(*(torch.ones(n, n) for n in lengths)).tril().bool()
    assert torch.equal(seen, expected if window is None else expected.triu(-window))


def test_what_causal_attention_would_get_wrong_is_refused(world: Path) -> None:
    told = json.loads((world / "pack1.safetensors.json").read_text())
    for name, text in zip(
        ("attention mask", "no_mask", "--window-size", "thd", "--hybrid-context-parallel"), told, strict=True
    ):
        assert name in text


def test_packs_that_two_ranks_cannot_share_are_refused() -> None:
    for borders, length in (([0, 6, 12], 12), ([0, 4, 8], 12)):
        with pytest.raises(RamoeError, match="multiple of 4"):
            _rows_of_ranks(length, 2, torch.tensor(borders), None)
