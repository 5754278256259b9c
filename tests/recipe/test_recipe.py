"""Recipes: which are accepted, the errors of the others, and which layouts can run."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.recipe.load import load_recipe, validate
from ramoe_megatron.recipe.megatron_flags import check_layout, check_names, cuda_devices

BASE: dict[str, Any] = {
    "name": "small",
    "model": {"num-layers": 2, "num-experts": 4, "num-attention-heads": 2},
    "train": {"train-iters": 4, "micro-batch-size": 2, "global-batch-size": 8, "lr": 1e-3},
    "pretrain": {"train-iters": 8},
    "data": {"world": {}},
    "methods": ["sft"],
}
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 64,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 128, "moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2,
    "norm_topk_prob": True, "vocab_size": 512, "max_position_embeddings": 1024, "rms_norm_eps": 1e-6,
    "rope_theta": 1e4, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
"""Configuration of a Hugging Face folder."""
EXAMPLES = Path(__file__).parents[2] / "examples"


def recipe(**changes: Any) -> Any:
    return validate({**BASE, **changes}, "r.yaml")


def refusal(**changes: Any) -> str:
    with pytest.raises(RamoeError) as caught:
        recipe(**changes)
    return str(caught.value)


def test_a_resolved_recipe_resolves_to_itself() -> None:
    first = recipe(methods=["sft", {"name": "wide", "alignment": {"layers": "0-1", "coeff": 2}}], seeds=3)
    again = validate(
        yaml.safe_load(yaml.safe_dump(first.model_dump(by_alias=True, exclude_none=True))), "again"
    )
    assert [again.alignment_of(m) for m in again.methods] == [first.alignment_of(m) for m in first.methods]
    assert again.model_dump(by_alias=True, exclude_none=True) == first.model_dump(
        by_alias=True, exclude_none=True
    )


@pytest.mark.parametrize(
    ("text", "line", "key", "near"),
    [
        ("model: {}\nname: x\nalignmnt: {}\n", 3, "alignmnt", "alignment"),
        ("name: x\nalignment:\n  coef: 3\n", 3, "alignment.coef", "coeff"),
        ("name: x\ntaxonomy:\n  max_new_tokens: 3\n", 3, "taxonomy.max_new_tokens", "max-new-tokens"),
        (
            "methods:\n  - sft\n  - name: a\n    alignment:\n      layer: 1-2\n",
            5,
            "methods.1.alignment.layer",
            "layers",
        ),
    ],
)
def test_an_unknown_key_is_told_with_file_line_path_and_nearest_key(
    tmp_path: Path, text: str, line: int, key: str, near: str
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RamoeError) as caught:
        load_recipe(path)
    assert f"{path}:{line}: {key} is no key of a recipe; did you mean {near}?" in str(caught.value)


def test_a_repeated_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: x\nmodel:\n  num-layers: 2\n  num-layers: 4\n")
    with pytest.raises(RamoeError, match=r"r\.yaml:4: the key 'num-layers' is given twice"):
        load_recipe(path)


def test_text_that_is_no_unicode_is_refused_wherever_it_is_given(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(BASE | {"name": "NAME"}).replace("NAME", '"x\\ud800"'))
    with pytest.raises(RamoeError, match=r"r.yaml: 'name': character 2 of .* half of a surrogate pair"):
        load_recipe(path)
    path.write_text(yaml.safe_dump(BASE))
    # the second: a byte of the command line that is no UTF-8
    for change in ('evaluate.split="x\\ud800"', "evaluate.split=x\udcff"):
        with pytest.raises(RamoeError, match="half of a surrogate pair"):
            load_recipe(path, [change])
    assert load_recipe(path, ['evaluate.split="x\\U0001f600"']).evaluate.split == "x\U0001f600"
    path.write_bytes(b"name: \xff\n")
    with pytest.raises(RamoeError, match=r"r.yaml: not UTF-8 text at byte 6"):
        load_recipe(path)


def test_what_looks_like_a_date_is_text_and_what_is_said_to_be_one_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(BASE))
    for text in ("2026-01-31", "2026-99-99", "12:00:00"):
        assert load_recipe(path, [f"evaluate.split={text}"]).evaluate.split == text
    with pytest.raises(RamoeError, match="invalid YAML"):
        load_recipe(path, ["name=!!timestamp 2026-99-99"])


def test_broken_yaml_and_an_absent_file_are_told(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: x\nmodel: [1,\n")
    with pytest.raises(RamoeError, match=r"r\.yaml:\d+: invalid YAML"):
        load_recipe(path)
    with pytest.raises(RamoeError, match="cannot be read"):
        load_recipe(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"data": {"world": {}, "files": ["a.jsonl"]}},
            "exactly one of world, sib200, benchmark and files; found world, files",
        ),
        ({"data": {}}, "found none of them"),
        ({"data": {"files": ["a.jsonl"]}}, "files needs general"),
        ({"data": {"files": ["a"], "general": ["b"]}}, "data.files needs tokenizer"),
        (
            {"pretrain": None},
            "give one of checkpoint (a base model) and pretrain (flags to train one); found neither",
        ),
        ({"checkpoint": "x"}, "found both"),
        ({"methods": ["ra-moe"]}, "ra-moe needs a coefficient"),
        (
            {"methods": ["ra-moe-shuffled"], "alignment": {"coeff": 1, "target": "paired"}},
            "it needs alignment.target example",
        ),
        ({"methods": ["sft", "sft"]}, "methods names one twice"),
        ({"methods": ["base"]}, "cannot be called 'base'"),
        ({"methods": ["sft-seed1"]}, "cannot be called 'sft-seed1'"),
        ({"model": {"--num-layers": 2}}, "without the leading dashes"),
        ({"train": {"save": "x"}}, "save is set by the plan itself; use --out"),
        ({"train": {"seed": 3}}, "use seed (data and base model) and seeds"),
        ({"train": {"ramoe-coeff": 3}}, "set by the plan itself"),
        ({"train": {"lr": []}}, "empty list"),
        ({"name": "../x"}, "name"),
        ({"profile": {"select": "tau"}}, "profile.select"),
    ],
)
def test_what_cannot_be_run_is_refused(changes: dict[str, Any], told: str) -> None:
    assert told in refusal(**changes)


def test_built_in_methods_differ_from_the_recipe_only_as_they_say() -> None:
    methods = ["sft", "ra-moe", "ra-moe-shuffled", {"name": "mine", "alignment": {"layers": "0-0"}}]
    found = recipe(methods=methods, alignment={"coeff": 5, "target": "example"})
    sft, plain, shuffled, mine = (found.alignment_of(method, 2) for method in found.methods)
    assert plain == found.alignment
    assert sft.coeff == 0
    assert not found.methods[0].aligns
    assert shuffled == plain.model_copy(update={"shuffle_targets": 2})
    assert mine == plain.model_copy(update={"layers": "0-0"})


def test_seeds_as_a_number_count_from_one() -> None:
    assert recipe(seeds=3).seeds == [1, 2, 3]
    assert recipe(seeds=[5, 2]).seeds == [5, 2]
    assert "seeds" in refusal(seeds=0)


@pytest.mark.parametrize(
    ("ranks", "changes", "told"),
    [
        (3, {}, "multiple of micro-batch-size 2 x 3 = 6"),
        (8, {}, "use fewer ranks"),
        (
            2,
            {"parallel": {"tensor-model-parallel-size": 4, "sequence-parallel": True}},
            "needs a multiple of 4",
        ),
        (
            3,
            {"parallel": {"pipeline-model-parallel-size": 2}},
            "1 x 3 = 3 ranks, but TP 1 x PP 2 x CP 1 needs a multiple of 2",
        ),
        (
            2,
            {"parallel": {"expert-model-parallel-size": 4}},
            "EP 4 x expert-TP 1 x PP 1 needs a multiple of 4",
        ),
        (2, {"parallel": {"tensor-model-parallel-size": 2}}, "set parallel.sequence-parallel to true"),
        (4, {"parallel": {"pipeline-model-parallel-size": 4}}, "does not divide model.num-layers 2"),
        (
            4,
            {"parallel": {"tensor-model-parallel-size": 4, "sequence-parallel": True}},
            "model.num-attention-heads 2",
        ),
        (2, {"pretrain": {"global-batch-size": 6}}, "pretrain: "),
        (
            1,
            {"parallel": {"expert-model-parallel-size": "two"}},
            "expert-model-parallel-size: expected a whole number",
        ),
    ],
)
def test_a_layout_that_cannot_run_is_refused_before_anything_starts(
    ranks: int, changes: dict[str, Any], told: str
) -> None:
    found = recipe(launch={"ranks-per-node": ranks}, **changes)
    with pytest.raises(RamoeError, match="(?s)" + told.replace("(", r"\(").replace(".", r"\.")):
        check_layout(found, None)


def test_layouts_that_fit_pass_and_more_ranks_than_devices_do_not() -> None:
    parallel = {"tensor-model-parallel-size": 2, "sequence-parallel": True, "pipeline-model-parallel-size": 2}
    both = recipe(launch={"ranks-per-node": 4}, parallel=parallel)
    check_layout(both, None)
    check_layout(recipe(launch={"ranks-per-node": 4}, parallel={"expert-model-parallel-size": 4}), 4)
    with pytest.raises(RamoeError, match="this node has 2 CUDA devices"):
        check_layout(both, 2)


def test_each_kind_of_stage_is_checked_with_its_own_ranks() -> None:
    """A batch of 8 fits two data-parallel replicas of micro-batch 4, and not four."""
    sizes = {"micro-batch-size": 4, "global-batch-size": 8}
    check_layout(recipe(train=sizes, launch={"ranks": {"pretrain": 2, "finetune": 2, "evaluate": 3}}), None)
    for kind in ("pretrain", "finetune"):
        with pytest.raises(
            RamoeError, match=r"launch gives 1 x 4 = 4 ranks .* make 4 data-parallel replicas"
        ):
            check_layout(recipe(train=sizes, launch={"ranks": {kind: 4}}), None)
    tensor = {"tensor-model-parallel-size": 2, "sequence-parallel": True}
    with pytest.raises(RamoeError, match=r"change launch\.ranks\.evaluate"):
        check_layout(recipe(parallel=tensor, launch={"ranks-per-node": 2, "ranks": {"evaluate": 1}}), None)
    with pytest.raises(RamoeError, match=r"launch\.ranks\.taxonomy is 4, but this node has 2 CUDA devices"):
        check_layout(recipe(launch={"ranks": {"taxonomy": 4}}), 2)
    with pytest.raises(RamoeError, match="'report' is no kind of stage with ranks"):
        recipe(launch={"ranks": {"report": 2}})


def test_devices_are_those_of_the_driver_that_are_visible(tmp_path: Path) -> None:
    assert cuda_devices({}, tmp_path / "absent") is None
    for name in ("0", "1", "2"):
        (tmp_path / name).mkdir()
    assert cuda_devices({}, tmp_path) == 3
    assert cuda_devices({"CUDA_VISIBLE_DEVICES": "1,2"}, tmp_path) == 2
    assert cuda_devices({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) is None


def test_an_unknown_megatron_flag_is_told_with_the_nearest() -> None:
    found = recipe(methods=[{"name": "sft", "train": {"weight-decai": 0.1}}])
    known = ["--num-layers", "--num-experts", "--num-attention-heads", "--train-iters", "--micro-batch-size"]
    known += ["--global-batch-size", "--lr", "--weight-decay", "--ramoe-coeff"]
    with pytest.raises(RamoeError) as caught:
        check_names(found, "r.yaml", known)
    told = "r.yaml: methods.0.train.weight-decai: "
    told += "Megatron has no flag --weight-decai; did you mean weight-decay?"
    assert str(caught.value) == told


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_valid_and_fit_their_own_launch(path: Path, tmp_path: Path) -> None:
    named = str(yaml.safe_load(path.read_text(encoding="utf-8")).get("checkpoint"))
    # a script makes the folder of such an example; a recipe reads its configuration alone
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found = load_recipe(path, [f"checkpoint=hf:{tmp_path}"] if named.startswith("hf:") else [])
    check_layout(found, None)
    assert {"sft", "ra-moe"} <= {method.name for method in found.methods}


def test_a_flag_that_would_be_a_boolean_elsewhere_is_refused() -> None:
    for word in ("yes", "Off"):
        assert f"model: swiglu is '{word}'; write true for a bare flag" in refusal(model={"swiglu": word})
