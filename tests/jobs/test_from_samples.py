"""The taxonomy from lm-eval's sample files: which rows meet, what has no partner, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_rows import row, write_jsonl

from ramoe_megatron.artifacts.files import load_document, sha256
from ramoe_megatron.artifacts.records import read_taxonomy
from ramoe_megatron.artifacts.samples import sample_line
from ramoe_megatron.jobs.from_samples import main
from ramoe_megatron.method.categories import category

RIGHT = {"en": [1, 1, 0, 0, 1], "sw": [1, 0, 1, 0, 1], "yo": [0, 0, 0, 1, 1]}
"""Language -> whether each document is answered correctly."""


def write_samples(
    folder: Path, language: str, right: list[int], keys: list[str] | None = None, metric: str = "acc"
) -> str:
    keys = keys or [f"k{number}" for number in range(len(right))]
    lines = [
        sample_line(n, {"key": key}, str(n), [("p", "a"), ("p", "b")], [(-1.0, None)] * 2, metric, bool(ok))
        for n, (key, ok) in enumerate(zip(keys, right, strict=True))
    ]
    path = folder / f"samples_{language}.jsonl"
    path.write_text("".join(lines))
    return f"{language}={path}"


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return [write_samples(tmp_path, language, right) for language, right in RIGHT.items()]


def taxonomy(folder: Path, files: list[str], *more: str) -> tuple[list[Any], dict[str, Any]]:
    out = folder / "out"
    assert main(["--from-samples", *files, "--ramoe-output", str(out), *more]) == 0
    return read_taxonomy(out / "taxonomy.jsonl"), load_document(out / "taxonomy.json", "ramoe-taxonomy")


ALONE = ("--task", "sums", "--ramoe-split", "test")


def test_each_document_meets_its_english_view(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, document = taxonomy(tmp_path, files, *ALONE)
    assert [(r.id, r.task, r.language, r.split, r.category) for r in rows] == [
        (str(n), "sums", language, "test", category(bool(RIGHT["en"][n]), bool(RIGHT[language][n])))
        for language in ("sw", "yo")
        for n in range(5)
    ]
    assert [(s["language"], s["sha256"]) for s in document["samples"]] == [
        (language, sha256(path)) for language, _, path in (each.partition("=") for each in files)
    ]
    assert document["unmatched"] == []
    assert "10 of 10 pairs have the same target" in capsys.readouterr().out


def test_an_id_by_column_does_not_depend_on_the_order(tmp_path: Path) -> None:
    """The same documents in another order, with ids from a column, give the same taxonomy."""
    order = [3, 0, 4, 1, 2]
    found = []
    for name, places in (("straight", range(5)), ("mixed", order)):
        folder = tmp_path / name
        folder.mkdir()
        files = [write_samples(folder, "en", RIGHT["en"])]
        files.append(write_samples(folder, "sw", [RIGHT["sw"][n] for n in places], [f"k{n}" for n in places]))
        found.append({(r.id, r.category) for r in taxonomy(folder, files, *ALONE, "--id", "sum/{key}")[0]})
    assert found[0] == found[1]
    assert {id_ for id_, _ in found[0]} == {f"sum/k{n}" for n in range(5)}


def test_the_data_give_task_split_and_order(tmp_path: Path, files: list[str]) -> None:
    rows = [
        row(f"k{number}", language, task=f"t{number % 2}", split="test" if number else "train")
        for number in (4, 2, 0, 1, 7)
        for language in ("en", "yo", "sw", "de")
    ]
    data = write_jsonl(tmp_path / "parallel.jsonl", rows)
    made, document = taxonomy(tmp_path, files, "--ramoe-data", data, "--id", "{key}")
    assert [(r.id, r.language) for r in made] == [
        (f"k{n}", language) for n in (4, 2, 0, 1) for language in ("yo", "sw")
    ]
    assert {(r.id, r.task, r.split) for r in made} == {
        ("k4", "t0", "test"), ("k2", "t0", "test"), ("k0", "t0", "train"), ("k1", "t1", "test"),
    }  # fmt: skip
    unmatched = {entry["what"]: entry["ids"] for entry in document["unmatched"]}
    for language in ("en", "sw", "yo"):
        assert unmatched[f"samples in {language} that the data do not have"] == ["k3"]
        assert unmatched[f"rows of the data in {language} without a sample"] == ["k7"]
    assert len(unmatched["rows of the data in de, which has no sample file"]) == 5
    assert document["data"] == [{"path": data, "sha256": sha256(data)}]


def test_rows_without_a_partner_are_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [[f"k{n}" for n in numbers] for numbers in (range(9), (8, 20))]
    files = [write_samples(tmp_path, "en", [1] * 9, keys[0]), write_samples(tmp_path, "sw", [0, 0], keys[1])]
    rows, document = taxonomy(tmp_path, files, *ALONE, "--id", "{key}")
    assert [(r.id, r.category) for r in rows] == [("k8", "ci")]
    assert [(entry["what"], len(entry["ids"])) for entry in document["unmatched"]] == [
        ("samples in sw without one in en", 1),
        ("samples in en without one in sw", 8),
    ]
    said = capsys.readouterr().out
    assert "1 samples in sw without one in en: k20\n" in said
    assert "8 samples in en without one in sw: k0, k1, k2, k3, k4, ..." in said


@pytest.mark.parametrize(
    ("change", "more", "said"),
    [
        (lambda files: files, (), "give --ramoe-data with the parallel rows, or both --task"),
        (lambda files: files[1:], ALONE, "found the languages sw, yo, expected the anchor 'en'"),
        (lambda files: files[:1], ALONE, "expected the anchor 'en' and at least one other"),
        (lambda files: [files[0].partition("=")[2]], ALONE, "expected LANGUAGE=FILE"),
        (lambda files: [*files, files[1]], ALONE, "id '0' is at"),
        (lambda files: [*files, "de=absent.jsonl"], ALONE, "absent.jsonl: cannot be read"),
        (lambda files: files, (*ALONE, "--id", "same"), "expected a column in braces"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    change: Any,
    more: tuple[str, ...],
    said: str,
    files: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert main(["--from-samples", *change(files), "--ramoe-output", str(out), *more]) == 2
    assert said.lower() in capsys.readouterr().err.lower()
    assert not out.exists()


def test_languages_that_share_no_id_or_no_metric_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    english = write_samples(tmp_path, "en", [1, 0])
    other = write_samples(tmp_path, "sw", [1, 0], ["x0", "x1"])
    normed = write_samples(tmp_path, "yo", [1, 0], metric="acc_norm")
    for files, said in (
        ([english, other], "no row of 'sw' is matched"),
        ([english, normed], "metric 'acc_norm', but 'acc' in"),
    ):
        out = tmp_path / "out"
        words = ["--from-samples", *files, "--ramoe-output", str(out), *ALONE, "--id", "{key}"]
        assert main(words) == 2
        assert said in capsys.readouterr().err
        assert not out.exists()


def test_the_command_takes_samples_without_ranks(tmp_path: Path, files: list[str]) -> None:
    import subprocess
    import sys

    out = str(tmp_path / "out")
    words = ["taxonomy", "--from-samples", *files, "--ramoe-output", out, *ALONE]
    done = subprocess.run(
        [sys.executable, "-m", "ramoe_megatron.cli", *words], capture_output=True, text=True, check=True
    )
    assert "every row is matched" in done.stdout
    assert len(read_taxonomy(Path(out) / "taxonomy.jsonl")) == 10
    first = json.loads((Path(out) / "taxonomy.jsonl").read_text().splitlines()[0])
    assert first["category"] == "cc"
