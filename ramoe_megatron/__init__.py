"""Routing-aligned fine-tuning (RA-MoE) of multilingual Mixture-of-Experts models on Megatron-Core.

The method is our reading of arXiv 2605.28306. The names below are the interface for a user's own training
script. Each name imports Megatron only on its first use.

    add_arguments            the --ramoe-... flags, as Megatron's `extra_args_provider`
    attach                   adds routing alignment to a model that is already built
    check_data               checks the data and the alignment files before any model is built
    cpu_backend              runs Megatron on a machine without a CUDA device
    cpu_command_line         adapts a Megatron command line to the CPU backend
    dataset_provider         Megatron's datasets provider for parallel data
    family_modules           the modules that a converted model needs; takes a model configuration
    packed_seq_params        the model's argument `packed_seq_params`, for batches of packed samples
    record_lm_loss           reports the loss from a loss function, for --ramoe-coeff-unit lm-loss
    routing_batch            the context manager around the model call in a `forward_step`
    RoutingAlignmentConfig   the settings of the alignment, as a dataclass
    skip_helper_compilation  skips the build of Megatron's data helpers, which a wheel already contains
    train_selected           limits training to --ramoe-train; takes a model configuration
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ramoe_megatron.errors import RamoeError

if TYPE_CHECKING:
    from ramoe_megatron.mcore.align.attach import attach
    from ramoe_megatron.mcore.align.batch import routing_batch
    from ramoe_megatron.mcore.arguments import RoutingAlignmentConfig, add_arguments
    from ramoe_megatron.mcore.compat import skip_helper_compilation
    from ramoe_megatron.mcore.cpu.backend import cpu_backend, cpu_command_line
    from ramoe_megatron.mcore.families import family_modules
    from ramoe_megatron.mcore.select.freeze import train_selected
    from ramoe_megatron.mcore.train.datasets import check_data, dataset_provider
    from ramoe_megatron.mcore.train.step import packed_seq_params, record_lm_loss

_HOMES = {
    "RoutingAlignmentConfig": "ramoe_megatron.mcore.arguments",
    "add_arguments": "ramoe_megatron.mcore.arguments",
    "attach": "ramoe_megatron.mcore.align.attach",
    "cpu_backend": "ramoe_megatron.mcore.cpu.backend",
    "cpu_command_line": "ramoe_megatron.mcore.cpu.backend",
    "check_data": "ramoe_megatron.mcore.train.datasets",
    "dataset_provider": "ramoe_megatron.mcore.train.datasets",
    "family_modules": "ramoe_megatron.mcore.families",
    "packed_seq_params": "ramoe_megatron.mcore.train.step",
    "record_lm_loss": "ramoe_megatron.mcore.train.step",
    "routing_batch": "ramoe_megatron.mcore.align.batch",
    "skip_helper_compilation": "ramoe_megatron.mcore.compat",
    "train_selected": "ramoe_megatron.mcore.select.freeze",
}

__all__ = [
    "RamoeError",
    "RoutingAlignmentConfig",
    "add_arguments",
    "attach",
    "check_data",
    "cpu_backend",
    "cpu_command_line",
    "dataset_provider",
    "family_modules",
    "packed_seq_params",
    "record_lm_loss",
    "routing_batch",
    "skip_helper_compilation",
    "train_selected",
]


def __getattr__(name: str) -> Any:
    """Imports a name on first use, so that `import ramoe_megatron` loads neither torch nor Megatron."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ramoe_megatron' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
