"""The run folders that `ramoe compare` accepts: finished, and equal where a mean needs them equal."""

import json
import re
from pathlib import Path

import pytest
from comparison_runs import plain, rising, write_run

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.report.comparison.assemble import compare


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("taxonomy.json", "taxonomy"),
        ("experts.safetensors", "profile"),
        ("predict.json", "predict"),
        ("evaluations/base.json", "evaluate/base"),
        ("evaluations/ra-moe-seed3.json", "evaluate/ra-moe-seed3"),
        ("evaluations/steering-soft.json", "evaluate/steering-soft"),
        ("manifest.json", "data"),
    ],
)
def test_a_missing_file_is_named_with_its_stage(tmp_path: Path, name: str, stage: str) -> None:
    folder = write_run(tmp_path / "one", {**rising(), ("steering-soft", None): {}})
    (folder / name).unlink()
    with pytest.raises(RamoeError, match=rf"1 file is missing(?s:.*)one/{re.escape(name)}: stage {stage}$"):
        compare([folder])


def test_folders_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", rising())
    with pytest.raises(RamoeError, match="given twice"):
        compare([folder, tmp_path / "two/../one"])
    with pytest.raises(RamoeError, match="found no run folder"):
        compare([])
    with pytest.raises(RamoeError, match=r"found methods sft, ra-moe, expected plain among them"):
        compare([folder], reference="plain")
    assert [b["base"] for b in compare([folder, write_run(tmp_path / "x/one", rising())])["bases"]] == [
        f"{tmp_path.name}/one",
        "x/one",
    ]


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        ("taxonomy.json", '"anchor": "en"', '"anchor": "tr"', "anchor language: found tr, expected en"),
        (
            "recipe.yaml",
            "train-iters: 72",
            "train-iters: 144",
            "train section: found train-iters 144, expected train-iters 72",
        ),
        (
            "recipe.yaml",
            "global-batch-size: 32",
            "lr: 0.1",
            "train section: found lr 0.1, global-batch-size not given, expected",
        ),
        (
            "recipe.yaml",
            "layers: auto",
            "layers: all",
            "alignment section: found layers all, expected layers auto",
        ),
        (
            "recipe.yaml",
            "- name: ra-moe",
            "- name: ra-moe\n  train: {lr: 1.0}",
            r"settings of a method: found ra-moe {'train': {'lr': 1.0}}, expected ra-moe {}",
        ),
    ],
)
def test_folders_that_differ_are_refused_with_what_differs(
    tmp_path: Path, file: str, old: str, new: str, told: str
) -> None:
    one, two = (write_run(tmp_path / name, rising()) for name in ("one", "two"))
    change(two / file, old, new)
    with pytest.raises(
        RamoeError, match=rf"^{two}: the run folders differ in {re.escape(told)}.* as in {one}; compare"
    ):
        compare([one, two])


def test_folders_of_other_methods_tasks_or_split_are_refused(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", rising())
    more = write_run(tmp_path / "more", {**rising(), **plain("rise")})
    with pytest.raises(
        RamoeError, match=r"more: .*methods: found ra-moe, rise, sft, expected ra-moe, sft as in .*one;"
    ):
        compare([one, more])
    with pytest.raises(RamoeError, match=r"tasks: found a, c, expected a, b as in"):
        compare([one, write_run(tmp_path / "tasks", rising(), tasks=("a", "c"))])
    split = write_run(tmp_path / "split", rising())
    for path in (split / "evaluations").glob("*.json"):
        change(path, '"split": "test"', '"split": "validation"')
    with pytest.raises(RamoeError, match=r"evaluated split: found validation, expected test as in"):
        compare([one, split])
    fewer = write_run(tmp_path / "fewer", rising())
    for path in (fewer / "evaluations").glob("*.json"):
        drop(path, "tr")
    with pytest.raises(RamoeError, match=r"languages: found en, es, expected en, es, tr as in"):
        compare([one, fewer])


def drop(path: Path, language: str) -> None:
    """Leave a language out of an evaluation, as a run with fewer languages would."""
    lines = path.with_suffix(".jsonl")
    lines.write_text(
        "".join(
            line for line in lines.read_text().splitlines(True) if f'"language": "{language}"' not in line
        )
    )
    document = json.loads(path.read_text())
    path.write_text(
        json.dumps(document | {"rows": [row for row in document["rows"] if row["language"] != language]})
    )


@pytest.mark.parametrize("name", ["base", "sft-seed3", "ra-moe-seed2", "steering-soft"])
def test_an_evaluation_of_other_examples_than_the_references_is_refused(tmp_path: Path, name: str) -> None:
    outcomes = {**rising(), ("steering-soft", None): {}}
    split, fewer, task = (
        write_run(tmp_path / kind, outcomes) / f"evaluations/{name}.json"
        for kind in ("split", "fewer", "task")
    )
    change(split, '"split": "test"', '"split": "validation"')
    drop(fewer, "tr")
    change(task.with_suffix(".jsonl"), '"id": "b7", "task": "b"', '"id": "b7", "task": "a"')
    expected = {
        split: "found split validation, expected test",
        fewer: "found 40 examples, 20 missing and 0 more, in tr, expected the 60",
        task: "found task a of example b7, expected b",
    }
    for path, told in expected.items():
        with pytest.raises(
            RamoeError, match=rf"^{path}: {told} of sft-seed1.json; remove the one that is wrong"
        ):
            compare([path.parent.parent])
