"""Finished run folders with known contents: every right answer is chosen by the test."""

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from scipy import stats

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.files import save_document
from ramoe_megatron.artifacts.tensors import ModelShape
from ramoe_megatron.method.divergence import Zone

TASKS = ("a", "b")
LANGUAGES = ("en", "es", "tr")
CELLS = [(task, language) for task in TASKS for language in LANGUAGES]
TARGETS = [cell for cell in CELLS if cell[1] != "en"]
N = 10
"""Examples of a task; 40 rows in target languages."""

Right = Mapping[tuple[str, str], int]
"""Right answers of N by (task, language): the first so many examples are right. 4 where nothing is said."""

SEEDS = (1, 2, 3, 4, 5)
Outcomes = dict[tuple[str, int | None], Right]
"""Right answers by (method, seed)."""

MASS = {"base": 0.2, "sft": 0.3, "ra-moe": 0.5}


def plain(*methods: str) -> Outcomes:
    """Every method 4 right of 10 in every cell, for every seed."""
    return {(method, seed): {} for seed in SEEDS for method in methods}


def rising(method: str = "ra-moe", sign: int = 1) -> Outcomes:
    """Seed s has s more (or fewer) right answers than SFT's 5, in one cell of four: differences of s / 40."""
    start = {("sft", seed): {("a", "es"): 5} for seed in SEEDS}
    return {**start, **{(method, seed): {("a", "es"): 5 + sign * seed} for seed in SEEDS}}


def row(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    (found,) = (r for r in rows if all(r[key] == value for key, value in wanted.items()))
    return found


def p_within(by_base: Mapping[str, list[float]]) -> float:
    """p of the mean difference by the spread within base models, with scipy's t."""
    values = [value for own in by_base.values() for value in own]
    degrees = len(values) - len(by_base)
    squares = sum((value - statistics.mean(own)) ** 2 for own in by_base.values() for value in own)
    error = math.sqrt(squares / degrees / len(values))
    return float(2 * stats.t.sf(abs(statistics.mean(values)) / error, degrees))


def write_run(root: Path, outcomes: Mapping[tuple[str, int | None], Right], **extra: Any) -> Path:
    """A run folder of these methods and seeds. `extra`: transplant, ci, tasks, commands, seconds, weights."""
    names = dict(zip(TASKS, extra.get("tasks", TASKS), strict=True))
    methods = list(dict.fromkeys(method for method, _ in outcomes))
    seeds = sorted({seed for _, seed in outcomes if seed is not None})
    for (method, seed), right in {("base", None): {}, **outcomes}.items():
        _evaluation(root, method, seed, right, names, extra.get("weights", {}).get((method, seed)))
    ci: Mapping[tuple[str, str], int] = extra.get("ci", {})
    pairs = [
        {
            "task": names[task],
            "language": language,
            "split": "test",
            "n": N,
            "ci": ci.get((task, language), 2),
        }
        for task, language in TARGETS
    ]
    made = {"checkpoint": "base", "data": [], "package_version": "0"}
    save_document(root / "taxonomy.json", "ramoe-taxonomy", {"anchor": "en", "pairs": pairs, **made})
    changes: Mapping[tuple[str, str], float] = extra.get("transplant", {})
    rows = [
        {"task": names[t], "language": g, "n": N, "transplant_change": changes.get((t, g), 0.1)}
        for t, g in TARGETS
    ]
    save_document(root / "predict.json", "ramoe-prediction", {"rows": rows, "verdict": {}, "limits": []})
    _experts(root / "experts.safetensors", tuple(names.values()))
    stages = {}
    for method, seed in outcomes:
        ended = extra.get("seconds", {}).get((method, seed), 10)
        name = "evaluate/" + method if seed is None else f"finetune/{method}-seed{seed}"
        stages[name] = {
            "state": "done",
            "started": "2026-01-01T12:00:00+00:00",
            "ended": f"2026-01-01T12:00:{ended:02d}+00:00",
            "command": ["finetune", "--seed", str(seed), *extra.get("commands", {}).get(method, [])],
        }
    manifest = {"format": "ramoe-manifest", "version": 1, "package_version": "0.1.0", "stages": stages}
    (root / "manifest.json").write_text(json.dumps(manifest))
    recipe = {
        "name": "study",
        "train": {"train-iters": 72, "global-batch-size": 32},
        "alignment": {"layers": "auto"},
    }
    recipe |= {
        "methods": [{"name": name} for name in methods],
        "seeds": seeds or [1],
        **extra.get("recipe", {}),
    }
    (root / "recipe.yaml").write_text(
        f"# Written by `ramoe run study.yaml`: the recipe.\n{yaml.safe_dump(recipe)}"
    )
    for name, text in extra.get("logs", {}).items():
        (root / "logs").mkdir(exist_ok=True)
        (root / f"logs/finetune-{name}.log").write_text(text)
    return root


def _evaluation(
    root: Path, method: str, seed: int | None, right: Right, names: Mapping[str, str], weights: str | None
) -> None:
    name = method if seed is None else f"{method}-seed{seed}"
    (root / "evaluations").mkdir(parents=True, exist_ok=True)
    lines, rows, mass = [], [], []
    for task, language in CELLS:
        correct = right.get((task, language), 4)
        lines += [
            {"id": f"{task}{i}", "task": names[task], "language": language, "correct": i < correct}
            for i in range(N)
        ]
        rows.append({"task": names[task], "language": language, "n": N, "correct": correct})
        share = 0.9 if language == "en" else MASS.get(method, 0.1)
        mass.append(
            {"task": names[task], "language": language, "mass": [0.0, share, share + 0.02 * (seed or 0), 0.0]}
        )
    (root / f"evaluations/{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    body: dict[str, Any] = {"method": method, "seed": seed, "checkpoint": name, "split": "test", "data": []}
    body |= {"rows": rows, "mass": mass, "examples": f"{name}.jsonl"} | (
        {"weights_sha256": weights} if weights else {}
    )
    save_document(root / f"evaluations/{name}.json", "ramoe-evaluation", body)


def _experts(path: Path, tasks: tuple[str, ...]) -> None:
    """Four MoE layers, the two inner ones the zone."""
    g, layers, experts = len(tasks), 4, 4
    ExpertFile(
        tasks=tasks,
        shape=ModelShape(
            num_moe_layers=layers, num_experts=experts, topk=2, score_function="softmax", hidden_size=8
        ),
        expert_mask=torch.ones(g, layers, experts, dtype=torch.bool),
        delta=torch.full((g, layers, experts), 0.5),
        task_frequency=torch.full((g, layers, experts), 0.5),
        general_frequency=torch.full((layers, experts), 0.5),
        english_pattern={"last": torch.full((g, layers, experts), 0.25)},
        layer_number=torch.arange(1, layers + 1),
        rule={"name": "tau", "tau": 0.3},
        zone=Zone(first=1, last=2, how="auto", reason="the floor of the U"),
        checkpoint="base",
    ).save(path)
