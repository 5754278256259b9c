"""Sample files of lm-evaluation-harness (`--log_samples`, version 0.4.13): one line per document and filter.

A line has `doc_id` (the number of the row), `doc` (the row), `filter` (what took the answer from the text),
`metrics` (their names) and a key for each metric. In a file of `ramoe evaluate`, a log-likelihood includes
the end token.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from ramoe_megatron.artifacts.records import json_objects
from ramoe_megatron.errors import RamoeError

DOC_ID = "doc_id"
_KEYS = {DOC_ID: int, "doc": dict, "metrics": list}
_AGAIN = "give a file that lm_eval --log_samples wrote"
_NAME = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True, slots=True)
class Sample:
    """What a file says about one document."""

    id: str
    correct: bool
    target: str
    """The gold answer, as lm-eval writes it: a text, or the number of a choice."""
    place: str
    """File and line, for messages."""


@dataclass(frozen=True, slots=True)
class SampleFile:
    """The samples of one file, by one filter and one metric."""

    path: str
    filter: str
    metric: str
    samples: list[Sample]


def read_samples(
    path: str | os.PathLike[str],
    metric: str | None = None,
    filter_name: str | None = None,
    form: str = "{doc_id}",
) -> SampleFile:
    """Read a sample file.

    Args:
        metric: the metric that says whether a document is answered correctly. Default: the only metric whose
            values are all 0 or 1.
        filter_name: the filter. Default: the only filter of the file.
        form: form of an id, with `doc_id` or columns of `doc` in braces.

    Raises:
        RamoeError: the file is malformed, two lines have the same document and filter or the same id, the
            filter or the metric is ambiguous or absent (the message lists those found), a value of the metric
            is neither 0 nor 1, or a document lacks a column.
    """
    lines = [(where, found) for _, where, found in json_objects(path, _AGAIN)]
    if not lines:
        raise RamoeError(f"{path}: no rows, expected one per document and filter; {_AGAIN}")
    for where, found in lines:
        for key, kind in _KEYS.items():
            if not isinstance(found.get(key), kind):
                value = repr(found[key])[:60] if key in found else "nothing"
                raise RamoeError(f"{where}: key {key!r}: found {value}, expected {kind.__name__}; {_AGAIN}")
    filters = list(dict.fromkeys(_filter(found) for _, found in lines))
    chosen = _only(path, "filter", filter_name, filters, filters)
    kept = [(where, found) for where, found in lines if _filter(found) == chosen]
    _refuse_twice(((found[DOC_ID], where) for where, found in kept), f"filter {chosen!r} and doc_id")
    named = list(dict.fromkeys(str(name) for _, found in kept for name in found["metrics"]))
    decisions = [name for name in named if all(_decision(found, name) is not None for _, found in kept)]
    measured = _only(path, "metric", metric, decisions, named)
    samples = []
    for where, found in kept:
        correct = _decision(found, measured)
        if correct is None:
            raise RamoeError(
                f"{where}: metric {measured!r} is {found.get(measured)!r}, expected 0 or 1; "
                "give another --metric"
            )
        samples.append(Sample(_id(found, form, where), correct, str(found.get("target")), where))
    return SampleFile(str(path), chosen, measured, samples)


def samples_by_id(files: Iterable[SampleFile]) -> dict[str, Sample]:
    """The samples of a language by id, in the order of the files. Raises RamoeError for an id given twice."""
    samples = [sample for file in files for sample in file.samples]
    _refuse_twice(((sample.id, sample.place) for sample in samples), "id")
    return {sample.id: sample for sample in samples}


def _filter(found: Mapping[str, Any]) -> str:
    return str(found.get("filter", "none"))


def _decision(found: Mapping[str, Any], metric: str) -> bool | None:
    """Whether the metric says correct; None if its value is neither 0 nor 1."""
    value = found.get(metric)
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


def _only(
    path: str | os.PathLike[str], what: str, given: str | None, fitting: Sequence[str], named: Sequence[str]
) -> str:
    """The given name, or the only fitting one."""
    flag = f"--{what}"
    if given is not None:
        if given in named:
            return given
        raise RamoeError(
            f"{path}: no {what} {given!r}. Found: {', '.join(named) or 'none'}. Give one of these with {flag}"
        )
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise RamoeError(f"{path}: {len(fitting)} {what}s: {', '.join(fitting)}. Choose one with {flag}")
    raise RamoeError(
        f"{path}: no {what} is 0 or 1 in every row. Found: {', '.join(named) or 'none'}. "
        "Evaluate with a metric such as acc or exact_match"
    )


def _refuse_twice(keys: Iterable[tuple[object, str]], what: str) -> None:
    seen: dict[object, str] = {}
    for key, where in keys:
        if key in seen:
            raise RamoeError(
                f"{where}: {what} {key!r} is at {seen[key]} already; give each document once, "
                "or an --id that differs"
            )
        seen[key] = where


def _id(found: Mapping[str, Any], form: str, where: str) -> str:
    """The id of a line's document."""

    def value(name: re.Match[str]) -> str:
        text = found[DOC_ID] if name[1] == DOC_ID else found["doc"].get(name[1])
        if not isinstance(text, str | int) or isinstance(text, bool):
            raise RamoeError(
                f"{where}: --id {form!r}: column {name[1]!r} of the document is {text!r}, expected a text or "
                f"a whole number. Columns: {', '.join([DOC_ID, *found['doc']])}"
            )
        return str(text)

    return _NAME.sub(value, form)


