"""OLMoE: one norm over all queries and one over all keys; the softmax comes before the top-k choice."""

from typing import Any

from ramoe_megatron.models.decoder import Family, Flags, Names, Numbers, decoder_flags, decoder_numbers


def _numbers(config: Any) -> Numbers:
    return decoder_numbers(config, config.num_experts, config.intermediate_size)


def _flags(config: Any) -> Flags:
    flags: Flags = {
        "normalization": "RMSNorm",
        "norm-epsilon": config.rms_norm_eps,
        "swiglu": True,
        "disable-bias-linear": True,
        "qk-layernorm": True,
        "position-embedding-type": "rope",
        "rotary-base": int(config.rope_parameters["rope_theta"]),
    }
    if not config.norm_topk_prob:
        flags["moe-router-pre-softmax"] = True
    return decoder_flags(_numbers(config), config) | flags


def _names(config: Any, _: Any) -> Names:
    n = _numbers(config)
    return Names(qk_norm=(n.heads * n.head_size, n.groups * n.head_size))


def _refuse(config: Any) -> str | None:
    if config.clip_qkv is not None:
        return f"clip_qkv {config.clip_qkv}: Megatron does not clip queries, keys and values"
    if config.attention_bias:
        return "attention_bias: Megatron has no bias in the output projection alone"
    return None


OLMOE = Family("olmoe", "OlmoeForCausalLM", _numbers, _flags, _names, modules="olmoe", refuse=_refuse)
