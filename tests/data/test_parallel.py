"""Reading parallel rows: what is read is what was written, and every fault is told with its place."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from data_rows import row, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from ramoe_megatron.data import sources
from ramoe_megatron.data.parallel import Example, load_examples, pair_with_anchor, write_rows
from ramoe_megatron.errors import RamoeError

MESSAGES = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "no"},
]


def load(tmp_path: Path, *rows: dict[str, Any], **options: Any) -> list[Example]:
    return load_examples([write_jsonl(tmp_path / "rows.jsonl", list(rows))], **options)


# "\u2028" and "\x85" are line breaks to str.splitlines but not to JSON lines
@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5))
def test_written_rows_are_read_back(tmp_path_factory: pytest.TempPathFactory, prompts: list[str]) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text(
        write_rows(row(f"q{i}", prompt=p) for i, p in enumerate(prompts)), encoding="utf-8", newline=""
    )
    assert [e.prompt for e in load_examples([str(path)])] == prompts


def test_optional_fields_and_defaults(tmp_path: Path) -> None:
    plain, choice, chat = load(
        tmp_path,
        row("1", answer=None),
        row(2, choices=["EUR", "USD"]),  # type: ignore[arg-type]
        row("3", prompt=None, response=None, answer=None, messages=MESSAGES),
    )
    assert (plain.answer, plain.choices, plain.messages) == ("EUR", None, None)
    assert (choice.id, choice.choices) == ("2", ("EUR", "USD"))
    assert (chat.prompt, chat.response, chat.answer) == ("one?\nyes\ntwo?", "no", "no")
    assert chat.messages == tuple(MESSAGES)


def test_how_an_answer_ends_and_how_choices_are_compared(tmp_path: Path) -> None:
    stopped, scored = load(
        tmp_path, row("1", stop=["\n", "Q:"]), row("2", choices=["EUR", "USD"], choice_score="byte")
    )
    assert (stopped.stop, stopped.choice_score) == (("\n", "Q:"), None)
    assert (scored.stop, scored.choice_score) == (None, "byte")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stop": "\n"}, "rows.jsonl, line 1: field 'stop' is '\\n', expected a list of strings"),
        ({"stop": [""]}, "expected a list of strings that are not empty"),
        ({"stop": ["a"], "choices": ["EUR", "USD"]}, "expected no such field beside 'choices'"),
        ({"choice_score": "sum"}, "'choice_score' is 'sum', expected no such field without 'choices'"),
        ({"choice_score": "mean", "choices": ["EUR", "USD"]}, "expected one of sum, token, byte"),
    ],
)
def test_ends_and_scores_without_meaning_are_told(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(RamoeError) as error:
        load(tmp_path, row("1", **changes))
    assert said in str(error.value)


def test_folder_is_its_files_in_sorted_order(tmp_path: Path) -> None:
    for name in "caebd":  # neither the order of making nor its reverse is the sorted one
        write_jsonl(tmp_path / f"{name}.jsonl", [row(name)])
    (tmp_path / "notes.txt").write_text("not data")
    assert [e.id for e in load_examples([str(tmp_path)])] == list("abcde")


def test_columns_are_mapped(tmp_path: Path) -> None:
    rows = [{"key": 7, "lang": "fi", **row(id=None, language=None)}]  # type: ignore[arg-type]
    (found,) = load(tmp_path, *rows, columns={"id": "key", "language": "lang"})
    assert (found.id, found.language) == ("7", "fi")


LOOKS_ELSE = [
    "NA",
    "N/A",
    "#N/A",
    "<NA>",
    "null",
    "None",
    "nan",
    "True",
    "no",
    "1e5",
    "007",
    "1.0",
    "-0",
    "1,5",
    "inf",
    "0x10",
    "1_000",
]
LOOKS_ELSE += ["2026-01-31", "12:00", "2026-01-31T00:00:00Z", "=1+1", "[]", "{}"]
LOOKS_ELSE += ['a "b" c', "a\nb", "a\r\nb", "\ta", " a ", "\ufeffa", "\u2028", "\x85"]
"""Texts that a reader of tables takes for something else."""


def csv_text(rows: list[dict[str, Any]], sep: str = ",") -> str:
    """Rows with the same keys, as Python's csv module writes them."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]), delimiter=sep)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1) | st.sampled_from(
    LOOKS_ELSE
)


