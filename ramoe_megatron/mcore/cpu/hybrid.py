"""A `HybridModel` of Megatron's local modules, for machines without transformer-engine.

Megatron 0.19's only hybrid stack uses transformer-engine modules (`hybrid_layer_specs.hybrid_stack_spec`),
whatever `--transformer-impl` says. Here the stack is built from local modules: each GPT layer of Megatron's
local spec is split into an attention layer `*` and a feed-forward layer `E` or `-`. The modules, their names
and the keys of their weights are those of the GPT layer. So a checkpoint of a local GPT run loads into a
local hybrid run, as in Megatron.

The norms: transformer-engine's linear layers contain the norm before them, local linear layers do not. So the
attention layer has its own `input_layernorm` and the feed-forward layer its own `pre_mlp_layernorm`, and
checkpoints name them as the GPT layer does. For attention and MLP this is also transformer-engine's name. For
MoE it is another name (`mlp.linear_fc1.layer_norm_weight`, where transformer-engine's models have
`pre_mlp_layernorm.weight`). As with GPT models, a local MoE checkpoint works with local modules only.

Remove when Megatron itself builds a hybrid stack under `--transformer-impl local`.
"""

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols, parse_hybrid_pattern
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from ramoe_megatron.errors import RamoeError

LOCAL_SYMBOLS = (Symbols.ATTENTION, Symbols.MOE, Symbols.MLP)


class LocalHybridStack(HybridStack):
    """A hybrid stack with torch's final norm; Megatron's always has transformer-engine's final norm."""

    def __init__(self, config: Any, *args: Any, post_layer_norm: bool = True, **kwargs: Any) -> None:
        """As `HybridStack`."""
        super().__init__(config, *args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = WrappedTorchNorm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )


def local_stack_spec(config: Any, pattern: str) -> ModuleSpec:
    """The hybrid stack of local modules for a model.

    Args:
        config: the model's `TransformerConfig`.
        pattern: `--hybrid-layer-pattern`.

    Raises:
        RamoeError: the pattern has MTP layers, or a layer without a local module.
    """
    parsed = parse_hybrid_pattern(pattern)
    others = sorted(set(parsed.main_pattern or "") - {*LOCAL_SYMBOLS, Symbols.PIPE})
    if others or parsed.mtp_pattern:
        found = "multi-token prediction (/)" if parsed.mtp_pattern else f"layers {', '.join(others)}"
        raise RamoeError(
            f"--hybrid-layer-pattern {pattern!r}: {found} cannot be built from local modules; "
            "expected only attention (*), MoE (E) and MLP (-) layers, or a machine with transformer-engine "
            "(--transformer-impl transformer_engine)"
        )
    return ModuleSpec(
        module=LocalHybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=_attention_layer(config),
            mlp_layer=_feed_forward_layer(config, MLPLayer, num_experts=None),
            moe_layer=_feed_forward_layer(config, MoETransformerLayer, num_experts=config.num_moe_experts),
        ),
    )


def _gpt_layer(config: Any, num_experts: int | None) -> TransformerLayerSubmodules:
    return get_gpt_layer_local_submodules(
        num_experts=num_experts,
        qk_layernorm=config.qk_layernorm,
        qk_l2_norm=config.qk_l2_norm,
        normalization=config.normalization,
    )


def _attention_layer(config: Any) -> ModuleSpec:
    layer = _gpt_layer(config, num_experts=None)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=layer.input_layernorm,
            self_attention=layer.self_attention,
            self_attn_bda=layer.self_attn_bda,
            sharded_state_dict_keys_map=layer.sharded_state_dict_keys_map,
        ),
    )


def _feed_forward_layer(config: Any, module: type, num_experts: int | None) -> ModuleSpec:
    layer = _gpt_layer(config, num_experts)
    return ModuleSpec(
        module=module,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=layer.pre_mlp_layernorm,
            mlp=layer.mlp,
            mlp_bda=layer.mlp_bda,
            sharded_state_dict_keys_map=layer.sharded_state_dict_keys_map,
        ),
    )
