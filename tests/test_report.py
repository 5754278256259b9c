"""The report: pooled counts, paired differences, and a self-contained page, from a run folder with known contents."""

import dataclasses
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.jobs.report import main
from ramoe_megatron.method.artefacts import write_divergence
from ramoe_megatron.method.divergence import DivergenceRow, Zone
from ramoe_megatron.method.expert_file import ExpertFile
from ramoe_megatron.method.files import load_document, save_document
from ramoe_megatron.method.predict import TransplantOutcome, predict
from ramoe_megatron.method.taxonomy import TaxonomyPair, TaxonomyRow, summarise
from ramoe_megatron.method.tensors import ModelShape
from ramoe_megatron.report.html import write_report
from ramoe_megatron.report.inputs import Evaluation, load_run
from ramoe_megatron.report.pairing import pair_up, paired_change, pooled
from ramoe_megatron.report.plots import FIGURES
from ramoe_megatron.report.tables import build, collect, summary_table
from ramoe_megatron.report.words import caption, summary

HOSTILE = "<script>alert('$x$')</script>"
TASKS = ("currency", "month arithmetic", HOSTILE)
LANGUAGES = ("en", "es", "tr", "fi", "sw", "ar", "hi")
LAYERS, EXPERTS = 6, 16
METHODS = {"base": 0.0, "sft": 0.12, "ra-moe": 0.17, "ra-moe-shuffled": 0.10}
SEEDS = (1, 2, 3)
EXAMPLES = 40
NO_DATA: dict[str, Any] = {"checkpoint": "checkpoints/base", "data": [], "package_version": "0"}


def write_run(root: Path) -> Path:
    """A run folder as the stages leave it, with random but fixed answers; every file by its own writer."""
    draw = random.Random(0)
    ids = {task: [f"{place}-{number}" for number in range(EXAMPLES)] for place, task in enumerate(TASKS)}
    keys = [(task, language, key) for task in TASKS for language in LANGUAGES for key in ids[task]]

    def chance(method: str, language: str) -> float:
        return 0.9 if language == "en" else 0.65 - 0.08 * LANGUAGES.index(language) + METHODS[method]

    def answers(method: str) -> dict[tuple[str, str, str], bool]:
        return {k: draw.random() < chance(method, k[1]) if draw.random() < 0.5 else right[k] for k in keys}

    right = {key: draw.random() < chance("base", key[1]) for key in keys}
    write_evaluation(root, "base", None, right)
    for method in [name for name in METHODS if name != "base"]:
        for seed in SEEDS:
            write_evaluation(root, method, seed, answers(method))
    rows = [
        TaxonomyRow(f"{split}-{key}", task, language, split, right[task, "en", key], right[task, language, key])
        for split in ("train", "test")
        for task, language, key in keys
        if language != "en"
    ]
    pairs = summarise(rows)
    body = {"anchor": "en", "pairs": [dataclasses.asdict(pair) for pair in pairs], **NO_DATA}
    save_document(root / "taxonomy.json", "ramoe-taxonomy", body)
    depth = [0.30, 0.17, 0.08, 0.07, 0.12, 0.28]
    curve = [
        DivergenceRow(name, layer, layer + 1, depth[layer] * (0.6 + 0.2 * place), 40, 0)
        for place, name in enumerate(LANGUAGES[1:])
        for layer in range(LAYERS)
    ]
    write_divergence(root / "divergence.csv", curve)
    write_experts(root / "experts.safetensors")
    write_prediction(root / "predict.json", pairs, curve)
    stages = {
        "taxonomy": {
            "state": "done",
            "ranks": 2,
            "ended": "2026-01-01T12:00:00+00:00",
            "inputs": {"data/parallel.jsonl": "ab12"},
            "outputs": {"taxonomy.json": "cd34"},
        }
    }
    (root / "manifest.json").write_text(json.dumps({"format": "ramoe-manifest", "version": 1, "stages": stages}))
    recipe = {"name": "demo", "methods": [{"name": name} for name in METHODS if name != "base"], "seeds": list(SEEDS)}
    (root / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "note": HOSTILE}))
    return root


