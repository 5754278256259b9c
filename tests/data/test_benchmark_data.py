"""Named benchmarks: excerpts in the published forms become parallel rows; faults are told by their place."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ramoe_megatron.artifacts.files import load_document, sha256
from ramoe_megatron.data.benchmarks import declaration as declarations
from ramoe_megatron.data.benchmarks.declaration import benchmark_names, check_declaration, declared
from ramoe_megatron.data.benchmarks.engine import (
    BenchmarkConfig,
    BenchmarksConfig,
    BenchmarkStats,
    write_benchmark,
    write_benchmarks,
)
from ramoe_megatron.data.benchmarks.published import match_language, read_table
from ramoe_megatron.data.grading import grade
from ramoe_megatron.data.parallel import Example, load_examples, pair_with_anchor
from ramoe_megatron.errors import RamoeError

Files = dict[str, str]


def jsonl(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(*rows: Sequence[object], head: str = "") -> str:
    return "".join(f"{line}\n" for line in ([head] if head else []) + ["\t".join(map(str, r)) for r in rows])


def squad(language: str) -> str:
    asked = [
        {
            "id": f"q{n}",
            "question": f"{language} {n}?",
            "answers": [{"text": f"{n} {language}", "answer_start": 0}],
        }
        for n in range(3)
    ]
    return json.dumps(
        {"version": "1.1", "data": [{"title": "T", "paragraphs": [{"context": "C", "qas": asked}]}]}
    )


def copa(language: str, question: str) -> str:
    return jsonl(
        *(
            {"premise": f"{language} {n}.", "choice1": "a", "choice2": "b", "question": question,
             "label": n % 2, "idx": n, "changed": False}
            for n in range(4)
        )
    )  # fmt: skip


def mmlu(question: str, option: str, answer: str) -> Callable[[str], dict[str, str]]:
    return lambda language: {
        question: f"{language}?", **{f"{option}{letter}": f"{language} {letter}" for letter in "abcd"},
        answer: "C",
    }  # fmt: skip


STORY = {f"input_sentence_{n}": f"{n}." for n in range(1, 5)} | {
    "sentence_quiz1": "x", "sentence_quiz2": "y", "answer_right_ending": 2, "story_id": "s",
}  # fmt: skip
BELEBELE = {f"mc_answer{n}": f"m{n}" for n in range(1, 5)} | {
    "link": "L", "question_number": 2, "flores_passage": "P", "question": "q?", "correct_answer_num": "3",
    "dialect": "d", "ds": "2023-05-03",
}  # fmt: skip
GLOBAL = {"sample_id": "law/test/1", "subject": "law", **mmlu("question", "option_", "answer")("xx")}
MKQA = declared("mkqa").forms[0].languages
PUBLISHED: dict[str, tuple[Files, str, int]] = {
    "mgsm": (
        {f"mgsm_{code}.tsv": table((f"{code} \"1\"?", "1,018"), (f"{code} 2?", 3))
         for code in ("en", "de", "bn")},
        "1018",
        6,
    ),
    "gsm8k": (
        {"test.jsonl": jsonl({"question": "q?", "answer": "2+2 = <<2+2=4>>4\n#### 1,004"}),
         "train.jsonl": jsonl({"question": "p?", "answer": "#### 5"})},
        "1004",
        2,
    ),
    "xcopa": (
        {f"data/{code}/{split}.{code}.jsonl": copa(code, "cause" if code == "et" else "effect")
         for code in ("et", "th") for split in ("val", "test")},
        "a",
        16,
    ),
    "xquad": ({f"xquad.{code}.json": squad(code) for code in ("en", "ar")}, "0 en", 6),
    "sib200": (
        {f"{code}/{split}.tsv": table((split[:2], "travel", "Ein \"Satz\""), head="index_id\tcategory\ttext")
         for code in ("eng_Latn", "deu_Latn") for split in ("train", "dev", "test")},
        "travel",
        6,
    ),
    "belebele": ({f"data/{code}.jsonl": jsonl(BELEBELE) for code in ("eng_Latn", "zho_Hans")}, "C", 2),
    "mmmlu": (
        {f"test/mmlu_{code}.csv": ",Question,A,B,C,D,Answer,Subject\n0,q?,1,2,3,4,C,law\n"
         for code in ("EN-US", "AR-XY")},
        "C",
        2,
    ),
    "xnli": (
        {"xnli.test.tsv": table(*((code, "neutral", "p", "h", 1) for code in ("en", "sw")),
                                head="language\tgold_label\tsentence1\tsentence2\tpairID")},
        "neutral",
        2,
    ),
    "paws-x": (
        {f"dev-{code}.tsv": table(("a", "b", 1), ("c", "d", int(code == "de"))) for code in ("en", "de")},
        "Yes",
        2,
    ),
    "mkqa": (
        {"mkqa.jsonl": jsonl(*(
            {"example_id": n, "query": "q", "queries": dict.fromkeys(MKQA, "q?"),
             "answers": {code: [{"type": "entity", "text": text, "aliases": ["A1"]},
                                {"type": "x", "text": text}] for code in MKQA}}
            for n, text in enumerate(["gold", None])))},
        "gold",
        26,
    ),
    "ifeval": (
        {f"{code}_input_data.jsonl": jsonl({"key": 1, "prompt": "p", "instruction_id_list": [f"{code}:a:b"],
                                            "kwargs": [{}]}) for code in ("en", "ja")},
        '{"prompt": "p"',
        2,
    ),
    "flores": ({f"{split}/{code}.{split}": "One.\nTwo.\n" for code in ("eng_Latn", "swh_Latn")
                for split in ("dev", "devtest")}, "", 8),
    "udhr": ({f"udhr_{code}.txt": "Title\n\nAll\n" for code in ("eng", "deu")}, "", 4),
}  # fmt: skip
PARQUET: dict[str, tuple[str, dict[str, Any], str]] = {
    "mgsm": ("de/test-0.parquet",
             {"question": "q?", "answer": None, "answer_number": 18, "equation_solution": None}, "18"),
    "xstorycloze": ("en/eval-0.parquet", STORY, "y"),
    "global_mmlu": ("en/test-0.parquet", GLOBAL, "C"),
    "xnli": ("de/test-0.parquet", {"premise": "p", "hypothesis": "h", "label": 2}, "contradiction"),
    "paws-x": ("fr/validation-0.parquet", {"id": 4, "sentence1": "a", "sentence2": "b", "label": 0}, "Non"),
    "xcopa": ("et/test-0.parquet", json.loads(copa("et", "cause").splitlines()[1]), "b"),
    "xquad": ("xquad.de/validation-0.parquet",
              {"id": "q", "context": "c", "question": "q?", "answers": {"text": ["t"], "answer_start": [0]}},
              "t"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "source"


def put(folder: Path, files: Files) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def run(name: str, folder: Path, **options: Any) -> tuple[list[dict[str, Any]], BenchmarkStats]:
    out = folder.parent / "out.jsonl"
    stats = write_benchmark(BenchmarkConfig(name, str(folder), **options), out)
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()], stats


def refusal(name: str, folder: Path, **options: Any) -> str:
    with pytest.raises(RamoeError) as caught:
        run(name, folder, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_form_becomes_rows_that_load(name: str, folder: Path) -> None:
    files, answer, count = PUBLISHED[name]
    rows, stats = run(name, put(folder, files))
    assert len(rows) == count == sum(sum(counts.values()) for counts in stats.rows.values())
    examples = load_examples([str(folder.parent / "out.jsonl")])
    assert {e.language for e in examples} == set(stats.languages)
    assert any(e.answer.startswith(answer) for e in examples)
    for one in examples:
        if one.metric in ("number", "exact"):
            assert grade(one, one.response)
    if declared(name).parallel and "en" in stats.languages:
        assert len(pair_with_anchor(examples, "en")) == len(examples) - len({e.id for e in examples})
    origin = load_document(folder.parent / "out.json", "ramoe-data")["benchmarks"][0]
    assert origin["licence"] == declared(name).licence
    assert {file["sha256"] for file in origin["files"]} <= {sha256(folder / file) for file in files}
    assert origin["files"]


@pytest.mark.parametrize("name", PARQUET)
def test_the_columns_of_the_hub_are_read_from_its_files(name: str, folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path, row, answer = PARQUET[name]
    (folder / path).parent.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), folder / path)
    rows, _ = run(name, folder)
    assert [found["answer"] for found in rows] == [answer]


def test_every_declaration_is_tested_in_some_form_and_read_whole() -> None:
    assert {*PUBLISHED, *PARQUET} == set(benchmark_names())
    for name in benchmark_names():
        assert declared(name).title


def test_ids_of_mgsm_are_those_of_gsm8k(folder: Path) -> None:
    mgsm, _ = run("mgsm", put(folder / "a", PUBLISHED["mgsm"][0]))
    gsm8k, _ = run("gsm8k", put(folder / "b", PUBLISHED["gsm8k"][0]))
    assert {row["id"] for row in gsm8k if row["split"] == "test"} < {row["id"] for row in mgsm}
    assert gsm8k[0]["response"].endswith("#### 5")
    assert "<<" not in gsm8k[1]["response"]


def test_the_wrong_column_of_xcopa_is_taken_from_a_right_language(folder: Path) -> None:
    put(folder, PUBLISHED["xcopa"][0])
    rows, _ = run("xcopa", folder, languages=("th",))
    assert {row["prompt"].split(", ")[1] for row in rows} == {"เพราะ\n"}  # et says cause, th says effect
    for split in ("val", "test"):
        (folder / f"data/et/{split}.et.jsonl").unlink()
    assert "'question'" in refusal("xcopa", folder)
    assert "no English" in refusal("xcopa", folder, languages=("en",))


def test_ids_whose_labels_differ_are_left_out_in_every_language_and_counted(folder: Path) -> None:
    rows, stats = run("paws-x", put(folder, PUBLISHED["paws-x"][0]))
    assert {row["id"] for row in rows} == {"paws-x-dev-0"}
    assert stats.left_out == {"languages disagree": 1}
    _, stats = run("mkqa", put(folder, PUBLISHED["mkqa"][0]))
    assert stats.left_out == {"no answer": 1}


def test_mkqa_has_every_gold_answer(folder: Path) -> None:
    rows, _ = run("mkqa", put(folder, PUBLISHED["mkqa"][0]), languages=("en",))
    assert rows[0]["answers"] == ["gold", "A1"]


@pytest.mark.parametrize(
    ("spelling", "codes", "code"),
    [
        ("sw", ["swh_Latn", "eng_Latn"], "swh_Latn"),
        ("Swahili", ["swh_Latn", "eng_Latn"], "swh_Latn"),
        ("zh", ["zho_Hans", "zho_Hant"], "zho_Hans"),
        ("eng_Latn", ["en", "de"], "en"),
        ("ar", ["AR-XY", "DE-DE"], "AR-XY"),
        ("fi", ["en", "de"], None),
    ],
)
def test_a_language_is_found_by_any_of_its_names(spelling: str, codes: list[str], code: str | None) -> None:
    assert match_language(spelling, codes, declared("mmmlu").spellings) == code


def test_rows_have_the_language_as_the_user_names_it(folder: Path) -> None:
    rows, stats = run("sib200", put(folder, PUBLISHED["sib200"][0]), languages=("en", "de"))
    assert stats.languages == {"en": "eng_Latn", "de": "deu_Latn"}
    assert {row["language"] for row in rows} == {"en", "de"}


def many(count: int = 12) -> Files:
    return {f"mgsm_{code}.tsv": table(*((f"{code} {n}?", n) for n in range(count))) for code in ("en", "sw")}


@pytest.mark.parametrize("chat", [False, True])
def test_shots_are_the_same_ids_in_every_language_and_never_the_question(folder: Path, chat: bool) -> None:
    put(folder, many())
    rows, _ = run("mgsm", folder, splits={"train": 0.5}, shots=3, chat=chat)
    train = {row["answer"] for row in rows if row["split"] == "train"}
    shown: dict[str, set[tuple[str, ...]]] = {}
    for row in rows:
        if chat:
            answers = tuple(m["content"] for m in row["messages"][1:-1:2])
            own = row["messages"][-2]["content"]
            assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * 4
        else:
            *shots, own = row["prompt"].split("\n\n")
            answers = tuple(shot.split("\n")[-1] for shot in shots)
        assert len(answers) == 3
        assert set(answers) <= train - {row["answer"]}
        assert f"{row['language']} {row['answer']}?" in own
        shown.setdefault(row["id"], set()).add(answers)
    assert all(len(answers) == 1 for answers in shown.values())


@given(st.floats(0.05, 0.9), st.integers(1, 5), st.integers(0, 3))
def test_moved_splits_part_the_test_ids_alike_in_every_language(share: float, seed: int, drawn: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        folder = put(Path(place) / "source", many(20))
        limit = drawn or None
        rows, stats = run("mgsm", folder, splits={"train": share}, seed=seed, limit=limit)
    ids = {split: {r["id"] for r in rows if r["split"] == split} for split in ("train", "test")}
    assert not ids["train"] & ids["test"]
    assert len(ids["train"]) == min(limit or 20, max(1, round(20 * share)))
    assert stats.rows["train"] == dict.fromkeys(("en", "sw"), len(ids["train"]))


def test_what_is_between_prompt_and_response_is_on_one_side(folder: Path) -> None:
    put(folder, PUBLISHED["sib200"][0])
    for between, end, start in (("line", "Topic:\n", ""), ("space", "Topic:", " "), ("none", "Topic:", "")):
        row = run("sib200", folder, between=between)[0][0]
        assert row["prompt"].endswith(end)
        assert row["response"] == row["answer"] == start + "travel"
        assert row["answer"] in row["choices"]


def test_a_row_has_what_grades_and_ends_its_answer(folder: Path) -> None:
    row = run("xquad", put(folder, PUBLISHED["xquad"][0]))[0][0]
    assert (row["metric"], row["stop"], row["answers"]) == ("exact", ["\n"], ["0 ar"])
    assert "choices" not in row
    assert "stop" not in run("xquad", folder, chat=True)[0][0]


def broken(name: str, path: str, change: Callable[[str], str]) -> Files:
    files = PUBLISHED[name][0]
    return {**files, path: change(files[path])}


def german(old: str, new: str) -> Files:
    return broken("mgsm", "mgsm_de.tsv", lambda text: text.replace(old, new))


THAI = "data/th/test.th.jsonl"


@pytest.mark.parametrize(
    ("name", "files", "options", "told"),
    [
        ("mgsm", german("3\n", "3\nmehr?\t4\n"), {}, ["mgsm_de.tsv, line 3", "'de'", "'en'"]),
        ("mgsm", german("\t3", ""), {}, ["mgsm_de.tsv, line 2", "1 cells", "question, answer"]),
        ("mgsm", german("\t3", "\tdrei"), {}, ["mgsm_de.tsv, line 2", "'drei'"]),
        ("mgsm", german("\t3", "\t4"), {}, ["line 2", "'4'", "'3'"]),
        ("mgsm", PUBLISHED["mgsm"][0], {"languages": ("en", "fi")}, ["'fi'", "bn, de, en"]),
        ("mgsm", PUBLISHED["mgsm"][0], {"languages": ("de",), "anchor": "en"}, ["anchor", "'en'"]),
        ("mgsm", PUBLISHED["mgsm"][0], {"split": ("train",)}, ["'train'", "splits found: test"]),
        ("mgsm", PUBLISHED["mgsm"][0], {"shots": 2}, ["shots", "never from 'test'", "splits"]),
        ("mgsm", PUBLISHED["mgsm"][0], {"splits": {"train": "dev"}}, ["'dev'", "it has test"]),
        ("mgsm", {"README": "x"}, {}, ["mgsm_{language}.tsv", "Found: README"]),
        ("sib200", {k: v for k, v in PUBLISHED["sib200"][0].items() if k != "deu_Latn/dev.tsv"}, {},
         ["'dev'", "deu_Latn/dev.tsv", "test, train"]),
        ("sib200", broken("sib200", "deu_Latn/dev.tsv", lambda t: t.replace("category", "topic")), {},
         ["deu_Latn/dev.tsv, line 2", "'category'", "index_id, topic, text"]),
        ("sib200", broken("sib200", "deu_Latn/dev.tsv", lambda t: t.replace("travel", "sports")), {},
         ["'sports'", "'travel'"]),
        ("xcopa", broken("xcopa", THAI, lambda t: t.replace('"label": 1', '"label": -1')), {},
         ["test.th.jsonl, line 2", "'-1'", "0 to 1"]),
        ("xcopa", broken("xcopa", THAI, lambda t: t.replace("premise", "text")), {},
         ["test.th.jsonl, line 1", "'premise'", "text, choice1"]),
        ("xquad", broken("xquad", "xquad.ar.json", lambda t: t.replace('"qas"', '"questions"')), {},
         ["xquad.ar.json", "data[0].paragraphs[0]", "'qas'", "questions"]),
        ("xnli", PUBLISHED["xnli"][0], {"languages": ("en", "fr")}, ["'fr'"]),
        ("mmmlu", broken("mmmlu", "test/mmlu_AR-XY.csv", lambda t: t.replace("C,law", "E,law")), {},
         ["mmlu_AR-XY.csv, line 2", "'E'", "'C'"]),
        ("xnli", broken("xnli", "xnli.test.tsv", lambda t: t.replace("neutral", "maybe")), {},
         ["xnli.test.tsv, line 2", "'maybe'", "'neutral'"]),
        ("ifeval", PUBLISHED["ifeval"][0], {"splits": {"train": 0.5}}, ["no gold responses"]),
        ("gsm8k", PUBLISHED["gsm8k"][0], {"shots": 1}, ["one to spare", "1 ids"]),
        ("nothing", {"a": ""}, {}, ["'nothing'", "mgsm"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_place(
    name: str, files: Files, options: dict[str, Any], told: list[str], folder: Path
) -> None:
    message = refusal(name, put(folder, files), **options)
    assert all(part in message for part in told), message
    assert not (folder.parent / "out.jsonl").exists()


def test_several_benchmarks_share_a_run_and_general_text(folder: Path, tmp_path: Path) -> None:
    entries = [
        BenchmarkConfig(name, str(put(folder / name, PUBLISHED[name][0])), languages=("en", "de"))
        for name in ("mgsm", "sib200")
    ]
    stats = write_benchmarks(BenchmarksConfig(tuple(entries)), tmp_path / "data")
    rows = load_examples([str(tmp_path / "data" / "parallel.jsonl")])
    assert {e.task for e in rows} == {"gsm8k", "topic"}
    assert stats.general == len(load_examples([str(tmp_path / "data" / "general.jsonl")])) > 100
    # general text has no shots and no test ids to move
    flores = BenchmarkConfig(
        "flores",
        str(put(folder / "f", PUBLISHED["flores"][0])),
        languages=("en", "sw"),
        splits={"train": 0.5},
        shots=2,
    )
    stats = write_benchmarks(BenchmarksConfig((*entries, flores)), tmp_path / "data")
    general = load_examples([str(tmp_path / "data" / "general.jsonl")])
    assert {(e.language, e.split, e.prompt) for e in general} == {("en", "train", "")}
    assert stats.general == 4
    with pytest.raises(RamoeError, match="two benchmarks"):
        write_benchmarks(BenchmarksConfig((*entries, entries[0])), tmp_path / "data")


def test_a_table_keeps_quotes_and_line_separators(tmp_path: Path) -> None:
    text = 'a "b\u2028c\t"d\n'
    (tmp_path / "t.tsv").write_text(text, encoding="utf-8")
    ((_, row),) = read_table(tmp_path / "t.tsv", ["x", "y"])
    assert "\t".join(row.values()) + "\n" == text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"prompt": "{{ question"}, "prompt: malformed template"),
        ({"prompts": "x"}, "fields.prompts"),
        ({"prompt": "{{ ''.__class__.__mro__ }}"}, "unsafe"),
    ],
)
def test_a_declaration_with_a_fault_is_told_and_cannot_leave_its_sandbox(
    change: dict[str, str], told: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = yaml.safe_load((Path(declarations.__file__).parent / "sib200.yaml").read_text(encoding="utf-8"))
    raw["fields"] |= change
    put(folder, PUBLISHED["sib200"][0])
    monkeypatch.setattr(
        "ramoe_megatron.data.benchmarks.engine.declared", lambda name: check_declaration(raw, "x.yaml")
    )
    assert told in refusal("sib200", folder)


def test_a_row_with_a_wrong_metric_or_answers_is_refused(tmp_path: Path) -> None:
    row = {"id": "1", "language": "en", "task": "t", "prompt": "p", "response": "r", "split": "test"}
    for change, told in (
        ({"metric": "bleu"}, "bleu"),
        ({"answers": []}, "answers"),
        ({"response": ""}, "response"),
    ):
        (tmp_path / "r.jsonl").write_text(json.dumps(row | change))
        with pytest.raises(RamoeError, match=told):
            load_examples([str(tmp_path / "r.jsonl")])
    (tmp_path / "r.jsonl").write_text(json.dumps(row | {"metric": "ifeval", "response": "", "answer": "{}"}))
    (one,) = load_examples([str(tmp_path / "r.jsonl")])
    assert isinstance(one, Example)
    assert (one.response, one.metric) == ("", "ifeval")
