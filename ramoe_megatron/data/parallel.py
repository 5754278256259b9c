"""Parallel task data: rows with the same id have the same content in different languages.

A row has the fields of `Example`: ``id``, ``language``, ``task``, ``split``, ``prompt`` and ``response`` or
``messages``, and optionally ``answer``, ``choices``, ``metric`` and ``answers``. `data.sources` reads the
rows of a file, a folder or a hub data set. Errors name the file and the line. Text is never converted:
"NA", "007" and "" are texts.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from ramoe_megatron.artifacts.files import refuse_unwritable
from ramoe_megatron.data import sources as files
from ramoe_megatron.data.codes import Codes, codes_of, pick
from ramoe_megatron.errors import RamoeError


@dataclass(frozen=True, slots=True)
class Example:
    """One view of a parallel example: the example in one language."""

    id: str
    """The same for all views of an example. Each (id, language) is unique."""
    language: str
    """Any name of the language, for example "en" or "eng_Latn"."""
    task: str
    """Name of the task, the same for all views of an example."""
    prompt: str
    """Input of the model; empty for plain text. With ``messages``: the contents of the earlier messages."""
    response: str
    """Text to train on. With ``messages``: the content of the last message."""
    answer: str
    """Gold answer, compared with the model's greedy answer, or one of ``choices``. Default: ``response``."""
    choices: tuple[str, ...] | None
    """Possible answers. With choices, the model's answer is the choice with the highest log-likelihood."""
    split: str
    """For example "train", "validation" or "test"."""
    messages: tuple[dict[str, str], ...] | None = None
    """A conversation, tokenised with the chat template. Each message has "role" and "content"; the last
    message is the assistant's."""
    stop: tuple[str, ...] | None = None
    """Strings that end a generated answer, beside the end token. They are no part of the answer."""
    choice_score: str | None = None
    """How choices are compared: by the sum of the log-likelihoods of a choice's tokens and its end token
    ("sum", the default), by this sum over their number ("token"), or over the choice's bytes ("byte")."""
    metric: str | None = None
    """How a generated answer is graded: one of `METRICS`. Default: it equals ``answer`` as a reader of the
    language compares."""
    answers: tuple[str, ...] | None = None
    """All gold answers, for the metric "exact". Default: ``answer`` alone."""
    place: str = field(default="", compare=False, repr=False)
    """File and line of the row, for messages."""


METRICS = ("number", "exact", "ifeval")
"""Ways to grade a generated answer (`data.grading`)."""
CHOICE_SCORES = ("sum", "token", "byte")
FIELDS = tuple(entry.name for entry in fields(Example) if entry.name != "place")
OPTIONAL = ("answer", "choices", "messages", "stop", "choice_score", "metric", "answers")
"""Fields that a row may lack. In a CSV file, an empty cell of such a field means that the field is absent."""


def load_examples(
    sources: Sequence[str],
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    languages: Sequence[str] | None = None,
) -> list[Example]:
    """Reads and checks the rows of all sources, in the order of the sources and their rows.

    Args:
        sources: files (.jsonl, .parquet, .csv, .arrow), folders with such files (read in sorted order), or
            names of hub data sets ("owner/name" or "owner/name:configuration").
        columns: our field name -> column name in the source, for sources with other column names.
        split: keep only this split, or several splits as in "train,test"; None keeps all splits.
        languages: keep only these languages; None keeps all languages.

    Raises:
        RamoeError: a source is missing or malformed (the message has the file, line and column), a field is
            missing or has the wrong type, an (id, language) occurs twice, an id has two tasks, text is not
            valid Unicode, or no row has a requested language or split.
    """
    examples = list(checked_examples(sources, columns))
    return list(select_examples(examples, split, languages, ", ".join(sources)))


def checked_examples(sources: Sequence[str], columns: Mapping[str, str] | None = None) -> Iterator[Example]:
    """The checked rows of all sources one by one, in the order of the sources and their rows.

    Raises:
        RamoeError: as `load_examples`, except for a missing language or split.
    """
    for name in columns or {}:
        if name not in FIELDS:
            raise RamoeError(f"column mapping: {name!r} is no field of a row. Fields: {', '.join(FIELDS)}.")
    if not sources:
        raise RamoeError("no data: name at least one file, folder or hub data set.")
    bits: dict[str, int] = {}
    seen: dict[str, tuple[str, int]] = {}  # id -> task, and one bit for each language read so far
    for place, row in _rows(sources, columns or {}):
        example = _example(row, columns or {}, place)
        bit = 1 << bits.setdefault(example.language, len(bits))
        task, languages = seen.get(example.id, (example.task, 0))
        if languages & bit:
            raise RamoeError(
                f"{place}: second row with id {example.id!r} and language {example.language!r}; the first is "
                f"at {_first(sources, columns or {}, example.id, example.language)}. "
                "Give each example one row per language."
            )
        if task != example.task:
            raise RamoeError(
                f"{place}: id {example.id!r} has task {example.task!r}, but task {task!r} at "
                f"{_first(sources, columns or {}, example.id)}. "
                "Rows with the same id are parallel and share their task."
            )
        seen[example.id] = (task, languages | bit)
        yield example


