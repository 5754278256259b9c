"""Laws of the store of examples and the cache of tokens: what they give is what lists in memory give."""

import json
import multiprocessing
import os
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_rows import SmallTokenizer, row, write_jsonl

from ramoe_megatron.data import store, token_cache
from ramoe_megatron.data.cache import Cache
from ramoe_megatron.data.codes import codes_of
from ramoe_megatron.data.dataset import EncodedExamples, SFTDataset
from ramoe_megatron.data.encode import check_examples
from ramoe_megatron.data.packing import PackedDataset
from ramoe_megatron.data.paired import PairedDataset
from ramoe_megatron.data.parallel import Example, load_examples, select_examples
from ramoe_megatron.data.sampler import order
from ramoe_megatron.data.store import StoredExamples, store_examples
from ramoe_megatron.data.token_cache import Tokens, cached_tokens
from ramoe_megatron.errors import RamoeError

CHAT = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "yes"}]
ROWS = [
    row(f"q{n}", language, task=f"task{n % 3}", split="validation" if n == 4 else "train")
    for n in range(11)
    for language in ("en", "fi", "tr")
]
ROWS += [row("choice", choices=["EUR", "USD"]), row("chat", prompt=None, response=None, answer=None)]
ROWS[-1]["messages"] = CHAT
PLAIN = ROWS[:-1]
"""Rows that need no chat template."""


class KnownTokenizer(SmallTokenizer):
    """As Megatron wraps SentencePiece: its content is known, so its tokens are kept."""

    def __init__(self) -> None:
        super().__init__()
        self._tokenizer = types.SimpleNamespace(tokenizer=self.processor)


