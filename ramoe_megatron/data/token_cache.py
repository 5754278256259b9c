"""Tokens of examples in flat arrays, and their cache: made once per node by all cores, mapped by all ranks.

An entry of the cache has:
    ids.npy             int32 [tokens]: the ids of all examples, one example after another
    lengths.npy         int32 [examples]: number of ids of each example
    starts.npy          int64 [examples]: place of the first id of each example
    prompt_lengths.npy  int32 [examples]: number of ids that are the prompt
"""

import hashlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ramoe_megatron.artifacts.files import atomic_write, package_version
from ramoe_megatron.data.cache import Cache, key_of, mapped
from ramoe_megatron.data.encode import Encoded, Tokenizer, border_faults, encode, refuse_borders
from ramoe_megatron.data.parallel import Example
from ramoe_megatron.data.store import Progress, StoredExamples
from ramoe_megatron.data.workers import die_with
from ramoe_megatron.errors import RamoeError

VERSION = 1
PART_ROWS = 4096
LIBRARIES = ("megatron-core", "transformers", "tokenizers", "sentencepiece", "tiktoken", "jinja2")
"""The libraries whose version may change the tokens of a text."""
ARRAYS = ("ids", "lengths", "starts", "prompt_lengths")


@dataclass(frozen=True)
class Tokens:
    """Token ids of examples, in the arrays that the module describes."""

    ids: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    prompt_lengths: np.ndarray

    @classmethod
    def of(cls, examples: Sequence[Example], tokenizer: Tokenizer) -> "Tokens":
        """Tokenise the examples. Raises RamoeError as `encode`."""
        encoded = [encode(example, tokenizer) for example in examples]
        lengths = np.array([len(e.ids) for e in encoded], dtype=np.int32)
        ids = np.fromiter((i for e in encoded for i in e.ids), dtype=np.int32, count=int(lengths.sum()))
        prompts = np.array([e.prompt_length for e in encoded], dtype=np.int32)
        return cls(ids, lengths, _starts(lengths), prompts)

    @classmethod
    def open(cls, folder: Path) -> "Tokens":
        """Map the tokens of an entry of the cache."""
        return cls(*(mapped(folder / f"{name}.npy") for name in ARRAYS))

    def __getitem__(self, example: int) -> Encoded:
        start = int(self.starts[example])
        ids = self.ids[start : start + int(self.lengths[example])]
        return Encoded(ids.tolist(), int(self.prompt_lengths[example]))


def cached_tokens(
    examples: StoredExamples,
    tokenizer: Tokenizer,
    flags: Any,
    cache: Cache,
    progress: Callable[[int, str], Progress],
) -> Tokens:
    """The tokens of the examples, checked by `check_examples` when they are made.

    All cores of this process work on them. A start that was killed loses only the parts in work.

    Args:
        flags: what the tokenizer was made from, as a JSON value.
        progress: as of `store_examples`.

    Raises:
        RamoeError: as `check_examples` and `Cache.entry`.
    """
    content = tokenizer_content(tokenizer)
    made_by = [VERSION, package_version(), *map(_version, LIBRARIES)]
    key = key_of([made_by, examples.digest, flags, content])

    def make(folder: Path) -> None:
        _make(folder, examples, tokenizer, progress(len(examples), "examples tokenised"))

    return Tokens.open(cache.entry(f"tokens-{key}", make, kept=content is not None))


def tokenizer_content(tokenizer: Any) -> list[str] | None:
    """Digests of all that a tokenizer and its chat template do; None for a tokenizer of an unknown kind."""
    inner: Any = getattr(getattr(tokenizer, "_tokenizer", None), "tokenizer", None)
    if (backend := getattr(inner, "backend_tokenizer", None)) is not None:
        content = backend.to_str().encode()
    elif hasattr(inner, "serialized_model_proto"):
        content = inner.serialized_model_proto()
    elif hasattr(inner, "_mergeable_ranks"):
        content = repr((inner._pat_str, inner._mergeable_ranks, inner._special_tokens)).encode()
    else:
        return None
    template = getattr(tokenizer, "chat_template", None)
    return [hashlib.sha256(content).hexdigest(), repr(type(tokenizer)), repr(template), str(tokenizer.eod)]


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.cumsum(lengths, dtype=np.int64) - lengths


def _make(folder: Path, examples: StoredExamples, tokenizer: Tokenizer, progress: Progress) -> None:
    parts = folder / "parts"
    parts.mkdir(exist_ok=True)
    count = -(-len(examples) // PART_ROWS)
    numbers = range(count)
    faults: list[str] = []
    for number, fault in zip(numbers, _written(numbers, parts, examples, tokenizer), strict=True):
        faults += fault
        progress(min(PART_ROWS, len(examples) - number * PART_ROWS))
    refuse_borders(faults, len(examples))
    _join(folder, [parts / f"{number}.npz" for number in numbers])


def _written(
    numbers: Sequence[int], parts: Path, examples: StoredExamples, tokenizer: Tokenizer
) -> Iterator[list[str]]:
    """Write the parts that are not there yet. Yields the border faults of each part, in order."""
    arguments = (parts, examples, tokenizer)
    cores = min(len(os.sched_getaffinity(0)), len(numbers))
    if cores < 2:
        yield from (_write_part(number, *arguments) for number in numbers)
        return
    # Forked, because a tokenizer need not be picklable; the workers touch neither torch nor a device.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(cores, context, _start_worker, (os.getpid(), *arguments)) as pool:
        try:
            yield from pool.map(_work, numbers)
        except BrokenProcessPool as error:
            raise RamoeError(
                f"{parts}: a process that tokenises was killed, perhaps for lack of memory; "
                "start again, and the finished parts are kept"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_worker: tuple[Any, ...] = ()
"""The arguments of `_write_part` in a worker process."""


def _start_worker(parent: int, *arguments: Any) -> None:
    global _worker
    die_with(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each core has a worker
    _worker = arguments


def _work(number: int) -> list[str]:
    return _write_part(number, *_worker)


def _write_part(number: int, parts: Path, examples: StoredExamples, tokenizer: Tokenizer) -> list[str]:
    path = parts / f"{number}.npz"
    if path.is_file():
        with np.load(path) as found:
            return found["faults"].tolist()
    block = list(examples[number * PART_ROWS : (number + 1) * PART_ROWS])
    faults, tokens = border_faults(block, tokenizer), Tokens.of(block, tokenizer)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        arrays = {name: getattr(tokens, name) for name in ARRAYS}
        np.savez(file, faults=np.array(faults, dtype=str), **arrays)
    return faults


def _join(folder: Path, parts: Sequence[Path]) -> None:
    """One array file of all parts for each array; the parts are removed."""
    lengths, prompts = [], []
    for part in parts:
        with np.load(part) as found:
            lengths.append(found["lengths"])
            prompts.append(found["prompt_lengths"])
    length = np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int32)
    np.save(folder / "lengths.npy", length)
    np.save(folder / "starts.npy", _starts(length))
    np.save(folder / "prompt_lengths.npy", np.concatenate(prompts) if prompts else length)
    ids = np.lib.format.open_memmap(folder / "ids.npy", "w+", np.int32, (int(length.sum()),))
    place = 0
    for part in parts:
        with np.load(part) as found:
            ids[place : place + len(found["ids"])] = found["ids"]
            place += len(found["ids"])
    ids.flush()
    for part in parts:
        part.unlink()
    (folder / "parts").rmdir()
