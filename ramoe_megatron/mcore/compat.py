"""All code for a version of Megatron-Core or torch, each with its reason and the condition to remove it."""

import argparse
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from typing import Any, get_args, get_type_hints

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.families import note_of, with_modules

JOBS_NEED = ">=0.19,<0.21"
"""The versions of megatron-core that the jobs run on. `attach` and `routing_batch` need 0.17 or newer."""


def refuse_other_megatron() -> None:
    """Raise RamoeError if the jobs do not run on the installed Megatron.

    Megatron 0.17 and 0.18 have no `gpt_config_from_args`, and their `pretrain()` takes other arguments.

    Remove with Megatron 0.18.
    """
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    from ramoe_megatron.mcore.cpu.backend import uncompiled

    with uncompiled():
        import megatron.core
    found = Version(Version(megatron.core.__version__).public)  # without the commit of a checkout
    if not SpecifierSet(JOBS_NEED).contains(found.base_version):
        raise RamoeError(
            f"megatron-core {found}: the jobs need megatron-core{JOBS_NEED}. "
            f"Run pip install 'megatron-core[training]{JOBS_NEED}'. With 0.17 and 0.18, use "
            "ramoe_megatron.attach and ramoe_megatron.routing_batch in your own training script"
        )


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


def merge_halves_in_place() -> None:
    """Put the halves of a gated projection together without a copy when a checkpoint is loaded.

    Megatron 0.19 loads gate and up into views of the weight and then concatenates all views of the model to
    new tensors. So loading takes two thirds of the experts' memory again.

    Remove when the `merge_fn` of `apply_swiglu_sharded_factory` returns the weight itself.
    """
    from megatron.core.transformer import mlp
    from megatron.core.transformer.moe import experts

    made = mlp.apply_swiglu_sharded_factory
    if hasattr(made, "__wrapped__"):
        return

    @functools.wraps(made)
    def apply_swiglu_sharded_factory(*args: Any, **kwargs: Any) -> Any:
        factory = made(*args, **kwargs)
        factory.merge_fn = functools.partial(_merged, factory.merge_fn)
        return factory

    mlp.apply_swiglu_sharded_factory = experts.apply_swiglu_sharded_factory = apply_swiglu_sharded_factory


def _merged(concatenate: Callable[[Any], Any], halves: Any) -> Any:
    """The weight whose views the two halves are, or a new tensor if they are apart."""
    if len(halves) != 2:  # FSDP2 has a part of the weight on each rank
        return concatenate(halves)
    first, second = halves
    end = first.data_ptr() + first.nbytes
    if not (first.is_contiguous() and second.is_contiguous() and second.data_ptr() == end):
        return concatenate(halves)
    if first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr():
        return concatenate(halves)
    return first.as_strided((len(first) + len(second), *first.shape[1:]), first.stride())


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


def attention_fault() -> str | None:
    """Why Megatron's attention cannot be given our cache; None if it can.

    `offline.rows` replaces a private method of Megatron 0.19, whose arguments and results may change.

    Remove when Megatron's static inference context has a position for each row.
    """
    from megatron.core.transformer.attention import Attention

    method = inspect.unwrap(Attention._adjust_key_value_for_inference)
    expected = ["self", "inference_context", "query", "key", "value", "rotary_pos_emb"]
    results = get_args(get_type_hints(method).get("return"))
    if list(inspect.signature(method).parameters)[:6] == expected and len(results) == 6:
        return None
    return f"megatron-core {version('megatron-core')} passes keys and values in another way than 0.19"


def model_type() -> Any:
    """Megatron's constant for decoder models."""
    from megatron.core.enums import ModelType

    return ModelType.encoder_or_decoder


