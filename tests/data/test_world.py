"""Laws of the embedded world: the same bytes every time, splits that keep apart, questions that fit."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from data_rows import SmallTokenizer

from ramoe_megatron.data.config import config_from_json, config_from_mapping
from ramoe_megatron.data.parallel import Example, load_examples, pair_with_anchor
from ramoe_megatron.data.sampler import order
from ramoe_megatron.data.world import ANCHOR, TASKS, WorldConfig, WorldStats, build_world
from ramoe_megatron.data.world.facts import continents, facts, questions
from ramoe_megatron.data.world.text import codes, list_rows, name_rows
from ramoe_megatron.errors import RamoeError

CONFIG = WorldConfig()
LANGUAGES = [ANCHOR, *CONFIG.target_shares]
FILES = ["general.jsonl", "parallel.jsonl", "pretrain.jsonl", "tokenizer.model", "weights.json"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, WorldStats]:
    out = tmp_path_factory.mktemp("world")
    return out, build_world(CONFIG, out)


@pytest.fixture(scope="module")
def parallel(built: tuple[Path, WorldStats]) -> list[Example]:
    return load_examples([str(built[0] / "parallel.jsonl")])


@pytest.fixture(scope="module")
def pretrain(built: tuple[Path, WorldStats]) -> list[Example]:
    return load_examples([str(built[0] / "pretrain.jsonl")])


def fact_of(example: Example) -> str:
    """Pretraining numbers its phrasings: currency-AT#2 asks for the fact currency-AT."""
    return example.id.split("#")[0]


def test_another_process_writes_the_same_bytes(built: tuple[Path, WorldStats], tmp_path: Path) -> None:
    # Another hash seed, and other data of Babel loaded first. Both have changed the bytes of a build before.
    code = (
        "import sys; from babel import Locale\n"
        "for name in ('hi', 'ar', 'sw', 'fi', 'tr', 'es', 'en', 'en_GB'):\n"
        "    locale = Locale.parse(name)\n"
        "    for data in (locale.months, locale.days): dict(data['stand-alone']['wide'])\n"
        "from ramoe_megatron.jobs.generate import main\n"
        f"sys.exit(main(['world', '--out', {str(tmp_path)!r}]))"
    )
    subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": "7"}, check=True, capture_output=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (built[0] / name).read_bytes(), name


def test_seed_changes_splits_but_not_facts(built: tuple[Path, WorldStats], tmp_path: Path) -> None:
    build_world(WorldConfig(seed=2), tmp_path)
    one, other = (load_examples([str(p / "parallel.jsonl")]) for p in (built[0], tmp_path))
    assert {(e.id, e.language, e.answer) for e in one} == {(e.id, e.language, e.answer) for e in other}
    assert {e.id: e.split for e in one} != {e.id: e.split for e in other}


def test_a_world_of_fewer_tasks_has_the_same_questions_of_each(
    parallel: list[Example], tmp_path: Path
) -> None:
    left = [*TASKS[:3]]
    stats = build_world(WorldConfig(tasks=left), tmp_path)
    assert [*stats.facts] == left
    rows = load_examples([str(tmp_path / "parallel.jsonl")])
    assert rows == [e for e in parallel if e.task in left]


def test_every_fact_has_a_view_in_every_language_with_one_answer(parallel: list[Example]) -> None:
    assert len(pair_with_anchor(parallel, ANCHOR)) == len({e.id for e in parallel}) * len(
        CONFIG.target_shares
    )
    assert len({(e.id, e.answer, e.split) for e in parallel}) == len({e.id for e in parallel})
    assert all(e.response == e.answer for e in parallel)


@pytest.mark.parametrize("task", TASKS)
def test_splits_hold_their_shares(parallel: list[Example], task: str) -> None:
    counts = {
        split: sum(e.task == task and e.split == split and e.language == "fi" for e in parallel)
        for split in ("pretrain", "train", "validation", "test")
    }
    total = sum(counts.values())
    assert total == len(facts(task)) > 130
    assert counts["train"] == CONFIG.train_per_pair
    assert counts["pretrain"] == round(0.25 * total)
    assert counts["train"] + counts["validation"] == round(0.30 * total)


