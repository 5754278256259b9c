"""All code for a version of Megatron-Core or torch, each with its reason and the condition to remove it."""

import argparse
import functools
import inspect
from collections.abc import Callable
from typing import Any

from ramoe_megatron.mcore.families import note_of, with_modules


def skip_helper_compilation() -> None:
    """Skip `compile_helpers()` in `initialize_megatron` if the compiled extension can be imported.

    The wheel of megatron-core 0.17-0.19 has the compiled dataset helpers but not their Makefile, so the call
    fails for every user of the wheel.

    Remove when the wheel has the Makefile, or `compile_helpers` looks for the compiled extension.
    """
    from megatron.core.datasets import utils

    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError:
        return
    utils.compile_helpers = lambda: None


def printable_help(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Escape the per cent signs in Megatron 0.19's help texts, on which `--help` fails.

    Remove when `parser.format_help()` of Megatron's parser works.
    """
    for action in parser._actions:
        if action.help and action.help is not argparse.SUPPRESS:
            try:
                parser._get_formatter()._expand_help(action)
            except (ValueError, TypeError, KeyError):
                action.help = action.help.replace("%", "%%")
    return parser


def remember_docstrings() -> None:
    """Cache the field docstrings of Megatron's dataclasses, in processes that parse many command lines.

    Megatron 0.19 reads the source of its dataclasses again for every parser, which takes most of the time of
    checking a command line.

    Remove when `ArgumentGroupFactory` caches them.
    """
    from megatron.training.argument_utils import ArgumentGroupFactory

    read, known = ArgumentGroupFactory._get_field_docstrings, dict[type, dict[str, str]]()

    def field_docstrings(factory: ArgumentGroupFactory, config: type) -> dict[str, str]:
        if config not in known:
            known[config] = read(factory, config)
        return dict(known[config])

    ArgumentGroupFactory._get_field_docstrings = field_docstrings


def call_after_each_step(call: Callable[[int], None]) -> None:
    """Make Megatron's training loop call `call(iteration)` on every rank after each step.

    The call comes after the step's log and validation and before its checkpoint. Megatron 0.19 has one
    function for such calls and no way to add to it. A later `call` replaces an earlier one.

    Remove when Megatron's training loop takes callbacks.
    """
    from megatron.training import training

    inner = getattr(
        training.post_training_step_callbacks, "__wrapped__", training.post_training_step_callbacks
    )
    parameters = inspect.signature(inner)

    @functools.wraps(inner)
    def post_training_step_callbacks(*args: Any, **kwargs: Any) -> Any:
        call(parameters.bind(*args, **kwargs).arguments["iteration"])
        return inner(*args, **kwargs)

    training.post_training_step_callbacks = post_training_step_callbacks


def model_config_from_args(args: Any) -> Any:
    """Megatron 0.19's model configuration (`GPTModelConfig`, or `HybridModelConfig` under
    `--hybrid-layer-pattern`), with the modules of the checkpoint's model family.

    Raises:
        RamoeError: the pattern has layers without a local module, or as `with_modules`.
    """
    from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args

    note = note_of(args)
    if not args.hybrid_layer_pattern:
        return with_modules(gpt_config_from_args(args), note)
    config = hybrid_config_from_args(args)
    # Megatron 0.19 would use its transformer-engine stack here too.
    if args.transformer_impl == "local" and args.spec is None:
        from ramoe_megatron.mcore.cpu.hybrid import local_stack_spec

        config.hybrid_stack_spec = local_stack_spec(config.transformer, args.hybrid_layer_pattern)
    return with_modules(config, note)


def model_type() -> Any:
    """Megatron's constant for decoder models."""
    from megatron.core.enums import ModelType

    return ModelType.encoder_or_decoder
