"""Parallel task data: rows with the same id say the same thing in different languages.

One JSON object a line: `id`, `language`, `task`, `prompt` and `response` (trained on) or `messages`, `answer` (gold;
without it the response), `choices` (optional), `split`. `data.sources` reads the rows of a file, a folder or
a hub data set; a fault is told by file and line. Text is what the file says: "NA", "007" and "" are texts.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ramoe_megatron.artifacts.files import refuse_unwritable
from ramoe_megatron.data import sources as files
from ramoe_megatron.errors import RamoeError


@dataclass(frozen=True, slots=True)
class Example:
    """One view (one language) of a parallel example."""

    id: str
    """Shared by the views of one example; (id, language) is unique."""
    language: str
    """Any name of a language, for example "en" or "eng_Latn"."""
    task: str
    """The task; the views of one example share it."""
    prompt: str
    """What the model is asked; may be empty (plain text). With `messages`: the contents before the last."""
    response: str
    """What is trained on. With `messages`: the content of the last one."""
    answer: str
    """The gold answer: what greedy decoding is compared with, or one of `choices`."""
    choices: tuple[str, ...] | None
    """With choices, scoring is by the log-likelihood of each choice as response."""
    split: str
    """For example "train", "validation" or "test"."""
    messages: tuple[dict[str, str], ...] | None = None
    """A conversation ("role", "content") whose last message is the assistant's; tokenised by the chat template."""


FIELDS = tuple(field.name for field in fields(Example))
OPTIONAL = ("answer", "choices", "messages")
"""Fields that a row may lack; of a CSV file, an empty cell there."""


def load_examples(
    sources: Sequence[str],
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    languages: Sequence[str] | None = None,
) -> list[Example]:
    """Reads and checks the rows of all sources, in the order of the sources and of their rows.

    Args:
        sources: files (.jsonl, .parquet, .csv), folders of such files (in sorted order), or hub names
            ("owner/name" or "owner/name:configuration").
        columns: our field name -> the source's column name, for sources that name them otherwise.
        split: keep this split only (several as "train,test"); None keeps all.
        languages: keep these languages only; None keeps all.

    Raises:
        RamoeError: for a missing or malformed source (file, line, column), a missing or mistyped field, two rows of one
            (id, language), one id in two tasks, text that is no Unicode (half of a surrogate pair), a
            language or split that no row has.
    """
    for name in columns or {}:
        if name not in FIELDS:
            raise RamoeError(f"column mapping: {name!r} is no field of a row. Fields: {', '.join(FIELDS)}.")
    if not sources:
        raise RamoeError("no data: name at least one file, folder or hub data set.")
    examples: list[Example] = []
    places: dict[tuple[str, str], str] = {}
    tasks: dict[str, tuple[str, str]] = {}
    for place, row in _rows(sources, columns or {}):
        example = _example(row, columns or {}, place)
        key = (example.id, example.language)
        if key in places:
            raise RamoeError(
                f"{place}: second row with id {example.id!r} and language {example.language!r}; the first is at "
                f"{places[key]}. Give each example one row per language."
            )
        task, task_place = tasks.setdefault(example.id, (example.task, place))
        if task != example.task:
            raise RamoeError(
                f"{place}: id {example.id!r} has task {example.task!r}, but task {task!r} at {task_place}. "
                "Rows with the same id are parallel and share their task."
            )
        places[key] = place
        examples.append(example)
    return select(examples, split, languages, ", ".join(sources))


def select(
    examples: Sequence[Example], split: str | None, languages: Sequence[str] | None, where: str
) -> list[Example]:
    """The examples of the splits ("train,test"; None: all) and languages (None: all), in order; `where` names the data in errors.

    Raises:
        RamoeError: a language or split that no example has.
    """
    known = Counter(example.language for example in examples)
    for language in languages or ():
        if language not in known:
            raise RamoeError(
                f"unknown language {language!r}: no row of {where} has it. Found: {_counts(known)}."
            )
    kept = [example for example in examples if not languages or example.language in languages]
    if split is None:
        if not kept:
            raise RamoeError(f"no rows in {where}.")
        return kept
    for name in split.split(","):
        if not any(example.split == name for example in kept):
            found = _counts(Counter(example.split for example in kept))
            raise RamoeError(f"empty split {name!r}: no row of {where} has it. Splits found: {found}.")
    return [example for example in kept if example.split in split.split(",")]


