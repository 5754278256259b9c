"""Phi-3.5-MoE: SparseMixer routing, LayerNorm, LongRoPE, and biases in the attention and the output layer."""

from dataclasses import replace
from typing import Any

from ramoe_megatron.models.decoder import Family, Flags, Names, decoder_flags
from ramoe_megatron.models.mixtral import BLOCK_SPARSE, block_sparse_numbers


def _flags(config: Any) -> Flags:
    flags: Flags = {
        "normalization": "LayerNorm",
        "norm-epsilon": config.rms_norm_eps,
        "swiglu": True,
        "disable-bias-linear": True,
        "position-embedding-type": "rope",
        "rotary-base": int(config.rope_parameters["rope_theta"]),
    }
    if config.attention_bias:
        flags["add-qkv-bias"] = True
    return decoder_flags(block_sparse_numbers(config), config) | flags


def _names(config: Any, _: Any) -> Names:
    bias = bool(config.attention_bias)
    head_bias = bool(config.lm_head_bias)
    return replace(BLOCK_SPARSE, qkv_bias=bias, o_bias=bias, norm_bias=True, lm_head_bias=head_bias)


def _refuse(config: Any) -> str | None:
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings:
        return f"sliding_window {window}: only full attention is converted"
    if config.num_experts_per_tok != 2:
        return f"num_experts_per_tok {config.num_experts_per_tok}: SparseMixer chooses two experts"
    return None


PHIMOE = Family(
    "phimoe", "PhimoeForCausalLM", block_sparse_numbers, _flags, _names, modules="phimoe", refuse=_refuse
)
