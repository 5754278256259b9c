"""The named methods: their meaning, their combinations, and the flags that a recipe makes of them."""

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from click.testing import CliRunner
from plans import BASE, option, plan

from ramoe_megatron.cli import main
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.align.options import RoutingAlignmentConfig
from ramoe_megatron.mcore.select.selective_options import SelectiveOptions
from ramoe_megatron.mcore.steer.steering_options import SteeringOptions
from ramoe_megatron.recipe.load import validate
from ramoe_megatron.recipe.methods import METHODS, Method
from ramoe_megatron.recipe.schema import Recipe
from ramoe_megatron.recipe.sections import AlignmentSection, SelectionSection, SteeringSection
from ramoe_megatron.recipe.stage import Stage

GIVEN = {
    "selection": {"train-budget": 5, "train-top-p": 0.4},
    "alignment": {"coeff": 10, "target": "example", "layers": "1-2"},
}


def recipe(*methods: Any, **changes: Any) -> Recipe:
    return validate({**BASE, **GIVEN, "methods": ["sft", *methods], **changes}, "r")


def refusal(*methods: Any, **changes: Any) -> str:
    with pytest.raises(RamoeError) as caught:
        recipe(*methods, **changes)
    return str(caught.value)


def stages(out: Path, *methods: Any, **changes: Any) -> dict[str, Stage]:
    return plan(out, **{**GIVEN, "methods": ["sft", *methods], **changes})


def flags(stage: Stage) -> dict[str, list[str]]:
    """Our flags in a command line."""
    words = stage.command
    return {word: option(stage, word) or [] for word in words if word.startswith("--ramoe-")}


def test_every_method_has_a_meaning_in_one_recipe(tmp_path: Path) -> None:
    found = stages(tmp_path, *[name for name in METHODS if name != "sft"])
    for name, entry in METHODS.items():
        assert (f"finetune/{name}-seed2" in found) == (not entry.steering)
        assert (f"evaluate/{name}-seed2" in found) == (not entry.steering)
        assert (f"evaluate/{name}" in found) == bool(entry.steering)
    assert {path.name for path in found["profile"].outputs} == {
        "experts.safetensors",
        "divergence.csv",
        "priors.safetensors",
        "priors-all.safetensors",
        "usage.safetensors",
    }


def test_the_published_settings_are_not_the_recipes(tmp_path: Path) -> None:
    given = {"coeff": 50, "divergence": "mass", "target": "example", "tokens": "prompt", "layers": "0-1"}
    found = stages(tmp_path, "ra-moe", "sara", "xlr", alignment=given)
    sara, xlr = flags(found["finetune/sara-seed1"]), flags(found["finetune/xlr-seed1"])
    assert (sara["--ramoe-coeff"], sara["--ramoe-divergence"], sara["--ramoe-tokens"]) == (
        ["1.5"],
        ["js"],
        ["all"],
    )
    assert (sara["--ramoe-examples"], sara["--ramoe-missing-priors"]) == (["ci+cc"], ["skip"])
    assert (xlr["--ramoe-coeff"], xlr["--ramoe-coeff-unit"], xlr["--ramoe-target"]) == (
        ["1.0"],
        ["lm-loss"],
        ["paired"],
    )
    assert "--ramoe-priors" not in xlr
    assert sara["--ramoe-layers"] == xlr["--ramoe-layers"] == ["0-1"]
    scheduled = {
        "coeff-unit": "lm-loss",
        "coeff-decay": "cosine",
        "coeff-warmup-iters": 3,
        "layer-weights": "divergence",
    }
    scheduled |= {"missing-priors": "skip", "refresh-interval": 4}
    again = stages(tmp_path, "ra-moe", "sara", "xlr", alignment={**given, **scheduled})
    assert flags(again["finetune/ra-moe-seed1"])["--ramoe-coeff-unit"] == ["lm-loss"]
    assert flags(again["finetune/sara-seed1"]) == sara
    assert flags(again["finetune/xlr-seed1"]) == xlr