def pair_with_anchor(examples: Iterable[Example], anchor: str) -> list[tuple[Example, Example]]:
    """(anchor view, target view) for every view that is not in the anchor language, in the order of the targets.

    Raises:
        RamoeError: if no view is in the anchor language, or ids lack their anchor view (their count, the first five).
    """
    examples = list(examples)
    anchors = {example.id: example for example in examples if example.language == anchor}
    if not anchors:
        found = sorted({example.language for example in examples})
        raise RamoeError(
            f"no row is in the anchor language {anchor!r}. Languages found: {', '.join(found) or 'none'}."
        )
    targets = [example for example in examples if example.language != anchor]
    missing = list(dict.fromkeys(example.id for example in targets if example.id not in anchors))
    if missing:
        raise RamoeError(
            f"{len(missing)} of {len({example.id for example in targets})} ids have no row in the anchor language "
            f"{anchor!r}: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. "
            "Add those rows, with the same id and split, or drop the ids."
        )
    return [(anchors[example.id], example) for example in targets]


def write_rows(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as JSONL text: UTF-8 kept readable, keys in the order given."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _rows(sources: Sequence[str], columns: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    optional = {columns.get(name, name) for name in OPTIONAL}
    for source in sources:
        yield from files.read_source(source, optional)


def _example(row: Mapping[str, Any], columns: Mapping[str, str], place: str) -> Example:
    def field(name: str, required: bool = True) -> Any:
        column = columns.get(name, name)
        value = row.get(column)
        if value is None and (required or (name in columns and column not in row)):
            found = ", ".join(map(repr, row)) or "none"
            mapped = f" (for field {name!r})" if column != name else ""
            if column in row:
                raise RamoeError(f"{place}: field {column!r}{mapped} is null, expected a string.")
            raise RamoeError(f"{place}: missing field {column!r}{mapped}. Fields found: {found}.")
        return value

    def text(name: str, required: bool = True, empty: bool = False) -> Any:
        value = field(name, required)
        if name == "id" and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if value is not None and (not isinstance(value, str) or not (value or empty)):
            expected = "a string" if empty else "a string that is not empty"
            raise RamoeError(f"{place}: field {columns.get(name, name)!r} is {value!r}, expected {expected}.")
        return value

    messages = field("messages", required=False)
    if messages is None:
        prompt, response = text("prompt", empty=True), text("response")
    else:
        messages = _messages(messages, place)
        prompt, response = "\n".join(m["content"] for m in messages[:-1]), messages[-1]["content"]
    answer = text("answer", required=False)
    if answer is None:
        answer = response
    choices = field("choices", required=False)
    if choices is not None:
        if not (
            isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) and c for c in choices)
        ):
            raise RamoeError(
                f"{place}: field 'choices' is {choices!r}, expected a list of two or more strings."
            )
        if answer not in choices:
            raise RamoeError(f"{place}: answer {answer!r} is none of the choices {choices!r}.")
        choices = tuple(choices)
    example = Example(
        text("id"), text("language"), text("task"), prompt, response, answer, choices, text("split"), messages
    )
    refuse_unwritable(
        {column: row.get(column) for name in FIELDS if (column := columns.get(name, name))}, place
    )
    return example


def _messages(value: Any, place: str) -> tuple[dict[str, str], ...]:
    fits = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in value
    )
    if not fits or len(value) < 2 or value[-1]["role"] != "assistant" or not value[-1]["content"]:
        raise RamoeError(
            f"{place}: field 'messages' must be a list of two or more objects with the strings 'role' and 'content', "
            "of which the last has role 'assistant' and some content."
        )
    return tuple({"role": m["role"], "content": m["content"]} for m in value)


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} ({count} rows)" for name, count in sorted(counter.items())) or "none"
