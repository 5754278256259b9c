"""Every artefact of a run is shown readably with its own numbers; any other file is an error."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.files import save_document
from ramoe_megatron.artifacts.priors import Priors
from ramoe_megatron.artifacts.records import write_divergence, write_taxonomy
from ramoe_megatron.artifacts.tensors import ModelShape
from ramoe_megatron.artifacts.usage import UsageFile
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.categories import TaxonomyRow, summarise
from ramoe_megatron.method.divergence import DivergenceRow, NoZone, Zone
from ramoe_megatron.method.prediction import TransplantOutcome, predict
from ramoe_megatron.report.inspect import describe

SHAPE = ModelShape(num_moe_layers=3, num_experts=4, topk=2, score_function="softmax", hidden_size=8)
ROWS = [TaxonomyRow(f"e{i}", "currency", "tr", "test", True, i < 3) for i in range(10)]
DATA = [{"path": "data/parallel.jsonl", "sha256": "ab" * 32}]


def shown(path: Path) -> str:
    """The text on a wide console, runs of spaces and table rules reduced to one space."""
    console = Console(width=400, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(describe(path))
    return " ".join(console.export_text().replace("│", " ").split())


def contains(text: str, *parts: str) -> None:
    for part in parts:
        assert part in text, f"{part!r} is not in: {text}"


def save_experts(path: Path, zone: Zone | NoZone) -> None:
    delta = torch.zeros(1, 3, 4)
    delta[0, 0, 1], delta[0, 2, 3], delta[0, 2, 0] = 0.5, 0.42, 0.75
    ExpertFile(
        tasks=("currency [eur]",),
        shape=SHAPE,
        expert_mask=delta > 0.3,
        delta=delta,
        task_frequency=torch.full((1, 3, 4), 0.5),
        general_frequency=torch.full((3, 4), 0.5),
        english_pattern={"last": torch.full((1, 3, 4), 0.25)},
        layer_number=torch.tensor([2, 4, 6]),
        rule={"name": "tau", "tau": 0.3},
        zone=zone,
        checkpoint="checkpoints/base",
        data=DATA,
        sequences={"general": 9},
    ).save(path)


def test_expert_file_lists_chosen_experts_with_both_layer_numbers(tmp_path: Path) -> None:
    path = tmp_path / "experts.safetensors"
    save_experts(path, Zone(1, 2, "auto", "floor of the curve"))
    text = shown(path)
    contains(
        text,
        "3 MoE layers, 4 experts, top-2, softmax scores",
        "tau=0.3",
        "data/parallel.jsonl (sha256 abababababab",
    )
    contains(text, "MoE layers 1 to 2 (layer_number 4 to 6), auto: floor of the curve")
    contains(text, "task experts: currency [eur]")
    contains(text, "0 2 1 +0.50 1 (+0.50)", "1 4 yes 0 +0.00", "2 6 yes 2 +0.75 0 (+0.75), 3 (+0.42)")
    contains(text, "tau=0.3 chooses no expert in 1 of 3 MoE layers (1)")


def test_expert_file_without_a_zone_says_why(tmp_path: Path) -> None:
    save_experts(tmp_path / "experts.safetensors", NoZone("the divergence curve is flat"))
    contains(shown(tmp_path / "experts.safetensors"), "none (the divergence curve is flat)")


def test_priors(tmp_path: Path) -> None:
    path = tmp_path / "priors.safetensors"
    ids = [f"x{i}" for i in range(7)]
    Priors.save(
        path, ids, torch.full((7, 3, 4), 0.25), tokens="last", shape=SHAPE, checkpoint="base", data=DATA
    )
    contains(shown(path), "ramoe-priors", "7, first x0, x1, x2, x3, x4", "tokens last", "top-2")


def test_usage(tmp_path: Path) -> None:
    path = tmp_path / "usage.safetensors"
    frequency = torch.zeros(2, 3, 4)
    frequency[:, :, 1], frequency[1, 2, 3] = 0.75, 0.875
    UsageFile(
        ("en", "tr"),
        SHAPE,
        torch.tensor([40, 50]),
        frequency,
        frequency / 2,
        torch.tensor([2, 4, 6]),
        "base@9",
        DATA,
    ).save(path)
    contains(shown(path), "ramoe-usage", "en 40, tr 50", "base@9", "top-2", "experts used most: tr")
    contains(shown(path), "2 6 2 3 (0.88, 0.44), 1 (0.75, 0.38), 0 (0.00, 0.00)")


def test_taxonomy_lines_and_document_show_the_same_pairs(tmp_path: Path) -> None:
    lines, document = tmp_path / "taxonomy.jsonl", tmp_path / "taxonomy.json"
    write_taxonomy(lines, ROWS)
    body = {"anchor": "en", "checkpoint": "base", "data": DATA, "package_version": "1"}
    save_document(document, "ramoe-taxonomy", {**body, "pairs": [asdict(pair) for pair in summarise(ROWS)]})
    for text in (shown(lines), shown(document)):
        contains(text, "currency tr test 10 3 7 0 0 70.0 [39.7, 89.2]")
    contains(shown(document), "anchor en")


def test_names_that_look_like_markup_are_shown_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "[bold]taxonomy.jsonl"
    write_taxonomy(path, [TaxonomyRow("a", "[red]month", "[/]", "test", True, False)])
    contains(shown(path), "[bold]taxonomy.jsonl", "[red]month [/] test 1 0 1 0 0")


def test_divergence_table_shows_languages_means_and_the_zone_in_both_numberings(tmp_path: Path) -> None:
    path = tmp_path / "divergence.csv"
    curve = [0.6, 0.3, 0.1, 0.12, 0.3, 0.5]
    rows = [DivergenceRow("tr", n, 2 * n + 1, value, 5, 1) for n, value in enumerate(curve)]
    rows += [
        DivergenceRow("sw", n, 2 * n + 1, value + 0.02 if n else None, 5, 0) for n, value in enumerate(curve)
    ]
    write_divergence(path, rows)
    text = shown(path)
    contains(
        text,
        "0 1 0.6000 – 0.6000 1",
        "3 7 0.1200 0.1400 0.1300 1",
        "MoE layers 1 to 4 (layer_number 3 to 9), auto",
    )


def test_divergence_by_task_shows_a_curve_and_a_zone_for_each_task(tmp_path: Path) -> None:
    path = tmp_path / "divergence-by-task.csv"
    curves = {"month": [0.6, 0.3, 0.1, 0.12, 0.3, 0.5], "currency": [0.5, 0.2, 0.4, 0.4, 0.4, 0.5]}
    rows = [
        DivergenceRow("tr", n, n + 1, value, 5, 0, task)
        for task, curve in curves.items()
        for n, value in enumerate(curve)
    ]
    write_divergence(path, rows)
    text = shown(path)
    contains(text, "csv, month:", "0 1 0.6000 0.6000 0", "MoE layers 1 to 4 (layer_number 2 to 5), auto")
    contains(text, "csv, currency:", "1 2 0.2000 0.2000 0")


def test_evaluation_and_its_answers(tmp_path: Path) -> None:
    body = {
        "method": "ra-moe",
        "seed": 2,
        "checkpoint": "checkpoints/ra-moe-seed2",
        "split": "test",
        "data": DATA,
        "rows": [{"task": "currency", "language": "tr", "n": 10, "correct": 3}],
        "mass": [{"task": "currency", "language": "tr", "mass": [0.25, 0.5, 0.125]}],
        "examples": "ra-moe-seed2.jsonl",
    }
    save_document(tmp_path / "e.json", "ramoe-evaluation", body)
    contains(
        shown(tmp_path / "e.json"),
        "method ra-moe",
        "currency tr 10 30.0 [10.8, 60.3]",
        "currency tr 0.250 0.500 0.125",
    )
    answers = [{"id": str(i), "task": "currency", "language": "tr", "correct": i < 3} for i in range(10)]
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    contains(shown(tmp_path / "e.jsonl"), "currency tr 10 30.0 [10.8, 60.3]")


def test_prediction_shows_table_verdict_and_limits(tmp_path: Path) -> None:
    outcomes = [TransplantOutcome(f"e{i}", "currency", "tr", i < 3, i < 8) for i in range(10)]
    prediction = predict(summarise(ROWS), [], (0, 2), outcomes, "test")
    save_document(tmp_path / "predict.json", "ramoe-prediction", prediction.document())
    text = shown(tmp_path / "predict.json")
    contains(
        text,
        "currency tr 10 70.0 [39.7, 89.2] – 30.0 80.0 +50.0 [",
        "English routing changes target accuracy by +50.0 points",
        "The number is no forecast.",
        "By task, in points: currency +50.0 [",
    )
    contains(text, "all all 10 – – 30.0 80.0 +50.0 [", *prediction.limits, prediction.verdict["paper"])


def results(change: dict[str, Any]) -> dict[str, Any]:
    row = {
        "method": "sft",
        "seed": 1,
        "task": "currency",
        "language": "tr",
        "n": 10,
        "correct": 3,
        "accuracy": 0.3,
    }
    share = {"n": 20, "seeds": 2, "accuracy": 0.35, "low": 0.3, "high": 0.4}
    base = dict.fromkeys(("change_vs_base", "change_vs_base_low", "change_vs_base_high"))
    none = dict.fromkeys(
        ("change_vs_sft", "change_low", "change_high", "p", "seeds_higher", "seeds_lower", "seeds_paired")
    )
    return {
        "recipe": "demo",
        "anchor": "en",
        "methods": ["base", "sft", "ra-moe"],
        "seeds": [1, 2],
        "rows": [
            {**row, "low": 0.1, "high": 0.5},
            {**row, "method": "base", "seed": None, "low": 0.1, "high": 0.5},
        ],
        "by_language": [{"method": "sft", "language": "tr", **share}],
        "by_pair": [{"method": "sft", "task": "currency", "language": "tr", **share}],
        "summary": [
            {"method": "ra-moe", "group": "target", **share, **none, **base, **change},
            {"method": "sft", "group": "target", **share, **none, **base},
        ],
        "comparisons": [],
        "mass": [{"method": "base", "seed": None, "task": "currency", "language": "tr", "mass": [0.5]}],
        "ci_gain": {
            "correlations": [
                {"method": "sft", "over": "base", "r": 0.61, "low": 0.2, "high": 0.8, "p": 0.03, "n": 2}
            ]
        },
    }


SEEDED = {"change_vs_sft": 0.022, "change_low": 0.01, "change_high": 0.034, "p": 0.0123}
SEEDED |= {"seeds_higher": 2, "seeds_lower": 0, "seeds_paired": 2}


def test_results_show_changes_with_intervals_and_dashes_where_there_is_nothing(tmp_path: Path) -> None:
    save_document(tmp_path / "results.json", "ramoe-results", results(SEEDED))
    text = shown(tmp_path / "results.json")
    contains(text, "ra-moe 35.0 [30.0, 40.0] +2.2 [+1.0, +3.4] 2 of 2 –", "sft 35.0 [30.0, 40.0] – – –")
    contains(
        text, "ra-moe sft target +2.2 [+1.0, +3.4] 0.012 2 of 2 0 of 2", "all tr 10 – 35.0 [30.0, 40.0] –"
    )
    contains(
        text,
        "sft base r = 0.61 [0.20, 0.80], n = 2 0.030",
        "sft 1 currency tr 10 30.0",
        "base – currency tr 0.500",
    )


def test_what_is_no_artefact_is_refused_by_name(tmp_path: Path) -> None:
    refused: dict[str, tuple[str | bytes, str]] = {
        "config.json": ('{"format": "other"}', "found format 'other', expected one of ramoe-taxonomy"),
        "list.json": ("[]", "found format None"),
        "notes.txt": ("hello", "line 1 column 1"),
        "data.csv": ("a,b\n1,2\n", "found columns a, b"),
        "data.jsonl": ('{"id": "a"}\n', ":1: key 'task': found nothing"),
        "empty.jsonl": ("", "no rows"),
        "cut.safetensors": (b"\x10", "not a whole safetensors file"),
    }
    for name, (content, message) in refused.items():
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(RamoeError, match=rf"{name}.*{message}"):
            describe(path)
    save_file({"w": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(
        RamoeError, match=r"weights\.safetensors: .*expected ramoe-experts, ramoe-priors or ramoe-usage"
    ):
        describe(tmp_path / "weights.safetensors")
    body = {**results(SEEDED), "rows": [{"method": "sft"}]}
    save_document(tmp_path / "results.json", "ramoe-results", body)
    with pytest.raises(RamoeError, match=r"results\.json: ramoe-results with a bad entry .*seed"):
        describe(tmp_path / "results.json")
