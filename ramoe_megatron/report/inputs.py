"""The inputs of a report. An input that no stage has written yet is None; a malformed input is an error."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.files import load_document, read_json
from ramoe_megatron.artifacts.records import read_divergence
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.divergence import DivergenceRow, Zone

ExampleKey = tuple[str, str]
"""(example id, language): unique in the data."""


@dataclass(frozen=True)
class Evaluation:
    """One checkpoint's answers on the evaluated split: `evaluations/NAME.json` and its `.jsonl`."""

    method: str
    seed: int | None
    split: str
    rows: list[dict[str, Any]]
    """{"task", "language", "n", "correct", "chance"}; chance is the accuracy of guessing among the choices, 0
    for generated answers. Evaluations of earlier versions lack it."""
    mass: list[dict[str, Any]]
    """{"task", "language", "mass": [one share per MoE layer]}"""
    examples: dict[ExampleKey, bool]
    """Whether the answer is right, by example and language."""
    tasks: dict[ExampleKey, str] = field(default_factory=dict)
    weights_sha256: str | None = None
    """Digest of the evaluated weights, if the job recorded one."""
    base: str = ""
    """The base model, when several run folders are compared."""


@dataclass(frozen=True)
class RunInputs:
    root: Path
    recipe: dict[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    evaluations: list[Evaluation] = field(default_factory=list)
    taxonomy: dict[str, Any] | None = None
    experts: ExpertFile | None = None
    divergence: list[DivergenceRow] | None = None
    task_divergence: list[DivergenceRow] = field(default_factory=list)
    prediction: dict[str, Any] | None = None
    manifest: dict[str, Any] | None = None

    @property
    def anchor(self) -> str:
        """The language with which the others are aligned."""
        data = self.recipe.get("data")
        asked = data.get("anchor") if isinstance(data, dict) else None
        return str((self.taxonomy or {}).get("anchor") or asked or "en")

    @property
    def zone(self) -> Zone | None:
        """The profile's alignment zone; None without a profile, or when the curve showed no zone."""
        zone = self.experts.zone if self.experts is not None else None
        return zone if isinstance(zone, Zone) else None

    @property
    def name(self) -> str:
        return str(self.recipe.get("name") or self.root.resolve().name)

    @property
    def recipe_methods(self) -> list[str]:
        """The methods that the recipe asks for, in its order."""
        return _methods(self.recipe)

    @property
    def methods(self) -> list[str]:
        """The evaluated methods: base, SFT, those of the recipe in its order, then any others by name."""
        found = {evaluation.method for evaluation in self.evaluations}
        order = dict.fromkeys(["base", "sft", *_methods(self.recipe), *sorted(found)])
        return [method for method in order if method in found]

    def evaluated_split(self) -> str | None:
        return self.evaluations[0].split if self.evaluations else None


def load_run(root: Path) -> RunInputs:
    """Read what the stages wrote under `root`.

    Raises:
        RamoeError: the folder does not exist, or a file in it is malformed or of another format.
    """
    root = Path(root)
    if not root.is_dir():
        raise RamoeError(
            f"{root}: no such run folder. Give --run the folder that `ramoe run ... --out` wrote."
        )
    recipe_text = _text(root / "recipe.yaml")
    try:
        recipe = yaml.safe_load(recipe_text) or {}
    except yaml.YAMLError as error:
        raise RamoeError(
            f"{root / 'recipe.yaml'}: not readable as YAML ({error}). Run the recipe again."
        ) from error
    if not isinstance(recipe, dict):
        raise RamoeError(
            f"{root / 'recipe.yaml'}: found {type(recipe).__name__}, expected a mapping. Run it again."
        )
    experts, divergence, by_task, manifest = (
        root / "experts.safetensors",
        root / "divergence.csv",
        root / "divergence-by-task.csv",
        root / "manifest.json",
    )
    return RunInputs(
        root=root,
        recipe=recipe,
        recipe_text=recipe_text,
        evaluations=_evaluations(root, recipe),
        taxonomy=_document(root / "taxonomy.json", "ramoe-taxonomy"),
        experts=ExpertFile.load(experts) if experts.exists() else None,
        divergence=read_divergence(divergence) if divergence.exists() else None,
        task_divergence=read_divergence(by_task) if by_task.exists() else [],
        prediction=_document(root / "predict.json", "ramoe-prediction"),
        manifest=read_json(manifest) if manifest.exists() else None,
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except UnicodeDecodeError as error:
        raise RamoeError(f"{path}: not UTF-8 text at byte {error.start}. Run the recipe again.") from error


def _document(path: Path, format_name: str) -> dict[str, Any] | None:
    return load_document(path, format_name) if path.exists() else None


def _methods(recipe: dict[str, Any]) -> list[str]:
    return [entry if isinstance(entry, str) else str(entry["name"]) for entry in recipe.get("methods") or []]


def _evaluations(root: Path, recipe: dict[str, Any]) -> list[Evaluation]:
    """Those that the recipe asks for: an earlier run with more seeds may have left others, of other
    settings."""
    found = [_evaluation(path) for path in sorted((root / "evaluations").glob("*.json"))]
    methods, seeds = _methods(recipe), recipe.get("seeds")
    if methods and isinstance(seeds, list):
        found = [e for e in found if e.method == "base" or (e.method in methods and e.seed in (None, *seeds))]
    return found


def _evaluation(path: Path) -> Evaluation:
    value = load_document(path, "ramoe-evaluation")
    try:
        examples: dict[ExampleKey, bool] = {}
        tasks: dict[ExampleKey, str] = {}
        lines = path.parent / str(value["examples"])
        for number, line in enumerate(_text(lines).split("\n")[:-1], start=1):
            try:
                row = json.loads(line)
                key = str(row["id"]), str(row["language"])
                examples[key], tasks[key] = bool(row["correct"]), str(row["task"])
            except (ValueError, KeyError, TypeError) as error:
                raise RamoeError(
                    f"{lines}:{number}: {error!r}; expected id, task, language, correct."
                ) from error
        counted = sum(int(row["n"]) for row in value["rows"])
        if len(examples) != counted:
            raise RamoeError(
                f"{lines}: found {len(examples)} examples, {path.name} counts {counted}. Evaluate again."
            )
        seed = value["seed"]
        return Evaluation(
            method=str(value["method"]),
            seed=None if seed is None else int(seed),
            split=str(value["split"]),
            rows=list(value["rows"]),
            mass=list(value.get("mass") or []),
            examples=examples,
            tasks=tasks,
            weights_sha256=value.get("weights_sha256"),
        )
    except KeyError as error:
        raise RamoeError(f"{path}: key {error} is missing. Run the evaluate stage again.") from error
