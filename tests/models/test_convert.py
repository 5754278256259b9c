"""Hugging Face folders to Megatron checkpoints and back: bit for bit; what is wrong is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import MODELS, write_model
from torch.distributed.checkpoint import FileSystemReader, load

from ramoe_megatron.cli import main
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.models import convert as engine
from ramoe_megatron.models.operations import (
    Copy,
    GateUp,
    Interleaved,
    Mxfp4,
    Operation,
    QueryKeyValue,
    Transpose,
)
from ramoe_megatron.models.torch_dist import TorchDist

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def assert_same_bytes(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def convert(folder: Path, out: Path) -> None:
    engine.convert_folder(engine.plan_conversion(folder), out)


def export(checkpoint: Path, out: Path) -> None:
    engine.export_checkpoint(engine.plan_export(checkpoint), out)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each tiny model in each type: the folder hf, and the checkpoint mg."""
    folder = tmp_path_factory.mktemp("models")
    for name in MODELS:
        for kind, dtype in DTYPES.items():
            write_model(name, folder / f"{name}-{kind}/hf", dtype)
            convert(folder / f"{name}-{kind}/hf", folder / f"{name}-{kind}/mg")
    return folder


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_bit_for_bit(world: Path, tmp_path: Path, name: str, kind: str) -> None:
    place = world / f"{name}-{kind}"
    export(place / "mg", tmp_path / "back")
    assert_same_bytes(tensors(tmp_path / "back"), tensors(place / "hf"))
    before, after = (
        json.loads((path / "config.json").read_text()) for path in (place / "hf", tmp_path / "back")
    )
    assert after == before


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_what_was_exported(world: Path, tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    place = world / f"{name}-float32"
    export(place / "mg", tmp_path / "back")
    ids = torch.tensor([[3, 14, 15, 92, 65]])
    with torch.no_grad():
        found, expected = (
            AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
            for folder in (tmp_path / "back", place / "hf")
        )
    assert torch.equal(found, expected)


def test_several_files_and_an_index(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = world / "gpt-oss-float32"
    monkeypatch.setattr(engine, "SHARD_BYTES", 60_000)
    monkeypatch.setattr(engine, "FILE_BYTES", 50_000)
    convert(place / "hf", tmp_path / "mg")
    assert len(list((tmp_path / "mg/release").glob("*.distcp"))) > 3
    export(tmp_path / "mg", tmp_path / "back")
    files = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    assert len(files) > 3
    assert sorted(set(index["weight_map"].values())) == files
    assert_same_bytes(tensors(tmp_path / "back"), tensors(place / "hf"))
    convert(tmp_path / "back", tmp_path / "again")
    export(tmp_path / "again", tmp_path / "twice")
    assert_same_bytes(tensors(tmp_path / "twice"), tensors(place / "hf"))


def test_torchs_own_reader_reads_the_checkpoint(world: Path) -> None:
    """Parity with another implementation of the format."""
    folder = world / "mixtral-float32/mg/release"
    ours = TorchDist(folder)
    state = {key: torch.zeros(shape, dtype=ours.dtypes[key]) for key, shape in ours.shapes.items()}
    load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    for key, tensor in state.items():
        assert torch.equal(tensor, ours.read(key)), key
        if tensor.dim() > 2:
            assert torch.equal(tensor[1], ours.read(key, (1,))), key


OPERATIONS: dict[str, tuple[Operation, tuple[int, ...]]] = {
    "copy": (Copy(), (6, 4)),
    "transpose": (Transpose(), (6, 4)),
    "qkv": (QueryKeyValue(2, 3, 4), (40, 5)),
    "qkv bias": (QueryKeyValue(2, 3, 4), (40,)),
    "gate-up": (GateUp(), (6, 4)),
    "interleaved": (Interleaved(), (6,)),
    "interleaved and transposed": (Interleaved(Transpose()), (6, 4)),
}


@pytest.mark.parametrize("name", OPERATIONS)
@given(seed=st.integers(0, 1000))
def test_an_operation_is_undone_by_its_inverse(name: str, seed: int) -> None:
    operation, shape = OPERATIONS[name]
    torch.manual_seed(seed)
    parts = [torch.randn(part) for part in operation.parts(shape)]
    joined = operation.join(parts)
    assert tuple(joined.shape) == shape
    assert all(torch.equal(a, b) for a, b in zip(operation.split(joined), parts, strict=True))


def test_query_key_value_is_grouped_as_megatron_splits_it() -> None:
    """Group by group: the queries, the key, the value."""
    rows = torch.arange(40.0)
    query, key, value = QueryKeyValue(2, 3, 4).split(rows)
    assert query.tolist() == [*range(12), *range(20, 32)]
    assert key.tolist() == [*range(12, 16), *range(32, 36)]
    assert value.tolist() == [*range(16, 20), *range(36, 40)]


@given(seed=st.integers(0, 1000))
def test_mxfp4_is_decoded_as_transformers_does(seed: int) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(seed)
    blocks = torch.randint(0, 256, (1, 8, 3, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (1, 8, 3), dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)  # [1, columns, rows]
    found = Mxfp4().join([blocks[0], scales[0]])
    assert torch.equal(found, expected[0].t())


def refused(source: Path, out: Path) -> str:
    """The error of a conversion, which must have written nothing."""
    with pytest.raises(RamoeError) as raised:
        convert(source, out)
    assert not out.exists()
    return str(raised.value)


def changed(world: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    folder = tmp_path / "hf"
    write_model("mixtral", folder)
    found = tensors(folder)
    change(found)
    save_file(found, folder / "model.safetensors")
    return folder


def test_tensors_that_are_missing_extra_or_misshapen_are_listed(world: Path, tmp_path: Path) -> None:
    def change(found: dict[str, torch.Tensor]) -> None:
        del found["model.layers.1.self_attn.k_proj.weight"]
        found["model.layers.0.extra.weight"] = torch.zeros(3)
        found["model.norm.weight"] = torch.zeros(31)

    told = refused(changed(world, tmp_path, change), tmp_path / "mg")
    assert "1 missing: model.layers.1.self_attn.k_proj.weight" in told
    assert "1 of another shape: model.norm.weight is [31], expected [32]" in told
    assert "1 unexpected: model.layers.0.extra.weight" in told


def test_another_architecture_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    told = refused(tmp_path / "hf", tmp_path / "mg")
    assert "LlamaForCausalLM" in told
    assert "Qwen3MoeForCausalLM" in told
    assert "Megatron-Bridge" in told


def test_a_quantised_model_is_refused_by_its_method(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    write_model("mixtral", folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    assert "quantization_config is gptq" in refused(folder, tmp_path / "mg")


def test_a_file_that_was_cut_short_is_named(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    write_model("mixtral", folder)
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    assert "cut short" in refused(folder, tmp_path / "mg")
    os.truncate(path, 50)
    assert "model.safetensors" in refused(folder, tmp_path / "mg")


def test_an_index_that_names_an_absent_file(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    write_model("mixtral", folder, max_shard_size="100KB")
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    assert gone.name in refused(folder, tmp_path / "mg")


def test_nothing_is_overwritten(world: Path, tmp_path: Path) -> None:
    place = world / "mixtral-float32"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("mine")
    for action, source in ((convert, place / "hf"), (export, place / "mg")):
        with pytest.raises(RamoeError, match="nothing is overwritten"):
            action(source, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]


def test_a_checkpoint_of_another_model_is_refused(world: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mg"
    shutil.copytree(world / "mixtral-float32/mg", mixed)
    shutil.rmtree(mixed / "release")
    shutil.copytree(world / "qwen3-moe-float32/mg/release", mixed / "release")
    with pytest.raises(RamoeError, match="not the model that"):
        export(mixed, tmp_path / "out")
    (mixed / engine.NOTE).unlink()
    with pytest.raises(RamoeError, match=engine.NOTE):
        export(mixed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    assert "GB needed" in refused(world / "mixtral-float32/hf", tmp_path / "mg")


def test_a_killed_conversion_goes_on_where_it_stopped(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it writes; the second call keeps the whole files, and the result is the same."""
    source, out = world / "mixtral-float32/hf", tmp_path / "mg"
    script = f"""
import os, signal, sys
from pathlib import Path
from ramoe_megatron.models import convert as engine
engine.FILE_BYTES = 50_000
moved = 0
def progress(count):
    global moved
    moved += count
    if moved > 120_000:
        os.kill(os.getpid(), signal.SIGKILL)
engine.convert_folder(engine.plan_conversion(Path({str(source)!r})), Path({str(out)!r}), progress)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    whole = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.distcp")}
    assert len(whole) == 2
    time.sleep(0.01)
    monkeypatch.setattr(engine, "FILE_BYTES", 50_000)
    plan = engine.plan_conversion(source)
    with monkeypatch.context() as full:  # what is written already needs no room
        usage = type("Usage", (), {"free": plan.bytes - 90_000})
        full.setattr(engine.shutil, "disk_usage", lambda _: usage)
        assert engine.refuse_output(plan, out).is_dir()
    convert(source, out)
    for path, when in whole.items():
        assert (out / "release" / path.name).stat().st_mtime_ns == when, "it was written again"
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list(tmp_path.glob(".*unfinished"))
    export(out, tmp_path / "back")
    assert_same_bytes(tensors(tmp_path / "back"), tensors(source))


def test_the_unfinished_output_of_another_model_is_kept(world: Path, tmp_path: Path) -> None:
    unfinished = tmp_path / ".mg.unfinished"
    unfinished.mkdir()
    (unfinished / engine.PLAN).write_text('{"source": "another"}')
    with pytest.raises(RamoeError, match="unfinished output of another model"):
        convert(world / "mixtral-float32/hf", tmp_path / "mg")
    assert (unfinished / engine.PLAN).is_file()


def test_the_commands(world: Path, tmp_path: Path) -> None:
    place, run = world / "olmoe-bfloat16", CliRunner()
    checked = run.invoke(main, ["convert", str(place / "hf"), "--out", str(tmp_path / "mg"), "--check"])
    assert checked.exit_code == 0, checked.output
    assert "olmoe" in checked.output
    assert not (tmp_path / "mg").exists()
    for words in (
        ["convert", place / "hf", "--out", tmp_path / "mg"],
        ["export", tmp_path / "mg", "--out", tmp_path / "hf"],
    ):
        done = run.invoke(main, [str(word) for word in words])
        assert done.exit_code == 0, done.output
        assert "GB/s" in done.output
    assert_same_bytes(tensors(tmp_path / "hf"), tensors(place / "hf"))
    again = run.invoke(main, ["export", str(tmp_path / "mg"), "--out", str(tmp_path / "hf")])
    assert again.exit_code == 2
    assert "ramoe: error:" in again.output


def test_mxfp4_in_and_bfloat16_out(world: Path, tmp_path: Path) -> None:
    """The exported experts are those that transformers decodes, bit for bit; the rest is unchanged."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    source, folder = world / "gpt-oss-bfloat16/hf", tmp_path / "hf"
    shutil.copytree(source, folder)
    plain, packed, expected = tensors(source), {}, {}
    torch.manual_seed(0)
    for name, tensor in plain.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            packed[name] = expected[name] = tensor
            continue
        experts, columns, rows = tensor.shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(110, 130, (experts, rows, columns // 32), dtype=torch.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).contiguous()
    save_file(packed, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}})
    )
    convert(folder, tmp_path / "mg")
    export(tmp_path / "mg", tmp_path / "back")
    assert_same_bytes(tensors(tmp_path / "back"), expected)
    assert json.loads((tmp_path / "back/config.json").read_text()) == config