TOKENIZER = KnownTokenizer()


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches of rows and several parts of tokens, of sizes that do not divide the rows."""
    monkeypatch.setattr(store, "BLOCK_ROWS", 7)
    monkeypatch.setattr(token_cache, "PART_ROWS", 5)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})  # in this process


def silent(total: int, unit: str) -> Any:
    return lambda count: None


def stored(path: str | Path, folder: Path, keeps: bool = True, columns: Any = None) -> StoredExamples:
    return store_examples([str(path)], columns, Cache(folder, keeps), silent)


def tokens(examples: StoredExamples, folder: Path, tokenizer: Any = TOKENIZER) -> Tokens:
    return cached_tokens(examples, tokenizer, {}, Cache(folder), silent)


def same(one: Sequence[Example], other: Sequence[Example]) -> None:
    assert list(one) == list(other)
    assert [e.place for e in one] == [e.place for e in other]


def test_the_store_has_the_examples_of_the_files(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    listed, found = load_examples([path]), stored(path, tmp_path / "cache")
    same(found, listed)
    same([found[n] for n in (0, 6, 7, -1)], [listed[n] for n in (0, 6, 7, -1)])
    same(found[3:20:4], listed[3:20:4])
    same(found.pick(np.array([30, 2, 2, 34])), [listed[n] for n in (30, 2, 2, 34)])
    for field in ("id", "task", "language", "split"):
        assert list(codes_of(found, field)) == list(codes_of(listed, field))
    for split, languages in ((None, ["fi"]), ("train", None), ("validation,train", ["tr", "en"])):
        same(select_examples(found, split, languages, "it"), load_examples([path], None, split, languages))
    import datasets  # reads the same file

    assert datasets.Dataset.from_file(str(found.folder / "rows.arrow"))["id"][:] == [e.id for e in listed]


def test_datasets_of_a_store_are_those_of_a_list(tmp_path: Path) -> None:
    path, weights = write_jsonl(tmp_path / "rows.jsonl", PLAIN), {"task0/*": 2.0, "*/fi": 1.0, "*": 0.5}
    listed, found = load_examples([path]), stored(path, tmp_path / "cache")
    some, few = load_examples([path], None, None, ["fi", "tr"]), found.pick(found.codes("language").codes > 0)
    views, anchors = load_examples([path], None, None, ["en"]), found.pick(found.codes("language").codes == 0)
    assert order(found, 200, 3, weights).tolist() == order(listed, 200, 3, weights).tolist()
    encoded = EncodedExamples(found, TOKENIZER, 40, tokens(found, tmp_path / "cache"))
    held = few.joined(anchors)
    pairs = EncodedExamples(held, TOKENIZER, 40, tokens(found, tmp_path / "cache"), held.rows)
    for one, other in (
        (
            SFTDataset(found, TOKENIZER, 40, 90, 3, weights, encoded),
            SFTDataset(listed, TOKENIZER, 40, 90, 3, weights),
        ),
        (
            PackedDataset(found, TOKENIZER, 64, 20, 3, 4, weights, 2, encoded),
            PackedDataset(listed, TOKENIZER, 64, 20, 3, 4, weights, 2),
        ),
        (
            PairedDataset(few, anchors, TOKENIZER, 40, 90, 3, None, pairs),
            PairedDataset(some, views, TOKENIZER, 40, 90, 3),
        ),
    ):  # fmt: skip
        assert len(one) == len(other)
        for place in range(len(one)):
            first, second = one[place], other[place]
            assert all(torch.equal(first[key], second[key]) for key in first.keys() | second.keys())


def test_a_second_start_reads_no_row_and_tokenises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", PLAIN)
    first = stored(path, tmp_path / "cache")
    made = tokens(first, tmp_path / "cache")
    with monkeypatch.context() as later:
        later.setattr(store, "checked_examples", None)
        later.setattr(token_cache, "encode", None)
        again = stored(path, tmp_path / "cache")
        same(again, first)
        assert tokens(again, tmp_path / "cache")[9] == made[9]
        with pytest.raises(TypeError):  # other examples have other tokens
            tokens(again[1:], tmp_path / "cache")
        with pytest.raises(TypeError):  # and so has another reading of the columns
            stored(path, tmp_path / "cache", columns={"answer": "response"})
    write_jsonl(tmp_path / "rows.jsonl", [*PLAIN, row("new")])
    assert stored(path, tmp_path / "cache")[-1].id == "new"


def test_what_was_finished_before_a_kill_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = stored(write_jsonl(tmp_path / "rows.jsonl", PLAIN), tmp_path / "cache")
    whole, encode, asked = Tokens.of(found, TOKENIZER), token_cache.encode, []

    def counted(example: Example, tokenizer: Any) -> Any:
        asked.append(example.id)
        if len(asked) == 13:
            raise KeyboardInterrupt
        return encode(example, tokenizer)

    monkeypatch.setattr(token_cache, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        tokens(found, tmp_path / "cache")
    made = tokens(found, tmp_path / "cache")
    assert len(asked) == 13 + len(PLAIN) - 10  # two parts of five were finished
    for name in token_cache.ARRAYS:
        assert np.array_equal(getattr(made, name), getattr(whole, name)), name
        assert getattr(made, name).dtype == getattr(whole, name).dtype


def test_workers_make_the_tokens_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = stored(write_jsonl(tmp_path / "rows.jsonl", PLAIN), tmp_path / "cache")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    made, whole = tokens(found, tmp_path / "cache"), Tokens.of(found, TOKENIZER)
    assert all(np.array_equal(getattr(made, name), getattr(whole, name)) for name in token_cache.ARRAYS)


def test_faults_are_told_as_for_a_list_and_leave_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    bad = write_jsonl(tmp_path / "bad.jsonl", [*PLAIN, row("q99", answer="GBP", choices=["EUR", "USD"])])
    with pytest.raises(RamoeError, match=r"bad.jsonl, line 35: answer 'GBP'"):
        stored(bad, cache)
    spaced = [{**r, "prompt": "one "} if n in (3, 21) else r for n, r in enumerate(PLAIN)]
    found = stored(write_jsonl(tmp_path / "spaced.jsonl", spaced), cache)
    with pytest.raises(RamoeError) as listed:
        check_examples(list(found), TOKENIZER)
    with pytest.raises(RamoeError) as told:
        tokens(found, cache)
    assert str(told.value) == str(listed.value)
    assert str(told.value).startswith(f"2 of {len(PLAIN)} examples")
    assert [path.name for path in cache.iterdir() if not path.name.endswith((".lock", ".json"))] == [
        found.folder.name
    ]


def test_a_check_writes_nothing_and_reads_what_was_kept(tmp_path: Path) -> None:
    path, cache = write_jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "cache"
    same(stored(path, cache, keeps=False), load_examples([path]))
    assert not cache.exists()
    kept = stored(path, cache)
    assert stored(path, cache, keeps=False).folder == kept.folder


def test_a_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    path, cache = write_jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "cache"
    cut = stored(path, cache).folder / "rows.arrow"
    os.truncate(cut, cut.stat().st_size - 1)
    with pytest.raises(RamoeError, match=rf"{cut}: .* delete the folder {cut.parent}"):
        stored(path, cache)


def test_of_several_processes_one_makes_an_entry(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        with (tmp_path / "made").open("a") as file:
            file.write("x")
        (folder / "it.json").write_text(json.dumps(1))

    context = multiprocessing.get_context("fork")
    started = [context.Process(target=Cache(tmp_path / "cache").entry, args=("it", make)) for _ in range(4)]
    for process in started:
        process.start()
    for process in started:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "made").read_text() == "x"