@given(st.lists(st.tuples(ANY_TEXT | st.just(""), ANY_TEXT, ANY_TEXT), min_size=1, max_size=5), st.booleans())
def test_every_cell_is_the_text_that_was_written(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str, str]], mark: bool
) -> None:
    folder = tmp_path_factory.mktemp("cells")
    rows = [row(f"00{i}", prompt=p, response=r, answer=a) for i, (p, r, a) in enumerate(cells)]
    text = ("\ufeff" if mark else "") + csv_text(rows)
    (folder / "rows.csv").write_text(text, encoding="utf-8", newline="")
    assert load_examples([str(folder / "rows.csv")]) == load(folder, *rows)


def test_texts_that_look_like_something_else_are_texts_from_every_source(tmp_path: Path) -> None:
    """In a column of texts that all look like numbers, or all like dates, a reader would convert it."""
    import datasets

    for number, value in enumerate(LOOKS_ELSE):
        rows = [
            row(f"{i}", language=value, task=value, prompt=value, response=value, answer=value, split=value)
            for i in range(2)
        ]
        here = tmp_path / f"{number}"
        here.mkdir()
        expected = load(here, *rows)
        assert {e.answer for e in expected} == {value}
        (here / "rows.csv").write_text(csv_text(rows), encoding="utf-8", newline="")
        assert load_examples([str(here / "rows.csv")]) == expected
        if number % 8 == 0:  # seconds each
            datasets.Dataset.from_list(rows).to_parquet(str(here / "rows.parquet"))
            assert load_examples([str(here / "rows.parquet")]) == expected


def test_an_empty_cell_is_an_empty_text_or_for_an_optional_field_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    cells = [
        row("1", prompt="", answer="", choices="", messages=""),
        row("2", answer="NA", choices="", messages=""),
    ]
    path.write_text(csv_text(cells))
    first, second = load_examples([str(path)])
    assert (first.prompt, first.answer, first.choices, first.messages) == ("", "EUR", None, None)
    assert second.answer == "NA"
    renamed = csv_text(cells).replace("answer", "gold", 1)
    path.write_text(renamed)
    assert [e.answer for e in load_examples([str(path)], columns={"answer": "gold"})] == ["EUR", "NA"]
    path.write_text(csv_text([row("1", response="")]))
    with pytest.raises(
        RamoeError, match=r"rows.csv, line 2: field 'response' is '', expected a string that is not empty"
    ):
        load_examples([str(path)])
    (tmp_path / "rows.jsonl").write_text('{"prompt": null}\n')
    with pytest.raises(RamoeError, match=r"rows.jsonl, line 1: field 'prompt' is null"):
        load_examples([str(tmp_path / "rows.jsonl")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,language\n1,en\n2\n", "line 3: found 1 cells, expected 2"),
        ('id,language\n1,"a\nb"\n\n2,en,more\n', "line 5: found 3 cells, expected 2"),
        ("id,id\n1,en\n", "line 1: two columns are called 'id'"),
        ('id,language\n1,"en\n2,fi\n', "line 2: malformed CSV"),
        ('id,language\n1,"en"x\n', "line 2: malformed CSV"),
        (b"id,language\n1,\xff\n", "byte 15: not UTF-8"),
    ],
)
def test_malformed_csv_is_told_by_file_and_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RamoeError, match=f"rows.csv, {message}"):
        list(sources.read_source(str(path)))


@pytest.mark.parametrize(
    "name", ["id", "language", "task", "prompt", "response", "answer", "split", "choices", "messages"]
)
def test_half_of_a_surrogate_pair_is_told_with_its_line(tmp_path: Path, name: str) -> None:
    """JSON may write one; no file that a job writes can hold it."""
    half, good = "x\ud83d", "x\U0001f600"
    fields: dict[str, Any] = {"choices": ["EUR", half]} if name == "choices" else {name: half}
    if name == "messages":
        fields = {"messages": [{"role": "user", "content": half}, {"role": "assistant", "content": "yes"}]}
    path = tmp_path / "rows.jsonl"
    for text in (half, good):  # a whole pair is one character, however JSON writes it
        bad = json.dumps(row(**{"id": "2", "prompt": "?", **fields})).replace(
            json.dumps(half), json.dumps(text)
        )
        path.write_text(json.dumps(row("1")) + "\n" + bad + "\n")
        if text == good:
            assert len(load_examples([str(path)])) == 2
        else:
            with pytest.raises(
                RamoeError, match=rf"rows.jsonl, line 2: '{name}'.*character 2 of .* half of a surrogate pair"
            ):
                load_examples([str(path)])


