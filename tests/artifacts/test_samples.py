"""Sample files of lm-evaluation-harness: what is read of them, what is refused, and what is written."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from data_rows import write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from ramoe_megatron.artifacts.samples import (
    check_form,
    read_samples,
    sample_line,
    sample_names,
    samples_by_id,
)
from ramoe_megatron.errors import RamoeError


def line(doc_id: int, filter_name: str = "none", **metrics: Any) -> dict[str, Any]:
    """A line as lm-eval 0.4.13 writes it for a generated answer, without its hashes."""
    return {
        "doc_id": doc_id,
        "doc": {"question": f"q{doc_id}", "number": doc_id + 100, "list": []},
        "target": str(doc_id % 3),
        "arguments": {"gen_args_0": {"arg_0": "text", "arg_1": {"until": ["\n"]}}},
        "resps": [[" 42"]],
        "filtered_resps": ["42"],
        "filter": filter_name,
        "metrics": list(metrics),
        **metrics,
    }


def both_filters(number: int) -> list[dict[str, Any]]:
    """Two filters that decide differently, and a metric that decides nothing."""
    return [
        line(n, name, exact_match=float(n % 2 == place), bleu=0.25)
        for n in range(number)
        for place, name in enumerate(("strict", "flexible"))
    ]


def test_one_filter_and_one_metric_decide(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "s.jsonl", both_filters(4))
    for name, first in (("strict", True), ("flexible", False)):
        found = read_samples(path, filter_name=name)
        assert (found.filter, found.metric) == (name, "exact_match")
        assert [sample.correct for sample in found.samples] == [first, not first, first, not first]
        assert [sample.id for sample in found.samples] == ["0", "1", "2", "3"]
    numbers = read_samples(path, filter_name="strict", form="set/{number}-{question}")
    assert [sample.id for sample in numbers.samples][:2] == ["set/100-q0", "set/101-q1"]


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        (both_filters(2), {}, "2 filters: strict, flexible. Choose one with --filter"),
        (both_filters(2), {"filter_name": "loose"}, "no filter 'loose'. Found: strict, flexible"),
        ([line(0, acc=1.0, acc_norm=0.0)], {}, "2 metrics: acc, acc_norm. Choose one with --metric"),
        ([line(0, acc=1.0)], {"metric": "f1"}, "no metric 'f1'. Found: acc"),
        ([line(0, acc=1.0), line(1, acc=0.5)], {"metric": "acc"}, ":2: metric 'acc' is 0.5, expected 0 or 1"),
        ([line(0, bleu=0.5)], {}, "no metric is 0 or 1 in every row. Found: bleu"),
        ([line(0, acc=1.0), line(0, acc=1.0)], {}, ":2: filter 'none' and doc_id 0 is at"),
        ([line(0, acc=1.0)], {"form": "{key}"}, "column 'key' of the document is None"),
        ([line(0, acc=1.0)], {"form": "{list}"}, r"column 'list' of the document is \[\]"),
        ([{"doc": {}}], {}, ":1: key 'doc_id': found nothing, expected int"),
        ([], {}, "no rows"),
    ],
)
def test_what_decides_nothing_is_refused(
    rows: list[dict[str, Any]], options: dict[str, str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(RamoeError, match=said):
        read_samples(write_jsonl(tmp_path / "s.jsonl", rows), **options)


def test_an_id_of_two_documents_and_a_form_without_a_column_are_refused(tmp_path: Path) -> None:
    files = [read_samples(write_jsonl(tmp_path / f"{name}.jsonl", [line(7, acc=1.0)])) for name in ("a", "b")]
    with pytest.raises(RamoeError, match=r"b.jsonl:1: id '7' is at .*a.jsonl:1 already"):
        samples_by_id(files)
    with pytest.raises(RamoeError, match="expected a column in braces"):
        check_form("mgsm")


scores = st.floats(-1e4, 0, allow_nan=False)


@given(
    st.lists(
        st.tuples(st.text(min_size=1), st.one_of(st.lists(scores, min_size=2), st.text()), st.booleans()),
        min_size=1,
        unique_by=lambda each: each[0],
    )
)
def test_what_is_written_is_read_back(rows: list[tuple[str, list[float] | str, bool]]) -> None:
    """Ids, decisions, texts and log-likelihoods, bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.jsonl"
        text = ""
        for number, (key, answer, right) in enumerate(rows):
            given = answer if isinstance(answer, str) else [(score, None) for score in answer]
            asked = [("p", "c")] * (1 if isinstance(answer, str) else len(answer))
            text += sample_line(number, {"id": key}, "0", asked, given, "acc", right)
        path.write_text(text, encoding="utf-8")
        found = read_samples(path, form="{id}")
        assert [(sample.id, sample.correct) for sample in found.samples] == [(r[0], r[2]) for r in rows]
        for (_, answer, _), written in zip(
            rows, map(json.loads, text.removesuffix("\n").split("\n")), strict=True
        ):
            back = written["filtered_resps"]
            assert back == [answer] if isinstance(answer, str) else [float(s) for s, _ in back] == answer


def test_names_of_files_differ() -> None:
    groups = [("a/b", "en"), ("a b", "en"), ("a_b", "en_1"), ("x", "sw")]
    names = sample_names(groups)
    assert len(set(names)) == len(groups)
    assert all(name.startswith("samples_") and "/" not in name for name in names)