def test_paired_views_double_the_batch_and_nothing_else_does(tmp_path: Path) -> None:
    found = stages(tmp_path, "ra-moe", "xlr", "reversed")
    sizes = {
        name: option(found[f"finetune/{name}-seed1"], "--global-batch-size")
        for name in ("sft", "ra-moe", "xlr", "reversed")
    }
    assert sizes == {"sft": ["8"], "ra-moe": ["8"], "xlr": ["16"], "reversed": ["16"]}
    assert option(found["finetune/xlr-seed1"], "--micro-batch-size") == ["4"]


def test_coefficient_zero_has_the_batch_of_sft_whatever_the_target(tmp_path: Path) -> None:
    found = stages(tmp_path, "ra-moe", "coeff-zero", alignment={"coeff": 1, "target": "paired"})
    sizes = [
        option(found[f"finetune/{name}-seed1"], "--global-batch-size")
        for name in ("sft", "coeff-zero", "ra-moe")
    ]
    assert sizes == [["8"], ["8"], ["16"]]


def test_sft_has_no_flag_of_alignment_and_coefficient_zero_has_all(tmp_path: Path) -> None:
    found = stages(tmp_path, "ra-moe", "coeff-zero")
    sft, zero, aligned = (flags(found[f"finetune/{name}-seed1"]) for name in ("sft", "coeff-zero", "ra-moe"))
    assert not {"--ramoe-coeff", "--ramoe-experts", "--ramoe-taxonomy"} & set(sft)
    assert zero == aligned | {"--ramoe-coeff": ["0.0"]}
    digests = {
        name: "--ramoe-weights-digest" in found[f"evaluate/{name}-seed1"].command
        for name in ("sft", "coeff-zero", "ra-moe")
    }
    assert digests == {"sft": True, "coeff-zero": True, "ra-moe": False}
    assert "--ramoe-weights-digest" not in stages(tmp_path, "ra-moe")["evaluate/sft-seed1"].command


def test_controls_differ_from_the_method_by_one_thing(tmp_path: Path) -> None:
    found = stages(tmp_path, "ra-moe", "random-experts", "all-layers", "outside-zone", "ra-moe-shuffled")
    method = flags(found["finetune/ra-moe-seed2"])
    for name, change in {
        "random-experts": {"--ramoe-random-experts": ["2"]},
        "all-layers": {"--ramoe-layers": ["all"]},
        "outside-zone": {"--ramoe-layers": ["outside:1-2"]},
        "ra-moe-shuffled": {"--ramoe-shuffle-targets": ["2"]},
    }.items():
        assert flags(found[f"finetune/{name}-seed2"]) == method | change


def test_selection_takes_what_its_method_needs(tmp_path: Path) -> None:
    found = stages(tmp_path, "rise", "esft-gate", "router-only")
    rise, esft, routers = (
        flags(found[f"finetune/{name}-seed1"]) for name in ("rise", "esft-gate", "router-only")
    )
    assert (rise["--ramoe-train"], rise["--ramoe-train-budget"]) == (["rise"], ["5"])
    assert not {"--ramoe-train-top-p", "--ramoe-train-split"} & set(rise)
    split = {"name": "split", "preset": ["rise"], "selection": {"train-budget": 6, "train-split": [1, 2, 3]}}
    assert flags(stages(tmp_path, split)["finetune/split-seed1"])["--ramoe-train-split"] == ["1", "2", "3"]
    assert (esft["--ramoe-train"], esft["--ramoe-train-top-p"]) == (["esft-gate"], ["0.4"])
    assert routers["--ramoe-train"] == ["routers"]
    assert "--ramoe-usage" not in routers
    assert "--ramoe-coeff" not in rise


def test_parts_combine(tmp_path: Path) -> None:
    found = stages(tmp_path, "ra-moe", {"name": "both", "preset": ["ra-moe", "esft-token"]})
    both, aligned = flags(found["finetune/both-seed1"]), flags(found["finetune/ra-moe-seed1"])
    selected = {"--ramoe-train", "--ramoe-train-top-p", "--ramoe-usage"}
    assert {name: value for name, value in both.items() if name not in selected} == aligned
    assert set(both) == set(aligned) | selected


