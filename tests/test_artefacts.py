"""Laws of the artefacts: what is written is read back, nothing is half-written, foreign files are refused by name."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.artefacts import (
    ExpertFile,
    ModelShape,
    Priors,
    atomic_write,
    atomic_write_text,
    digests,
    load_document,
    read_divergence,
    read_taxonomy,
    save_document,
    sha256,
    write_divergence,
    write_taxonomy,
)
from ramoe_megatron.method.divergence import DivergenceRow, NoZone, Zone
from ramoe_megatron.method.taxonomy import TaxonomyRow

SHAPE = ModelShape(num_moe_layers=3, num_experts=4, topk=2, score_function="softmax", hidden_size=8)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


def expert_file(seed: int = 0, zone: Zone | NoZone | None = None) -> ExpertFile:
    generator = torch.Generator().manual_seed(seed)
    random = torch.rand(2, 3, 4, generator=generator)
    return ExpertFile(
        tasks=("currency", "continent"),
        shape=SHAPE,
        expert_mask=random > 0.5,
        delta=random - 0.5,
        task_frequency=random,
        general_frequency=random[0],
        english_pattern={"last": random.softmax(-1), "all": random.softmax(-1)},
        layer_number=torch.tensor([2, 4, 6]),
        rule={"name": "tau", "tau": 0.3},
        zone=zone or Zone(1, 2, "auto", "floor of the curve"),
        checkpoint="checkpoints/base",
        data=[{"path": "parallel.jsonl", "sha256": "0" * 64}],
        sequences={"task": {"currency": 5, "continent": 7}, "general": 9},
    )


def save_priors(path: Path, ids: list[str], seed: int = 0) -> torch.Tensor:
    priors = torch.rand(len(ids), 3, 4, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    Priors.save(path, ids, priors, tokens="last", shape=SHAPE, checkpoint="checkpoints/base")
    return priors


# --- whole or not at all ---


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, failure: type[BaseException]) -> None:
    path = tmp_path / "deep" / "file.txt"
    atomic_write_text(path, "old")

    def write_half() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            assert temporary.parent == path.parent
            assert temporary.suffix != path.suffix, "a search for files of this kind must not find half of one"
            assert path.read_text() == "old"
            raise failure

    with pytest.raises(failure):
        write_half()
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_write_replaces_the_file_and_keeps_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    for text in ("first", "zweite\r\nZeile\n"):
        atomic_write_text(path, text)
        assert path.read_bytes() == text.encode()
    plain = tmp_path / "plain"
    plain.write_text("")
    assert path.stat().st_mode == plain.stat().st_mode, "readable by whoever may read the user's other files"


def test_sha256_is_the_known_digest_of_abc(tmp_path: Path) -> None:
    (tmp_path / "abc").write_text("abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "abc") == digest
    assert digests([tmp_path / "abc"]) == [{"path": str(tmp_path / "abc"), "sha256": digest}]


# --- experts.safetensors ---


@pytest.mark.parametrize("zone", [Zone(0, 2, "0-2", "given"), NoZone("the divergence curve is flat")])
def test_expert_file_round_trip(tmp_path: Path, zone: Zone | NoZone) -> None:
    path = tmp_path / "experts.safetensors"
    written = expert_file(zone=zone)
    written.save(path)
    read = ExpertFile.load(path)
    for name in ("expert_mask", "delta", "task_frequency", "general_frequency", "layer_number"):
        assert torch.equal(getattr(read, name), getattr(written, name)), name
        assert getattr(read, name).dtype == getattr(written, name).dtype
    assert set(read.english_pattern) == {"last", "all"}
    assert torch.equal(read.english_pattern["last"], written.english_pattern["last"])
    for name in ("tasks", "shape", "rule", "zone", "checkpoint", "sequences", "package_version"):
        assert getattr(read, name) == getattr(written, name), name
    assert list(read.data) == list(written.data)
    assert load_file(path)["expert_mask"].dtype == torch.uint8


def test_the_anchor_is_kept_and_older_files_have_none(tmp_path: Path) -> None:
    path = tmp_path / "experts.safetensors"
    replace(expert_file(), anchor="zh").save(path)
    assert ExpertFile.load(path).anchor == "zh"
    with safe_open(path, framework="pt") as handle:
        tensors, meta = {name: handle.get_tensor(name) for name in handle.keys()}, json.loads(handle.metadata()["ramoe"])  # noqa: SIM118
    del meta["anchor"]
    save_file(tensors, path, {"ramoe": json.dumps(meta)})
    assert ExpertFile.load(path).anchor is None


def test_the_same_experts_give_the_same_bytes(tmp_path: Path) -> None:
    expert_file().save(tmp_path / "a")
    expert_file().save(tmp_path / "b")
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta": torch.zeros(2, 3, 5)}, r"delta has shape \(2, 3, 5\), expected \(2, 3, 4\)"),
        ({"general_frequency": torch.full((3, 4), float("nan"))}, "general_frequency holds values that are not finite"),
        ({"english_pattern": {"last": torch.full((2, 3, 4), 0.5)}}, "sum to neither 1 nor 0"),
        ({"english_pattern": {"first": torch.zeros(2, 3, 4)}}, "'first', expected prompt, response, all, last"),
        ({"zone": Zone(1, 3, "auto", "")}, "zone 1 to 3, expected within 0 to 2"),
    ],
)
def test_an_inconsistent_expert_file_is_not_written(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(RamoeError, match=message):
        replace(expert_file(), **change).save(tmp_path / "experts.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_expert_file_whose_tensors_do_not_fit_its_metadata_is_refused_on_loading(tmp_path: Path) -> None:
    path = tmp_path / "experts.safetensors"
    expert_file().save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for name, tensor, message in [
        ("delta", torch.zeros(2, 3, 5), r"delta has shape \(2, 3, 5\), expected \(2, 3, 4\)"),
        ("delta", torch.full((2, 3, 4), float("inf")), "delta holds values that are not finite"),
        ("english_pattern.last", torch.ones(2, 3, 4), "rows of english_pattern.last sum to neither 1 nor 0"),
    ]:
        save_file({**tensors, name: tensor}, path, metadata)
        with pytest.raises(RamoeError, match=rf"experts\.safetensors: {message}"):
            ExpertFile.load(path)


def test_the_expert_file_of_another_model_is_refused_with_every_difference(tmp_path: Path) -> None:
    path = tmp_path / "experts.safetensors"
    expert_file().save(path)
    experts = ExpertFile.load(path)
    experts.check_model(3, 4, 2, "softmax")
    with pytest.raises(RamoeError) as refusal:
        experts.check_model(num_moe_layers=3, num_experts=64, topk=2, score_function="sigmoid")
    for part in (str(path), "num_experts is 4 in the file, 64 in", "'softmax' in the file, 'sigmoid'", "ramoe profile"):
        assert part in str(refusal.value)
    assert "num_moe_layers" not in str(refusal.value)


def test_the_profile_target_is_the_pattern_of_its_task_or_a_refusal() -> None:
    experts = expert_file()
    assert torch.equal(experts.profile_target("continent", "last"), experts.english_pattern["last"][1])
    with pytest.raises(RamoeError, match=r"no task 'medicine'.*currency, continent"):
        experts.profile_target("medicine", "last")
    with pytest.raises(RamoeError, match="no English pattern for tokens 'prompt', found last, all"):
        experts.profile_target("continent", "prompt")
    without = replace(experts, english_pattern={"last": torch.zeros(2, 3, 4)})
    with pytest.raises(RamoeError, match="'continent' has no English-correct example"):
        without.profile_target("continent", "last")


# --- refusals shared by both tensor files ---

LOADERS: dict[str, Callable[[Path], object]] = {"ramoe-experts": ExpertFile.load, "ramoe-priors": Priors.load}


def write_valid(path: Path, format_name: str) -> None:
    if format_name == "ramoe-experts":
        expert_file().save(path)
    else:
        save_priors(path, ["a", "b"])


@pytest.mark.parametrize("format_name", LOADERS)
def test_a_tensor_file_cut_short_anywhere_is_refused_by_name(tmp_path: Path, format_name: str) -> None:
    path = tmp_path / "file.safetensors"
    write_valid(path, format_name)
    whole = path.read_bytes()
    for length in [0, 4, 8, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(RamoeError, match=r"file\.safetensors: not a whole safetensors file.*profile again"):
            LOADERS[format_name](path)


@pytest.mark.parametrize("format_name", LOADERS)
def test_foreign_tensor_files_are_refused_by_name(tmp_path: Path, format_name: str) -> None:
    path = tmp_path / "file.safetensors"
    load = LOADERS[format_name]
    with pytest.raises(RamoeError, match=r"file\.safetensors: no such file"):
        load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(RamoeError, match=r"file\.safetensors: .*without ramoe metadata"):
        load(path)
    other = next(name for name in LOADERS if name != format_name)
    write_valid(path, other)
    with pytest.raises(RamoeError, match=f"found format '{other}', expected '{format_name}'"):
        load(path)
    tensors = {"weight": torch.zeros(2)}
    save_file(tensors, path, {"ramoe": json.dumps({"format": format_name, "version": 2, "package_version": "9.0"})})
    with pytest.raises(RamoeError, match=rf"{format_name} version 2, expected 1.*9\.0"):
        load(path)
    save_file(tensors, path, {"ramoe": json.dumps({"format": format_name, "version": 1})})
    with pytest.raises(RamoeError, match=r"file\.safetensors: (no tensor expert_mask|bad metadata)"):
        load(path)
    save_file(tensors, path, {"ramoe": "{"})
    with pytest.raises(RamoeError, match=r"file\.safetensors: bad metadata"):
        load(path)


# --- priors.safetensors ---


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(st.lists(TEXT, min_size=1, max_size=6, unique=True), st.data())
def test_rows_are_those_of_the_ids_asked_for_in_that_order(tmp_path: Path, ids: list[str], data: st.DataObject) -> None:
    written = save_priors(tmp_path / "priors.safetensors", ids)
    priors = Priors.load(tmp_path / "priors.safetensors")
    assert (priors.ids, priors.tokens, priors.shape) == (tuple(ids), "last", SHAPE)
    asked = data.draw(st.lists(st.sampled_from(ids), max_size=8))
    assert torch.equal(priors.rows(asked), written[[ids.index(id_) for id_ in asked]])


def test_missing_ids_are_refused_with_their_count_and_the_first_five(tmp_path: Path) -> None:
    save_priors(tmp_path / "priors.safetensors", ["known"])
    priors = Priors.load(tmp_path / "priors.safetensors")
    with pytest.raises(RamoeError, match=r"priors\.safetensors: 7 of 8 examples .* first m0, m1, m2, m3, m4;"):
        priors.rows(["known", *(f"m{i}" for i in range(7)), "m0"])


def test_priors_opened_in_another_process_read_the_same_rows(tmp_path: Path) -> None:
    written = save_priors(tmp_path / "priors.safetensors", ["a", "b"])
    text = pickle.dumps(Priors.load(tmp_path / "priors.safetensors"))
    assert len(text) < 1000, "the tensor does not travel"
    assert torch.equal(pickle.loads(text).rows(["b"]), written[1:])


def test_priors_of_another_model_or_with_double_ids_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "priors.safetensors"
    with pytest.raises(RamoeError, match="ids occur twice, first a"):
        save_priors(path, ["a", "b", "a"])
    with pytest.raises(RamoeError, match=r"priors has shape \(1, 3, 4\), expected \(2, 3, 4\)"):
        Priors.save(path, ["a", "b"], torch.zeros(1, 3, 4), tokens="last", shape=SHAPE, checkpoint="")
    assert not path.exists()
    save_priors(path, ["a"])
    with pytest.raises(RamoeError, match="topk is 2 in the file, 8 in the model"):
        Priors.load(path).check_model(3, 4, 8, "softmax")


# --- taxonomy.jsonl ---


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.builds(TaxonomyRow, TEXT, TEXT, TEXT, TEXT, st.booleans(), st.booleans()),
        min_size=1,
        unique_by=lambda row: (row.id, row.language),
    )
)
def test_taxonomy_round_trip(tmp_path: Path, rows: list[TaxonomyRow]) -> None:
    write_taxonomy(tmp_path / "taxonomy.jsonl", rows)
    assert read_taxonomy(tmp_path / "taxonomy.jsonl") == rows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "b", ', r"column 12: .*expected one JSON object"),
        ("[1]", "found list, expected one JSON object"),
        ({"id": 7}, "key 'id': found 7, expected str"),
        ({"english_correct": 1}, "key 'english_correct': found 1, expected bool"),
        ({"category": "ii"}, "key 'category': found 'ii', expected 'ci'"),
        ({"id": "a"}, "id 'a' in 'tr' stands on line 1 already"),
    ],
)
def test_a_bad_taxonomy_line_is_named(tmp_path: Path, line: str | dict[str, Any], message: str) -> None:
    path = tmp_path / "taxonomy.jsonl"
    write_taxonomy(path, [TaxonomyRow("a", "t", "tr", "train", True, False)])
    if isinstance(line, dict):
        line = json.dumps({**json.loads(path.read_text()), "id": "b", **line})
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(RamoeError, match=rf"taxonomy\.jsonl:2: .*{message}"):
        read_taxonomy(path)


def test_a_missing_or_empty_taxonomy_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "taxonomy.jsonl"
    with pytest.raises(RamoeError, match=r"taxonomy\.jsonl: cannot be read"):
        read_taxonomy(path)
    path.write_text("\n")
    with pytest.raises(RamoeError, match=r"taxonomy\.jsonl: no rows"):
        read_taxonomy(path)


# --- divergence.csv ---


def divergence_rows(languages: list[str]) -> list[DivergenceRow]:
    return [
        DivergenceRow(language, layer, 2 * layer + 1, None if layer == 1 else layer / 7, 5 * (layer != 1), layer)
        for language in languages
        for layer in range(3)
    ]


def test_divergence_round_trip_keeps_undefined_means(tmp_path: Path) -> None:
    rows = divergence_rows(["tr", 'a,"b'])
    write_divergence(tmp_path / "divergence.csv", rows)
    assert read_divergence(tmp_path / "divergence.csv") == rows


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("moe_layer", "layer", r"csv:1: found columns language, layer, .*expected language, moe_layer"),
        ("tr,2", "tr,two", r"csv:4: .*'two'.*expected a number"),
        ("0.28", "nan0.28", r"csv:4: .*expected a number"),
        ("tr,2", "tr,3", r"language 'tr' has MoE layers \[0, 1, 3\], expected 0 to 2"),
    ],
)
def test_a_bad_divergence_table_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "divergence.csv"
    write_divergence(path, divergence_rows(["tr"]))
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(RamoeError, match=message):
        read_divergence(path)


# --- JSON documents ---

BODY = {"rows": [], "verdict": {"word": "go"}, "limits": ["один"]}


def test_document_round_trip(tmp_path: Path) -> None:
    save_document(tmp_path / "predict.json", "ramoe-prediction", BODY)
    expected = {"format": "ramoe-prediction", "version": 1, **BODY}
    assert load_document(tmp_path / "predict.json", "ramoe-prediction") == expected


def test_foreign_documents_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "predict.json"
    with pytest.raises(RamoeError, match=r"predict\.json: cannot be read"):
        load_document(path, "ramoe-prediction")
    for text, message in [
        ("[]", "found format 'list', expected 'ramoe-prediction'"),
        ('{"format": "ramoe-results"}', "found format 'ramoe-results', expected 'ramoe-prediction'"),
        ('{"format": "ramoe-prediction", "version": 7}', "version 7, expected 1"),
        ('{"format": "ramoe-prediction", "version": 1, "rows": []}', "lacks verdict, limits"),
    ]:
        path.write_text(text)
        with pytest.raises(RamoeError, match=rf"predict\.json: .*{message}"):
            load_document(path, "ramoe-prediction")
    save_document(path, "ramoe-prediction", BODY)
    whole = path.read_text().rstrip()
    for length in range(0, len(whole), 7):
        path.write_text(whole[:length])
        with pytest.raises(RamoeError, match=r"predict\.json: line \d+ column \d+: .*cut short"):
            load_document(path, "ramoe-prediction")


def test_an_incomplete_or_infinite_document_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(RamoeError, match="lacks verdict, limits"):
        save_document(tmp_path / "predict.json", "ramoe-prediction", {"rows": []})
    with pytest.raises(RamoeError, match="not finite"):
        save_document(tmp_path / "predict.json", "ramoe-prediction", {**BODY, "rows": [float("nan")]})
    assert not list(tmp_path.iterdir())
