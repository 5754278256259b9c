"""Laws of text files: round trips, atomic writes, and errors that name a file of another kind."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from artefact_files import TEXT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ramoe_megatron.artifacts.files import (
    atomic_write,
    atomic_write_text,
    digests,
    load_document,
    read_json,
    save_document,
    sha256,
)
from ramoe_megatron.artifacts.records import read_divergence, read_taxonomy, write_divergence, write_taxonomy
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.categories import TaxonomyRow
from ramoe_megatron.method.divergence import DivergenceRow

# --- whole or not at all ---


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    path = tmp_path / "deep" / "file.txt"
    atomic_write_text(path, "old")

    def write_half() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            assert temporary.parent == path.parent
            assert temporary.suffix != path.suffix, (
                "a search for files of this kind must not find half of one"
            )
            assert path.read_text() == "old"
            raise failure

    with pytest.raises(failure):
        write_half()
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_write_replaces_the_file_and_keeps_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    for text in ("first", "zweite\r\nZeile\n"):
        atomic_write_text(path, text)
        assert path.read_bytes() == text.encode()
    plain = tmp_path / "plain"
    plain.write_text("")
    assert path.stat().st_mode == plain.stat().st_mode, "readable by whoever may read the user's other files"


def test_sha256_is_the_known_digest_of_abc(tmp_path: Path) -> None:
    (tmp_path / "abc").write_text("abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "abc") == digest
    assert digests([tmp_path / "abc"]) == [{"path": str(tmp_path / "abc"), "sha256": digest}]


# --- taxonomy.jsonl ---


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.builds(TaxonomyRow, TEXT, TEXT, TEXT, TEXT, st.booleans(), st.booleans()),
        min_size=1,
        unique_by=lambda row: (row.id, row.language),
    )
)
def test_taxonomy_round_trip(tmp_path: Path, rows: list[TaxonomyRow]) -> None:
    write_taxonomy(tmp_path / "taxonomy.jsonl", rows)
    assert read_taxonomy(tmp_path / "taxonomy.jsonl") == rows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "b", ', r"column 12: .*expected one JSON object"),
        ("[1]", "found list, expected one JSON object"),
        ({"id": 7}, "key 'id': found 7, expected str"),
        ({"id": "x\ud800"}, "'id': character 2 of .* half of a surrogate pair"),
        ({"english_correct": 1}, "key 'english_correct': found 1, expected bool"),
        ({"category": "ii"}, "key 'category': found 'ii', expected 'ci'"),
        ({"id": "a"}, "id 'a' in 'tr' is on line 1 already"),
    ],
)
def test_a_bad_taxonomy_line_is_named(tmp_path: Path, line: str | dict[str, Any], message: str) -> None:
    path = tmp_path / "taxonomy.jsonl"
    write_taxonomy(path, [TaxonomyRow("a", "t", "tr", "train", True, False)])
    if isinstance(line, dict):
        line = json.dumps({**json.loads(path.read_text()), "id": "b", **line})
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(RamoeError, match=rf"taxonomy\.jsonl:2: .*{message}"):
        read_taxonomy(path)


def test_a_missing_or_empty_taxonomy_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "taxonomy.jsonl"
    with pytest.raises(RamoeError, match=r"taxonomy\.jsonl: cannot be read"):
        read_taxonomy(path)
    path.write_text("\n")
    with pytest.raises(RamoeError, match=r"taxonomy\.jsonl: no rows"):
        read_taxonomy(path)


# --- divergence.csv ---


def divergence_rows(languages: list[str]) -> list[DivergenceRow]:
    return [
        DivergenceRow(
            language, layer, 2 * layer + 1, None if layer == 1 else layer / 7, 5 * (layer != 1), layer
        )
        for language in languages
        for layer in range(3)
    ]


def test_divergence_round_trip_keeps_undefined_means_and_names_as_they_are(tmp_path: Path) -> None:
    rows = divergence_rows(["tr", 'a,"b', "NA", "007", " a ", "a\n\nb ", "\u2028", "null"])
    by_task = [dataclasses.replace(row, task=task) for task in ("month", 'b,"') for row in rows]
    for name, written in (("divergence.csv", rows), ("divergence-by-task.csv", by_task)):
        write_divergence(tmp_path / name, written)
        assert read_divergence(tmp_path / name) == written


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("moe_layer", "layer", r"csv:1: found columns language, layer, .*expected language, moe_layer"),
        ("tr,2", "tr,two", r"csv:4: .*'two'.*expected a number"),
        ("0.28", "nan0.28", r"csv:4: .*expected a number"),
        ("tr,2", "tr,3", r"language 'tr' has MoE layers \[0, 1, 3\], expected 0 to 2"),
    ],
)
def test_a_bad_divergence_table_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "divergence.csv"
    write_divergence(path, divergence_rows(["tr"]))
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(RamoeError, match=message):
        read_divergence(path)


# --- JSON documents ---

BODY = {"rows": [], "verdict": {"reading": "+1"}, "limits": ["один"]}


def test_document_round_trip(tmp_path: Path) -> None:
    save_document(tmp_path / "predict.json", "ramoe-prediction", BODY)
    expected = {"format": "ramoe-prediction", "version": 2, **BODY}
    assert load_document(tmp_path / "predict.json", "ramoe-prediction") == expected


def test_json_may_begin_with_a_mark_but_holds_unicode_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": ["\\ud83d\\ude00"]}')
    assert read_json(path) == {"a": ["\U0001f600"]}
    path.write_text('{"a": [{"b": "x\\ude00"}]}')
    with pytest.raises(RamoeError, match=r"a\.json: 'a'\.0\.'b': character 2 of .* half of a surrogate pair"):
        read_json(path)
    path.write_text('{"x\\ude00": 1}')
    with pytest.raises(RamoeError, match="half of a surrogate pair"):
        read_json(path)


def test_foreign_documents_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "predict.json"
    with pytest.raises(RamoeError, match=r"predict\.json: cannot be read"):
        load_document(path, "ramoe-prediction")
    for text, message in [
        ("[]", "found format 'list', expected 'ramoe-prediction'"),
        ('{"format": "ramoe-results"}', "found format 'ramoe-results', expected 'ramoe-prediction'"),
        ('{"format": "ramoe-prediction", "version": 7}', "version 7, expected 2"),
        ('{"format": "ramoe-prediction", "version": 2, "rows": []}', "lacks verdict, limits"),
    ]:
        path.write_text(text)
        with pytest.raises(RamoeError, match=rf"predict\.json: .*{message}"):
            load_document(path, "ramoe-prediction")
    save_document(path, "ramoe-prediction", BODY)
    whole = path.read_text().rstrip()
    for length in range(0, len(whole), 7):
        path.write_text(whole[:length])
        with pytest.raises(RamoeError, match=r"predict\.json: line \d+ column \d+: .*cut short"):
            load_document(path, "ramoe-prediction")


def test_an_incomplete_or_infinite_document_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(RamoeError, match="lacks verdict, limits"):
        save_document(tmp_path / "predict.json", "ramoe-prediction", {"rows": []})
    with pytest.raises(RamoeError, match="not finite"):
        save_document(tmp_path / "predict.json", "ramoe-prediction", {**BODY, "rows": [float("nan")]})
    assert not list(tmp_path.iterdir())