def test_steering_is_evaluated_on_the_base_model_or_on_a_trained_one(tmp_path: Path) -> None:
    steered = {"name": "steered-sft", "preset": ["steering-hard"], "on": "sft"}
    found = stages(
        tmp_path, "steering-soft", steered, steering={"steer-strength": 0.25, "steer-layers": "1-2"}
    )
    soft, hard = found["evaluate/steering-soft"], found["evaluate/steered-sft-seed2"]
    assert option(soft, "--load") == [str(tmp_path / "checkpoints/base")]
    assert option(hard, "--load") == [str(tmp_path / "checkpoints/sft-seed2")]
    assert (option(soft, "--ramoe-steer-strength"), option(hard, "--ramoe-steer-strength")) == (
        ["0.25"],
        None,
    )
    assert not [name for name in found if name.startswith("finetune/steer")]
    found = stages(tmp_path, "steering-soft", steering={"search": True})
    assert option(found["steer/steering-soft"], "--ramoe-split") == ["validation"]
    assert option(found["evaluate/steering-soft"], "--ramoe-steering") == [
        str(tmp_path / "steering/steering-soft/steering.json")
    ]
    assert option(found["steer/steering-soft"], "--ramoe-zones") == ["auto"]


def test_a_search_on_a_trained_method_is_on_its_own_checkpoints(tmp_path: Path) -> None:
    searched = {
        "name": "sought",
        "preset": ["steering-soft"],
        "on": "sft",
        "steering": {"search": True, "zones": ["auto", "0-1"]},
    }
    found = stages(tmp_path, searched)
    for seed in (1, 2):
        search, evaluation = found[f"steer/sought-seed{seed}"], found[f"evaluate/sought-seed{seed}"]
        assert (
            option(search, "--load")
            == option(evaluation, "--load")
            == [str(tmp_path / f"checkpoints/sft-seed{seed}")]
        )
        assert option(evaluation, "--ramoe-steering") == [str(path) for path in search.outputs]
        assert option(search, "--ramoe-zones") == ["auto", "0-1"]
    assert list(found).index("finetune/sft-seed2") < list(found).index("steer/sought-seed1")