@pytest.mark.parametrize("task", TASKS)
def test_pretraining_shows_targets_their_share_of_one_split_alone(
    parallel: list[Example], pretrain: list[Example], task: str
) -> None:
    split = {e.id: e.split for e in parallel}
    shares = []
    for language, share in CONFIG.target_shares.items():
        seen = {fact_of(e) for e in pretrain if e.task == task and e.language == language}
        assert {split[fact] for fact in seen} == {"pretrain"}
        assert len(seen) == round(share * len(facts(task)))
        shares.append(len(seen))
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("task", TASKS)
def test_english_misses_a_share_of_each_evaluated_split(
    parallel: list[Example], pretrain: list[Example], task: str
) -> None:
    seen = {fact_of(e) for e in pretrain if e.task == task and e.language == ANCHOR}
    for split in ("pretrain", "train", "validation", "test"):
        members = {e.id for e in parallel if e.task == task and e.split == split}
        held_out = 0.0 if split == "pretrain" else CONFIG.english_held_out
        assert len(members - seen) == round(held_out * len(members))


def test_everything_fits_and_codes_are_single_tokens(built: tuple[Path, WorldStats]) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(built[0] / "tokenizer.model"))
    for name in ("parallel", "pretrain", "general"):
        for e in load_examples([str(built[0] / f"{name}.jsonl")]):
            assert len(processor.encode(e.prompt) + processor.encode(e.response)) <= CONFIG.max_tokens
            assert processor.decode(processor.encode(e.response)) == e.response
    assert {code for code in codes() if len(processor.encode(code)) > 1} == set()
    assert processor.eos_id() == SmallTokenizer().eod == 2
    assert max(row["longest"] for row in built[1].lengths.values()) <= 16


def test_key_stays_one_token_inside_every_question(
    built: tuple[Path, WorldStats], parallel: list[Example]
) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(built[0] / "tokenizer.model"))
    for e in parallel:
        if e.task != "month":
            assert f"▁{e.id.split('-')[1]}" in processor.encode(e.prompt, out_type=str), e.prompt


def test_weights_give_the_stated_mixture(built: tuple[Path, WorldStats], pretrain: list[Example]) -> None:
    drawn = order(pretrain, 20_000, 1, json.loads((built[0] / "weights.json").read_text()))
    groups = [
        pretrain[i].task if pretrain[i].task not in TASKS else pretrain[i].language == ANCHOR for i in drawn
    ]
    for group, share in {True: 0.40, "names": 0.40, "lists": 0.15, False: 0.05}.items():
        assert abs(groups.count(group) / len(groups) - share) < 0.02


def test_a_world_that_shows_targets_no_task_can_be_drawn_from(tmp_path: Path) -> None:
    build_world(WorldConfig(target_shares={"sw": 0.0}), tmp_path)
    shown = load_examples([str(tmp_path / "pretrain.jsonl")])
    weights = json.loads((tmp_path / "weights.json").read_text())
    drawn = {f"{shown[i].task}/{shown[i].language}" for i in order(shown, 500, 1, weights)}
    assert drawn == {*(f"{task}/en" for task in TASKS), "names/en", "names/sw", "lists/en", "lists/sw"}


def test_general_text_is_english_without_the_tasks(built: tuple[Path, WorldStats]) -> None:
    found = load_examples([str(built[0] / "general.jsonl")])
    assert len(found) == CONFIG.general_rows
    assert {(e.language, e.task, e.prompt) for e in found} == {(ANCHOR, "general", "")}
    assert not any("?" in e.response for e in found)


