"""Laws of the priors: rows by id, and the errors for damaged files, which the expert file shares."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from artefact_files import SHAPE, TEXT, expert_file, save_priors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.priors import DTYPES, Priors, bytes_per_id
from ramoe_megatron.errors import RamoeError

# --- refusals shared by both tensor files ---

LOADERS: dict[str, Callable[[Path], object]] = {"ramoe-experts": ExpertFile.load, "ramoe-priors": Priors.load}


def write_valid(path: Path, format_name: str) -> None:
    if format_name == "ramoe-experts":
        expert_file().save(path)
    else:
        save_priors(path, ["a", "b"])


@pytest.mark.parametrize("format_name", LOADERS)
def test_a_tensor_file_cut_short_anywhere_is_refused_by_name(tmp_path: Path, format_name: str) -> None:
    path = tmp_path / "file.safetensors"
    write_valid(path, format_name)
    whole = path.read_bytes()
    for length in [0, 4, 8, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(
            RamoeError, match=r"file\.safetensors: not a whole safetensors file.*profile again"
        ):
            LOADERS[format_name](path)


@pytest.mark.parametrize("format_name", LOADERS)
def test_foreign_tensor_files_are_refused_by_name(tmp_path: Path, format_name: str) -> None:
    path = tmp_path / "file.safetensors"
    load = LOADERS[format_name]
    with pytest.raises(RamoeError, match=r"file\.safetensors: no such file"):
        load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(RamoeError, match=r"file\.safetensors: .*without ramoe metadata"):
        load(path)
    other = next(name for name in LOADERS if name != format_name)
    write_valid(path, other)
    with pytest.raises(RamoeError, match=f"found format '{other}', expected '{format_name}'"):
        load(path)
    tensors = {"weight": torch.zeros(2)}
    save_file(
        tensors, path, {"ramoe": json.dumps({"format": format_name, "version": 2, "package_version": "9.0"})}
    )
    with pytest.raises(RamoeError, match=rf"{format_name} version 2, expected 1.*9\.0"):
        load(path)
    save_file(tensors, path, {"ramoe": json.dumps({"format": format_name, "version": 1})})
    with pytest.raises(RamoeError, match=r"file\.safetensors: (no tensor expert_mask|bad metadata)"):
        load(path)
    save_file(tensors, path, {"ramoe": "{"})
    with pytest.raises(RamoeError, match=r"file\.safetensors: bad metadata"):
        load(path)


# --- priors.safetensors ---


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(st.lists(TEXT, min_size=1, max_size=6, unique=True), st.data())
def test_rows_are_those_of_the_ids_asked_for_in_that_order(
    tmp_path: Path, ids: list[str], data: st.DataObject
) -> None:
    written = save_priors(tmp_path / "priors.safetensors", ids)
    priors = Priors.load(tmp_path / "priors.safetensors")
    assert (priors.ids, priors.tokens, priors.shape) == (tuple(ids), "last", SHAPE)
    asked = data.draw(st.lists(st.sampled_from(ids), max_size=8))
    assert torch.equal(priors.rows(asked), written[[ids.index(id_) for id_ in asked]])


def test_missing_ids_are_refused_with_their_count_and_the_first_five(tmp_path: Path) -> None:
    save_priors(tmp_path / "priors.safetensors", ["known"])
    priors = Priors.load(tmp_path / "priors.safetensors")
    with pytest.raises(
        RamoeError, match=r"priors\.safetensors: 7 of 8 examples .* first m0, m1, m2, m3, m4;"
    ):
        priors.rows(["known", *(f"m{i}" for i in range(7)), "m0"])


def test_priors_opened_in_another_process_read_the_same_rows(tmp_path: Path) -> None:
    written = save_priors(tmp_path / "priors.safetensors", ["a", "b"])
    text = pickle.dumps(Priors.load(tmp_path / "priors.safetensors"))
    assert len(text) < 1000, "the tensor does not travel"
    assert torch.equal(pickle.loads(text).rows(["b"]), written[1:])


def test_priors_of_another_model_or_with_double_ids_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "priors.safetensors"
    with pytest.raises(RamoeError, match="ids occur twice, first a"):
        save_priors(path, ["a", "b", "a"])
    with pytest.raises(RamoeError, match=r"priors has shape \(1, 3, 4\), expected \(2, 3, 4\)"):
        Priors.save(path, ["a", "b"], torch.zeros(1, 3, 4), tokens="last", shape=SHAPE, checkpoint="")
    assert not path.exists()
    save_priors(path, ["a"])
    with pytest.raises(RamoeError, match="topk is 2 in the file, 8 in the model"):
        Priors.load(path).check_model(3, 4, 8, "softmax")


def test_a_file_written_in_parts_has_the_bytes_of_one_written_whole(tmp_path: Path) -> None:
    """For any id, layers and dtype: the bytes that safetensors itself writes."""
    priors, ids = torch.rand(5, 3, 4).softmax(-1), ["a", "b", "ä", "d", "e"]
    facts: dict[str, Any] = {"tokens": "last", "shape": SHAPE, "checkpoint": "base@1"}
    for dtype in DTYPES:
        path, own = tmp_path / f"{dtype}.safetensors", tmp_path / "own.safetensors"
        Priors.save(path, ids, iter(priors.split(2)), dtype=dtype, **facts)
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            save_file(tensors, own, file.metadata())
        assert path.read_bytes() == own.read_bytes()
        assert torch.equal(Priors(path).rows(["ä", "a"]), priors[[2, 0]].to(DTYPES[dtype]).float())
    with pytest.raises(RamoeError, match=r"priors has 4 rows, expected 5"):
        Priors.save(path, ids, iter(priors[:4].split(2)), **facts)


def test_kept_layers_keep_their_numbers(tmp_path: Path) -> None:
    whole, path = torch.rand(2, 3, 4).softmax(-1), tmp_path / "priors.safetensors"
    Priors.save(
        path, ["a", "b"], whole[:, 1:], tokens="last", shape=SHAPE, checkpoint="base@1", layers=range(1, 3)
    )
    priors = Priors(path)
    assert torch.equal(priors.rows(["b", "a"], [2]), whole[[1, 0], 2:])
    assert torch.equal(priors.rows(["b"]), whole[1:, 1:])
    with pytest.raises(RamoeError, match=r"has the MoE layers 1-2, and not 0; .*--ramoe-priors-for all"):
        priors.check_layers([0, 1])


def test_bytes_of_an_id_are_those_of_its_numbers() -> None:
    """Qwen3-30B-A3B: 48 layers, 128 experts. A million ids take 24.6 GB; ten layers in bfloat16 2.6 GB."""
    assert bytes_per_id(48, 128) == 24_576
    assert bytes_per_id(10, 128, "bfloat16") == 2_560
