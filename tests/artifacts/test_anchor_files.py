"""`ramoe anchors`: fine-tuning reads its files, one anchor changes nothing, no file is overwritten."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from anchor_tables import SHAPE, by_hand, save_priors, tables
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings

from ramoe_megatron.artifacts.anchor_files import check_anchor, write_anchors
from ramoe_megatron.artifacts.files import ANCHOR_FILES, load_document, save_document
from ramoe_megatron.artifacts.priors import Priors
from ramoe_megatron.artifacts.records import read_taxonomy, write_taxonomy
from ramoe_megatron.cli import main
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.anchors import anchored, answered, counts
from ramoe_megatron.method.categories import TaxonomyRow, summarise


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_taxonomy(tmp_path / "taxonomy.jsonl", by_hand())
    save_priors(tmp_path / "en.safetensors", "abcd", 0.25)
    save_priors(tmp_path / "zh.safetensors", "dcba", 0.5)
    return tmp_path


def ramoe(folder: Path, *words: str, split: str = "") -> Result:
    flags, names = (
        [word for word in words if word.startswith("--")],
        [word for word in words if not word.startswith("--")],
    )
    named = [
        word
        for name in names
        for word in ("--priors", name if "=" in name or not name else f"{name}={folder / name}.safetensors")
    ]
    given = [
        "--taxonomy",
        str(folder / "taxonomy.jsonl"),
        "--anchor",
        "en",
        *named,
        "--out",
        str(folder / "out"),
        "--split",
        split,
        *flags,
    ]
    return CliRunner().invoke(main, ["anchors", *given])


def beside(folder: Path, anchor: str, checkpoint: str) -> None:
    body = {"anchor": anchor, "checkpoint": checkpoint, "data": [], "package_version": "1", "pairs": []}
    save_document(folder / "taxonomy.json", "ramoe-taxonomy", body)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=tables())
def test_one_anchor_gives_back_the_files(tmp_path: Path, rows: list[TaxonomyRow]) -> None:
    """Byte for byte, examples that the taxonomy does not have included."""
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    write_taxonomy(folder / "taxonomy.jsonl", rows)
    ids = [*dict.fromkeys(row.id for row in rows), "more"]
    priors = torch.rand(len(ids), 2, 3).softmax(-1)
    data = [{"path": "p", "sha256": "0"}]
    Priors.save(
        folder / "priors.safetensors", ids, priors, tokens="last", shape=SHAPE, checkpoint="base", data=data
    )
    write_anchors(folder / "taxonomy.jsonl", "en", {"en": folder / "priors.safetensors"}, folder / "out")
    for name in ("taxonomy.jsonl", "priors.safetensors"):
        assert (folder / "out" / name).read_bytes() == (folder / name).read_bytes(), name


def test_of_a_taxonomy_the_named_splits_are_taken(folder: Path) -> None:
    """Priors need hold no example of the others."""
    other = [TaxonomyRow("later", "t", language, "test", True, False) for language in ("zh", "sw")]
    write_taxonomy(folder / "taxonomy.jsonl", [*other, *by_hand()])
    assert "first later, have no routing in 'en'" in ramoe(folder, "en", "zh").stderr
    assert (
        "no row of the split 'tset'; it has test, train"
        in ramoe(folder, "en", "zh", split="train,tset").stderr
    )
    assert ramoe(folder, "en", "zh", split="train").exit_code == 0
    assert read_taxonomy(folder / "out/taxonomy.jsonl") == anchored(
        by_hand(), answered(by_hand(), "en", ["en", "zh"])
    )


def test_replace_overwrites_what_an_earlier_call_wrote(folder: Path) -> None:
    assert ramoe(folder, "en", "zh").exit_code == 0
    written = {name: (folder / "out" / name).read_bytes() for name in ANCHOR_FILES}
    (folder / "out/anchors.json").unlink()
    (folder / "out/priors.safetensors").write_bytes(b"cut short")
    assert "--replace" in ramoe(folder, "en", "zh").stderr
    assert ramoe(folder, "en", "zh", "--replace").exit_code == 0
    assert {name: (folder / "out" / name).read_bytes() for name in ANCHOR_FILES} == written


def test_the_command_writes_what_fine_tuning_reads_and_shows_the_counts(folder: Path) -> None:
    beside(folder, "en", "base")
    done = ramoe(folder, "en", "zh")
    assert done.exit_code == 0, done.output
    out, right = folder / "out", answered(by_hand(), "en", ["en", "zh"])
    assert sorted(path.name for path in out.iterdir()) == sorted(ANCHOR_FILES)
    rows = read_taxonomy(out / "taxonomy.jsonl")
    assert rows == anchored(by_hand(), right)
    assert load_document(out / "taxonomy.json", "ramoe-taxonomy")["pairs"] == [
        asdict(pair) for pair in summarise(rows)
    ]
    document = load_document(out / "anchors.json", "ramoe-anchors")
    assert (document["anchor"], document["anchors"], document["checkpoint"]) == ("en", ["en", "zh"], "base")
    assert [Path(entry["path"]).name for entry in document["data"]] == [
        "taxonomy.jsonl",
        "en.safetensors",
        "zh.safetensors",
    ]
    assert document["tasks"] == counts(by_hand(), right)
    priors = Priors(out / "priors.safetensors")
    assert [entry["path"] for entry in priors.data] == ["en.jsonl", "zh.jsonl"]
    torch.testing.assert_close(
        priors.rows(["a", "b", "c", "d"])[:, 0, 0], torch.tensor([0.25, 0.52, 0.27, 0.28])
    )
    for shown in (done.output, CliRunner().invoke(main, ["inspect", str(out / "anchors.json")]).output):
        assert "t 4 3 1 1 2 3 1" in " ".join(shown.split())
    assert "en, zh" in CliRunner().invoke(main, ["inspect", str(out / "taxonomy.json")]).output


@pytest.mark.parametrize("standing", ANCHOR_FILES)
def test_nothing_is_overwritten(folder: Path, standing: str) -> None:
    (folder / "out").mkdir()
    (folder / "out" / standing).write_text("mine")
    done = ramoe(folder, "en", "zh")
    assert done.exit_code == 2
    assert f"{standing} exist already" in done.stderr
    assert [path.read_text() for path in (folder / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["en=", "zh"], "--priors en=: expected LANGUAGE=FILE"),
        (["=x"], "--priors =x: expected LANGUAGE=FILE"),
        (["en", "en"], "each language once"),
        (["en", "tr=x"], "1 of 2 not in the taxonomy: tr"),
        (["en", "zh=none.safetensors"], "none.safetensors: no such file"),
    ],
)
def test_bad_words_are_refused_and_leave_nothing(folder: Path, words: list[str], told: str) -> None:
    done = ramoe(folder, *words)
    assert done.exit_code == 2
    assert told in done.stderr
    assert not (folder / "out").exists()


def test_a_taxonomy_document_that_disagrees_is_refused(folder: Path) -> None:
    beside(folder, "fr", "base")
    assert "taxonomy.json is of the anchor 'fr'" in ramoe(folder, "en", "zh").stderr
    beside(folder, "en", "later")
    assert "is of the checkpoint 'later'" in ramoe(folder, "en", "zh").stderr
    assert not (folder / "out").exists()


def test_a_taxonomy_against_another_anchor_or_several_is_no_single_anchors(folder: Path) -> None:
    assert check_anchor(folder / "taxonomy.jsonl", "en") is None, "without a document nothing is known"
    (folder / "taxonomy.json").write_text('{"notes": "of somebody else"}')
    assert check_anchor(folder / "taxonomy.jsonl", "en") is None, "nor by a file that is none of ours"
    beside(folder, "en", "base")
    assert check_anchor(folder / "taxonomy.jsonl", "en") == load_document(
        folder / "taxonomy.json", "ramoe-taxonomy"
    )
    with pytest.raises(RamoeError, match=r"taxonomy\.json is of the anchor 'en', expected 'zh'"):
        check_anchor(folder / "taxonomy.jsonl", "zh")
    assert ramoe(folder, "en", "zh").exit_code == 0
    for anchor in ("en", "zh"):
        with pytest.raises(RamoeError, match=rf"is of the anchor 'en', 'zh', expected '{anchor}'"):
            check_anchor(folder / "out/taxonomy.jsonl", anchor)
