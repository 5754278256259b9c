"""Fields of many examples as arrays: the distinct texts of a field, and a code for each example.

A list of examples and examples in a file (`data.store`) give the same codes.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ramoe_megatron.artifacts.texts import ArrowTexts


class Codes(Sequence[str]):
    """The texts of one field of N examples, stored as the distinct texts and a code for each example.

    Attributes:
        names: distinct texts, in the order in which they first appear in the data. Some may belong to no
            example of a selection.
        codes: index into ``names`` of each example, integers [N].
    """

    def __init__(self, names: Sequence[str], codes: np.ndarray) -> None:
        self.names, self.codes = names, codes

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Codes":
        """The codes of some texts."""
        place: dict[str, int] = {}
        codes = np.array([place.setdefault(text, len(place)) for text in texts], dtype=np.int64)
        return cls(list(place), codes)

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, place: Any) -> Any:
        """The text at a place, or the codes of a slice or of an array of places."""
        codes = self.codes[place]
        return Codes(self.names, codes) if np.ndim(codes) else self.names[int(codes)]

    def counts(self) -> dict[str, int]:
        """Text -> number of examples, for the texts that occur."""
        found, counts = np.unique(self.codes, return_counts=True)
        return {self.names[int(code)]: int(count) for code, count in zip(found, counts, strict=True)}

    def distinct(self, which: np.ndarray | None = None) -> list[str]:
        """The texts that occur, in the order of the examples.

        Args:
            which: look only at these examples. bool [N]
        """
        found, first = np.unique(self.codes if which is None else self.codes[which], return_index=True)
        return [self.names[int(code)] for code in found[np.argsort(first)]]

    def among(self, texts: Sequence[str]) -> np.ndarray:
        """Whether the text of each example is one of ``texts``. bool [N]"""
        return np.isin(self.codes, self.find(texts))

    def find(self, texts: Sequence[str]) -> np.ndarray:
        """The code of each text; -1 for a text that no example has. int64 [texts]"""
        if isinstance(self.names, ArrowTexts):
            return self.names.find(texts)
        place = {name: code for code, name in enumerate(self.names)}
        return np.array([place.get(text, -1) for text in texts], dtype=np.int64)

    def mapped(self, values: Sequence[Any], dtype: Any) -> np.ndarray:
        """A value for each example from the value of each of the ``names``. [N]"""
        return np.array(values, dtype=dtype)[self.codes]


class CodedExamples(Sequence[Any]):
    """Examples that know the codes of their fields."""

    @abstractmethod
    def codes(self, field: str) -> Codes:
        """The codes of "id", "task", "language" or "split"."""

    @abstractmethod
    def pick(self, places: np.ndarray) -> "CodedExamples":
        """The examples at these places."""

    @abstractmethod
    def joined(self, others: "CodedExamples") -> "CodedExamples":
        """These examples, then others of the same data."""


def codes_of(examples: Sequence[Any], field: str) -> Codes:
    """The codes of a field ("id", "task", "language" or "split") of the examples."""
    if isinstance(examples, CodedExamples):
        return examples.codes(field)
    return Codes.of(getattr(example, field) for example in examples)


def pick(examples: Sequence[Any], places: np.ndarray) -> Sequence[Any]:
    """The examples at these places. A list gives a list."""
    if isinstance(examples, CodedExamples):
        return examples.pick(places)
    return [examples[place] for place in places.tolist()]


def joined(examples: Sequence[Any], others: Sequence[Any]) -> Sequence[Any]:
    """The examples, then the others. Lists give a list."""
    if isinstance(examples, CodedExamples) and isinstance(others, CodedExamples):
        return examples.joined(others)
    return [*examples, *others]


def groups_of(examples: Sequence[Any]) -> list[tuple[tuple[str, str], np.ndarray]]:
    """((task, language), places of its examples) of every group, in alphabetical order. int64 [group]"""
    task, language = codes_of(examples, "task"), codes_of(examples, "language")
    group = task.codes.astype(np.int64) * len(language.names) + language.codes
    found = [
        ((task.names[key // len(language.names)], language.names[key % len(language.names)]), key)
        for key in np.unique(group).tolist()
    ]
    return [(names, np.flatnonzero(group == key)) for names, key in sorted(found)]


class RowKeys:
    """One number for each (id, language), by which rows of other files are matched with the examples.

    Attributes:
        of_examples: the number of each example. int64 [N]
    """

    def __init__(self, examples: Sequence[Any]) -> None:
        self._ids, self._languages = codes_of(examples, "id"), codes_of(examples, "language")
        ids = self._ids.codes.astype(np.int64)
        self.of_examples = ids * len(self._languages.names) + self._languages.codes

    def of(self, ids: Sequence[str], languages: Sequence[str]) -> np.ndarray:
        """The number of each row; -1 for an id or a language that no example has. int64 [rows]"""
        id_, language = self._ids.find(ids), self._languages.find(languages)
        keys = id_ * len(self._languages.names) + language
        return np.where((id_ < 0) | (language < 0), -1, keys)
