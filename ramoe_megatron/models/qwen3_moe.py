"""Qwen3-MoE: a norm on each head's query and key, and dense layers between the others."""

from typing import Any

from ramoe_megatron.models.decoder import Family, Flags, Names, Numbers, decoder_flags, decoder_numbers


def _numbers(config: Any) -> Numbers:
    dense = frozenset(
        layer
        for layer in range(config.num_hidden_layers)
        if layer in (config.mlp_only_layers or []) or (layer + 1) % config.decoder_sparse_step
    )
    width = config.moe_intermediate_size
    return decoder_numbers(
        config, config.num_experts, width, dense=dense, dense_width=config.intermediate_size
    )


def _flags(config: Any) -> Flags:
    flags: Flags = {
        "normalization": "RMSNorm",
        "norm-epsilon": config.rms_norm_eps,
        "swiglu": True,
        "qk-layernorm": True,
        "position-embedding-type": "rope",
        "rotary-base": int(config.rope_parameters["rope_theta"]),
    }
    if config.attention_bias:
        flags["add-qkv-bias"] = True
    flags["disable-bias-linear"] = True
    if not config.norm_topk_prob:
        flags["moe-router-pre-softmax"] = True
    return decoder_flags(_numbers(config), config) | flags


def _names(config: Any, _: Any) -> Names:
    size = _numbers(config).head_size
    return Names(qk_norm=(size, size), qkv_bias=config.attention_bias)


def _refuse(config: Any) -> str | None:
    if config.attention_bias:
        return "attention_bias: Megatron has no bias in the output projection alone"
    if config.use_sliding_window:
        return "use_sliding_window: only full attention is converted"
    if config.rope_parameters.get("rope_type", "default") != "default":
        return f"rope_type {config.rope_parameters['rope_type']}: only the default one is converted"
    return None


QWEN3_MOE = Family("qwen3-moe", "Qwen3MoeForCausalLM", _numbers, _flags, _names, refuse=_refuse)
