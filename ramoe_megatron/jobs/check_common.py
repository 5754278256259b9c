"""What the checks of all jobs share: the command line on trial, what it says of the model, and what to do about a fault."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ramoe_megatron.mcore.checkpoint import TRACKER
from ramoe_megatron.mcore.findings import WRITTEN, Line
from ramoe_megatron.mcore.router import configured_moe_layer_numbers

DATA_FIX, CHECKPOINT_FIX = "correct the data or the flag", "correct the path, or run the job that writes it"
FILE_FIX = "run the job that writes it (ramoe taxonomy, ramoe profile) on this model and data, or correct the path"


@dataclass
class Trial:
    """A command line that Megatron takes, and what its inputs are checked with."""

    line: Line
    args: Any
    tokenizer: Any = None
    config: Any = None
    """`TransformerConfig` of the model."""
    read: dict[str, Any] = field(default_factory=dict)
    """What was read, by the options that name it: shared by the command lines of a process."""

    def written_by(self, *paths: str | None) -> str | None:
        """In words, which earlier stages write those of the paths that are still to come; None when all are there."""
        makers = dict.fromkeys(self.line.coming[path] for path in paths if path and path in self.line.coming)
        return f"{WRITTEN}{', '.join(makers)}" if makers else None


def moe_layers(trying: Trial) -> int:
    return len(configured_moe_layer_numbers(trying.config, trying.args.hybrid_layer_pattern))


def named(folder: str) -> str:
    path = Path(folder)
    return f"{path.name} at iteration {(path / TRACKER).read_text(encoding='utf-8').strip()}"
