"""Mixtral: no norm on queries and keys; its expert matrices are called w1 (gate), w3 (up) and w2 (down)."""

from typing import Any

from ramoe_megatron.models.decoder import Family, Flags, Names, Numbers, decoder_flags, decoder_numbers

BLOCK_SPARSE = Names(
    router="block_sparse_moe.gate",
    expert="block_sparse_moe.experts.{expert}",
    gate_up_down=("w1", "w3", "w2"),
)
"""Names that Phi-3.5-MoE has too."""


def block_sparse_numbers(config: Any) -> Numbers:
    """The numbers of Mixtral and of Phi-3.5-MoE."""
    return decoder_numbers(config, config.num_local_experts, config.intermediate_size)


def _flags(config: Any) -> Flags:
    return decoder_flags(block_sparse_numbers(config), config) | {
        "normalization": "RMSNorm",
        "norm-epsilon": config.rms_norm_eps,
        "swiglu": True,
        "disable-bias-linear": True,
        "position-embedding-type": "rope",
        "rotary-base": int(config.rope_parameters["rope_theta"]),
    }


def _refuse(config: Any) -> str | None:
    if config.sliding_window and config.sliding_window < config.max_position_embeddings:
        return (
            f"sliding_window {config.sliding_window} below max_position_embeddings "
            f"{config.max_position_embeddings}: only full attention is converted"
        )
    return None


MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    block_sparse_numbers,
    _flags,
    lambda *_: BLOCK_SPARSE,
    refuse=_refuse,
)
