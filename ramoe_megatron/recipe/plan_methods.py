"""The stages of a recipe's methods: fine-tunes, searches of steering settings, evaluations."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.align.options import RoutingAlignmentConfig
from ramoe_megatron.mcore.select.selective_options import SelectiveOptions
from ramoe_megatron.recipe.method_schema import Alignment, Method
from ramoe_megatron.recipe.plan_anchors import labels_of
from ramoe_megatron.recipe.plan_context import Files, PlanContext, weights_option
from ramoe_megatron.recipe.section import FlagValue
from ramoe_megatron.recipe.stage import Stage


def fine_tunings(plan: PlanContext) -> list[tuple[Method, int]]:
    """Method and seed of each fine-tune, seed by seed."""
    return [(method, seed) for seed in plan.recipe.seeds for method in plan.recipe.methods if not method.steered]


def evaluated(plan: PlanContext) -> list[tuple[str, int | None, Path, Method | None]]:
    """Name, seed, checkpoint and, of steering, the method of each evaluation but the base model's."""
    found: list[tuple[str, int | None, Path, Method | None]] = [
        (method.name, seed, plan.checkpoint(f"{method.name}-seed{seed}"), None) for method, seed in fine_tunings(plan)
    ]
    for method in plan.recipe.methods:
        if method.steered and method.on is None:
            found.append((method.name, None, plan.base, method))
        elif method.steered:
            found += [(method.name, seed, plan.checkpoint(f"{method.on}-seed{seed}"), method) for seed in plan.recipe.seeds]
    return found


def finetune_stage(plan: PlanContext, method: Method, seed: int, checked: bool = True) -> Stage:
    """Raises RamoeError, when `checked`, for flags that the fine-tune would refuse."""
    name, alignment = f"{method.name}-seed{seed}", plan.recipe.alignment_of(method)
    flags, places = plan.training(name, plan.recipe.train_of(method), seed)
    files: Files = {"data": plan.parallel}
    options: dict[str, FlagValue] = {
        "split": "train",
        "languages": plan.languages(),
        "weights": weights_option(plan.recipe.data.weights),
    }
    selection = plan.recipe.selection_of(method)
    if method.aligns:
        files |= {"experts": [plan.experts_of(alignment)], **labels_of(plan, alignment)}
        files |= {"layer-weights": [plan.out / "divergence.csv"]} if alignment.layer_weights == "divergence" else {}
        options |= _alignment_options(alignment, seed)
    if selection.train != "all":
        names = {"budget": "train-budget", "split": "train-split", "top-p": "train-top-p"}
        options |= {names.get(key, key): value for key, value in selection.model_dump(by_alias=True).items()}
        files |= {"usage": [plan.out / "usage.safetensors"]} if selection.reads_usage else {}
        files |= {"experts": [plan.experts_of(alignment)]} if selection.train == "task-experts" else {}
    options |= {"select": alignment.select} if alignment.select else {}
    if checked:
        _refuse(method, options, files)
    return plan.job(
        f"finetune/{name}",
        "finetune",
        flags,
        options,
        files,
        [plan.checkpoint(name)],
        {**places, "pretrained-checkpoint": str(plan.base)},
        plan.base,
        [plan.curves(name)],
    )


def _refuse(method: Method, options: Mapping[str, FlagValue], files: Files) -> None:
    """Raise RamoeError, before any stage runs, for what the fine-tune itself would refuse of its flags."""
    paths = {key: str(group[0]) for key, group in files.items() if group}
    given = {key.replace("-", "_"): value for key, value in {**options, **paths}.items() if value is not None}

    def of[Options](flags: type[Options]) -> Options:
        fields = {field.name for field in dataclasses.fields(flags)}  # type: ignore[arg-type]
        return flags(**{key: value for key, value in given.items() if key in fields})

    try:
        of(RoutingAlignmentConfig).refuse_unread_rule(of(SelectiveOptions).train)
    except RamoeError as error:
        raise RamoeError(f"method {method.name}: {error}") from error


def searches(plan: PlanContext) -> list[Stage]:
    """A search for each checkpoint that a searching method acts on."""
    return [
        steer_stage(plan, method, seed, checkpoint)
        for _, seed, checkpoint, method in evaluated(plan)
        if method is not None and plan.recipe.steering_of(method).search
    ]


def _run_name(method: str, seed: int | None) -> str:
    return method if seed is None else f"{method}-seed{seed}"


def steer_stage(plan: PlanContext, method: Method, seed: int | None, checkpoint: Path) -> Stage:
    name = _run_name(method.name, seed)
    steering, folder = plan.recipe.steering_of(method), f"steering/{name}"
    options: dict[str, FlagValue] = {
        "split": "validation",
        "languages": plan.languages(),
        "kinds": [steering.kind],
        "zones": [*(steering.zones or [steering.layers])],
        "max-new-tokens": plan.answer_tokens(),
    }
    files: Files = {"data": plan.parallel, "experts": [plan.experts]}
    outputs = [plan.out / folder / "steering.json"]
    places = plan.offline(checkpoint, folder)
    return plan.job(f"steer/{name}", "steer", plan.scoring(), options, files, outputs, places, checkpoint)


def evaluate_stage(
    plan: PlanContext, method: str, seed: int | None, checkpoint: Path, steered: Method | None = None
) -> Stage:
    name = _run_name(method, seed)
    options: dict[str, FlagValue] = {
        "split": plan.recipe.evaluate.split,
        "languages": plan.languages(),
        "method": method,
        "seed": seed,
        "max-new-tokens": plan.answer_tokens(),
    }
    if any("coeff-zero" in other.presets for other in plan.recipe.methods):  # which has to end with the weights of sft
        options["weights-digest"] = method == "sft" or "coeff-zero" in plan.recipe.presets_of(method)
    files: Files = {"data": plan.parallel, "experts": [plan.experts]}
    if steered is not None:
        steering = plan.recipe.steering_of(steered)
        if steering.search:
            files |= {"steering": [plan.out / "steering" / name / "steering.json"]}
        else:
            options |= {"steer": steering.kind, "steer-layers": steering.layers, "steer-tau": steering.tau}
            options |= {"steer-strength": steering.strength} if steering.kind == "soft" else {}
    outputs = [plan.out / "evaluations" / f"{name}{suffix}" for suffix in (".json", ".jsonl")]
    places = plan.offline(checkpoint, "evaluations")
    return plan.job(f"evaluate/{name}", "evaluate", plan.scoring(), options, files, outputs, places, checkpoint)


def _alignment_options(alignment: Alignment, seed: int) -> dict[str, FlagValue]:
    """The flags of an alignment; its controls draw by the seed of the run."""
    controls: dict[str, FlagValue] = {"shuffle-targets": seed if alignment.shuffle_targets else None, "layer-weights": None}
    controls["random-experts"] = seed if alignment.random_experts else None
    return {**alignment.model_dump(by_alias=True, exclude={"anchors", "select", "select_tokens"}), **controls}
