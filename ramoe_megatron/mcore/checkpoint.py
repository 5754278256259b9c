"""Rejects a missing or mismatched checkpoint, where Megatron would start from random weights."""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ramoe_megatron.artifacts.checkpoints import TRACKER
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.unfinished import tell_unfinished


def has_checkpoint(folder: str | None) -> bool:
    """Whether Megatron finds a checkpoint in the folder."""
    return bool(folder) and (Path(str(folder)) / TRACKER).is_file()


def require_checkpoint(folder: str | None, flag: str) -> None:
    """Raise RamoeError if there is no checkpoint; Megatron itself would continue with random weights."""
    if not has_checkpoint(folder):
        raise RamoeError(
            f"{flag} {folder}: no checkpoint there (expected a folder with {TRACKER}); "
            "give the folder that training saved to"
        )


def named(folder: str) -> str:
    """A folder that holds a checkpoint, in words: its name and the iteration."""
    path = Path(folder)
    return f"{path.name} at iteration {(path / TRACKER).read_text(encoding='utf-8').strip()}"


def starting_checkpoint(args: Any) -> str | None:
    """The folder of the weights that training starts from; None for random weights.

    It is --load if it has a checkpoint (the run resumes), else --pretrained-checkpoint.

    Raises:
        RamoeError: the flags name a checkpoint that does not exist.
    """
    if has_checkpoint(args.load):
        return args.load
    if args.pretrained_checkpoint:
        require_checkpoint(args.pretrained_checkpoint, "--pretrained-checkpoint")
    elif args.finetune and args.load:
        require_checkpoint(args.load, "--load")
    return args.pretrained_checkpoint


@contextlib.contextmanager
def explained_mismatch(folder: str | None) -> Iterator[None]:
    """Raise a clear error when a checkpoint of another shape is loaded; other errors pass unchanged.

    Raises:
        RamoeError: the checkpoint has another shape. The message names the folder and a tensor that differs.
    """
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except (CheckpointException, RuntimeError, KeyError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        marks = [
            "shape mismatch",
            "size mismatch",
            "Missing key",
            "Unexpected key",
            "is not found in the checkpoint",
        ]
        # when one is a GPTModel and the other a HybridModel
        marks += [
            "the current run builds a non-hybrid model",
            "Cannot load a GPT checkpoint",
            "pairs with a GPT checkpoint",
        ]
        found = next((line for line in reversed(lines) if any(mark in line for mark in marks)), None)
        loading = any(frame.name == "load_checkpoint" for frame in traceback.extract_tb(error.__traceback__))
        if found is None or not loading:  # training itself can fail with a shape error too
            raise
        raise RamoeError(
            f"the checkpoint in {folder} does not fit the model flags: {found[:300]}. "
            "Give the model flags that it was trained with"
        ) from error


@contextlib.contextmanager
def told_when_unfinished(args: Any) -> Iterator[None]:
    """Report how far `pretrain()` came if it ends early.

    On Megatron's exit signal, duration or interval `pretrain()` calls `sys.exit(0)`.
    """
    try:
        yield
    except SystemExit as stop:
        # The iteration that it ended after. Megatron may also end before the first iteration.
        done = getattr(args, "curr_iteration", -1) + 1
        if not stop.code and 0 < done < args.train_iters:
            saved = (
                f"the checkpoint is in {args.save}, and the same command continues from it"
                if args.save
                else "nothing is saved without --save"
            )
            tell_unfinished(f"stopped after iteration {done} of {args.train_iters}; {saved}")
        raise
