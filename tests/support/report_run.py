"""A run folder with known contents for the tests of the report, every file by its own writer."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.files import save_document
from ramoe_megatron.artifacts.records import write_divergence
from ramoe_megatron.artifacts.tensors import ModelShape
from ramoe_megatron.method.categories import TaxonomyPair, TaxonomyRow, summarise
from ramoe_megatron.method.divergence import DivergenceRow, Zone
from ramoe_megatron.method.prediction import TransplantOutcome, predict

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
        TaxonomyRow(
            f"{split}-{key}", task, language, split, right[task, "en", key], right[task, language, key]
        )
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
    by_task = [
        dataclasses.replace(row, task=task, divergence=(row.divergence or 0) * (0.9 + 0.1 * number))
        for number, task in enumerate(TASKS)
        for row in curve
    ]
    write_divergence(root / "divergence-by-task.csv", by_task)
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
    (root / "manifest.json").write_text(
        json.dumps({"format": "ramoe-manifest", "version": 1, "stages": stages})
    )
    recipe = {
        "name": "demo",
        "methods": [{"name": name} for name in METHODS if name != "base"],
        "seeds": list(SEEDS),
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "note": HOSTILE}))
    return root


def write_evaluation(
    root: Path, method: str, seed: int | None, answers: dict[tuple[str, str, str], bool]
) -> None:
    name = method if seed is None else f"{method}-seed{seed}"
    (root / "evaluations").mkdir(parents=True, exist_ok=True)
    lines = [
        {"id": key, "task": task, "language": lang, "correct": ok}
        for (task, lang, key), ok in answers.items()
    ]
    (root / f"evaluations/{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows, mass = [], []
    for task in TASKS:
        for language in LANGUAGES:
            own = [ok for (t, lang, _), ok in answers.items() if (t, lang) == (task, language)]
            rows.append({"task": task, "language": language, "n": len(own), "correct": sum(own)})
            share = 0.5 if language == "en" else 0.2 + METHODS[method] + 0.01 * LANGUAGES.index(language)
            mass.append(
                {"task": task, "language": language, "mass": [share * (0.6 + 0.1 * i) for i in range(LAYERS)]}
            )
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
        shape=ModelShape(
            num_moe_layers=LAYERS, num_experts=EXPERTS, topk=2, score_function="softmax", hidden_size=64
        ),
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
        TransplantOutcome(
            f"{pair.task}-{number}", pair.task, pair.language, draw.random() < 0.4, draw.random() < 0.5
        )
        for pair in pairs
        if pair.split == "test"
        for number in range(EXAMPLES)
    ]
    save_document(path, "ramoe-prediction", predict(pairs, curve, (2, 4), outcomes, "test").document())
