"""Checked rows in a memory-mapped Arrow file, made once per node. `Example` objects are made on demand.

An entry of the cache has:
    rows.arrow   one column for each field of `Example`, as an Arrow stream, which `datasets` reads too
    ids.arrow    the distinct ids, in the order in which they first appear
    codes.npy    int32 [fields, rows]: code of the id, task, language and split of each row
    names.json   the distinct tasks, languages and splits, in the order of their codes
"""

import functools
import hashlib
import itertools
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import numpy as np

from ramoe_megatron.artifacts.files import atomic_write_text, package_version
from ramoe_megatron.artifacts.texts import ArrowTexts
from ramoe_megatron.data.cache import Cache, key_of, mapped
from ramoe_megatron.data.codes import CodedExamples, Codes
from ramoe_megatron.data.parallel import Example, checked_examples
from ramoe_megatron.data.sources import hub_version, local_files
from ramoe_megatron.errors import RamoeError

if TYPE_CHECKING:
    import pyarrow

VERSION = 1
BLOCK_ROWS = 4096
CODED = ("id", "task", "language", "split")
type Progress = Callable[[int], None]


class StoredExamples(CodedExamples):
    """Examples in the file of a store.

    Attributes:
        folder: the store.
        rows: row of each example in the store, int32 [N].
    """

    def __init__(self, folder: Path, rows: np.ndarray | None = None) -> None:
        self.folder, self._opened = folder, _opened(folder)
        self.rows = np.arange(self._opened.codes.shape[1], dtype=np.int32) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return self.pick(np.arange(*place.indices(len(self))))
        return next(self._opened.examples(self.rows[[place]]))

    def __iter__(self) -> Iterator[Example]:
        return self._opened.examples(self.rows)

    def __reduce__(self) -> tuple[type["StoredExamples"], tuple[Path, np.ndarray]]:
        return StoredExamples, (self.folder, self.rows)

    @functools.cached_property
    def digest(self) -> str:
        """A name for these rows of this store, by which what is made of them is kept."""
        return f"{self.folder.name}-{hashlib.sha256(self.rows.tobytes()).hexdigest()}"

    def codes(self, field: str) -> Codes:
        number = CODED.index(field)
        return Codes(self._opened.names[number], self._opened.codes[number][self.rows])

    def pick(self, places: np.ndarray) -> "StoredExamples":
        return StoredExamples(self.folder, self.rows[places])

    def joined(self, others: CodedExamples) -> "StoredExamples":
        assert isinstance(others, StoredExamples)
        assert others.folder == self.folder
        return StoredExamples(self.folder, np.concatenate([self.rows, others.rows]))


def store_examples(
    sources: Sequence[str],
    columns: Mapping[str, str] | None,
    cache: Cache,
    progress: Callable[[int, str], Progress],
) -> StoredExamples:
    """All examples of the sources, as `load_examples` reads and checks them.

    The rows are read and checked when the store is made. A later start compares the digests of the files.

    Args:
        sources, columns: as `load_examples`.
        cache: where the store is made, or was made by an earlier start.
        progress: from a total and its unit, what is called with each further number of units.

    Raises:
        RamoeError: as `load_examples`; and as `Cache.entry`.
    """
    if not sources:
        raise RamoeError("no data: name at least one file, folder or hub data set.")
    content: list[list[str]] = []
    for source in sources:
        files = local_files(source)
        content += [[str(file), cache.digest(file)] for file in files] or [[source, hub_version(source)]]
    key = key_of([VERSION, package_version(), content, sorted((columns or {}).items()), str(_schema())])

    def make(folder: Path) -> None:
        told = progress(sum(map(_line_count, itertools.chain(*map(local_files, sources)))), "rows read")
        _write(folder, checked_examples(sources, columns), told)

    return StoredExamples(cache.entry(f"rows-{key}", make))


def _schema() -> "pyarrow.Schema":
    import pyarrow

    text, texts = pyarrow.string(), pyarrow.list_(pyarrow.string())
    turns = pyarrow.list_(pyarrow.struct([("role", text), ("content", text)]))
    types = {
        str: text,
        str | None: text,
        tuple[str, ...] | None: texts,
        tuple[dict[str, str], ...] | None: turns,
    }
    hints = get_type_hints(Example)
    return pyarrow.schema([(field.name, types[hints[field.name]]) for field in fields(Example)])


def _line_count(path: Path) -> int:
    """About the number of rows of a file, for the progress; 0 where lines are no rows."""
    if path.suffix not in (".jsonl", ".csv"):
        return 0
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _write(folder: Path, examples: Iterable[Example], progress: Progress) -> None:
    import pyarrow

    schema, codes = _schema(), [array("i") for _ in CODED]
    names: list[dict[str, int]] = [{} for _ in CODED]
    with pyarrow.ipc.new_stream(str(folder / "rows.arrow"), schema) as file:
        for block in itertools.batched(examples, BLOCK_ROWS):
            for name, known, found in zip(CODED, names, codes, strict=True):
                found.extend(known.setdefault(getattr(example, name), len(known)) for example in block)
            table = {name: [getattr(example, name) for example in block] for name in schema.names}
            file.write_batch(pyarrow.RecordBatch.from_pydict(table, schema))
            progress(len(block))
    ids = pyarrow.record_batch({"id": pyarrow.array(list(names[0]), "string")})
    with pyarrow.ipc.new_stream(str(folder / "ids.arrow"), ids.schema) as file:
        file.write_batch(ids)
    np.save(folder / "codes.npy", np.array([np.frombuffer(found, np.int32) for found in codes]))
    others = [list(known) for known in names[1:]]
    atomic_write_text(folder / "names.json", json.dumps(others, ensure_ascii=False))


class _Opened:
    """The mapped files of a store. `codes`: int32 [fields, rows]; `names`: the distinct texts by field."""

    def __init__(self, folder: Path) -> None:
        import pyarrow

        self.codes = mapped(folder / "codes.npy")
        others = json.loads((folder / "names.json").read_text(encoding="utf-8"))
        ids = pyarrow.ipc.open_stream(pyarrow.memory_map(str(folder / "ids.arrow"))).read_next_batch()
        self.names: list[Sequence[str]] = [ArrowTexts(ids.column(0)), *others]
        rows = pyarrow.ipc.open_stream(pyarrow.memory_map(str(folder / "rows.arrow"))).read_all()
        self._batches = rows.to_batches()
        self._firsts = np.cumsum([0, *(len(batch) for batch in self._batches)])
        self._lists = [field.name for field in _schema() if pyarrow.types.is_list(field.type)]

    def examples(self, rows: np.ndarray) -> Iterator[Example]:
        """The examples of these rows, in this order. Neighbours in one batch are read at once."""
        import pyarrow

        batch = np.searchsorted(self._firsts, rows, side="right") - 1
        borders = [0, *(np.flatnonzero(np.diff(batch)) + 1).tolist(), len(rows)]
        for start, end in itertools.pairwise(borders):
            if start == end:
                continue
            number = int(batch[start])
            inside = pyarrow.array(rows[start:end] - self._firsts[number])
            for row in self._batches[number].take(inside).to_pylist():
                lists = {name: tuple(row[name]) for name in self._lists if row[name] is not None}
                yield Example(**row | lists)


@functools.lru_cache(maxsize=4)
def _opened(folder: Path) -> _Opened:
    return _Opened(folder)