def test_questions_are_complete_and_distinct() -> None:
    for task in TASKS:
        slots = {name for name, _ in facts(task)[0].slots}
        assert list(questions()[task]) == LANGUAGES
        for language, frames in questions()[task].items():
            assert len(frames) == len(set(frames)) == len(questions()[task][ANCHOR])
            for frame in frames:
                assert set(re.findall(r"{(\w+)}", frame)) == slots, (language, frame)
    frames = [
        frame for by_language in questions().values() for group in by_language.values() for frame in group
    ]
    assert len(frames) == len(set(frames))


def test_facts_are_those_of_the_world() -> None:
    known = {task: {fact.key: fact.answer for fact in facts(task)} for task in TASKS}
    assert [known[task]["AT"] for task in TASKS[:3]] == ["EUR", "de", "150"]
    assert [known[task]["BR"] for task in TASKS[:3]] == ["BRL", "pt", "019"]
    assert [known[task]["IN"] for task in TASKS[:3]] == ["INR", "hi", "142"]
    assert known["continent"]["NO"] == "150"  # YAML reads a bare NO as false
    assert "PA" not in known["currency"]  # two currencies are legal tender
    assert all(
        int(answer) % 12 == (int(key[:2]) + int(key[3:])) % 12 for key, answer in known["month"].items()
    )
    assert {len(code) for code in continents()} == {2}
    assert set(continents().values()) == {"002", "009", "019", "142", "150"}


def test_names_are_unambiguous_and_lists_in_order() -> None:
    for language in LANGUAGES:
        rows = list(name_rows(language))
        back = {(row["prompt"]): row["response"] for row in rows if row["id"].endswith("#code")}
        assert len(back) == len(rows) / 2
        assert all(
            back[f"{row['response']}:"] in row["prompt"] for row in rows if row["id"].endswith("#name")
        )
    lists = {row["id"]: f"{row['prompt']} {row['response']}" for row in list_rows("en")}
    assert lists["months-11"] == "November, December, January, February"
    assert lists["weekdays-5"] == "Saturday, Sunday, Monday, Tuesday"
    assert lists["duration-day-2"] == "2 days, 3 days, 4 days"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocabsize": 3}, "unknown key 'vocabsize'; did you mean 'vocab_size'"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"tasks": ["capital"]}, "tasks: capital. Known: currency, language, continent, month"),
        ({"tasks": []}, "tasks: none"),
        ({"target_shares": {"de": 0.1}}, "unknown target language 'de'. Known: ar, es, fi, hi, sw, tr"),
        ({"target_shares": {"es": 0.3}}, "above pretrain_share"),
        ({"english_held_out": 1.5}, "expected 0 to 1"),
        ({"pretrain_share": 0.7, "finetune_share": 0.3}, "no facts for the test split"),
    ],
)
def test_bad_configs_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(RamoeError, match=message):
        config_from_mapping(WorldConfig, values)


def test_configs_come_from_text_or_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"target_shares": {"fi": 0.1}}')
    expected = WorldConfig(target_shares={"fi": 0.1})
    assert config_from_json(WorldConfig, '{"target_shares": {"fi": 0.1}}') == expected
    assert config_from_json(WorldConfig, str(tmp_path / "config.json")) == expected
    with pytest.raises(RamoeError, match="column 10: malformed JSON"):
        config_from_json(WorldConfig, '{"seed": }')
    with pytest.raises(RamoeError, match=r"none\.json: cannot be read"):
        config_from_json(WorldConfig, str(tmp_path / "none.json"))


def test_worlds_that_cannot_be_built_write_nothing(tmp_path: Path) -> None:
    for values, message in (
        ({"max_tokens": 8}, "more than max_tokens 8"),
        ({"vocab_size": 300}, "vocab_size 300 does not fit"),
        ({"train_per_pair": 500}, "train_per_pair is 500"),
    ):
        with pytest.raises(RamoeError, match=message):
            build_world(config_from_mapping(WorldConfig, values), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_job_tells_a_fault_without_a_traceback(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "ramoe_megatron.jobs.generate",
        "world",
        "--config",
        '{"sede": 1}',
        "--out",
        str(tmp_path),
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("ramoe: error: WorldConfig: unknown key 'sede'; did you mean 'seed'?")
