"""Many texts in one buffer, mapped or in memory, instead of one Python object for each."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

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

        return cls(pyarrow.array(texts, "string"))

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
        return found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
