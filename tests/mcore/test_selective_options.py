"""What selective training refuses before anything starts, and what a selection is made of."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.tensors import ModelShape
from ramoe_megatron.artifacts.usage import UsageFile
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.arguments import RoutingAlignmentConfig
from ramoe_megatron.mcore.select.selective_options import SelectiveOptions
from ramoe_megatron.mcore.select.trained import (
    Selection,
    refuse_partial_groups,
    refuse_unreached,
    select_weights,
)
from ramoe_megatron.method.divergence import NoZone
from ramoe_megatron.method.selection import esft, rise

SHAPE = ModelShape(num_moe_layers=4, num_experts=8, topk=2, score_function="softmax", hidden_size=32)
CONFIG = SimpleNamespace(
    num_moe_experts=8,
    moe_router_topk=2,
    moe_router_score_function="softmax",
    moe_grouped_gemm=True,
    expert_model_parallel_size=2,
)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"train": "experts"}, ["--ramoe-train 'experts'", "esft-gate"]),
        ({"train": "rise", "train_budget": 4}, ["without --ramoe-usage", "--ramoe-save-usage"]),
        ({"train": "rise", "usage": "u"}, ["without --ramoe-train-budget"]),
        ({"train": "esft-gate", "usage": "u"}, ["without --ramoe-train-top-p"]),
        ({"train": "esft-token", "train_top_p": 0.5}, ["without --ramoe-usage"]),
        ({"usage": "u"}, ["--ramoe-usage u", "--ramoe-train all", "remove"]),
        ({"train": "routers", "train_budget": 3}, ["--ramoe-train-budget 3", "only rise uses it"]),
        (
            {"train": "rise", "usage": "u", "train_budget": 3, "train_top_p": 0.5},
            ["--ramoe-train-top-p 0.5", "only esft-gate"],
        ),
        ({"train": "rise", "usage": "u", "train_budget": 0}, ["--ramoe-train-budget 0", "at least 1"]),
        ({"train": "esft-token", "usage": "u", "train_top_p": 1.5}, ["--ramoe-train-top-p 1.5", "at most 1"]),
        ({"train": "esft-token", "usage": "u", "train_top_p": float("nan")}, ["--ramoe-train-top-p nan"]),
    ],
)
def test_flags_that_do_not_go_together_are_refused(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RamoeError) as error:
        SelectiveOptions(**fields)
    assert all(word in str(error.value) for word in words), error.value


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Usage of three languages, and an expert file of two tasks."""
    frequency = torch.rand(3, 4, 8, generator=torch.Generator().manual_seed(0)) / 4
    UsageFile(
        ("en", "es", "tr"),
        SHAPE,
        torch.tensor([10, 20, 30]),
        frequency,
        frequency**2,
        torch.arange(1, 5),
        "base@4",
    ).save(tmp_path / "usage.safetensors")
    mask = torch.zeros(2, 4, 8, dtype=torch.bool)
    mask[0, 2, 1] = mask[1, 3, 5] = mask[1, 2, 1] = True
    zeros = torch.zeros(2, 4, 8)
    ExpertFile(
        ("even", "odd"), SHAPE, mask, zeros, zeros, zeros[0], {"last": zeros}, torch.arange(1, 5),
        {"name": "tau", "tau": 0.3},
        NoZone("flat"), "base@4",
    ).save(tmp_path / "experts.safetensors")  # fmt: skip
    return tmp_path


def selected(files: Path, languages: list[str], **options: Any) -> Selection:
    if options["train"] not in ("routers", "task-experts"):
        options["usage"] = str(files / "usage.safetensors")
    alignment = RoutingAlignmentConfig(experts=str(files / "experts.safetensors"))
    return select_weights(SelectiveOptions(**options), alignment, CONFIG, 4, languages, "en")


def test_a_selection_is_that_of_the_training_languages(files: Path) -> None:
    usage = UsageFile.load(files / "usage.safetensors")
    found = selected(files, ["en", "tr"], train="rise", train_budget=7)
    # every language is compared, the anchor is no target
    assert torch.equal(found.experts_LE, rise(usage.frequency, [2], 7))
    assert not found.routers
    found = selected(files, ["en", "tr"], train="esft-gate", train_top_p=0.4)
    assert torch.equal(found.experts_LE, esft((usage.gate[0] * 10 + usage.gate[2] * 30) / 40, 0.4))
    found = selected(files, ["tr"], train="esft-token", train_top_p=0.4)
    assert torch.equal(found.experts_LE, esft(usage.frequency[2], 0.4))
    assert selected(files, ["tr"], train="task-experts").experts_LE.nonzero().tolist() == [[2, 1], [3, 5]]
    routers = selected(files, ["tr"], train="routers")
    assert routers.routers
    assert not routers.experts_LE.any()


@pytest.mark.parametrize(
    ("languages", "options", "words"),
    [
        (["en", "sw"], {"train": "rise", "train_budget": 3}, ["no language 'sw'", "en, es, tr"]),
        (
            ["en"],
            {"train": "rise", "train_budget": 3},
            ["all training examples are in en", "target language"],
        ),
        (
            ["tr"],
            {"train": "rise", "train_budget": 33},
            ["--ramoe-train-budget 33", "32 (layer, expert) pairs"],
        ),
    ],
)
def test_what_the_files_cannot_give_is_refused(
    files: Path, languages: list[str], options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(RamoeError) as error:
        selected(files, languages, **options)
    assert all(word in str(error.value) for word in words), error.value


def experts(*pairs: tuple[int, int]) -> Selection:
    mask = torch.zeros(4, 8, dtype=torch.bool)
    for layer, expert in pairs:
        mask[layer, expert] = True
    return Selection("rise", False, mask, "")


def test_alignment_has_to_reach_what_is_trained(files: Path) -> None:
    """Experts change the routing of later layers alone; a router its own."""
    on = RoutingAlignmentConfig(
        coeff=1.0, experts=str(files / "experts.safetensors"), examples="all", layers="1-2"
    )
    for fine in (
        experts((1, 0)),
        experts((0, 7), (3, 1)),
        Selection("routers", True, torch.zeros(4, 8, dtype=torch.bool), ""),
    ):
        refuse_unreached(fine, on)
    for blind in (experts((2, 0)), experts((2, 1), (3, 5))):
        with pytest.raises(RamoeError, match="no trained expert is below the last aligned MoE layer 2"):
            refuse_unreached(blind, on)
        refuse_unreached(blind, RoutingAlignmentConfig())


def test_grouped_experts_train_together_or_not_at_all() -> None:
    whole = experts(*((1, expert) for expert in range(4, 8)))  # all of the second rank's
    refuse_partial_groups(whole, CONFIG)
    for partial in (experts((1, 4)), experts(*((2, expert) for expert in range(2, 6)))):
        with pytest.raises(RamoeError, match="--moe-grouped-gemm"):
            refuse_partial_groups(partial, CONFIG)
        refuse_partial_groups(partial, SimpleNamespace(**{**vars(CONFIG), "moe_grouped_gemm": False}))
