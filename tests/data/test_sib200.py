"""SIB-200 conversion of a tiny folder: ids stay parallel, splits are disjoint, errors name the line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from ramoe_megatron.data.benchmarks.sib200 import TASK, SibConfig, SibStats, convert
from ramoe_megatron.data.benchmarks.sib200_source import CATEGORIES
from ramoe_megatron.data.parallel import load_examples, pair_with_anchor
from ramoe_megatron.data.sampler import order
from ramoe_megatron.errors import RamoeError

WORDS = {
    "eng_Latn": "the river runs past old stone houses",
    "fin_Latn": "joki virtaa vanhojen kivitalojen ohi",
    "hin_Deva": "नदी पुराने पत्थर के घरों के पास",
}
SIZES = {"train": 20, "dev": 4, "test": 6}
FILES = ["general.jsonl", "parallel.jsonl", "pretrain.jsonl", "tokenizer.model", "weights.json"]


def sentence(language: str, number: int) -> str:
    words = WORDS[language].split()
    # one long sentence in one language of each split: its id has to go in all languages
    count = 30 if language == "fin_Latn" and number % 100 == 3 else 3 + number % 4
    return " ".join(words[(number + i) % len(words)] for i in range(count)) + f' "{number}".'


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "sib200"
    for language in WORDS:
        (folder / language).mkdir(parents=True)
        for place, (split, size) in enumerate(SIZES.items()):
            numbers = [100 * place + i for i in range(size)]
            lines = [f"{n}\t{CATEGORIES[n % 7]}\t{sentence(language, n)}" for n in numbers]
            text = "\n".join(["index_id\tcategory\ttext", *lines]) + "\n"
            (folder / language / f"{split}.tsv").write_text(text, encoding="utf-8")
    return folder


def run(source: Path, out: Path, **changes: object) -> SibStats:
    options: dict[str, object] = {"vocab_size": 420, "target_share": 0.25} | changes
    return convert(SibConfig(source=str(source), **options), out)  # type: ignore[arg-type]


def test_views_are_parallel_with_choices(source: Path, tmp_path: Path) -> None:
    stats = run(source, tmp_path / "out")
    found = load_examples([str(tmp_path / "out" / "parallel.jsonl")])
    pairs = pair_with_anchor(found, "eng_Latn")
    assert len(pairs) == 2 * sum(SIZES.values())
    for english, target in pairs:
        assert (english.answer, english.split, english.choices) == (target.answer, target.split, CATEGORIES)
        number = int(english.id.removeprefix("topic-"))
        assert english.answer == CATEGORIES[number % 7]
        assert target.prompt == f"{sentence(target.language, number)} Topic:"
    assert stats.ids == {"pretrain": 12, "train": 8, "validation": 4, "test": 6}
    assert stats.rows["parallel"] == len(found)


def test_pretraining_sees_labels_of_its_own_split_alone(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    split = {e.id: e.split for e in load_examples([str(tmp_path / "out" / "parallel.jsonl")])}
    rows = load_examples([str(tmp_path / "out" / "pretrain.jsonl")])
    labelled = [e for e in rows if e.task == TASK]
    assert {split[e.id] for e in labelled} == {"pretrain"}
    counts = {language: sum(e.language == language for e in labelled) for language in WORDS}
    assert counts == {"eng_Latn": 12, "fin_Latn": 3, "hin_Deva": 3}
    text = [e for e in rows if e.task == "text"]
    assert len(text) == SIZES["train"] * len(WORDS)
    assert {e.prompt for e in text} == {""}
    weights = json.loads((tmp_path / "out" / "weights.json").read_text())
    assert len(order(rows, 100, 1, weights)) == 100
    general = load_examples([str(tmp_path / "out" / "general.jsonl")])
    assert {e.language for e in general} == {"eng_Latn"}
    assert [e.response for e in general if e.response.endswith("Topic:")] == []


def test_same_source_gives_the_same_bytes_wherever_it_lies(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "one")
    moved = source.rename(tmp_path / "elsewhere")
    config = {"source": str(moved), "vocab_size": 420, "target_share": 0.25}
    command = [sys.executable, "-m", "ramoe_megatron.jobs.generate", "sib200", "--config", json.dumps(config)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "two")], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["ids"]["train"] == 8
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == FILES
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_ids_with_a_long_view_go_in_every_language(source: Path, tmp_path: Path) -> None:
    whole = run(source, tmp_path / "whole")
    limit = int(whole.lengths["eng_Latn"]["longest"])
    assert whole.lengths["fin_Latn"]["longest"] > limit
    stats = run(source, tmp_path / "short", max_tokens=limit)
    assert all(count >= 1 for count in stats.dropped.values())
    assert sum(stats.ids.values()) + sum(stats.dropped.values()) == sum(SIZES.values())
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "short" / "tokenizer.model"))
    for name in ("parallel", "pretrain", "general"):
        found = load_examples([str(tmp_path / "short" / f"{name}.jsonl")])
        assert not {"topic-3", "topic-103", "topic-203", "text-3", "general-3"} & {e.id for e in found}
        for e in found:
            for response in e.choices or (e.response,):
                assert len(processor.encode(e.prompt) + processor.encode(response)) <= limit
    with pytest.raises(
        RamoeError, match="max_tokens 3 drops all 20 ids of split 'train': the shortest id needs"
    ):
        run(source, tmp_path / "none", max_tokens=3)
    assert not (tmp_path / "none").exists()


def edit(source: Path, line: int, text: str, language: str = "fin_Latn") -> None:
    path = source / language / "train.tsv"
    lines = path.read_text(encoding="utf-8").split("\n")
    lines[line - 1] = text
    path.write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (1, "id\tcategory\ttext", "fin_Latn/train.tsv, line 1: columns"),
        (4, "2\tsports", "fin_Latn/train.tsv, line 4: found .*, expected three cells"),
        (4, "2\tcooking\tx", "fin_Latn/train.tsv, line 4: category 'cooking', expected one of"),
        (
            4,
            "1\tgeography\tx",
            "fin_Latn/train.tsv, line 4: index_id 1 occurs again; the first row is on line 3",
        ),
        (
            4,
            "2\tsports\tx",
            "fin_Latn/train.tsv, line 4: index_id 2 has category 'sports', but 'health' in eng_Latn",
        ),
        (4, "77\thealth\tx", "1 ids have no row in the anchor language 'eng_Latn': 77"),
    ],
)
def test_faults_in_the_source_are_told_by_line(
    source: Path, tmp_path: Path, line: int, text: str, message: str
) -> None:
    edit(source, line, text)
    with pytest.raises(RamoeError, match=message):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_configs_are_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RamoeError, match="no such folder"):
        run(tmp_path / "none", out)
    with pytest.raises(
        RamoeError, match=r"no folder of language 'deu_Latn'.*Found: \['eng_Latn', 'fin_Latn'"
    ):
        run(source, out, languages=("eng_Latn", "deu_Latn"))
    with pytest.raises(RamoeError, match="anchor 'eng_Latn' is missing"):
        run(source, out, languages=("fin_Latn", "hin_Deva"))
    with pytest.raises(RamoeError, match="no target language"):
        run(source, out, languages=("eng_Latn",))
    with pytest.raises(RamoeError, match="vocab_size 100000 does not fit"):
        run(source, out, vocab_size=100_000)
    with pytest.raises(RamoeError, match="the place of the sentence"):
        SibConfig(frame="Topic:")
    with pytest.raises(RamoeError, match=r"target_share is 1\.5"):
        SibConfig(target_share=1.5)
