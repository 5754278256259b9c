"""The stages that a base model goes through before anything is fine-tuned: training, taxonomy, profile, prediction."""

import dataclasses

from ramoe_megatron.recipe.plan_context import Files, PlanContext, weights_option
from ramoe_megatron.recipe.section import FlagValue
from ramoe_megatron.recipe.stage import Stage


def pretrain_stage(plan: PlanContext) -> Stage:
    flags, places = plan.training("base", plan.recipe.pretrain_flags(), plan.recipe.seed)
    options: dict[str, FlagValue] = {"split": "train", "weights": weights_option(plan.recipe.data.pretrain_weights)}
    traces = [plan.curves("base")]
    stage = plan.job("pretrain", "finetune", flags, options, {"data": plan.pretraining}, [plan.base], places, traces=traces)
    if plan.recipe.data.pretrain_weights or plan.recipe.data.files is not None:
        return stage
    return dataclasses.replace(stage, weights=plan.weights, inputs=(*stage.inputs, plan.weights))


def taxonomy_stage(plan: PlanContext) -> Stage:
    settings = plan.recipe.taxonomy
    options: dict[str, FlagValue] = {
        "split": ",".join(settings.splits),
        "languages": plan.languages(),
        "max-new-tokens": settings.max_new_tokens,
    }
    outputs = [plan.out / "taxonomy.jsonl", plan.out / "taxonomy.json"]
    return plan.job(
        "taxonomy",
        "taxonomy",
        plan.scoring(),
        options,
        {"data": plan.parallel},
        outputs,
        plan.offline(),
        plan.base,
    )


def profile_stage(plan: PlanContext) -> Stage:
    settings, usage = plan.recipe.profile, any(plan.recipe.selection_of(method).reads_usage for method in plan.recipe.methods)
    options: dict[str, FlagValue] = {
        "split": settings.split,
        "languages": plan.languages(),
        "select": settings.select,
        "layers": settings.layers,
        "tokens": [*plan.priors] or settings.tokens,
        "save-priors": bool(plan.priors),
        "save-usage": usage,
    }
    if len(plan.expert_files) > 1:
        options["select-tokens"] = [*plan.expert_files]
    files: Files = {"data": plan.parallel, "general": plan.general, "taxonomy": [plan.out / "taxonomy.jsonl"]}
    outputs = [
        *plan.expert_files.values(),
        plan.out / "divergence.csv",
        *plan.priors.values(),
        *([plan.out / "usage.safetensors"] * usage),
    ]
    return plan.job("profile", "profile", plan.scoring(), options, files, outputs, plan.offline(), plan.base)


def predict_stage(plan: PlanContext) -> Stage:
    options: dict[str, FlagValue] = {
        "split": plan.recipe.evaluate.split,
        "languages": plan.languages(),
        "layers": plan.recipe.alignment.layers,
        "max-new-tokens": plan.answer_tokens(),
    }
    files: Files = {
        "data": plan.parallel,
        "taxonomy": [plan.out / "taxonomy.jsonl"],
        "experts": [plan.out / "experts.safetensors"],
        "divergence-file": [plan.out / "divergence.csv"],
    }
    outputs = [plan.out / "predict.json"]
    return plan.job("predict", "predict", plan.scoring(), options, files, outputs, plan.offline(), plan.base)