def write_evaluation(root: Path, method: str, seed: int | None, answers: dict[tuple[str, str, str], bool]) -> None:
    name = method if seed is None else f"{method}-seed{seed}"
    (root / "evaluations").mkdir(parents=True, exist_ok=True)
    lines = [{"id": key, "task": task, "language": lang, "correct": ok} for (task, lang, key), ok in answers.items()]
    (root / f"evaluations/{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows, mass = [], []
    for task in TASKS:
        for language in LANGUAGES:
            own = [ok for (t, lang, _), ok in answers.items() if (t, lang) == (task, language)]
            rows.append({"task": task, "language": language, "n": len(own), "correct": sum(own)})
            share = 0.5 if language == "en" else 0.2 + METHODS[method] + 0.01 * LANGUAGES.index(language)
            mass.append({"task": task, "language": language, "mass": [share * (0.6 + 0.1 * i) for i in range(LAYERS)]})
    body = {"method": method, "seed": seed, "checkpoint": f"checkpoints/{name}", "split": "test", "data": []}
    evaluation = {**body, "rows": rows, "mass": mass, "examples": f"{name}.jsonl"}
    save_document(root / f"evaluations/{name}.json", "ramoe-evaluation", evaluation)


def write_experts(path: Path) -> None:
    torch.manual_seed(0)
    general = torch.rand(LAYERS, EXPERTS).softmax(-1) * 2
    task = (torch.randn(len(TASKS), LAYERS, EXPERTS) * 1.5).softmax(-1) * 2
    delta = (task - general).clamp(-1, 1)
    ExpertFile(
        tasks=TASKS,
        shape=ModelShape(num_moe_layers=LAYERS, num_experts=EXPERTS, topk=2, score_function="softmax", hidden_size=64),
        expert_mask=delta > 0.3,
        delta=delta,
        task_frequency=task,
        general_frequency=general,
        english_pattern={"last": task / 2},
        layer_number=torch.arange(1, LAYERS + 1),
        rule={"name": "tau", "tau": 0.3},
        zone=Zone(first=2, last=4, how="auto", reason="the floor of the U"),
        checkpoint="checkpoints/base",
    ).save(path)


def write_prediction(path: Path, pairs: list[TaxonomyPair], curve: list[DivergenceRow]) -> None:
    draw = random.Random(1)
    outcomes = [
        TransplantOutcome(f"{pair.task}-{number}", pair.task, pair.language, draw.random() < 0.4, draw.random() < 0.5)
        for pair in pairs
        if pair.split == "test"
        for number in range(EXAMPLES)
    ]
    save_document(path, "ramoe-prediction", predict(pairs, curve, (2, 4), outcomes, "test").document())


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_run(tmp_path_factory.mktemp("run"))
    assert main(["--run", str(root)]) == 0
    return root


@pytest.fixture
def results(reported: Path) -> dict[str, Any]:
    return load_document(reported / "results.json", "ramoe-results")


# ---- numbers ----


@pytest.mark.parametrize("table", ["by_language", "by_pair"])
def test_pooled_counts_are_the_sums_of_the_rows(results: dict[str, Any], table: str) -> None:
    keys = ("method", "language", "task") if table == "by_pair" else ("method", "language")
    for found in results[table]:
        rows = [row for row in results["rows"] if all(row[key] == found[key] for key in keys)]
        assert found["n"] == sum(row["n"] for row in rows)
        assert found["correct"] == sum(row["correct"] for row in rows)
        assert found["seeds"] == len({row["seed"] for row in rows})
        assert found["low"] <= found["accuracy"] <= found["high"]


def test_summary_splits_all_examples_into_english_and_target(results: dict[str, Any]) -> None:
    for method in METHODS:
        counted = sum(row["n"] for row in results["summary"] if row["method"] == method)
        assert counted == sum(row["n"] for row in results["rows"] if row["method"] == method)


def test_difference_of_means_equals_mean_of_differences(results: dict[str, Any]) -> None:
    """Every seed answers every example here, so pairing must not move the estimate."""
    rows = {(row["method"], row["group"]): row for row in results["summary"]}
    for (method, group), row in rows.items():
        for reference, change in (("sft", row["change_vs_sft"]), ("base", row["change_vs_base"])):
            if method != "base":
                assert change == pytest.approx(row["accuracy"] - rows[reference, group]["accuracy"], abs=1e-12)
                assert row["change_low"] <= row["change_vs_sft"] <= row["change_high"]


def evaluation(method: str, seed: int | None, answers: dict[tuple[str, str], bool]) -> Evaluation:
    return Evaluation(method=method, seed=seed, split="test", rows=[], mass=[], examples=answers)


answers = st.dictionaries(
    st.tuples(st.text(max_size=3), st.sampled_from(["en", "es", "tr"])), st.booleans(), min_size=1
)


@given(answers)
def test_a_method_does_not_differ_from_itself(own: dict[tuple[str, str], bool]) -> None:
    runs = [evaluation("a", 1, own), evaluation("a", 2, {key: not value for key, value in own.items()})]
    change = paired_change(runs, runs, {"en", "es", "tr"})
    assert change is not None
    assert (change.change, change.seeds_higher, change.seeds_lower) == (0.0, 0, 0)
    assert (change.low, change.high, change.p) in {(0.0, 0.0, 1.0), (None, None, None)}


@given(answers, st.data())
def test_swapping_the_methods_turns_the_difference_round(own: dict[tuple[str, str], bool], data: st.DataObject) -> None:
    other = {key: data.draw(st.booleans()) for key in own}
    one, two = [evaluation("a", 1, own)], [evaluation("b", 1, other)]
    forth, back = (paired_change(x, y, {"en", "es", "tr"}) for x, y in ((one, two), (two, one)))
    assert forth is not None
    assert back is not None
    assert forth.change == pytest.approx(-back.change)
    assert (forth.seeds_higher, forth.seeds_lower) == (back.seeds_lower, back.seeds_higher)
    if forth.low is not None and back.high is not None:
        assert forth.low == pytest.approx(-back.high)


def test_parallel_rows_of_one_example_add_no_certainty() -> None:
    """What clustering is for: the same answers in a second language, under the same ids, do not narrow the interval."""
    right = {str(place): value for place, value in enumerate([1, 0, 0, 1, 0, 1, 1, 0])}
    one = {(key, "es"): bool(value) for key, value in right.items()}
    two = one | {(key, "tr"): bool(value) for key, value in right.items()}
    half, whole = (
        paired_change([evaluation("a", 1, own)], [evaluation("b", 1, dict.fromkeys(own, False))], {"es", "tr"})
        for own in (one, two)
    )
    assert half is not None
    assert whole is not None
    assert (half.change, half.low, half.high) == pytest.approx((whole.change, whole.low, whole.high))
    assert half.low is not None
    assert half.low < half.change == 0.5


def test_parallel_rows_of_one_example_do_not_narrow_an_accuracy_either() -> None:
    right = {(str(place), language): place < 3 for place in range(8) for language in ("es", "tr", "en")}
    one, both = (pooled([evaluation("a", seed, right) for seed in (1, 2)], languages) for languages in ("es", {"es", "tr"}))
    assert one is not None
    assert both is not None
    assert (both["n"], both["accuracy"]) == (2 * one["n"], one["accuracy"])
    assert (both["low"], both["high"], both["effective"]) == pytest.approx((one["low"], one["high"], 8))


def test_only_pairs_that_both_answered_count() -> None:
    method = [evaluation("a", 1, {("x", "es"): True, ("y", "es"): False}), evaluation("a", 2, {("x", "es"): True})]
    sft = [evaluation("sft", 1, {("x", "es"): False})]
    change = paired_change(method, sft, {"es"})
    assert change is not None
    assert (change.change, change.seeds_higher) == (1.0, 1)
    assert paired_change(method, sft, {"tr"}) is None


def test_an_outcome_without_a_seed_is_paired_with_every_seed_of_its_own_base_model() -> None:
    seeds = [evaluation("sft", seed, {("x", "es"): seed == 1}) for seed in (1, 2, 3)]
    steered = [evaluation("steering", None, {("x", "es"): True})]
    change = paired_change(steered, seeds, {"es"})
    assert change is not None
    assert (change.change, change.seeds_higher, change.seeds_lower, change.seeds_paired) == (pytest.approx(2 / 3), 2, 0, 3)
    back = paired_change(seeds, steered, {"es"})
    assert back is not None
    assert (back.change, back.seeds_lower, back.seeds_paired) == (pytest.approx(-2 / 3), 2, 3)
    elsewhere = [dataclasses.replace(steered[0], base="another model")]
    assert paired_change(elsewhere, seeds, {"es"}) is None
    assert [(pair.base, pair.seed) for pair in pair_up(steered, seeds[::-1])] == [("", 1), ("", 2), ("", 3)]


def test_gain_is_after_minus_before(results: dict[str, Any]) -> None:
    accuracy = {(row["method"], row["task"], row["language"]): row["accuracy"] for row in results["by_pair"]}
    points = results["ci_gain"]["points"]
    assert len(points) == (len(METHODS) - 1) * len(TASKS) * (len(LANGUAGES) - 1)
    for p in points:
        own, base = accuracy[p["method"], p["task"], p["language"]], accuracy["base", p["task"], p["language"]]
        assert p["gain"] == pytest.approx(own - base)
    assert results["ci_gain"]["method"] == "ra-moe"
    assert results["ci_gain"]["low"] <= results["ci_gain"]["r"] <= results["ci_gain"]["high"]


def test_console_table_has_a_row_for_each_method_and_fits_eighty_columns(results: dict[str, Any]) -> None:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(summary_table(results))
    lines = captured.get().splitlines()
    for method in METHODS:
        (row,) = (line for line in lines if line.split()[:1] == [method])
        target = next(r for r in results["summary"] if (r["method"], r["group"]) == (method, "target"))
        assert f"{100 * target['accuracy']:.1f} [{100 * target['low']:.1f}, {100 * target['high']:.1f}]" in row


# ---- the page ----


def test_page_is_self_contained(reported: Path) -> None:
    page = (reported / "report.html").read_text()
    assert not re.search(r"https?:|[\"'(=]\s*//|@import|<link|<script|url\(|<iframe|<object", page)
    assert page.count("data:image/png;base64,") == len(FIGURES)


def test_the_experts_caption_tells_the_rule_of_one_file_and_of_several(reported: Path, results: dict[str, Any]) -> None:
    run = load_run(reported)
    assert run.experts is not None
    assert "chosen by the rule tau = 0.3." in caption("experts", run, results, "test")
    parts = [{"file": "a.safetensors", "rule": {"name": "tau", "tau": 0.3}}, {"file": "b.safetensors", "rule": {"name": "top-m", "m": 2}}]
    merged = dataclasses.replace(run, experts=dataclasses.replace(run.experts, rule={"name": "merge", "of": parts}))
    told = "merge of a.safetensors (tau = 0.3) and b.safetensors (top-m = 2)."
    assert told in caption("experts", merged, results, "test")


def test_figures_are_png_files(reported: Path) -> None:
    for name in FIGURES:
        assert (reported / f"plots/{name}.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert {path.stem for path in (reported / "plots").iterdir()} == set(FIGURES)


def test_names_from_data_are_escaped(reported: Path) -> None:
    page = (reported / "report.html").read_text()
    assert "&lt;script&gt;" in page
    assert HOSTILE not in page


def test_results_are_written_alike_twice(reported: Path) -> None:
    before = (reported / "results.json").read_bytes()
    collect(reported)
    assert (reported / "results.json").read_bytes() == before


def test_summary_says_when_an_interval_includes_zero(tmp_path: Path, reported: Path) -> None:
    shutil.copytree(reported, tmp_path / "run")
    for seed in SEEDS:
        body = json.loads((tmp_path / f"run/evaluations/ra-moe-seed{seed}.json").read_text())
        twin = json.loads((tmp_path / f"run/evaluations/sft-seed{seed}.json").read_text())
        body |= {"rows": twin["rows"], "examples": twin["examples"]}
        (tmp_path / f"run/evaluations/ra-moe-seed{seed}.json").write_text(json.dumps(body))
    run = load_run(tmp_path / "run")
    told = " ".join(summary(run, build(run)))
    assert re.search(r"RA-MoE \(our reading\) answers .*\+0\.0 \[\+0\.0, \+0\.0\] points.*interval includes zero", told)


def test_missing_inputs_name_the_stage_that_makes_them(tmp_path: Path) -> None:
    page = write_report(tmp_path).read_text()
    for stage in ("evaluate", "taxonomy", "profile", "predict"):
        assert f"<strong>{stage}</strong>" in page
    assert "Nothing has been evaluated" in page
    assert load_document(tmp_path / "results.json", "ramoe-results")["rows"] == []


def test_results_of_methods_and_seeds_no_longer_asked_for_are_left_out(tmp_path: Path, reported: Path) -> None:
    shutil.copytree(reported, tmp_path / "run")
    (tmp_path / "run/recipe.yaml").write_text(yaml.safe_dump({"name": "demo", "methods": ["sft"], "seeds": [1, 2]}))
    run = load_run(tmp_path / "run")
    assert {(e.method, e.seed) for e in run.evaluations} == {("base", None), ("sft", 1), ("sft", 2)}


# ---- errors ----


def test_absent_folder_is_told_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run", str(tmp_path / "nowhere")]) == 2
    assert "no such run folder" in capsys.readouterr().err


def test_damaged_evaluation_names_file_and_line(tmp_path: Path, reported: Path) -> None:
    shutil.copytree(reported, tmp_path / "run")
    lines = tmp_path / "run/evaluations/base.jsonl"
    lines.write_text(lines.read_text().replace('"id"', '"name"', 1))
    with pytest.raises(RamoeError, match=r"base\.jsonl:1: .*'id'"):
        collect(tmp_path / "run")
    lines.write_text("")
    with pytest.raises(RamoeError, match=r"found 0 examples, base\.json counts 840"):
        collect(tmp_path / "run")


def test_no_line_leaves_its_panel() -> None:
    """A limit taken from the first panel of a shared scale must not cut the lines of the others."""
    from ramoe_megatron.report.style import from_zero, panels, pyplot

    with pyplot():
        _figure, axes = panels(2, 3.0, 2.0, sharey=True)
        axes[0].plot([0, 1], [0.1, 0.2])
        axes[1].plot([0, 1], [0.3, 0.9])
        from_zero(axes)
        for axis in axes:
            low, high = axis.get_ylim()
            assert low == 0
            assert all(low <= y <= high for line in axis.get_lines() for y in line.get_ydata())
