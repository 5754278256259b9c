"""GPT-OSS: attention sinks, a window in every second layer, YaRN, clamped experts with biases, MXFP4.

The tensors of a layer's experts lie in one tensor. Their orientation follows from the name and never from the
shape, which is square: bfloat16 matrices are [in, out], MXFP4 blocks are rows of [out, in].
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ramoe_megatron.models.decoder import (
    Family,
    Flags,
    Names,
    Numbers,
    Piece,
    decoder_flags,
    decoder_numbers,
)
from ramoe_megatron.models.operations import Copy, Interleaved, Mxfp4, Transpose


def _numbers(config: Any) -> Numbers:
    return decoder_numbers(config, config.num_local_experts, config.intermediate_size)


def _flags(config: Any) -> Flags:
    rope = config.rope_parameters
    return decoder_flags(_numbers(config), config) | {
        "normalization": "RMSNorm",
        "norm-epsilon": config.rms_norm_eps,
        "softmax-type": "learnable",
        "window-size": f"{config.sliding_window - 1},0",  # keys beside the token itself
        "window-attn-skip-freq": 2,
        "quick-geglu": True,
        "glu-linear-offset": 1.0,
        "activation-func-clamp-value": 7.0,
        "no-bias-gelu-fusion": True,  # the fused activation clamps before it adds the bias
        "position-embedding-type": "yarn",
        "rotary-base": int(rope["rope_theta"]),
        "rotary-scaling-factor": rope["factor"],
        "yarn-original-max-position-embeddings": rope["original_max_position_embeddings"],
        "yarn-beta-fast": rope["beta_fast"],
        "yarn-beta-slow": rope["beta_slow"],
        "no-yarn-correction-range-round-to-int": True,
        "no-rope-fusion": True,  # the fused kernel does not scale the cosines
        "expert-tensor-parallel-size": 1,  # Megatron does not split experts with biases
    }


def _names(config: Any, tensors: Mapping[str, Any]) -> Names:
    def experts(n: Numbers, source: str, each: Callable[..., Iterator[Piece]]) -> Iterator[Piece]:
        at = f"{source}.mlp.experts"
        up, down = (2 * n.expert_width, n.hidden), (n.hidden, n.expert_width)
        if f"{at}.gate_up_proj_blocks" in tensors:
            for linear, shape, name, then in (
                ("linear_fc1", up, "gate_up_proj", Interleaved(Mxfp4())),
                ("linear_fc2", down, "down_proj", Mxfp4()),
            ):
                halves = [f"{at}.{name}_blocks", f"{at}.{name}_scales"]
                yield from each(n.experts, f"{linear}.weight", shape, halves, then)
        else:
            yield from each(
                n.experts, "linear_fc1.weight", up, [f"{at}.gate_up_proj"], Interleaved(Transpose())
            )
            yield from each(n.experts, "linear_fc2.weight", down, [f"{at}.down_proj"], Transpose())
        yield from each(n.experts, "linear_fc1.bias", up[:1], [f"{at}.gate_up_proj_bias"], Interleaved())
        yield from each(n.experts, "linear_fc2.bias", down[:1], [f"{at}.down_proj_bias"], Copy())

    return Names(
        router="mlp.router", router_bias=True, qkv_bias=True, o_bias=True, sinks=True, experts=experts
    )


def _refuse(config: Any) -> str | None:
    expected = ["sliding_attention", "full_attention"] * config.num_hidden_layers
    if list(config.layer_types) != expected[: config.num_hidden_layers]:
        return "layer_types: expected a window in every second layer, beginning with the first"
    if config.rope_parameters.get("rope_type") != "yarn" or config.rope_parameters.get("truncate", True):
        return "rope_parameters: expected YaRN with truncate: false"
    quantised = getattr(config, "quantization_config", None)
    method = (
        (quantised or {}).get("quant_method")
        if isinstance(quantised, dict | None)
        else quantised.quant_method
    )
    if quantised and str(method).rpartition(".")[2].lower() != "mxfp4":
        return f"quantization_config {method}: expected MXFP4 or none; give the unquantised model"
    return None


GPT_OSS = Family("gpt-oss", "GptOssForCausalLM", _numbers, _flags, _names, modules="gpt_oss", refuse=_refuse)
