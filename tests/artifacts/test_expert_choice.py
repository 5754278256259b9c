"""Laws of choosing task experts anew from an expert file, and of the files of further token choices."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.tensors import ModelShape
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.jobs.profile import ProfileOptions
from ramoe_megatron.mcore.align.options import RoutingAlignmentConfig
from ramoe_megatron.method.divergence import Zone
from ramoe_megatron.method.experts import parse_rule, task_experts
from ramoe_megatron.recipe.load import validate
from ramoe_megatron.recipe.plan import make_plan
from ramoe_megatron.recipe.stage import Stage
from ramoe_megatron.report.comparison.ablation import training_flags

SHAPE = ModelShape(num_moe_layers=3, num_experts=6, topk=2, score_function="softmax", hidden_size=8)
RECIPE: dict[str, Any] = {
    "name": "small",
    "model": {"num-layers": 3, "num-experts": 6},
    "data": {"world": {}},
    "pretrain": {"train-iters": 8, "lr": 1e-2},
    "train": {"train-iters": 4, "micro-batch-size": 2, "global-batch-size": 8, "lr": 1e-3},
    "alignment": {"coeff": 10},
}
LAST = {"name": "last", "preset": ["ra-moe"], "alignment": {"select-tokens": "last", "select": "top-m=2"}}
RULES = st.one_of(
    st.integers(-9, 9).map(lambda n: f"tau={n / 10:g}"), st.integers(1, 6).map(lambda m: f"top-m={m}")
)


def expert_file(seed: int, rule: str = "tau=0.3", **facts: Any) -> ExpertFile:
    task, general = (
        torch.rand(2, 2, 3, 6, generator=torch.Generator().manual_seed(seed)).softmax(-1).mul(2).split([1, 1])
    )
    delta, parsed = (task - general[:, :1])[0], parse_rule(rule)
    return ExpertFile(
        tasks=("even", "odd"),
        shape=SHAPE,
        expert_mask=task_experts(delta, parsed),
        delta=delta,
        task_frequency=task[0],
        general_frequency=general[0, 0],
        english_pattern={},
        layer_number=torch.arange(1, 4),
        rule=parsed.as_dict(),
        zone=Zone(0, 2, "0-2", "given"),
        checkpoint="base@1",
        sequences={
            "english_task": {"even": 2, "odd": 3},
            "english_correct": {"even": 1, "odd": 1},
            "general": 4,
        },
        **facts,
    )


def plan(out: Path, *methods: str | dict[str, Any], **changes: Any) -> dict[str, Stage]:
    return {
        stage.name: stage
        for stage in make_plan(validate({**RECIPE, "methods": list(methods), **changes}, "r"), out, out)
    }


@given(seed=st.integers(0, 99), first=RULES, second=RULES)
def test_experts_chosen_anew_are_those_that_the_profile_would_have_chosen(
    seed: int, first: str, second: str
) -> None:
    file, other = expert_file(seed, first), expert_file(seed, second)
    assert torch.equal(file.chosen_by(second).expert_mask, other.expert_mask)
    assert file.chosen_by(second).rule == other.rule
    assert torch.equal(file.chosen_by(second).chosen_by(first).expert_mask, file.expert_mask)
    assert file.chosen_by(None) is file


def test_the_tokens_are_kept_and_a_file_of_all_tokens_does_not_say_so(tmp_path: Path) -> None:
    for tokens in ("all", "last"):
        expert_file(0, select_tokens=tokens).save(tmp_path / f"{tokens}.safetensors")
        assert ExpertFile.load(tmp_path / f"{tokens}.safetensors").select_tokens == tokens
    with safe_open(tmp_path / "all.safetensors", "pt") as handle:
        assert "select_tokens" not in str(handle.metadata())


def test_flags_that_choose_experts_are_read_before_anything_runs() -> None:
    on: dict[str, Any] = {"coeff": 1.0, "experts": "e", "taxonomy": "t"}
    assert RoutingAlignmentConfig(**on, select="top-m=2").select == "top-m=2"
    with pytest.raises(RamoeError, match="select: found 'top-2'"):
        RoutingAlignmentConfig(select="top-2")
    without = RoutingAlignmentConfig(**on, select="top-m=2", divergence="kl")
    without.refuse_unread_rule("task-experts")  # which reads it
    with pytest.raises(RamoeError, match="--ramoe-select top-m=2 with --ramoe-divergence kl"):
        without.refuse_unread_rule("all")
    dataclasses.replace(without, coeff=0.0).refuse_unread_rule("all")
    with pytest.raises(RamoeError, match="--ramoe-select-tokens all first"):
        ProfileOptions(select_tokens=["all", "first"])


def test_a_profile_writes_the_expert_files_that_methods_read(tmp_path: Path) -> None:
    plain, stages = plan(tmp_path, "sft", "ra-moe"), plan(tmp_path, "sft", "ra-moe", LAST)
    further = tmp_path / "experts-last.safetensors"
    assert further not in plain["profile"].outputs
    assert further in stages["profile"].outputs
    assert further in stages["finetune/last-seed1"].inputs
    assert tmp_path / "experts.safetensors" not in stages["finetune/last-seed1"].inputs
    assert "--ramoe-select" in stages["finetune/last-seed1"].command
    assert stages["finetune/ra-moe-seed1"] == plain["finetune/ra-moe-seed1"]


def test_training_the_task_experts_alone_takes_the_recipes_choice_of_them(tmp_path: Path) -> None:
    """Also where nothing is aligned; a published loss that knows none keeps to its own settings."""
    chosen = {"coeff": 10, "target": "example", "select": "top-m=2", "select-tokens": "last"}
    alone = {"name": "alone", "preset": ["sft"], "selection": {"train": "task-experts"}}
    free = {"name": "free", "preset": ["ra-moe"], "alignment": {"divergence": "kl", "select": None}}
    stages = plan(tmp_path, "sft", alone, "sara", "xlr", free, alignment=chosen)
    words = stages["finetune/alone-seed1"].command
    assert words[words.index("--ramoe-select") + 1] == "top-m=2"
    assert tmp_path / "experts-last.safetensors" in stages["finetune/alone-seed1"].inputs
    for name in ("sft", "sara", "xlr", "free"):
        assert "--ramoe-select" not in stages[f"finetune/{name}-seed1"].command
    for name in ("sara", "xlr"):
        assert tmp_path / "experts.safetensors" in stages[f"finetune/{name}-seed1"].inputs
    with pytest.raises(
        RamoeError, match=r"method alone asks for experts of the tokens 'last'.*profile\.experts"
    ):
        plan(tmp_path, "sft", alone, alignment=chosen, profile={"experts": "other.safetensors"})


def test_a_null_that_is_given_is_written_back() -> None:
    free = {"name": "free", "preset": ["ra-moe"], "alignment": {"divergence": "kl", "select": None}}
    recipe = validate(
        {**RECIPE, "alignment": {"coeff": 10, "select": "top-m=2"}, "methods": ["sft", free]}, "r"
    )
    again = validate(recipe.model_dump(by_alias=True, exclude_none=True), "r")
    assert again.alignment_of(again.method("free")).select is None
    assert again == recipe


def test_what_a_comparison_sets_beside_trains_the_same_experts() -> None:
    trained = {
        "lr": "1",
        "ramoe-train": "task-experts",
        "ramoe-select": "top-m=2",
        "ramoe-experts": "e",
        "ramoe-coeff": "1",
    }
    assert training_flags(trained).keys() == {"lr", "ramoe-train", "ramoe-select", "ramoe-experts"}
    assert training_flags(trained | {"ramoe-train": "routers"}).keys() == {"lr", "ramoe-train"}


def test_experts_of_another_run_have_the_tokens_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(
        RamoeError, match=r"method last asks for experts of the tokens 'last'.*profile\.experts"
    ):
        plan(tmp_path, LAST, profile={"experts": "other.safetensors"})
