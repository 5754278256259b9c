"""From a recipe to its ordered stages: which command, what it reads, what it writes.

Order: data, pretrain, taxonomy, profile, with several anchors priors/LANGUAGE and anchors/LANGUAGES-TOKENS, evaluate/base,
predict, finetune/METHOD-seedK, evaluate/METHOD-seedK, results, report: what the base model can do, and whether alignment
has anything to gain, is known before anything is fine-tuned. Methods that steer at inference have an evaluation and no fine-tune.
"""

from pathlib import Path

from ramoe_megatron.recipe.plan_anchors import anchors_stages
from ramoe_megatron.recipe.plan_base import predict_stage, pretrain_stage, profile_stage, taxonomy_stage
from ramoe_megatron.recipe.plan_context import PlanContext
from ramoe_megatron.recipe.plan_methods import evaluate_stage, evaluated, fine_tunings, finetune_stage, searches
from ramoe_megatron.recipe.schema import Recipe
from ramoe_megatron.recipe.sources import data_stage
from ramoe_megatron.recipe.stage import JOBS, Stage


def make_plan(recipe: Recipe, out: Path, recipe_folder: Path, checked: bool = True) -> list[Stage]:
    """The recipe's stages in order.

    Raises:
        RamoeError: a file, folder or checkpoint that the recipe names is absent; or, when `checked`, a fine-tune would refuse its flags
            (the doctor tells that itself, beside everything else).
    """
    plan = PlanContext(recipe, out.resolve(), recipe_folder)
    generated = [data_stage(recipe, plan.out, recipe_folder)] if recipe.data.files is None else []
    pretraining = [pretrain_stage(plan)] if recipe.pretrain is not None else []
    profiling = [taxonomy_stage(plan), profile_stage(plan), *anchors_stages(plan)]
    offline = [*profiling, evaluate_stage(plan, "base", None, plan.base), predict_stage(plan)]
    tunings = [finetune_stage(plan, method, seed, checked) for method, seed in fine_tunings(plan)]
    evaluations = [evaluate_stage(plan, *run) for run in evaluated(plan)]
    return [*generated, *pretraining, *offline, *tunings, *searches(plan), *evaluations, _results(plan), _report(plan)]


def _evaluations(plan: PlanContext) -> list[Path]:
    names = ["base", *(name if seed is None else f"{name}-seed{seed}" for name, seed, *_ in evaluated(plan))]
    return [plan.out / "evaluations" / f"{name}{suffix}" for name in names for suffix in (".json", ".jsonl")]


def _results(plan: PlanContext) -> Stage:
    return Stage(
        name="results",
        command=("ramoe_megatron.recipe.results", str(plan.out)),
        settings={"recipe": plan.recipe.name, "methods": [method.name for method in plan.recipe.methods]},
        inputs=(*_evaluations(plan), plan.out / "taxonomy.json"),
        outputs=(plan.out / "results.json",),
        ranks=0,
    )


def _report(plan: PlanContext) -> Stage:
    read = ("results.json", "taxonomy.json", "experts.safetensors", "divergence.csv", "predict.json", "recipe.yaml")
    return Stage(
        name="report",
        command=(f"{JOBS}.report", "--run", str(plan.out)),
        settings={},
        inputs=tuple(plan.out / name for name in read),
        outputs=(plan.out / "report.html",),
        traces=(plan.out / "plots",),
        ranks=0,
    )
