"""Flags of selective training: which weights a fine-tuning run may change."""

from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from ramoe_megatron.errors import RamoeError

READS_USAGE = ("rise", "esft-gate", "esft-token")
"""What is read off usage.safetensors."""
READ_BY = {
    "usage": READS_USAGE,
    "train_budget": ("rise",),
    "train_split": ("rise",),
    "train_top_p": ("esft-gate", "esft-token"),
}
"""By option, the values of `train` that read it."""


@dataclass(frozen=True)
class SelectiveOptions:
    """Selective training: which weights may change (all others stay bit-for-bit, and take no gradient and no optimizer memory)."""

    train: Literal["all", "routers", "task-experts", "rise", "esft-gate", "esft-token"] = "all"
    """Weights that are trained: all, routers, task-experts (of any task in --ramoe-experts, by --ramoe-select where given, in all layers),
    rise (arXiv 2604.03592), esft-gate or esft-token (arXiv 2407.01906, by gate weight or by token share). The last three choose by the
    languages of the training data (rise: the anchor left out)."""

    usage: str | None = None
    """usage.safetensors of the profile job (--ramoe-save-usage): how much each language uses each expert."""

    train_budget: int | None = None
    """rise: (layer, expert) pairs to train, over all MoE layers."""

    train_split: list[int] | None = None
    """rise: how many of them are shallow, middle and deep, three numbers (the paper: 44 32 52 of 128); by the layers of each zone when
    left out."""

    train_top_p: float | None = None
    """esft: in each layer, the fewest experts whose share of the total score reaches this, above 0 and at most 1."""

    def __post_init__(self) -> None:
        kinds = get_args(get_type_hints(type(self))["train"])
        if self.train not in kinds:
            raise RamoeError(f"--ramoe-train {self.train!r}: expected one of {', '.join(kinds)}")
        needed = {
            "usage": "which experts each language uses; run `ramoe profile -- --ramoe-save-usage`",
            "train_budget": "how many (layer, expert) pairs to train",
            "train_top_p": "the share of the score to reach in each layer",
        }
        for name, readers in READ_BY.items():
            value, flag = getattr(self, name), f"--ramoe-{name.replace('_', '-')}"
            if value is None and self.train in readers and name in needed:
                raise RamoeError(f"--ramoe-train {self.train} without {flag}: expected {needed[name]}")
            if value is not None and self.train not in readers:
                raise RamoeError(
                    f"{flag} {value} with --ramoe-train {self.train}: only {' or '.join(readers)} reads it; remove one of the flags"
                )
        if self.train_budget is not None and self.train_budget < 1:
            raise RamoeError(f"--ramoe-train-budget {self.train_budget}: expected a number of (layer, expert) pairs, at least 1")
        if self.train_top_p is not None and not 0 < self.train_top_p <= 1:
            raise RamoeError(f"--ramoe-train-top-p {self.train_top_p}: expected a share above 0 and at most 1")
        if self.train_split is not None and (len(self.train_split) != 3 or min(self.train_split) < 0):
            raise RamoeError(f"--ramoe-train-split {self.train_split}: expected three numbers, 0 or more: shallow, middle, deep")
        if self.train_split is not None and sum(self.train_split) != self.train_budget:
            raise RamoeError(
                f"--ramoe-train-split {self.train_split} sums to {sum(self.train_split)}, not to --ramoe-train-budget {self.train_budget}"
            )
