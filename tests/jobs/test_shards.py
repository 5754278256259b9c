"""Laws of shards: read back bit for bit, only under their key, by one job at a time, and never damaged."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from data_rows import example, row, write_jsonl
from safetensors.torch import save_file

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.jobs.shards import Shards, checkpoint_state, depends_on


def shards(folder: Path, key: Any = "a", total: int = 5) -> Shards:
    return Shards(folder, "profile", total, lambda: {"key": key})


def sums(seed: int) -> dict[str, torch.Tensor]:
    random = torch.rand(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return {"sums": random / 3, "count": torch.tensor([seed])}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(tensor, expected[name]) and tensor.dtype == expected[name].dtype
        for name, tensor in found.items()
    )


def test_the_last_state_comes_back_bit_for_bit_and_what_is_kept_of_each_shard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with shards(tmp_path) as first:
        assert (first.done, first.state) == (0, {})
        for number in range(3):
            first.save(number, sums(number), {"priors": torch.full((2,), number)})
            assert first.done == number + 1
    assert capsys.readouterr().out == ""
    with shards(tmp_path) as again:
        assert again.done == 3
        assert same(again.state, sums(2))
        assert [again.kept(number)["priors"].tolist() for number in range(3)] == [[0, 0], [1, 1], [2, 2]]
    assert capsys.readouterr().out == "ramoe: goes on after 3 of 5 shards\n"


def test_a_shard_counts_from_when_its_state_stands(tmp_path: Path) -> None:
    with shards(tmp_path) as first:
        first.save(0, sums(0), {"priors": torch.zeros(2)})
        first.save(1, sums(1), {"priors": torch.ones(2)})
        before = (first.folder / "state.safetensors").read_bytes()
        first.save(2, sums(2), {"priors": torch.ones(2)})
        (first.folder / "state.safetensors").write_bytes(before)  # as if killed between the two files
    with shards(tmp_path) as again:
        assert again.done == 2
        again.save(2, sums(2), {"priors": torch.full((2,), 7.0)})
        assert again.kept(2)["priors"].tolist() == [7, 7]


def test_shards_of_another_key_are_neither_taken_nor_removed(tmp_path: Path) -> None:
    for key in ("a", "b"):
        with shards(tmp_path, key) as made:
            assert made.done == 0
            made.save(0, sums(0))
    with shards(tmp_path, "a") as mine:
        mine.remove()
    with shards(tmp_path, "a") as mine:
        assert mine.done == 0
    with shards(tmp_path, "b") as other:
        assert other.done == 1
        other.remove()
    assert not list(tmp_path.iterdir())
    with shards(tmp_path) as none:
        none.remove()  # nothing to remove is no error
    assert not list(tmp_path.iterdir())


def test_what_a_killed_job_left_while_it_tidied_up_goes(tmp_path: Path) -> None:
    with shards(tmp_path) as mine:
        mine.save(0, sums(0))
        mine.folder.rename(mine.folder.with_suffix(".finished"))
    with shards(tmp_path) as again:
        assert again.done == 0
        again.remove()
    assert not list(tmp_path.iterdir())


def test_a_second_job_is_refused_whatever_its_key_until_the_first_ends(tmp_path: Path) -> None:
    with shards(tmp_path, "a") as first:
        first.save(0, sums(0))
        for key in ("a", "b"):
            with (
                pytest.raises(
                    RamoeError, match=r"another profile job is at work in this folder; .*--ramoe-output"
                ),
                shards(tmp_path, key),
            ):
                pass
        with Shards(tmp_path, "taxonomy", 1, dict) as other:  # which writes other files
            other.remove()
    with shards(tmp_path, "a") as again:
        assert again.done == 1


def damages(whole: bytes, foreign: Path) -> list[bytes]:
    tensors = {"sums": torch.zeros(2)}
    found = [whole[:length] for length in (0, 1, 8, 60, len(whole) // 2, len(whole) - 1)]
    for about in (
        {"format": "ramoe-priors", "version": 1},
        {"format": "ramoe-shard", "version": 2, "key": "x", "done": 1},
        {"format": "ramoe-shard", "version": 1, "key": "of another job", "done": 1},
        {"format": "ramoe-shard", "version": 1},
    ):
        save_file(tensors, foreign, {"ramoe": json.dumps(about)})
        found.append(foreign.read_bytes())
    save_file(tensors, foreign)
    return [*found, foreign.read_bytes(), b"[true, false]", b'{"format": "ramoe-taxonomy"}']


@pytest.mark.parametrize("name", ["state", "000000"])
def test_a_damaged_or_foreign_shard_is_refused_by_name_before_any_work(tmp_path: Path, name: str) -> None:
    with shards(tmp_path) as made:
        made.save(0, sums(0), {"priors": torch.zeros(2)})
        folder = made.folder
    path = folder / f"{name}.safetensors"
    for content in damages(path.read_bytes(), tmp_path / "foreign"):
        path.write_bytes(content)
        with pytest.raises(RamoeError) as refused, shards(tmp_path):
            pass
        assert str(refused.value).startswith(f"{path}: cannot go on from this shard (")
        assert f"remove {folder}" in str(refused.value)


def test_a_state_of_more_shards_than_there_are_is_refused(tmp_path: Path) -> None:
    with shards(tmp_path) as made:
        made.save(4, sums(0))
    with (
        pytest.raises(RamoeError, match="found 5 finished shards, expected 1 to 4"),
        shards(tmp_path, total=4),
    ):
        pass


# --- the key ---


def job(folder: Path) -> SimpleNamespace:
    """The arguments of a job whose files lie in `folder`."""
    for name in ("base/iter", "words"):
        (folder / name).mkdir(parents=True)
    for name in ("base/iter/weights", "words/vocab.json", "tokenizer.model", "taxonomy.jsonl", "data.jsonl"):
        (folder / name).write_text("one")
    return SimpleNamespace(
        load=str(folder / "base"), tokenizer_model=str(folder / "tokenizer.model"),
        tokenizer_metadata=str(folder / "words"),
        ramoe_taxonomy=str(folder / "taxonomy.jsonl"), ramoe_output=str(folder), ramoe_select="tau=0.3",
        ramoe_layers="auto",
        ramoe_tokens="last", ramoe_columns=None, tensor_model_parallel_size=1, hidden_size=64, rank=0,
        dtype=torch.float32,
    )  # fmt: skip


def key(args: SimpleNamespace) -> str:
    return json.dumps(
        depends_on(args, [f"{args.ramoe_output}/data.jsonl"], [example("a", "en")]), sort_keys=True
    )


def test_the_key_is_the_same_for_the_same_command_and_for_what_no_sum_depends_on(tmp_path: Path) -> None:
    args = job(tmp_path)
    before = key(args)
    assert key(args) == before
    args.ramoe_select, args.ramoe_layers, args.rank, args.distributed_timeout_minutes = (
        "top-m=2",
        "1-2",
        0,
        30,
    )
    assert key(args) == before


CHANGES: dict[str, Callable[[SimpleNamespace, Path], object]] = {
    "a flag of the job": lambda args, folder: setattr(args, "ramoe_tokens", "all"),
    "columns": lambda args, folder: setattr(args, "ramoe_columns", ["id=key"]),
    "the model": lambda args, folder: setattr(args, "hidden_size", 128),
    "the precision": lambda args, folder: setattr(args, "dtype", torch.bfloat16),
    "the layout": lambda args, folder: setattr(args, "tensor_model_parallel_size", 2),
    "a new flag": lambda args, folder: setattr(args, "sequence_parallel", True),
    **{
        f"the bytes of {name}": lambda args, folder, name=name: (folder / name).write_text("two")
        for name in (
            "base/iter/weights",
            "words/vocab.json",
            "tokenizer.model",
            "taxonomy.jsonl",
            "data.jsonl",
        )
    },
}


@pytest.mark.parametrize("what", CHANGES)
def test_the_key_changes_with(tmp_path: Path, what: str) -> None:
    args = job(tmp_path)
    before = key(args)
    CHANGES[what](args, tmp_path)
    assert key(args) != before


def test_the_key_changes_with_the_rows_behind_a_name(tmp_path: Path) -> None:
    args = job(tmp_path)
    one, other = (depends_on(args, ["owner/name"], [example(id_, "en")]) for id_ in "ab")
    assert one["data"] == other["data"]
    assert one != other


def test_a_checkpoint_that_is_saved_again_is_another_state(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "iter.jsonl", [row("a")])
    before = checkpoint_state(str(tmp_path))
    assert checkpoint_state(str(tmp_path)) == before
    write_jsonl(tmp_path / "iter.jsonl", [row("abc")])
    assert checkpoint_state(str(tmp_path)) != before
