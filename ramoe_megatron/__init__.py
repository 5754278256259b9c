"""Routing-aligned fine-tuning of multilingual Mixture-of-Experts models on Megatron-Core (RA-MoE, arXiv 2605.28306; our reading).

What a user's own training script needs, each imported from Megatron's side only when asked for:

    add_arguments        Megatron's `extra_args_provider`: the --ramoe-... flags
    attach               routing alignment on a model that is already built
    check_data           reads the data and the files of alignment, and tells what is wrong before any model is built
    dataset_provider     Megatron's datasets provider for parallel data
    packed_seq_params    the model's argument of that name, for batches of packed samples
    record_lm_loss       the language-model loss, told in a loss function: what --ramoe-coeff-unit lm-loss measures
    train_selected       training of what --ramoe-train selects, on a model configuration before `pretrain()`
    routing_batch        context around the model call of a `forward_step`
    RoutingAlignmentConfig   the alignment, as a dataclass
    cpu_backend          Megatron on a machine without a CUDA device
    cpu_command_line     a Megatron command line as the CPU backend can run it
    skip_helper_compilation  for megatron-core from a wheel, whose data helpers are built already
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
    "packed_seq_params",
    "record_lm_loss",
    "routing_batch",
    "skip_helper_compilation",
    "train_selected",
]


def __getattr__(name: str) -> Any:
    """Import from the owning module on first use: `import ramoe_megatron` loads neither torch nor Megatron."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ramoe_megatron' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
