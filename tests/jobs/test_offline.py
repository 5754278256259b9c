"""The parts that a long job is cut into, the digests of what it read, and its progress lines."""

import hashlib
import json
from pathlib import Path

import pytest
from data_rows import example, row, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from ramoe_megatron.jobs.offline_job import ProgressLines, data_digests
from ramoe_megatron.jobs.scores import by_id
from ramoe_megatron.jobs.shards import SHARD_EXAMPLES


@given(
    st.lists(
        st.tuples(st.integers(0, 3 * SHARD_EXAMPLES), st.sampled_from(["en", "es", "tr"])),
        unique=True,
        max_size=900,
    )
)
def test_parts_hold_every_view_once_and_no_id_is_split(views: list[tuple[int, str]]) -> None:
    examples = [example(f"q{number}", language) for number, language in views]
    parts = by_id(examples)
    assert sorted((e.id, e.language) for part in parts for e in part) == sorted(
        (e.id, e.language) for e in examples
    )
    for part in parts:
        ids = {e.id for e in part}
        assert len(ids) <= SHARD_EXAMPLES
        assert all(e in part for e in examples if e.id in ids)


def test_digests_name_the_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_jsonl(tmp_path / f"{name}.jsonl", [row(name)])
    expected = [
        {
            "path": str(tmp_path / f"{n}.jsonl"),
            "sha256": hashlib.sha256((tmp_path / f"{n}.jsonl").read_bytes()).hexdigest(),
        }
        for n in "ab"
    ]
    assert data_digests([str(tmp_path)]) == expected
    assert data_digests(["owner/name"]) == [{"path": "owner/name", "sha256": "hub"}]


def test_progress_lines_count_up_to_the_total(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ProgressLines(10, "answers")
    for count in (4, 4, 4):
        progress(count)
    lines = [
        json.loads(line.removeprefix("RAMOE-PROGRESS ")) for line in capsys.readouterr().out.splitlines()
    ]
    assert [line["done"] for line in lines] == [4, 8, 10]
    assert {line["total"] for line in lines} == {10}
