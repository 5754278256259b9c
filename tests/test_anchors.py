"""Laws of several anchors: which one an example is pulled to, and the taxonomy and priors that follow."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ramoe_megatron.cli import main
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.anchors import anchored, answered, check_anchor, choose, counts, gather, write_anchors
from ramoe_megatron.method.artefacts import Priors, load_document, read_taxonomy, save_document, write_taxonomy
from ramoe_megatron.method.files import ANCHOR_FILES
from ramoe_megatron.method.taxonomy import TaxonomyRow, summarise
from ramoe_megatron.method.tensors import ModelShape

SHAPE = ModelShape(num_moe_layers=2, num_experts=3, topk=1, score_function="softmax", hidden_size=4)
LANGUAGES = ("zh", "es", "sw")
orders = st.lists(st.sampled_from(["en", "zh", "es"]), min_size=1, max_size=3, unique=True)


@st.composite
def tables(draw: st.DrawFn) -> list[TaxonomyRow]:
    """A whole taxonomy against en: every id in every language, in any order."""
    rows = []
    for n in range(draw(st.integers(1, 6))):
        task, english = draw(st.sampled_from(["t", "u"])), draw(st.booleans())
        rows += [TaxonomyRow(f"x{n}", task, language, "train", english, draw(st.booleans())) for language in LANGUAGES]
    return draw(st.permutations(rows))


def ci(rows: Sequence[TaxonomyRow]) -> set[tuple[str, str]]:
    return {(row.id, row.language) for row in rows if row.category == "ci"}


@given(tables())
def test_the_taxonomys_own_anchor_alone_changes_nothing(rows: list[TaxonomyRow]) -> None:
    assert anchored(rows, answered(rows, "en", ["en"])) == rows


@given(tables(), orders)
def test_an_outcome_is_right_iff_another_anchor_is(rows: list[TaxonomyRow], order: list[str]) -> None:
    right = {(row.id, row.language): row.target_correct for row in rows} | {(row.id, "en"): row.english_correct for row in rows}
    made = anchored(rows, answered(rows, "en", order))
    assert len(made) == len(rows)
    for before, after in zip(rows, made, strict=True):
        assert replace(after, english_correct=before.english_correct) == before
        assert after.english_correct == any(right[before.id, name] for name in order if name != before.language)


@given(tables(), orders)
def test_more_anchors_only_add_ci_rows_and_their_order_does_not_matter(rows: list[TaxonomyRow], order: list[str]) -> None:
    found = [ci(anchored(rows, answered(rows, "en", order[: n + 1]))) for n in range(len(order))]
    assert all(few <= many for few, many in itertools.pairwise(found))
    assert anchored(rows, answered(rows, "en", order[::-1])) == anchored(rows, answered(rows, "en", order))
    gained = sum(entry["ci_gained"] for entry in counts(rows, answered(rows, "en", order)))
    assert gained == len(found[-1] - found[0])


@given(tables(), orders)
def test_a_ci_row_is_pulled_to_a_right_answer_in_another_language(rows: list[TaxonomyRow], order: list[str]) -> None:
    right = answered(rows, "en", order)
    chosen, made = choose(right), anchored(rows, right)
    for id_, language in ci(made):
        assert chosen[id_] != language
        assert right[id_][chosen[id_]]
    for row in made:
        if chosen[row.id] == row.language and any(right[row.id].values()):
            assert row.category in ("cc", "ic")


@given(tables(), orders)
def test_the_first_right_anchor_is_chosen_else_the_first(rows: list[TaxonomyRow], order: list[str]) -> None:
    right = answered(rows, "en", order)
    for id_, name in choose(right).items():
        assert list(right[id_]) == order
        before = order[: order.index(name)]
        assert not any(right[id_][other] for other in before)
        assert right[id_][name] or (name == order[0] and not any(right[id_].values()))
    for entry in counts(rows, right):
        assert entry["examples"] == len({row.id for row in rows if row.task == entry["task"]}) == sum(entry["chosen"].values())
        assert entry["chosen"][order[0]] >= entry["none_right"]


def by_hand() -> list[TaxonomyRow]:
    """a: en right. b: zh alone right. c: none. d: en and zh right. Languages zh and sw; sw is wrong but in d."""
    outcomes = {"a": (True, False, False), "b": (False, True, False), "c": (False, False, False), "d": (True, True, True)}
    return [
        TaxonomyRow(id_, "t", language, "train", en, correct)
        for id_, (en, zh, sw) in outcomes.items()
        for language, correct in (("zh", zh), ("sw", sw))
    ]


def test_rows_and_counts_by_hand() -> None:
    rows = by_hand()
    right = answered(rows, "en", ["en", "zh"])
    assert choose(right) == {"a": "en", "b": "zh", "c": "en", "d": "en"}
    made = {(row.id, row.language): row.category for row in anchored(rows, right)}
    assert made == {
        ("a", "zh"): "ci", ("a", "sw"): "ci", ("b", "zh"): "ic", ("b", "sw"): "ci",
        ("c", "zh"): "ii", ("c", "sw"): "ii", ("d", "zh"): "cc", ("d", "sw"): "cc",
    }  # fmt: skip
    expected = {"task": "t", "examples": 4, "chosen": {"en": 3, "zh": 1}, "none_right": 1, "ci_first": 2, "ci": 3, "ci_gained": 1}
    assert counts(rows, right) == [expected]
    assert choose(answered(rows, "en", ["zh", "en"])) == {"a": "en", "b": "zh", "c": "zh", "d": "zh"}


def save_priors(path: Path, ids: str, value: float, tokens: str = "last", checkpoint: str = "base", shape: ModelShape = SHAPE) -> Path:
    """Row n is [value + n / 100, 1 - that, 0] in each layer."""
    first = torch.tensor([value + n / 100 for n in range(len(ids))])
    rows = torch.stack([first, 1 - first, torch.zeros(len(ids))], -1)[:, None].expand(-1, 2, -1)
    data = [{"path": f"{path.stem}.jsonl", "sha256": "0" * 64}]
    Priors.save(path, list(ids), rows, tokens=tokens, shape=shape, checkpoint=checkpoint, data=data)
    return path


def test_each_prior_is_the_chosen_anchors(tmp_path: Path) -> None:
    files = {"en": Priors(save_priors(tmp_path / "en", "dcxa", 0.25)), "zh": Priors(save_priors(tmp_path / "zh", "ebd", 0.5))}
    ids, rows = gather(files, {"a": "en", "b": "zh", "c": "en", "d": "zh"})
    assert ids == ["d", "c", "x", "a", "b"], "those of the first file in its order, x without a choice, then the others"
    torch.testing.assert_close(rows[:, 0, 0], torch.tensor([0.52, 0.26, 0.27, 0.28, 0.51]))
    torch.testing.assert_close(rows[:, 1], rows[:, 0])
    with pytest.raises(RamoeError, match=r"zh: 2 examples, first c, a, have no routing in 'zh', their chosen anchor"):
        gather(files, {"a": "zh", "b": "zh", "c": "zh"})


def test_priors_of_other_models_tokens_or_checkpoints_are_refused(tmp_path: Path) -> None:
    first = Priors(save_priors(tmp_path / "en", "ab", 0.25))
    others = {
        "tokens is 'last' and 'all'": save_priors(tmp_path / "all", "ab", 0.5, tokens="all"),
        "checkpoint is 'base' and 'other'": save_priors(tmp_path / "other", "ab", 0.5, checkpoint="other"),
        "topk is 1 and 2": save_priors(tmp_path / "model", "ab", 0.5, shape=replace(SHAPE, topk=2)),
    }
    for told, path in others.items():
        with pytest.raises(RamoeError, match=f"{tmp_path}/en and {path}: {told}; profile both anchors alike"):
            gather({"en": first, "zh": Priors(path)}, {"a": "en"})


def test_tables_that_do_not_tell_about_an_anchor_are_refused() -> None:
    rows = by_hand()
    with pytest.raises(RamoeError, match=r"2 of 3 not in the taxonomy: es, tr; it has en, sw, zh"):
        answered(rows, "en", ["es", "zh", "tr"])
    with pytest.raises(RamoeError, match="found zh, zh, expected languages, each once"):
        answered(rows, "en", ["zh", "zh"])
    with pytest.raises(RamoeError, match="found none"):
        answered(rows, "en", [])
    with pytest.raises(RamoeError, match=r"4 examples, first a, b, c, d, have rows in 'zh' itself"):
        answered(rows, "zh", ["zh"])
    kept = [row for row in rows if (row.id, row.language) not in {("a", "zh"), ("c", "zh")}]
    with pytest.raises(RamoeError, match=r"2 examples, first a, c, have no row in the anchor 'zh'"):
        answered(kept, "en", ["en", "zh"])
    many = [TaxonomyRow(f"x{n}", "t", language, "train", language == "zh", True) for n in range(7) for language in ("zh", "sw")]
    with pytest.raises(RamoeError, match=r"7 examples, first x0, x1, x2, x3, x4, are right and wrong in 'en'"):
        answered(many, "en", ["en"])


# --- files ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_taxonomy(tmp_path / "taxonomy.jsonl", by_hand())
    save_priors(tmp_path / "en.safetensors", "abcd", 0.25)
    save_priors(tmp_path / "zh.safetensors", "dcba", 0.5)
    return tmp_path


def ramoe(folder: Path, *words: str, split: str = "") -> Result:
    flags, names = [word for word in words if word.startswith("--")], [word for word in words if not word.startswith("--")]
    named = [word for name in names for word in ("--priors", name if "=" in name or not name else f"{name}={folder / name}.safetensors")]
    given = ["--taxonomy", str(folder / "taxonomy.jsonl"), "--anchor", "en", *named, "--out", str(folder / "out"), "--split", split, *flags]
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
    Priors.save(folder / "priors.safetensors", ids, priors, tokens="last", shape=SHAPE, checkpoint="base", data=data)
    write_anchors(folder / "taxonomy.jsonl", "en", {"en": folder / "priors.safetensors"}, folder / "out")
    for name in ("taxonomy.jsonl", "priors.safetensors"):
        assert (folder / "out" / name).read_bytes() == (folder / name).read_bytes(), name


def test_of_a_taxonomy_the_named_splits_are_taken(folder: Path) -> None:
    """Priors need hold no example of the others."""
    other = [TaxonomyRow("later", "t", language, "test", True, False) for language in ("zh", "sw")]
    write_taxonomy(folder / "taxonomy.jsonl", [*other, *by_hand()])
    assert "first later, have no routing in 'en'" in ramoe(folder, "en", "zh").stderr
    assert "no row of the split 'tset'; it has test, train" in ramoe(folder, "en", "zh", split="train,tset").stderr
    assert ramoe(folder, "en", "zh", split="train").exit_code == 0
    assert read_taxonomy(folder / "out/taxonomy.jsonl") == anchored(by_hand(), answered(by_hand(), "en", ["en", "zh"]))


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
    assert load_document(out / "taxonomy.json", "ramoe-taxonomy")["pairs"] == [asdict(pair) for pair in summarise(rows)]
    document = load_document(out / "anchors.json", "ramoe-anchors")
    assert (document["anchor"], document["anchors"], document["checkpoint"]) == ("en", ["en", "zh"], "base")
    assert [Path(entry["path"]).name for entry in document["data"]] == ["taxonomy.jsonl", "en.safetensors", "zh.safetensors"]
    assert document["tasks"] == counts(by_hand(), right)
    priors = Priors(out / "priors.safetensors")
    assert [entry["path"] for entry in priors.data] == ["en.jsonl", "zh.jsonl"]
    torch.testing.assert_close(priors.rows(["a", "b", "c", "d"])[:, 0, 0], torch.tensor([0.25, 0.52, 0.27, 0.28]))
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
    assert check_anchor(folder / "taxonomy.jsonl", "en") == load_document(folder / "taxonomy.json", "ramoe-taxonomy")
    with pytest.raises(RamoeError, match=r"taxonomy\.json is of the anchor 'en', expected 'zh'"):
        check_anchor(folder / "taxonomy.jsonl", "zh")
    assert ramoe(folder, "en", "zh").exit_code == 0
    for anchor in ("en", "zh"):
        with pytest.raises(RamoeError, match=rf"is of the anchor 'en', 'zh', expected '{anchor}'"):
            check_anchor(folder / "out/taxonomy.jsonl", anchor)