def test_an_expert_file_of_another_run_is_aligned_by(tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    other.touch()
    found = stages(tmp_path / "run", "ra-moe", profile={"experts": str(other)})
    assert option(found["finetune/ra-moe-seed1"], "--ramoe-experts") == [str(other)]
    assert found["profile"].outputs[0].name == "experts.safetensors"


@pytest.mark.parametrize(
    ("methods", "changes", "told"),
    [
        ([{"name": "x", "preset": ["sara", "xlr"]}], {}, "do not combine"),
        ([{"name": "x", "preset": ["ra-moe", "sara"]}], {}, "each has its own loss"),
        ([{"name": "x", "preset": ["sft", "rise"]}], {}, "it combines with nothing"),
        (
            [{"name": "x", "alignment": {"coeff": 5}, "steering": {"steer": "soft"}}],
            {},
            "so alignment has no meaning",
        ),
        (
            [{"name": "x", "preset": ["steering-hard"], "selection": {"train": "routers"}}],
            {},
            "so selection has no meaning",
        ),
        (
            [{"name": "x", "preset": ["steering-hard"], "steering": {"steer-strength": 1}}],
            {},
            "only soft steering without a search reads steering.steer-strength",
        ),
        (
            [{"name": "x", "preset": ["steering-soft"], "steering": {"search": True, "steer-tau": 0.3}}],
            {},
            "only steering without a search reads steering.steer-tau",
        ),
        (
            [{"name": "x", "preset": ["steering-soft"], "steering": {"zones": ["0-1"]}}],
            {},
            "set steering.search",
        ),
        (
            [{"name": "x", "preset": ["router-only"], "selection": {"train-budget": 3}}],
            {},
            "selection.train-budget 3 with selection.train routers: only rise uses it",
        ),
        (
            [{"name": "x", "preset": ["rise"], "selection": {"train-split": [1, 1, 1]}}],
            {},
            "sums to 3, not to selection.train-budget 5",
        ),
        ([], {"selection": {"train": "routers"}}, "belong to a method"),
        ([], {"steering": {"steer": "soft"}}, "belong to a method"),
        (
            ["outside-zone"],
            {"alignment": {"coeff": 1, "layers": "all"}},
            "takes the layers outside alignment.layers",
        ),
        ([{"name": "x", "preset": ["rise", "esft-gate"]}], {}, "do not combine"),
        ([{"name": "x", "preset": ["ra-moe", "steering-soft"]}], {}, "steering acts at inference"),
        ([{"name": "x", "preset": ["nothing"]}], {}, "no preset 'nothing'"),
        (["esft-tokn"], {}, "did you mean esft-token?"),
        (["mine"], {}, "or a method of your own with a preset or a section"),
        ([], {"seeds": [1, 0]}, "seeds: found 0"),
        ([], {"seeds": 0}, "seeds: found 0"),
        (
            [{"name": "x", "preset": ["steering-soft"], "on": "mine"}],
            {},
            "no method of this recipe that trains",
        ),
        ([{"name": "x", "on": "sft"}], {}, "only a steering method acts `on`"),
        ([{"name": "x", "preset": ["steering-soft"], "train": {"lr": 1}}], {}, "steering trains nothing"),
        ([{"name": "x", "preset": ["steering-soft"], "replay": 0.5}], {}, "steering trains nothing"),
        ([{"name": "x", "preset": ["sft"], "replay": 1}], {}, "less than 1"),
        ([{"name": "x", "preset": ["sft"], "ids-per-task": 0}], {}, "ids-per-task"),
        (
            [{"name": "x", "preset": ["steering-soft"], "ids-per-task": 4}],
            {},
            "so ids-per-task has no meaning",
        ),
        (["rise"], {"selection": {}}, "selection.train rise without selection.train-budget"),
        (["esft-token"], {"selection": {}}, "selection.train esft-token without selection.train-top-p"),
        (["ra-moe"], {"alignment": {}}, "needs a coefficient"),
        (
            ["ra-moe-shuffled"],
            {"alignment": {"coeff": 1, "target": "profile"}},
            "alignment.shuffle-targets permutes the targets of examples: it needs alignment.target example",
        ),
        ([{"name": "x", "alignment": {"reverse": True}}], {}, "and only alignment.target paired runs"),
        ([], {"launch": {"at-once": 2, "nodes": 2}}, "launch.at-once is for one node"),
    ],
)
def test_what_has_no_meaning_is_refused(methods: list[Any], changes: dict[str, Any], told: str) -> None:
    assert told in refusal(*methods, **changes)


@pytest.mark.parametrize(
    ("method", "told"),
    [
        (
            {"preset": ["random-experts"], "alignment": {"divergence": "kl"}},
            "alignment.random-experts with alignment.divergence kl",
        ),
        (
            {"preset": ["ra-moe"], "alignment": {"target": "profile", "missing-priors": "skip"}},
            "alignment.missing-priors skip: only",
        ),
        (
            {"preset": ["ra-moe"], "alignment": {"refresh-interval": 2, "examples": "all"}},
            "alignment.refresh-interval does not work with",
        ),
        ({"preset": ["ra-moe"], "alignment": {"select": "top-m=0"}}, "select: found 'top-m=0'"),
    ],
)
def test_what_a_fine_tune_would_refuse_of_its_flags_is_refused_in_the_recipes_words(
    method: dict[str, Any], told: str
) -> None:
    assert f"method mine: {told}" in refusal({"name": "mine", **method})


def test_a_section_is_the_options_of_its_job() -> None:
    """Each option of the dataclasses, except files, is a key with the same name, type and default."""
    files = {"experts", "taxonomy", "priors", "usage", "steering"}
    pairs = (
        (AlignmentSection, RoutingAlignmentConfig),
        (SelectionSection, SelectiveOptions),
        (SteeringSection, SteeringOptions),
    )
    for section, options in pairs:
        keys = section.model_fields
        for field in dataclasses.fields(options):
            assert (field.name in keys) == (field.name not in files), field.name
            if field.name in keys and field.name not in ("layer_weights", "target"):
                assert keys[field.name].default == field.default
                assert keys[field.name].annotation == get_type_hints(options)[field.name]


def test_a_target_left_out_is_the_example_wherever_there_are_priors() -> None:
    known = {"coeff": 1.0, "experts": "e", "taxonomy": "t"}
    assert RoutingAlignmentConfig(**known).target == "profile"
    assert RoutingAlignmentConfig(**known, priors="p").target == "example"
    assert RoutingAlignmentConfig(**known, priors="p", target="profile").target == "profile"
    assert AlignmentSection().target == "example"


@pytest.mark.parametrize(
    ("data", "languages", "weights"),
    [
        ({"languages": ["es", "hi"]}, ["en", "es", "hi"], ["*/en=0.2", "*=0.8"]),
        ({"weights": {"currency/*": 3, "*": 1}}, None, ["*/en=0.2", "currency/*=0.6", "*=0.2"]),
    ],
)
def test_replayed_samples_are_a_share_and_the_others_keep_theirs(
    tmp_path: Path, data: dict[str, Any], languages: list[str] | None, weights: list[str]
) -> None:
    mixed = {"name": "mixed", "preset": ["ra-moe"], "replay": 0.2}
    found = stages(tmp_path, "ra-moe", mixed, data={"world": {}, **data})
    own, plain = (flags(found[f"finetune/{name}-seed1"]) for name in ("mixed", "ra-moe"))
    assert own.get("--ramoe-languages") == languages
    assert own["--ramoe-weights"] == weights
    replayed = ("--ramoe-languages", "--ramoe-weights")
    for name in own.keys() - {"--save", "--load", "--tensorboard-dir", *replayed}:
        assert own[name] == plain[name], name
    assert Method.model_validate(mixed).model_dump(by_alias=True) == mixed


def test_fewer_ids_are_a_flag_of_the_fine_tune_alone(tmp_path: Path) -> None:
    fewer = {"name": "fewer", "preset": ["ra-moe"], "ids-per-task": 4}
    found = stages(tmp_path, "ra-moe", fewer)
    own, plain = (flags(found[f"finetune/{name}-seed1"]) for name in ("fewer", "ra-moe"))
    assert own["--ramoe-ids-per-task"] == ["4"]
    places = ("--save", "--load", "--tensorboard-dir", "--ramoe-ids-per-task")
    assert {name: own[name] for name in own if name not in places} == {
        name: plain[name] for name in plain if name not in places
    }
    assert not any(
        "--ramoe-ids-per-task" in s.command for n, s in found.items() if not n.startswith("finetune/fewer-")
    )


@pytest.mark.parametrize(("method", "needed"), [("ra-moe", True), ("router-only", False)])
def test_a_method_that_aligns_nothing_needs_no_priors(tmp_path: Path, method: str, needed: bool) -> None:
    written = {path.name for path in stages(tmp_path, method)["profile"].outputs}
    assert ("priors.safetensors" in written) == needed


def test_a_control_is_a_seed_in_a_recipe_too(tmp_path: Path) -> None:
    mine = {"name": "mine", "alignment": {"shuffle-targets": 7}}
    found = stages(tmp_path, "ra-moe-shuffled", mine)
    shuffled, own = (
        flags(found[f"finetune/{name}-seed2"])["--ramoe-shuffle-targets"]
        for name in ("ra-moe-shuffled", "mine")
    )
    assert (shuffled, own) == (["2"], ["7"])
    assert "expected a number" in refusal({"name": "mine", "alignment": {"shuffle-targets": True}})


def test_the_table_of_methods_has_a_row_for_each() -> None:
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(main, ["methods"])
    assert shown.exit_code == 0
    for name, entry in METHODS.items():
        assert name in shown.output
        assert entry.source.split(",")[0] in shown.output


def test_compare_needs_sft_and_a_base_model_to_train(tmp_path: Path) -> None:
    from ramoe_megatron.recipe.compare import compare_recipe

    path = tmp_path / "r.yaml"
    path.write_text(Path(__file__).parents[2].joinpath("examples/comparison.yaml").read_text())
    with pytest.raises(RamoeError, match="methods has no sft"):
        compare_recipe(path, ["methods=[ra-moe]"], out=tmp_path)
    with pytest.raises(RamoeError, match="--bases asks for 2"):
        compare_recipe(path, ["pretrain=null", "checkpoint=x"], bases=[1, 2], out=tmp_path)
    for bases, told in (("1,x", "expected whole numbers"), ("1,1", "names one twice")):
        shown = CliRunner().invoke(main, ["compare", str(path), "--bases", bases])
        assert shown.exit_code == 2
        assert told in shown.output
