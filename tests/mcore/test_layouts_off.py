"""Off is Megatron bit for bit; evaluation, saving and resuming change nothing; a context is used once."""

import json
from pathlib import Path

import pytest
import torch
from layout_rows import LONG
from small_run import outcome, weights
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

LAYOUTS = ("one", "tp")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert len(expected) > 0
    different = [key for key, tensor in expected.items() if not torch.equal(found[key], tensor)]
    assert not different


def checkpoint(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: weights, and the optimizer's moments and master weights."""
    reader = FileSystemReader(folder / f"iter_{step:07d}")
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(tensors, storage_reader=reader, no_dist=True)
    assert any("exp_avg_sq" in name for name in tensors)
    return tensors


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("off", ["off", "zero"])
def test_off_is_stock_megatron_bit_for_bit(layouts: Path, off: str, layout: str) -> None:
    """Ten steps of our job without alignment flags, or with all of them and coefficient 0, against
    `pretrain()` with nothing of ours but the data. Both leave padding out of Megatron's own losses, the stock
    script by the model's `padding_mask`."""
    assert_equal(weights(layouts, f"{off}-{layout}"), weights(layouts, f"stock-{layout}"))
    assert_equal(
        checkpoint(layouts / f"{off}-{layout}", LONG), checkpoint(layouts / f"off-stock-{layout}", LONG)
    )


def test_off_logs_nothing_of_ours(layouts: Path) -> None:
    assert outcome(layouts, "off-one")["steps"] == outcome(layouts, "zero-one")["steps"] == [{}] * LONG


def test_alignment_changes_the_weights(layouts: Path) -> None:
    """Or the comparisons in this file would be empty."""
    off, on = weights(layouts, "off-one"), weights(layouts, "through-one")
    assert all(not torch.equal(on[key], off[key]) for key in off if "router" in key)


def test_a_users_own_script_trains_the_same(layouts: Path) -> None:
    """Also with multi-token prediction, whose loss is over the loss tokens, and an expert bias."""
    ours, script = weights(layouts, "one"), weights(layouts, "script")
    assert_equal(script, ours)
    assert_equal(weights(layouts, "script-every"), weights(layouts, "one-every"))
    assert outcome(layouts, "script-every")["megatron"] == outcome(layouts, "one-every")["megatron"]
    assert ours.keys() == weights(layouts, "stock-one").keys()  # state-dict keys are Megatron's own


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_adds_nothing(layouts: Path, layout: str) -> None:
    """Validation after steps 3, 6 and 9, on data without a taxonomy, changes neither weights nor metrics."""
    assert_equal(weights(layouts, f"evaluated-{layout}"), weights(layouts, f"through-{layout}"))
    assert outcome(layouts, f"evaluated-{layout}")["steps"] == outcome(layouts, f"through-{layout}")["steps"]
    ranks = 1 if layout == "one" else 2
    assert any(
        "validation loss at iteration 9" in log.read_text() for log in layouts.glob(f"ranks{ranks}*.log")
    )


@pytest.mark.parametrize("layout", [*LAYOUTS, "distributed"])
def test_resuming_goes_on_bit_for_bit(layouts: Path, layout: str) -> None:
    """Steps 6 to 10 from the checkpoint of step 5: weights and figures of the run that went through."""
    assert_equal(weights(layouts, f"resumed-{layout}"), weights(layouts, f"through-{layout}"))
    through = outcome(layouts, f"through-{layout}")["steps"]
    assert len(through) == LONG
    assert outcome(layouts, f"resumed-{layout}")["steps"] == through[5:]


@pytest.mark.parametrize("calls", [0, 2])
def test_a_model_not_called_once_for_a_micro_batch_is_told(layouts: Path, calls: int) -> None:
    error = json.loads((layouts / f"calls-{calls}.json").read_text())["error"]
    words = (
        ["routing_batch", "model once inside"] if calls == 0 else ["MoE layer 1", "twice", "one micro-batch"]
    )
    assert all(word in error for word in words), error
