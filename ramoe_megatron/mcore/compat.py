"""Every branch on a version of Megatron-Core or torch stands here, with its reason and the condition for removing it."""

from typing import Any


def skip_helper_compilation() -> None:
    """The wheel of megatron-core 0.17-0.19 ships the dataset helpers built but without their Makefile, so `initialize_megatron`'s
    `compile_helpers()` fails for every user of the wheel. Skip the call where the extension imports.

    Remove when the wheel ships the Makefile or `compile_helpers` looks for the built extension itself.
    """
    from megatron.core.datasets import utils

    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError:
        return
    utils.compile_helpers = lambda: None


def model_config_from_args(args: Any) -> Any:
    """Megatron 0.19's model configuration (`GPTModelConfig`, or `HybridModelConfig` under `--hybrid-layer-pattern`)."""
    from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args

    if getattr(args, "hybrid_layer_pattern", None):
        return hybrid_config_from_args(args)
    return gpt_config_from_args(args)


def model_type() -> Any:
    """Megatron's constant for decoder models."""
    from megatron.core.enums import ModelType

    return ModelType.encoder_or_decoder
