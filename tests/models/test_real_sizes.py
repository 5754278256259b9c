"""Published models are planned in full: the names and shapes of their tensors, and no values.

The folders have whole headers and files of the right length without blocks on the disk. The lists of tensors
are written out here, from the models' published configurations and totals.
"""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from click.testing import CliRunner

from ramoe_megatron.cli import main
from ramoe_megatron.models.convert import plan_conversion
from ramoe_megatron.models.safetensors_folder import INDEX, header_of

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
SHARD = 5 * 10**9
COMMON = {
    "hidden_act": "silu", "tie_word_embeddings": False, "attention_dropout": 0.0, "use_cache": True,
    "initializer_range": 0.02, "output_router_logits": False, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN3_30B_A3B: dict[str, Any] = COMMON | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "intermediate_size": 6144,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "vocab_size": 151936,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_scaling": None,
    "attention_bias": False, "use_sliding_window": False, "sliding_window": None,
    "router_aux_loss_coef": 0.001, "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip
GPT_OSS_20B: dict[str, Any] = COMMON | {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 2880,
    "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    "num_local_experts": 32, "num_experts_per_tok": 4, "intermediate_size": 2880, "vocab_size": 201088,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 150000, "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 12, "attention_bias": True, "swiglu_limit": 7.0,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "router_aux_loss_coef": 0.9, "pad_token_id": 199999, "eos_token_id": 200002,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
}  # fmt: skip


def qwen3() -> Shapes:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (151936, 2048)}
    for layer in range(48):
        at, attention = f"model.layers.{layer}", f"model.layers.{layer}.self_attn"
        shapes |= {
            f"{attention}.{name}_proj.weight": (rows, 2048)
            for name, rows in (("q", 4096), ("k", 512), ("v", 512))
        }
        shapes |= {f"{attention}.o_proj.weight": (2048, 4096)}
        shapes |= {f"{attention}.{name}_norm.weight": (128,) for name in "qk"}
        shapes |= {f"{at}.{name}_layernorm.weight": (2048,) for name in ("input", "post_attention")}
        shapes[f"{at}.mlp.gate.weight"] = (128, 2048)
        for expert in range(128):
            own = f"{at}.mlp.experts.{expert}"
            shapes |= {f"{own}.{name}_proj.weight": (768, 2048) for name in ("gate", "up")}
            shapes[f"{own}.down_proj.weight"] = (2048, 768)
    shapes |= {"model.norm.weight": (2048,), "lm_head.weight": (151936, 2048)}
    return {name: (torch.bfloat16, shape) for name, shape in shapes.items()}


def gpt_oss() -> Shapes:
    shapes: Shapes = {}

    def add(dtype: torch.dtype, name: str, *shape: int) -> None:
        shapes[name] = dtype, shape

    add(torch.bfloat16, "model.embed_tokens.weight", 201088, 2880)
    for layer in range(24):
        at = f"model.layers.{layer}"
        for name, rows, columns in (("q", 4096, 2880), ("k", 512, 2880), ("v", 512, 2880), ("o", 2880, 4096)):
            add(torch.bfloat16, f"{at}.self_attn.{name}_proj.weight", rows, columns)
            add(torch.bfloat16, f"{at}.self_attn.{name}_proj.bias", rows)
        add(torch.bfloat16, f"{at}.self_attn.sinks", 64)
        for name in ("input", "post_attention"):
            add(torch.bfloat16, f"{at}.{name}_layernorm.weight", 2880)
        add(torch.bfloat16, f"{at}.mlp.router.weight", 32, 2880)
        add(torch.bfloat16, f"{at}.mlp.router.bias", 32)
        for name, rows in (("gate_up", 5760), ("down", 2880)):
            add(torch.uint8, f"{at}.mlp.experts.{name}_proj_blocks", 32, rows, 90, 16)
            add(torch.uint8, f"{at}.mlp.experts.{name}_proj_scales", 32, rows, 90)
            add(torch.bfloat16, f"{at}.mlp.experts.{name}_proj_bias", 32, rows)
    add(torch.bfloat16, "model.norm.weight", 2880)
    add(torch.bfloat16, "lm_head.weight", 201088, 2880)
    return shapes


class Published(NamedTuple):
    """A model, and its published totals."""

    config: dict[str, Any]
    shapes: Shapes
    tensors: int
    size: int
    """Bytes of all tensors: `total_size` in the index."""
    parameters: int
    norms: int
    """Parameters that are written twice: the norms before the experts, under two names."""


MODELS = {
    "Qwen3-30B-A3B": Published(QWEN3_30B_A3B, qwen3(), 18867, 61_064_245_248, 30_532_122_624, 48 * 2048),
    "gpt-oss-20b": Published(GPT_OSS_20B, gpt_oss(), 459, 13_761_264_768, 20_914_757_184, 24 * 2880),
}


def write_folder(folder: Path, model: Published) -> None:
    """A folder of several files with the tensors' names, types and shapes. Its values take no room."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.config))
    shards: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
    filled, where = 0, {}
    for name, (dtype, shape) in model.shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if filled and filled + size > SHARD:
            shards.append([])
            filled = 0
        shards[-1].append((name, dtype, shape))
        filled += size
        where[name] = f"model-{len(shards):05d}.safetensors"
    for number, tensors in enumerate(shards, 1):
        header = header_of(tensors)
        with (folder / f"model-{number:05d}.safetensors").open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in tensors))
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": model.size}, "weight_map": where}))


@pytest.mark.parametrize("name", MODELS)
def test_a_published_model_is_planned_in_full(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    write_folder(tmp_path / name, model)
    assert len(list((tmp_path / name).glob("*.safetensors"))) > 2
    plan = plan_conversion(tmp_path / name)
    assert len(plan.source.tensors) == model.tensors
    assert sum(stored.bytes for stored in plan.source.tensors.values()) == model.size
    pieces = [piece for batch in plan.batches for piece in batch]
    written = sum(math.prod(piece.shape) for piece in pieces)
    assert written - model.norms == model.parameters
    assert plan.bytes == 2 * written
    largest = max(math.prod(shape) * dtype.itemsize for dtype, shape in model.shapes.values())
    assert largest <= plan.memory <= 1.3 * largest + 1e9


@pytest.mark.parametrize(("free", "status"), [(42, 0), (41, 2)])
def test_the_command_tells_the_size_and_the_memory_and_looks_for_room(
    free: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free * 10**9))
    write_folder(tmp_path / "hf", MODELS["gpt-oss-20b"])
    words = ["convert", str(tmp_path / "hf"), "--out", str(tmp_path / "out"), "--check"]
    shown = CliRunner().invoke(main, words)
    assert "41.83 GB, at most 1.16 GB of them in memory" in shown.output
    assert shown.exit_code == status, shown.output
    assert ("41.0 GB free, 41.8 GB needed" in shown.output) == (status == 2)
