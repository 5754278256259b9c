"""The report of a run folder with known contents: sums and differences agree, the page is self-contained."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_run import HOSTILE, LANGUAGES, METHODS, SEEDS, TASKS, write_run
from rich.console import Console

from ramoe_megatron.artifacts.files import load_document
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.report.artefact_tables import summary_table
from ramoe_megatron.report.inputs import load_run
from ramoe_megatron.report.page import figure_caption, run_findings, write_report
from ramoe_megatron.report.plots import FIGURES, from_zero, panels, pyplot
from ramoe_megatron.report.rendering import console
from ramoe_megatron.report.run_results import collect, results_of
from ramoe_megatron.report.write import main


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_run(tmp_path_factory.mktemp("run"))
    for stage in ("results", "report"):
        assert main([stage, "--run", str(root)]) == 0
    return root


@pytest.fixture
def results(reported: Path) -> dict[str, Any]:
    return load_document(reported / "results.json", "ramoe-results")


@pytest.mark.parametrize(
    ("chance", "share", "told"), [(0.25, 0.24, True), (0.25, 0.9, False), (0.0, 0.0, True), (0.0, 0.2, False)]
)
def test_a_base_model_that_guesses_is_told(reported: Path, chance: float, share: float, told: bool) -> None:
    run = load_run(reported)
    results = results_of(run)
    for found in run.evaluations:
        for row in found.rows:
            row |= {"chance": chance, "correct": round(share * row["n"])}
    assert any("at chance" in sentence for sentence in run_findings(run, results)) == told


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
                assert change == pytest.approx(
                    row["accuracy"] - rows[reference, group]["accuracy"], abs=1e-12
                )
                assert row["change_low"] <= row["change_vs_sft"] <= row["change_high"]


def test_gain_is_after_minus_before(results: dict[str, Any]) -> None:
    accuracy = {(row["method"], row["task"], row["language"]): row["accuracy"] for row in results["by_pair"]}
    points = results["ci_gain"]["points"]
    assert len(points) == (len(METHODS) - 1) * len(TASKS) * (len(LANGUAGES) - 1)
    for p in points:
        own, base = (
            accuracy[p["method"], p["task"], p["language"]],
            accuracy["base", p["task"], p["language"]],
        )
        assert p["gain"] == pytest.approx(own - base)
    assert results["ci_gain"]["method"] == "ra-moe"
    assert results["ci_gain"]["low"] <= results["ci_gain"]["r"] <= results["ci_gain"]["high"]


def test_console_table_has_a_row_for_each_method_and_fits_eighty_columns(results: dict[str, Any]) -> None:
    terminal = Console(width=80)
    with terminal.capture() as captured:
        terminal.print(console([summary_table(results)]))
    lines = captured.get().splitlines()
    for method in METHODS:
        (row,) = (line for line in lines if line.split()[:1] == [method])
        target = next(r for r in results["summary"] if (r["method"], r["group"]) == (method, "target"))
        assert (
            f"{100 * target['accuracy']:.1f} [{100 * target['low']:.1f}, {100 * target['high']:.1f}]" in row
        )


def test_the_table_names_the_anchor_language(results: dict[str, Any]) -> None:
    assert summary_table(results).heads[-1] == "English, %"
    assert summary_table({**results, "anchor": "zh"}).heads[-1] == "zh, %"


# ---- the page ----


def test_page_is_self_contained(reported: Path) -> None:
    page = (reported / "report.html").read_text()
    assert not re.search(r"https?:|[\"'(=]\s*//|@import|<link|<script|url\(|<iframe|<object", page)
    assert page.count("data:image/png;base64,") == len(FIGURES)


def test_the_experts_caption_tells_the_rule(reported: Path, results: dict[str, Any]) -> None:
    run = load_run(reported)
    assert run.experts is not None
    assert "chosen by the rule tau = 0.3." in figure_caption("experts", run, results)


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


def test_the_page_leaves_the_results_as_they_are(tmp_path: Path, reported: Path) -> None:
    """Otherwise the results stage would find its file changed by hand, after a report by a newer version."""
    shutil.copytree(reported, tmp_path / "run")
    (tmp_path / "run/results.json").write_text("{}")
    write_report(tmp_path / "run")
    assert (tmp_path / "run/results.json").read_text() == "{}"
    made_at = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d [+]0000")
    pages = [(root / "report.html").read_text() for root in (tmp_path / "run", reported)]
    assert len({made_at.sub("", page, count=1) for page in pages}) == 1


def test_summary_says_when_an_interval_includes_zero(tmp_path: Path, reported: Path) -> None:
    shutil.copytree(reported, tmp_path / "run")
    for seed in SEEDS:
        body = json.loads((tmp_path / f"run/evaluations/ra-moe-seed{seed}.json").read_text())
        twin = json.loads((tmp_path / f"run/evaluations/sft-seed{seed}.json").read_text())
        body |= {"rows": twin["rows"], "examples": twin["examples"]}
        (tmp_path / f"run/evaluations/ra-moe-seed{seed}.json").write_text(json.dumps(body))
    run = load_run(tmp_path / "run")
    told = " ".join(run_findings(run, results_of(run)))
    assert (
        "ra-moe scored the same as sft in the target languages (95 % interval +0.0 to +0.0, p = 1.000)"
        in told
    )
    assert "The interval includes zero: this run shows no difference." in told


def test_missing_inputs_name_the_stage_that_makes_them(tmp_path: Path) -> None:
    page = write_report(tmp_path).read_text()
    for stage in ("evaluate", "taxonomy", "profile", "predict"):
        assert re.search(rf"Not there yet: the [a-z ]*{stage}[a-z ]* stages? make", page)
    assert "Nothing has been evaluated" in page
    assert collect(tmp_path)["rows"] == []


def test_results_of_methods_and_seeds_no_longer_asked_for_are_left_out(
    tmp_path: Path, reported: Path
) -> None:
    shutil.copytree(reported, tmp_path / "run")
    (tmp_path / "run/recipe.yaml").write_text(
        yaml.safe_dump({"name": "demo", "methods": ["sft"], "seeds": [1, 2]})
    )
    run = load_run(tmp_path / "run")
    assert {(e.method, e.seed) for e in run.evaluations} == {("base", None), ("sft", 1), ("sft", 2)}


# ---- errors ----


def test_absent_folder_is_told_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "--run", str(tmp_path / "nowhere")]) == 2
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
    with pyplot():
        _figure, axes = panels(2, 3.0, 2.0, sharey=True)
        axes[0].plot([0, 1], [0.1, 0.2])
        axes[1].plot([0, 1], [0.3, 0.9])
        from_zero(axes)
        for axis in axes:
            low, high = axis.get_ylim()
            assert low == 0
            assert all(low <= y <= high for line in axis.get_lines() for y in line.get_ydata())