def test_parquet_whose_text_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = {name: pyarrow.array([value]) for name, value in row().items()}
    broken = pyarrow.array([b"\xff\xfe"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table(columns | {"prompt": broken}), tmp_path / "rows.parquet")
    with pytest.raises(RamoeError, match=r"rows.parquet: not readable as parquet"):
        load_examples([str(tmp_path / "rows.parquet")])


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_other_files_say_the_same_as_jsonl(tmp_path: Path, suffix: str) -> None:
    import datasets

    rows = [row("1"), row("2", "fi", prompt='a "quoted", text')]
    table = datasets.Dataset.from_list(rows)
    path = str(tmp_path / f"rows.{suffix}")
    table.to_parquet(path) if suffix == "parquet" else table.to_csv(path)
    assert load_examples([path]) == load(tmp_path, *rows)


def test_split_and_languages_select(tmp_path: Path) -> None:
    rows = [
        row("1"),
        row("1", "fi"),
        row("2", split="test"),
        row("2", "fi", split="test"),
        row("3", split="dev"),
    ]
    assert [e.id for e in load(tmp_path, *rows, split="test", languages=["fi"])] == ["2"]
    assert [e.id for e in load(tmp_path, *rows, split="train,test", languages=["en"])] == ["1", "2"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "2", "language" "fi"}', "line 3, column 24: malformed JSON"),
        ('{"id": "2"', "line 3, column 11: malformed JSON"),
        ('["id"]', "line 3, column 1: found list, expected one JSON object"),
        (b'{"id": "\xff"}', "line 3, byte 9: not UTF-8"),
    ],
)
def test_malformed_json_is_told_by_file_line_and_column(
    tmp_path: Path, line: str | bytes, message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    bad = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(json.dumps(row()).encode() + b"\n\n" + bad + b"\n")
    with pytest.raises(RamoeError, match=f"rows.jsonl, {message}"):
        load_examples([str(path)])


@pytest.mark.parametrize("name", ["id", "language", "task", "prompt", "response", "split"])
def test_missing_field_is_named(tmp_path: Path, name: str) -> None:
    rows = [row("1"), {key: value for key, value in row("2").items() if key != name}]
    with pytest.raises(RamoeError, match=f"rows.jsonl, line 2: missing field '{name}'. Fields found: "):
        load(tmp_path, *rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"response": 3}, "field 'response' is 3, expected a string"),
        ({"response": ""}, "field 'response' is '', expected a string that is not empty"),
        ({"language": ["en"]}, "field 'language' is"),
        ({"choices": ["USD", "GBP"]}, "answer 'EUR' is none of the choices"),
        ({"choices": "EUR"}, "field 'choices' is 'EUR', expected a list"),
        ({"messages": MESSAGES[:3]}, "last has role 'assistant'"),
        ({"messages": [{"role": "user"}]}, "field 'messages' must be"),
        (
            {"messages": [*MESSAGES[:-1], {**MESSAGES[-1], "reasoning_content": "It is AT."}]},
            "'messages' has 'reasoning_content'.*Write it into 'content' as the template does",
        ),
    ],
)
def test_bad_values_are_told_with_their_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RamoeError, match=f"line 2: .*{message}"):
        load(tmp_path, row("1"), row("2", **changes))


def test_second_row_of_an_id_and_language_names_both_places(tmp_path: Path) -> None:
    with pytest.raises(RamoeError, match=r"line 3: second row with id 'q1' and language 'fi'; .*line 2"):
        load(tmp_path, row(), row(language="fi"), row(language="fi"))


def test_one_id_in_two_tasks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RamoeError, match=r"line 2: id 'q1' has task 'month', but task 'currency' at .*line 1"
    ):
        load(tmp_path, row(), row(language="fi", task="month"))


def test_unknown_language_and_empty_split_list_what_there_is(tmp_path: Path) -> None:
    rows = [row("1"), row("1", "fi"), row("2", split="test")]
    with pytest.raises(RamoeError, match=r"unknown language 'sw'.*Found: en \(2 rows\), fi \(1 rows\)"):
        load(tmp_path, *rows, languages=["en", "sw"])
    with pytest.raises(RamoeError, match=r"empty split 'test'.*Splits found: train \(1 rows\)"):
        load(tmp_path, *rows, languages=["fi"], split="test")
    with pytest.raises(RamoeError, match="no rows in"):
        load(tmp_path)


