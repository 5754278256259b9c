"""Shards of a long job, the parts it is cut into, and the digests of what it read."""

import hashlib
import json
from pathlib import Path

import pytest
from data_rows import example, row, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from ramoe_megatron.jobs.offline import Progress, Shards, checkpoint_state, data_digests
from ramoe_megatron.jobs.taxonomy import SHARD_IDS, _by_id


def test_a_shard_comes_back_and_only_under_the_same_key(tmp_path: Path) -> None:
    shards = Shards(tmp_path, "taxonomy", data="a", checkpoint=[1])
    assert shards.rows(0) is None
    shards.save(0, [True, False])
    assert Shards(tmp_path, "taxonomy", checkpoint=[1], data="a").rows(0) == [True, False]
    assert shards.rows(1) is None
    for other in ({"data": "b", "checkpoint": [1]}, {"data": "a", "checkpoint": [2]}):
        assert Shards(tmp_path, "taxonomy", **other).rows(0) is None


def test_removing_shards_leaves_those_of_another_key(tmp_path: Path) -> None:
    mine, other = Shards(tmp_path, "taxonomy", data="a"), Shards(tmp_path, "taxonomy", data="b")
    mine.save(0, [1])
    other.save(0, [2])
    mine.remove()
    assert mine.rows(0) is None
    assert other.rows(0) == [2]
    other.remove()
    assert not list(tmp_path.iterdir())
    other.remove()  # nothing left to remove is no error


@given(st.lists(st.tuples(st.integers(0, 3 * SHARD_IDS), st.sampled_from(["en", "es", "tr"])), unique=True, max_size=900))
def test_parts_hold_every_view_once_and_no_id_is_split(views: list[tuple[int, str]]) -> None:
    examples = [example(f"q{number}", language) for number, language in views]
    parts = _by_id(examples)
    assert sorted((e.id, e.language) for part in parts for e in part) == sorted((e.id, e.language) for e in examples)
    for part in parts:
        ids = {e.id for e in part}
        assert len(ids) <= SHARD_IDS
        assert all(e in part for e in examples if e.id in ids)


def test_a_checkpoint_that_is_saved_again_is_another_state(tmp_path: Path) -> None:
    (tmp_path / "iter").mkdir()
    (tmp_path / "iter/weights").write_text("one")
    before = checkpoint_state(str(tmp_path))
    assert checkpoint_state(str(tmp_path)) == before
    (tmp_path / "iter/weights").write_text("three")
    assert checkpoint_state(str(tmp_path)) != before


def test_digests_name_the_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_jsonl(tmp_path / f"{name}.jsonl", [row(name)])
    expected = [
        {"path": str(tmp_path / f"{n}.jsonl"), "sha256": hashlib.sha256((tmp_path / f"{n}.jsonl").read_bytes()).hexdigest()} for n in "ab"
    ]
    assert data_digests([str(tmp_path)]) == expected
    assert data_digests(["owner/name"]) == [{"path": "owner/name", "sha256": "hub"}]


def test_progress_lines_count_up_to_the_total(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(10, "answers")
    for count in (4, 4, 4):
        progress(count)
    lines = [json.loads(line.removeprefix("RAMOE-PROGRESS ")) for line in capsys.readouterr().out.splitlines()]
    assert [line["done"] for line in lines] == [4, 8, 10]
    assert {line["total"] for line in lines} == {10}
