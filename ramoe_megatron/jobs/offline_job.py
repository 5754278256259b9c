"""What the offline jobs share: their options, the data they read, and progress lines."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ramoe_megatron.artifacts.files import digests
from ramoe_megatron.data.encode import Tokenizer
from ramoe_megatron.data.limits import new_token_limits
from ramoe_megatron.data.parallel import Example, load_examples
from ramoe_megatron.data.sources import local_files
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.arguments import DataOptions, arguments_with
from ramoe_megatron.mcore.flags import options_from_args
from ramoe_megatron.mcore.launch import is_rank_0, megatron_arguments

if TYPE_CHECKING:
    from ramoe_megatron.mcore.offline.model import OfflineModel

FORWARD_ONLY_FLAGS = ["--micro-batch-size", "1", "--no-load-optim", "--no-load-rng", "--finetune"]
"""Megatron's parser asks for a micro-batch size; a checkpoint is loaded for its weights alone."""


@dataclass(frozen=True)
class OfflineOptions:
    """Options of the jobs that run a model forward only."""

    output: str | None = None
    """Folder that the job writes its files to."""

    batch_tokens: int = 4096
    """Tokens of a micro-batch on one rank."""

    max_new_tokens: int | None = None
    """Longest generated answer in tokens, the end token included, for examples without choices. Default: 16, or as many as the longest
    gold answer needs. A limit that a gold answer does not fit is refused."""

    def limits(self, args: Any, examples: Iterable[Example], tokenizer: Tokenizer) -> list[int]:
        """New tokens of each example that is scored (`new_token_limits`). Raises RamoeError for examples that nobody can answer right."""
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise RamoeError(f"--ramoe-max-new-tokens {self.max_new_tokens}: expected at least 1")
        return new_token_limits(list(examples), tokenizer, self.max_new_tokens, args.max_position_embeddings)


@contextmanager
def offline_job(*options: type) -> Iterator[tuple[Any, DataOptions, OfflineOptions]]:
    """Parsed arguments, data options and offline options of a job, on Megatron or its CPU backend."""
    provider = arguments_with(DataOptions, OfflineOptions, *options)
    with megatron_arguments(provider, FORWARD_ONLY_FLAGS) as args:
        yield args, *offline_options(args)


def offline_options(args: Any) -> tuple[DataOptions, OfflineOptions]:
    """The options that all offline jobs share, from the parsed flags. Raises RamoeError when one without a default is missing."""
    data, offline = options_from_args(DataOptions, args), options_from_args(OfflineOptions, args)
    if not data.data:
        raise RamoeError("--ramoe-data is missing: expected JSONL files, folders of them, or the name of a data set")
    if offline.output is None:
        raise RamoeError("--ramoe-output is missing: expected the folder to write to")
    return data, offline


def examples_with_anchor(options: DataOptions, split: str | None = None) -> list[Example]:
    """The examples of the chosen languages and, always, of the anchor."""
    languages = None if options.languages is None else sorted({*options.languages, options.anchor})
    return load_examples(options.data, options.column_mapping(), split or options.split, languages)


def data_digests(sources: Sequence[str]) -> list[dict[str, str]]:
    """Path and sha256 of every local file of the sources; a hub name stands for itself."""
    entries: list[dict[str, str]] = []
    for source in sources:
        files = local_files(source)
        entries += digests(files) if files else [{"path": source, "sha256": "hub"}]
    return entries


def checkpoint_name(folder: str) -> str:
    """The checkpoint as the artefacts name it: folder and iteration."""
    path = Path(folder)
    return f"{path.name}@{(path / 'latest_checkpointed_iteration.txt').read_text().strip()}"


class Progress:
    """Prints a job's progress on rank 0, as lines that `ramoe run` turns into a bar."""

    def __init__(self, total: int, unit: str) -> None:
        self.done, self.total, self.unit = 0, total, unit
        self.note = ""

    def __call__(self, count: int) -> None:
        """`count` more are done."""
        self.done += count
        if is_rank_0():
            line = {"done": min(self.done, self.total), "total": self.total, "unit": self.unit, "note": self.note}
            print(f"RAMOE-PROGRESS {json.dumps(line)}", flush=True)


def write_on_rank_0(model: "OfflineModel", write: Any) -> None:
    """Call `write` on rank 0 and let every rank wait for it: no rank leaves before the files stand."""
    import torch

    if torch.distributed.get_rank() == 0:
        write()
    torch.distributed.barrier()