def test_bad_sources_and_mappings(tmp_path: Path) -> None:
    with pytest.raises(RamoeError, match=r"none\.jsonl: no such file or folder"):
        load_examples([str(tmp_path / "none.jsonl")])
    with pytest.raises(RamoeError, match="folder holds no data file"):
        load_examples([str(tmp_path)])
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(RamoeError, match=r"cannot read '\.txt' files"):
        load_examples([str(tmp_path / "rows.txt")])
    (tmp_path / "bad.parquet").write_text("x")
    with pytest.raises(RamoeError, match=r"bad\.parquet: not readable as parquet"):
        load_examples([str(tmp_path / "bad.parquet")])
    with pytest.raises(RamoeError, match="'lang' is no field"):
        load(tmp_path, row(), columns={"lang": "language"})
    with pytest.raises(RamoeError, match=r"missing field 'key' \(for field 'id'\)"):
        load(tmp_path, row(), columns={"id": "key"})
    with pytest.raises(RamoeError, match="no data"):
        load_examples([])


def test_pairs_join_each_target_with_its_anchor(tmp_path: Path) -> None:
    found = load(tmp_path, row("1", "fi"), row("2"), row("1"), row("2", "sw"), row("2", "fi"))
    pairs = pair_with_anchor(found, "en")
    assert [(a.id, a.language, t.id, t.language) for a, t in pairs] == [
        ("1", "en", "1", "fi"),
        ("2", "en", "2", "sw"),
        ("2", "en", "2", "fi"),
    ]


def test_ids_without_anchor_are_counted_and_the_first_five_named(tmp_path: Path) -> None:
    found = load(
        tmp_path, row("a"), *(row(f"x{i}", lang) for i in range(7) for lang in ("fi", "sw")), row("a", "fi")
    )
    with pytest.raises(RamoeError, match=r"7 of 8 ids have no row .*'en': x0, x1, x2, x3, x4, \.\.\."):
        pair_with_anchor(found, "en")
    with pytest.raises(
        RamoeError, match=r"no row is in the anchor language 'de'\. Languages found: en, fi, sw"
    ):
        pair_with_anchor(found, "de")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_hub_rows_keep_their_split_and_their_text(tmp_path: Path, kind: str) -> None:
    """A folder stands in for the hub: `datasets` finds the files of both the same way, as named splits."""
    import datasets

    texts = ["007", "2026-01-31", "NA"]
    for split in ("train", "test"):
        rows = [row(text, prompt=text, response=text, answer=text, split=None) for text in texts]
        path = tmp_path / f"{split}.{kind}"
        if kind == "parquet":
            datasets.Dataset.from_list(rows).to_parquet(str(path))
        else:
            write = {
                "jsonl": lambda r: write_rows(r),
                "json": json.dumps,
                "csv": csv_text,
                "tsv": lambda r: csv_text(r, "\t"),
            }[kind]
            path.write_text(write(rows), encoding="utf-8", newline="")
    rows = dict(sources._read_hub(str(tmp_path)))
    assert {place.removeprefix(f"{tmp_path}, ").split(", ")[0] for place in rows} == {
        "split train",
        "split test",
    }
    found = [(r["id"], r["prompt"], r["response"], r["answer"], r["split"]) for r in rows.values()]
    assert sorted(found) == sorted(
        (text, text, text, text, split) for text in texts for split in ("train", "test")
    )


def test_a_hub_data_set_whose_card_has_a_csv_read_otherwise_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("id,language\n1,en\n")
    card = "---\nconfigs:\n- config_name: default\n  data_files: train.csv\n  skiprows: 1\n---\n"
    (tmp_path / "README.md").write_text(card)
    with pytest.raises(RamoeError, match=r"train.csv: the data set sets skiprows to 1"):
        list(sources._read_hub(str(tmp_path)))


def test_hub_name_out_of_reach_is_told() -> None:
    code = (
        "from ramoe_megatron.data.parallel import load_examples; "
        "load_examples(['no-such-owner/no-such-data'])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert (
        "RamoeError: no-such-owner/no-such-data: no such file or folder, and as a hub name it failed"
        in run.stderr
    )


def test_datasets_is_not_imported_for_jsonl(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [row()])
    code = (
        "import sys; from ramoe_megatron.data.parallel import load_examples; "
        f"load_examples([{path!r}]); print('datasets' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
