"""Options of selective training: which weights a fine-tuning run may change."""

from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from ramoe_megatron.errors import RamoeError

READS_USAGE = ("rise", "esft-gate", "esft-token")
"""The values of `train` that need usage.safetensors."""
READ_BY = {
    "usage": READS_USAGE,
    "train_budget": ("rise",),
    "train_split": ("rise",),
    "train_top_p": ("esft-gate", "esft-token"),
}
"""For each option, the values of `train` that use it."""


@dataclass(frozen=True)
class SelectiveOptions:
    """Selective training: which weights may change.

    All other weights stay bit-for-bit, without gradients and without optimizer memory.
    """

    train: Literal["all", "routers", "task-experts", "rise", "esft-gate", "esft-token"] = "all"
    """Weights that are trained: all, routers, task-experts (of all tasks in --ramoe-experts, re-selected by
    --ramoe-select when given, in all layers), rise (arXiv 2604.03592), esft-gate or esft-token (arXiv
    2407.01906, by gate weight or by token share). rise and esft choose experts by the languages of the
    training data; rise leaves out the anchor language."""

    usage: str | None = None
    """usage.safetensors of the profile job (--ramoe-save-usage): how much each language uses each expert."""

    train_budget: int | None = None
    """rise: number of (layer, expert) pairs to train, over all MoE layers."""

    train_split: list[int] | None = None
    """rise: number of these pairs in shallow, middle and deep layers, three numbers (the paper: 44 32 52 of
    128). Default: in proportion to the number of layers in each zone."""

    train_top_p: float | None = None
    """esft: in each layer, train the fewest experts whose share of the total score reaches this value (above
    0, at most 1)."""

    def __post_init__(self) -> None:
        kinds = get_args(get_type_hints(type(self))["train"])
        if self.train not in kinds:
            raise RamoeError(f"--ramoe-train {self.train!r}: expected one of {', '.join(kinds)}")
        needed = {
            "usage": "which experts each language uses; run `ramoe profile -- --ramoe-save-usage`",
            "train_budget": "the number of (layer, expert) pairs to train",
            "train_top_p": "the share of the score to reach in each layer",
        }
        for name, readers in READ_BY.items():
            value, flag = getattr(self, name), f"--ramoe-{name.replace('_', '-')}"
            if value is None and self.train in readers and name in needed:
                raise RamoeError(f"--ramoe-train {self.train} without {flag}: expected {needed[name]}")
            if value is not None and self.train not in readers:
                raise RamoeError(
                    f"{flag} {value} with --ramoe-train {self.train}: "
                    f"only {' or '.join(readers)} uses it; remove one of the two"
                )
        if self.train_budget is not None and self.train_budget < 1:
            raise RamoeError(
                f"--ramoe-train-budget {self.train_budget}: expected a number of (layer, expert) pairs, "
                "at least 1"
            )
        if self.train_top_p is not None and not 0 < self.train_top_p <= 1:
            raise RamoeError(
                f"--ramoe-train-top-p {self.train_top_p}: expected a share above 0 and at most 1"
            )
        if self.train_split is not None and (len(self.train_split) != 3 or min(self.train_split) < 0):
            raise RamoeError(
                f"--ramoe-train-split {self.train_split}: "
                "expected three numbers, 0 or more: shallow, middle, deep"
            )
        if self.train_split is not None and sum(self.train_split) != self.train_budget:
            raise RamoeError(
                f"--ramoe-train-split {self.train_split} sums to {sum(self.train_split)}, "
                f"not to --ramoe-train-budget {self.train_budget}"
            )
