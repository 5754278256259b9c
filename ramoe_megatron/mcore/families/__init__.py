"""The modules that a converted model needs beside Megatron's: one file a family.

The note beside the checkpoint names them, so no flag does. The families without a file compute with
Megatron's own modules exactly what transformers computes.
"""

import os
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.families.changes import ChangedLayers, ModelChanges, change_chunks
from ramoe_megatron.models.note import NOTE, ModelNote, copy_note, note_in

FAMILY_MODULES = ("olmoe", "phimoe", "gpt_oss")
"""Files of this room. Each has a function NAME_changes that makes the `ModelChanges` from the note."""


def note_of(args: Any) -> ModelNote | None:
    """The note in the folder of --load, else of --pretrained-checkpoint; None if neither has one.

    Raises:
        RamoeError: the note is damaged.
    """
    for folder in (args.load, args.pretrained_checkpoint):
        if folder and (note := note_in(Path(folder))):
            return note
    return None


def with_modules(config: Any, note: ModelNote | None) -> Any:
    """Give a model configuration the modules that the note names. Without such modules nothing changes.

    Args:
        config: Megatron's `GPTModelConfig`, before the model is built.

    Returns:
        `config`.

    Raises:
        RamoeError: the modules are unknown, or the model is not a `GPTModel` with Megatron's own layers.
    """
    if note is None or note.modules is None:
        return config
    if note.modules not in FAMILY_MODULES:
        raise RamoeError(
            f"{note.folder / NOTE}: modules {note.modules!r}, expected one of {', '.join(FAMILY_MODULES)}; "
            "use the version of ramoe-megatron that wrote it"
        )
    if not hasattr(config, "transformer_layer_spec"):
        raise RamoeError(
            f"{note.folder} is a {note.family} model, which needs layers of its own: "
            "remove --hybrid-layer-pattern"
        )
    if config.transformer_layer_spec is not None:
        raise RamoeError(
            f"{note.folder} is a {note.family} model, which needs layers of its own: remove --spec"
        )
    made = import_module(f"{__name__}.{note.modules}_modules")
    changes: ModelChanges = getattr(made, f"{note.modules}_changes")(note)
    config.transformer_layer_spec = ChangedLayers(changes.layer)
    if changes.softmax_scale is not None:
        config.transformer.softmax_scale = changes.softmax_scale
    if changes.chunk is not None:
        # first: later hooks freeze or align what the model has
        config.pre_wrap_hooks.insert(0, partial(change_chunks, changes.chunk))
    return config


def keep_note(args: Any) -> None:
    """On rank 0, copy the starting checkpoint's note into --save, so that what is saved is of the family too.

    Nothing is overwritten. Without a note or without --save nothing is done.
    """
    if args.save and os.environ.get("RANK", "0") == "0" and (note := note_of(args)):
        copy_note(note.folder, Path(args.save))


def family_modules(args: Any, config: Any) -> Any:
    """In a script of one's own: `with_modules` by the checkpoint that the arguments name, and `keep_note`.

    Args:
        args: Megatron's arguments.
        config: Megatron's `GPTModelConfig`, before the model is built.

    Returns:
        `config`.

    Raises:
        RamoeError: as `with_modules`.
    """
    keep_note(args)
    return with_modules(config, note_of(args))