def import_early(modules: Iterable[str]) -> None:
    """Import modules in a process that will fork. One that this version of Megatron lacks is left out.

    Megatron 0.20 has no `megatron.core.tokenizers.text.models`. The import saves time only.

    Remove with Megatron 0.19, and that module from the list in `recipe.fork_server`.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module or not module.startswith("megatron."):
                raise


def moe_logging() -> Any:
    """Megatron's module `moe_logging`, which holds the tracker of the losses at the routers.

    Megatron 0.17 has functions in `moe_utils` instead. They come back under the names of that module.

    Remove with Megatron 0.17, `_LoggingOf017` and `_TrackerOf017` too.
    """
    try:
        from megatron.core.transformer.moe import moe_logging
    except ImportError:
        return _LoggingOf017
    return moe_logging


class _TrackerOf017:
    """The methods of Megatron 0.18's `MoEMetricsTracker` that we use, on the functions of Megatron 0.17."""

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The entries of Megatron's losses. There is one set of them in a process."""
        from megatron.core.transformer.moe import moe_utils

        return moe_utils.get_moe_layer_wise_logging_tracker()

    def report(
        self,
        loss_scale: float,
        iteration: int,
        writer: Any = None,
        wandb_writer: Any = None,
        per_layer_logging: bool = False,
        **others: Any,
    ) -> str:
        """Megatron's report. Its figures go to the loss table, so it has no text."""
        _LoggingOf017.megatrons("track_moe_metrics")(
            loss_scale=loss_scale,
            iteration=iteration,
            writer=writer,
            wandb_writer=wandb_writer,
            per_layer_logging=per_layer_logging,
            **others,
        )
        return ""

    def clear(self) -> None:
        """Zero Megatron's entries. Megatron's report ends in this call."""
        _LoggingOf017.megatrons("clear_aux_losses_tracker")()


class _LoggingOf017:
    """Megatron 0.18's module `moe_logging` for Megatron 0.17, as far as we use it."""

    MoEMetricsTracker = _TrackerOf017
    _current: _TrackerOf017 | None = None
    _replaced: dict[str, Callable] = {}  # noqa: RUF012 - one for the process

    @classmethod
    def get_moe_metrics_tracker(cls) -> _TrackerOf017:
        cls._current = cls._current or _TrackerOf017()
        return cls._current

    @classmethod
    def set_moe_metrics_tracker(cls, tracker: _TrackerOf017) -> None:
        """Make Megatron's functions report to and clear `tracker`."""
        from megatron.core.transformer.moe import moe_utils

        cls._current = tracker
        if cls._replaced:
            return
        parameters = inspect.signature(moe_utils.track_moe_metrics)

        def track_moe_metrics(*args: Any, **kwargs: Any) -> None:
            cls.get_moe_metrics_tracker().report(**parameters.bind(*args, **kwargs).arguments)

        def clear_aux_losses_tracker() -> None:
            cls.get_moe_metrics_tracker().clear()

        for stand_in in (track_moe_metrics, clear_aux_losses_tracker):
            original = getattr(moe_utils, stand_in.__name__)
            cls._replaced[stand_in.__name__] = original
            # Training loops import the functions by name, so each module has its own reference.
            for module in list(sys.modules.values()):
                if getattr(module, "__dict__", {}).get(stand_in.__name__) is original:
                    setattr(module, stand_in.__name__, stand_in)

    @classmethod
    def megatrons(cls, name: str) -> Callable:
        """Megatron's own function."""
        from megatron.core.transformer.moe import moe_utils

        return cls._replaced.get(name) or getattr(moe_utils, name)


def hybrid_layer_allocation() -> Any:
    """Megatron's module that reads `--hybrid-layer-pattern`. Megatron 0.17 has it among the Mamba modules.

    Remove with Megatron 0.17.
    """
    try:
        from megatron.core.models.hybrid import hybrid_layer_allocation
    except ImportError:
        from megatron.core.ssm import mamba_hybrid_layer_allocation as hybrid_layer_allocation
    return hybrid_layer_allocation


def graphed_modules(config: Any) -> tuple[str, set[str]]:
    """The flag that names the modules in CUDA graphs, and the names. No names mean whole layers.

    Megatron 0.17 calls the setting `cuda_graph_scope`. Megatron 0.18 and newer replace that name on
    construction.

    Remove with Megatron 0.17.

    Args:
        config: a `TransformerConfig`, or an object with the same attributes.
    """
    of_017 = hasattr(config, "cuda_graph_scope") and not hasattr(config, "cuda_graph_modules")
    name = "cuda_graph_scope" if of_017 else "cuda_graph_modules"
    modules = getattr(config, name, None) or ()
    return f"--{name.replace('_', '-')}", {getattr(module, "name", str(module)) for module in modules}
