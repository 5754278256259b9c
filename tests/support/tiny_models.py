"""Random tiny models of every family, as folders that `transformers` writes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

COMMON: dict[str, Any] = {
    "vocab_size": 250,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}


def _models() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> name of the class in transformers without its ending, and the configuration."""
    qwen = COMMON | EXPERTS | {
        "num_experts": 8, "moe_intermediate_size": 24, "intermediate_size": 40, "head_dim": 16,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "rope_theta": 1e6,
    }  # fmt: skip
    mixtral = COMMON | EXPERTS | {"num_local_experts": 8, "intermediate_size": 24, "sliding_window": None}
    olmoe = COMMON | EXPERTS | {"num_experts": 8, "intermediate_size": 24, "norm_topk_prob": False}
    phimoe = COMMON | EXPERTS | {
        "num_local_experts": 8, "intermediate_size": 24, "sliding_window": None, "attention_bias": True,
        "lm_head_bias": True,
        "original_max_position_embeddings": 64,
        "rope_scaling": {
            "rope_type": "longrope", "type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.6],
            "long_factor": [1.0, 2.0, 3.0, 4.0], "short_mscale": 1.2, "long_mscale": 1.2,
            "original_max_position_embeddings": 64,
        },
    }  # fmt: skip
    gpt_oss = COMMON | EXPERTS | {
        "num_local_experts": 8, "intermediate_size": 32, "head_dim": 16, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 16, "rope_theta": 150000.0,
        },
    }  # fmt: skip
    return {
        "qwen3-moe": ("Qwen3Moe", qwen),
        "qwen3-moe-tied-dense": (
            "Qwen3Moe",
            qwen | {"tie_word_embeddings": True, "decoder_sparse_step": 2, "norm_topk_prob": False},
        ),
        "mixtral": ("Mixtral", mixtral),
        "olmoe": ("Olmoe", olmoe),
        "phimoe": ("Phimoe", phimoe),
        "gpt-oss": ("GptOss", gpt_oss),
    }


MODELS = _models()


def make_model(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model whose every parameter is random, also norms, biases and sinks.

    Args:
        changes: values of its configuration other than those of `MODELS`.
    """
    import transformers

    kind, values = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**values | changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() == 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape) * scale)
        for module in model.modules():
            if "Norm" in type(module).__name__:
                module.weight.add_(1)
    return model.to(dtype).eval()


def write_model(name: str, folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """Write a model's folder. Returns the model."""
    model = make_model(name, dtype)
    model.save_pretrained(folder, **more)
    return model


Changed = Callable[[dict[str, Any]], None]
