"""The note beside a checkpoint, `ramoe-model.json`: which model it is.

`ramoe convert` writes the note, with the model's Megatron flags and its Hugging Face folder without weights.
`ramoe finetune` copies the three into the folder that it saves to.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ramoe_megatron.artifacts.files import atomic_write, load_document
from ramoe_megatron.models.families import family_of

NOTE, FLAGS, ORIGINAL = "ramoe-model.json", "model_args.yaml", "huggingface"
"""Beside a checkpoint: which model it is, its Megatron flags, and the Hugging Face folder without weights."""


@dataclass(frozen=True)
class ModelNote:
    """The note of a checkpoint."""

    folder: Path
    """Folder of the checkpoint."""
    family: str
    modules: str | None
    """Name of the family's own modules in `mcore/families`; None where Megatron's are exact."""

    def config(self) -> Any:
        """The model's Hugging Face configuration. Raises RamoeError when it is missing or unknown."""
        return family_of(self.folder / ORIGINAL)[1]


def note_in(folder: Path) -> ModelNote | None:
    """The note in a checkpoint's folder, if there is one.

    Raises:
        RamoeError: the note is damaged.
    """
    if not (folder / NOTE).is_file():
        return None
    document = load_document(folder / NOTE, "ramoe-model")
    return ModelNote(folder, document["family"], document["modules"])


def copy_note(source: Path, target: Path) -> None:
    """Copy the note, the flags and the Hugging Face folder of a checkpoint to another folder.

    Each is copied whole or not at all, and nothing is overwritten. The note is last, so a folder that has a
    note has the others.
    """
    if not (source / NOTE).is_file() or source.resolve() == target.resolve():
        return
    target.mkdir(parents=True, exist_ok=True)
    if (source / ORIGINAL).is_dir() and not (target / ORIGINAL).exists():
        temporary = target / f".{ORIGINAL}.{os.getpid()}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(source / ORIGINAL, temporary)
        temporary.rename(target / ORIGINAL)
    for name in (FLAGS, NOTE):
        if (source / name).is_file() and not (target / name).exists():
            with atomic_write(target / name) as path:
                shutil.copyfile(source / name, path)