def check_form(form: str) -> None:
    """Raise RamoeError for a form of ids without a column, which would give all documents the same id."""
    if not _NAME.search(form):
        raise RamoeError(f"--id {form!r}: expected a column in braces, such as {{doc_id}} or mgsm/{{doc_id}}")


def sample_line(
    doc_id: int,
    doc: Mapping[str, Any],
    target: str,
    asked: Sequence[tuple[str, object]],
    answers: Sequence[tuple[float, bool | None]] | str,
    metric: str,
    correct: bool,
) -> str:
    """One line of a sample file, with the keys and types that lm-eval writes.

    Args:
        doc_id: number of the document in the file, from 0.
        asked: (prompt, choice) of each choice; or one (prompt, settings) of a generated answer.
        answers: (log-likelihood, whether greedy decoding gives the choice) of each choice, with None where it
            was not measured; or the generated text.
    """
    if isinstance(answers, str):
        filtered: list[Any] = [answers]
        made: list[Any] = [[answers]]
    else:
        filtered = [[str(score), str(greedy)] for score, greedy in answers]
        made = [[each] for each in filtered]
    found = {
        DOC_ID: doc_id,
        "doc": dict(doc),
        "target": target,
        "arguments": {
            f"gen_args_{n}": {"arg_0": prompt, "arg_1": other} for n, (prompt, other) in enumerate(asked)
        },
        "resps": made,
        "filtered_resps": filtered,
        "filter": "none",
        "metrics": [metric],
        "doc_hash": _hash(json.dumps(dict(doc), indent=2, ensure_ascii=False)),
        "prompt_hash": _hash(asked[0][0]),
        "target_hash": _hash(target),
        metric: float(correct),
    }
    return json.dumps(found, ensure_ascii=False) + "\n"


def sample_names(groups: Iterable[tuple[str, str]]) -> list[str]:
    """Names of the sample files of (task, language), in sorted order: `samples_TASK_LANGUAGE.jsonl`.

    A character that a file's name may not have becomes "_". A name that is taken gets a number.
    """
    names: dict[str, None] = {}
    for task, language in sorted(groups):
        name = re.sub(r"[^\w.-]", "_", f"samples_{task}_{language}")
        free = (f"{name}{f'_{number}' if number else ''}.jsonl" for number in count())
        names[next(each for each in free if each not in names)] = None
    return list(names)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
