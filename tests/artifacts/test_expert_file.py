"""Laws of the expert file: round trips to the same bytes; errors for inconsistent files and other models."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from artefact_files import expert_file
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.files import sha256
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.divergence import NoZone, Zone


@pytest.mark.parametrize("zone", [Zone(0, 2, "0-2", "given"), NoZone("the divergence curve is flat")])
def test_expert_file_round_trip(tmp_path: Path, zone: Zone | NoZone) -> None:
    path = tmp_path / "experts.safetensors"
    written = expert_file(zone=zone)
    written.save(path)
    read = ExpertFile.load(path)
    for name in ("expert_mask", "delta", "task_frequency", "general_frequency", "layer_number"):
        assert torch.equal(getattr(read, name), getattr(written, name)), name
        assert getattr(read, name).dtype == getattr(written, name).dtype
    assert set(read.english_pattern) == {"last", "all"}
    assert torch.equal(read.english_pattern["last"], written.english_pattern["last"])
    for name in ("tasks", "shape", "rule", "zone", "checkpoint", "sequences", "package_version"):
        assert getattr(read, name) == getattr(written, name), name
    assert list(read.data) == list(written.data)
    assert load_file(path)["expert_mask"].dtype == torch.uint8


def test_the_anchor_is_kept_and_older_files_have_none(tmp_path: Path) -> None:
    path = tmp_path / "experts.safetensors"
    replace(expert_file(), anchor="zh").save(path)
    assert ExpertFile.load(path).anchor == "zh"
    with safe_open(path, framework="pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        meta = json.loads(handle.metadata()["ramoe"])
    del meta["anchor"]
    save_file(tensors, path, {"ramoe": json.dumps(meta)})
    assert ExpertFile.load(path).anchor is None


def test_the_same_experts_give_the_same_bytes(tmp_path: Path) -> None:
    expert_file().save(tmp_path / "a")
    expert_file().save(tmp_path / "b")
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta": torch.zeros(2, 3, 5)}, r"delta has shape \(2, 3, 5\), expected \(2, 3, 4\)"),
        (
            {"general_frequency": torch.full((3, 4), float("nan"))},
            "general_frequency has values that are not finite",
        ),
        ({"english_pattern": {"last": torch.full((2, 3, 4), 0.5)}}, "sum to neither 1 nor 0"),
        (
            {"english_pattern": {"first": torch.zeros(2, 3, 4)}},
            "'first', expected one of prompt, response, all, last",
        ),
        ({"zone": Zone(1, 3, "auto", "")}, "zone 1 to 3, expected layers within 0 to 2"),
    ],
)
def test_an_inconsistent_expert_file_is_not_written(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(RamoeError, match=message):
        replace(expert_file(), **change).save(tmp_path / "experts.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_expert_file_whose_tensors_do_not_fit_its_metadata_is_refused_on_loading(tmp_path: Path) -> None:
    path = tmp_path / "experts.safetensors"
    expert_file().save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for name, tensor, message in [
        ("delta", torch.zeros(2, 3, 5), r"delta has shape \(2, 3, 5\), expected \(2, 3, 4\)"),
        ("delta", torch.full((2, 3, 4), float("inf")), "delta has values that are not finite"),
        (
            "english_pattern.last",
            torch.ones(2, 3, 4),
            "found rows of english_pattern.last that sum to neither 1 nor 0",
        ),
    ]:
        save_file({**tensors, name: tensor}, path, metadata)
        with pytest.raises(RamoeError, match=rf"experts\.safetensors: {message}"):
            ExpertFile.load(path)


def test_the_expert_file_of_another_model_is_refused_with_every_difference(tmp_path: Path) -> None:
    path = tmp_path / "experts.safetensors"
    expert_file().save(path)
    experts = ExpertFile.load(path)
    experts.check_model(3, 4, 2, "softmax")
    with pytest.raises(RamoeError) as refusal:
        experts.check_model(num_moe_layers=3, num_experts=64, topk=2, score_function="sigmoid")
    for part in (
        str(path),
        "num_experts is 4 in the file, 64 in",
        "'softmax' in the file, 'sigmoid'",
        "ramoe profile",
    ):
        assert part in str(refusal.value)
    assert "num_moe_layers" not in str(refusal.value)


def test_the_profile_target_is_the_pattern_of_its_task_or_a_refusal() -> None:
    experts = expert_file()
    assert torch.equal(experts.profile_target("continent", "last"), experts.english_pattern["last"][1])
    with pytest.raises(RamoeError, match=r"no task 'medicine'.*currency, continent"):
        experts.profile_target("medicine", "last")
    with pytest.raises(RamoeError, match="no English pattern for tokens 'prompt', found last, all"):
        experts.profile_target("continent", "prompt")
    without = replace(experts, english_pattern={"last": torch.zeros(2, 3, 4)})
    with pytest.raises(RamoeError, match="'continent' has no English-correct example"):
        without.profile_target("continent", "last")
