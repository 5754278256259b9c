"""Flags of selective training: which weights a fine-tuning run may change."""

from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from ramoe_megatron.errors import RamoeError

READS_USAGE = ("rise", "esft-gate", "esft-token")
"""What is read off usage.safetensors."""


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
        esft = self.train.startswith("esft")
        flags = (
            ("usage", self.usage, self.train in READS_USAGE, "rise, esft-gate or esft-token", "which experts each language uses"),
            ("train-budget", self.train_budget, self.train == "rise", "rise", "how many (layer, expert) pairs to train"),
            ("train-top-p", self.train_top_p, esft, "esft-gate or esft-token", "the share of the score to reach in each layer"),
        )
        for flag, value, used, by, what in flags:
            if used and value is None:
                made = "; run `ramoe profile -- --ramoe-save-usage`" if flag == "usage" else ""
                raise RamoeError(f"--ramoe-train {self.train} without --ramoe-{flag}: expected {what}{made}")
            if value is not None and not used:
                raise RamoeError(f"--ramoe-{flag} {value} with --ramoe-train {self.train}: only {by} reads it; remove one of the flags")
        if self.train_split is not None and self.train != "rise":
            raise RamoeError(f"--ramoe-train-split with --ramoe-train {self.train}: only rise reads it; remove one of the flags")
        if self.train_budget is not None and self.train_budget < 1:
            raise RamoeError(f"--ramoe-train-budget {self.train_budget}: expected a number of (layer, expert) pairs, at least 1")
        if self.train_top_p is not None and not 0 < self.train_top_p <= 1:
            raise RamoeError(f"--ramoe-train-top-p {self.train_top_p}: expected a share above 0 and at most 1")
