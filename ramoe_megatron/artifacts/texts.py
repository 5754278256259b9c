"""Many texts in one buffer, mapped or in memory, instead of one Python object for each.

Arrays are made of buffers and read as buffers. pyarrow's own conversions import pandas, which takes each rank
a second at its start.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ramoe_megatron.errors import RamoeError

if TYPE_CHECKING:
    import pyarrow


class ArrowTexts(Sequence[str]):
    """Texts in an Arrow array. They find the places of many texts at once."""

    def __init__(self, texts: "pyarrow.Array") -> None:
        self._texts = texts

    @classmethod
    def of(cls, texts: Iterable[str]) -> "ArrowTexts":
        """The texts in memory."""
        import pyarrow

        encoded = [text.encode() for text in texts]
        ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        if ends[-1] > np.iinfo(np.int32).max:
            raise RamoeError(f"texts of {ends[-1]} bytes together: expected less than 2 GiB")
        buffers = [None, *map(pyarrow.py_buffer, (ends.astype(np.int32), b"".join(encoded)))]
        return cls(pyarrow.Array.from_buffers(pyarrow.string(), len(encoded), buffers))

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, place: Any) -> Any:
        return (
            tuple(self._texts[place].to_pylist()) if isinstance(place, slice) else self._texts[place].as_py()
        )

    def find(self, texts: Sequence[str]) -> np.ndarray:
        """The place of each text; -1 for a text that is absent. int64 [texts]"""
        import pyarrow.compute

        sought = texts if isinstance(texts, ArrowTexts) else ArrowTexts.of(texts)
        found = pyarrow.compute.index_in(sought._texts, value_set=self._texts)
        if not len(found):
            return np.zeros(0, np.int64)
        valid, values = found.buffers()
        places = np.frombuffer(values, np.int32, len(found)).astype(np.int64)
        if found.null_count:
            bits = np.unpackbits(np.frombuffer(valid, np.uint8), count=len(found), bitorder="little")
            places[bits == 0] = -1
        return places