def _first(sources: Sequence[str], columns: Mapping[str, str], id_: str, language: str | None = None) -> str:
    """The place of the first row with this id and language. Read again, so that no place is held for it."""
    examples = (_example(row, columns, place) for place, row in _rows(sources, columns))
    return next(e.place for e in examples if e.id == id_ and language in (None, e.language))


def select_examples(
    examples: Sequence[Example], split: str | None, languages: Sequence[str] | None, where: str
) -> Sequence[Example]:
    """The examples of some splits and languages, in their order. A list gives a list.

    Args:
        examples: all examples.
        split: the splits to keep, as in "train,test"; None keeps all splits.
        languages: the languages to keep; None keeps all languages.
        where: the name of the data, for messages.

    Raises:
        RamoeError: no example has a requested language or split.
    """
    spoken = codes_of(examples, "language")
    for language in languages or ():
        if language not in spoken.counts():
            raise RamoeError(
                f"unknown language {language!r}: no row of {where} has it. Found: {_counts(spoken.counts())}."
            )
    kept = spoken.among(languages) if languages else np.ones(len(spoken), dtype=bool)
    if split is None and not kept.any():
        raise RamoeError(f"no rows in {where}.")
    if split is not None:
        splits = codes_of(examples, "split")
        found = Codes(splits.names, splits.codes[kept]).counts()
        for name in split.split(","):
            if name not in found:
                raise RamoeError(
                    f"empty split {name!r}: no row of {where} has it. Splits found: {_counts(found)}."
                )
        kept &= splits.among(split.split(","))
    return pick(examples, np.flatnonzero(kept))


def pair_with_anchor(examples: Iterable[Example], anchor: str) -> list[tuple[Example, Example]]:
    """(anchor view, target view) for every view in another language than the anchor, in the order of the
    views.

    Raises:
        RamoeError: no view is in the anchor language, or ids have no view in the anchor language. The message
            counts the ids and names the first five.
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
            f"{len(missing)} of {len({example.id for example in targets})} ids have no row in the anchor "
            f"language {anchor!r}: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. "
            "Add those rows, with the same id and split, or drop the ids."
        )
    return [(anchors[example.id], example) for example in targets]


def write_rows(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as JSONL text. Non-ASCII characters are not escaped; keys keep their order."""
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

    metric = text("metric", required=False)
    if metric not in (None, *METRICS):
        raise RamoeError(f"{place}: metric {metric!r}, expected one of {', '.join(METRICS)}, or no metric.")
    messages = field("messages", required=False)
    if messages is None:
        # an instruction has no gold response
        prompt, response = text("prompt", empty=True), text("response", empty=metric == "ifeval")
    else:
        messages = _messages(messages, place, empty=metric == "ifeval")
        prompt, response = "\n".join(m["content"] for m in messages[:-1]), messages[-1]["content"]
    answers = field("answers", required=False)
    if answers is not None and not (
        isinstance(answers, list) and answers and all(isinstance(a, str) and a for a in answers)
    ):
        raise RamoeError(f"{place}: field 'answers' is {answers!r}, expected a list of one or more strings.")
    answer = text("answer", required=False)
    if answer is None:
        answer = answers[0] if answers else response
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
    stop, choice_score = field("stop", required=False), text("choice_score", required=False)
    if stop is not None:
        if not (isinstance(stop, list) and stop and all(isinstance(s, str) and s for s in stop)) or choices:
            expected = "no such field beside 'choices'" if choices else "a list of strings that are not empty"
            name = columns.get("stop", "stop")
            raise RamoeError(f"{place}: field {name!r} is {stop!r}, expected {expected}.")
        stop = tuple(stop)
    if choice_score is not None and (choice_score not in CHOICE_SCORES or not choices):
        expected = f"one of {', '.join(CHOICE_SCORES)}" if choices else "no such field without 'choices'"
        name = columns.get("choice_score", "choice_score")
        raise RamoeError(f"{place}: field {name!r} is {choice_score!r}, expected {expected}.")
    example = Example(
        *(text("id"), text("language"), text("task"), prompt, response, answer, choices, text("split")),
        messages,
        stop,
        choice_score,
        metric,
        tuple(answers) if answers else None,
        place,
    )
    refuse_unwritable(
        {column: row.get(column) for name in FIELDS if (column := columns.get(name, name))}, place
    )
    return example


def _messages(value: Any, place: str, empty: bool) -> tuple[dict[str, str], ...]:
    fits = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in value
    )
    if not fits or len(value) < 2 or value[-1]["role"] != "assistant" or not (value[-1]["content"] or empty):
        raise RamoeError(
            f"{place}: field 'messages' must be a list of two or more objects with the strings 'role' and "
            "'content', of which the last has role 'assistant' and some content."
        )
    for n, message in enumerate(value):
        if lost := next((name for name in _BESIDE_CONTENT if message.get(name)), None):
            raise RamoeError(
                f"{place}: message {n + 1} of 'messages' has {lost!r}, and the chat template gets only "
                "'role' and 'content'. Write it into 'content' as the template does, or leave it out."
            )
    return tuple({"role": m["role"], "content": m["content"]} for m in value)


_BESIDE_CONTENT = ("reasoning_content", "reasoning", "thinking", "tool_calls")
"""Fields in which chat data have what an assistant writes beside the content."""


def _counts(counter: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count} rows)" for name, count in sorted(counter.items())) or "none"
