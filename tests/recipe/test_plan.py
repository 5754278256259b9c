"""The plan: its order, the inputs and outputs of each stage, and which settings affect which stage."""

from pathlib import Path
from typing import Any

import pytest
from plans import BASE, option, plan

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.recipe.digests import digest_path
from ramoe_megatron.recipe.runner import select_stages


def test_every_stage_reads_only_what_an_earlier_one_wrote(tmp_path: Path) -> None:
    written: set[Path] = set()
    stages = plan(tmp_path)
    for stage in stages.values():
        inside = {path for path in stage.inputs if path.is_relative_to(tmp_path)}
        loose = {tmp_path / "recipe.yaml", tmp_path / "data" / "weights.json"}
        assert inside - loose <= written, stage.name
        assert not written & set(stage.outputs), stage.name
        written |= set(stage.outputs)
    names = list(stages)
    offline = ["data", "pretrain", "taxonomy", "profile", "evaluate/base", "predict"]
    assert names[:6] == offline
    assert names[-2:] == ["results", "report"]
    assert set(names[6:10]) == {f"finetune/{m}-seed{s}" for m in ("sft", "ra-moe") for s in (1, 2)}


def test_a_kind_of_stage_may_have_ranks_of_its_own_and_reruns_nothing(tmp_path: Path) -> None:
    plain, own = plan(tmp_path), plan(tmp_path, launch={"ranks-per-node": 2, "ranks": {"finetune": 4}})
    assert {stage.ranks for stage in own.values() if stage.kind == "finetune"} == {4}
    others = {stage.ranks for name, stage in own.items() if stage.kind != "finetune" and plain[name].ranks}
    assert others == {2}
    assert {name: stage.settings for name, stage in own.items()} == {
        name: stage.settings for name, stage in plain.items()
    }


def test_files_that_a_command_names_are_inputs_or_outputs(tmp_path: Path) -> None:
    for stage in plan(tmp_path).values():
        if stage.ranks == 0:
            continue
        known = {str(path) for path in (*stage.inputs, *stage.outputs, *stage.traces)}
        known |= {str(tmp_path), str(tmp_path / "evaluations")}  # folders that outputs go to
        known |= {str(tmp_path / "data-cache")}  # of all stages that train
        named = {word for word in stage.command if word.startswith(str(tmp_path))}
        assert named <= known, stage.name


@pytest.mark.parametrize(
    ("changes", "outdated"),
    [
        ({"train": {**BASE["train"], "lr": 2e-3}}, {"finetune/"}),
        ({"train": {**BASE["train"], "log-interval": 7}}, set()),
        ({"train": {**BASE["train"], "micro-batch-size": 1}}, set()),
        ({"parallel": {"expert-model-parallel-size": 2}}, set()),
        ({"launch": {"ranks-per-node": 4}}, set()),
        ({"pretrain": {**BASE["pretrain"], "lr": 5e-3}}, {"pretrain"}),
        ({"seed": 2}, {"data", "pretrain"}),
        ({"alignment": {"coeff": 3, "target": "example"}}, {"finetune/ra-moe"}),
        ({"alignment": {"coeff": 10, "target": "example", "layers": "0-1"}}, {"finetune/ra-moe", "predict"}),
        ({"alignment": {"coeff": 10, "target": "profile"}}, {"finetune/ra-moe", "profile"}),
        ({"profile": {"select": "top-m=2"}}, {"profile"}),
        ({"taxonomy": {"splits": ["test"]}}, {"taxonomy"}),
        ({"evaluate": {"split": "validation"}}, {"evaluate/", "predict"}),
        ({"data": {"world": {"vocab-size": 900}}}, {"data"}),
        ({"data": {"world": {}, "weights": {"*/es": 1.0}}}, {"finetune/"}),
        ({"data": {"world": {}, "pretrain-weights": {"*": 1.0}}}, {"pretrain"}),
        ({"seeds": [1, 2, 3]}, set()),
    ],
)
def test_a_setting_outdates_the_stages_that_it_bears_on(
    tmp_path: Path, changes: dict[str, Any], outdated: set[str]
) -> None:
    """Only through settings: effects through another stage's result are covered by the digests of inputs."""
    before, after = plan(tmp_path), plan(tmp_path, **changes)
    differing = {name for name in before if before[name].settings != after[name].settings}
    assert {name for name in differing if not any(name.startswith(prefix) for prefix in outdated)} == set()
    assert all(any(name.startswith(prefix) for name in differing) for prefix in outdated)


def test_settings_do_not_depend_on_where_the_run_folder_lies(tmp_path: Path) -> None:
    here, there = plan(tmp_path / "a"), plan(tmp_path / "b")
    assert {name: stage.settings for name, stage in here.items()} == {
        name: stage.settings for name, stage in there.items()
    }


def test_each_fine_tuning_run_differs_from_sft_only_by_the_alignment(tmp_path: Path) -> None:
    stages = plan(tmp_path, methods=["sft", "ra-moe", "ra-moe-shuffled"])
    sft, aligned, shuffled = (
        stages[f"finetune/{name}-seed2"] for name in ("sft", "ra-moe", "ra-moe-shuffled")
    )
    assert not {word for word in sft.command if word.startswith("--ramoe-")} - {
        "--ramoe-data",
        "--ramoe-anchor",
        "--ramoe-split",
    }
    assert sft.settings["flags"] == aligned.settings["flags"] == shuffled.settings["flags"]
    assert option(aligned, "--ramoe-coeff") == ["10.0"]
    assert option(aligned, "--ramoe-priors") == [str(tmp_path / "priors.safetensors")]
    assert option(aligned, "--ramoe-shuffle-targets") is None
    assert option(shuffled, "--ramoe-shuffle-targets") == ["2"]
    assert option(sft, "--seed") == ["2"]
    assert tmp_path / "taxonomy.jsonl" in aligned.inputs
    assert tmp_path / "taxonomy.jsonl" not in sft.inputs


def test_fine_tuning_resumes_its_own_checkpoint_and_starts_from_the_base(tmp_path: Path) -> None:
    stage = plan(tmp_path)["finetune/sft-seed1"]
    own, base = str(tmp_path / "checkpoints" / "sft-seed1"), str(tmp_path / "checkpoints" / "base")
    assert (option(stage, "--load"), option(stage, "--save"), option(stage, "--pretrained-checkpoint")) == (
        [own],
        [own],
        [base],
    )
    assert option(stage, "--save-interval") == ["4"]


def test_priors_are_written_exactly_when_a_method_reads_them(tmp_path: Path) -> None:
    assert "--ramoe-save-priors" in plan(tmp_path)["profile"].command
    assert tmp_path / "priors.safetensors" in plan(tmp_path)["profile"].outputs
    for changes in ({"methods": ["sft"]}, {"alignment": {"coeff": 1, "target": "profile"}}):
        assert "--ramoe-save-priors" not in plan(tmp_path, **changes)["profile"].command


def test_priors_keep_what_the_methods_read(tmp_path: Path) -> None:
    keeping, aligned = {"profile": {"priors-for": "ci"}}, {"coeff": 1, "target": "example"}
    assert option(plan(tmp_path, **keeping)["profile"], "--ramoe-priors-for") == ["ci"]
    for more in ({"examples": "all"}, {"layers": "0-1"}, {"anchors": ["es"]}, {"refresh-interval": 2}):
        with pytest.raises(RamoeError, match=r"method ra-moe reads priors beyond .*: ci"):
            plan(tmp_path, alignment=aligned | more, **keeping)


def test_all_fine_tunes_share_the_cache_of_the_data(tmp_path: Path) -> None:
    for name in ("pretrain", "finetune/sft-seed1"):
        assert option(plan(tmp_path)[name], "--data-cache-path") == [str(tmp_path / "data-cache")]
    own = plan(tmp_path, model={"data-cache-path": "/elsewhere"})
    assert option(own["finetune/sft-seed1"], "--data-cache-path") == ["/elsewhere"]


def test_user_files_are_found_beside_the_recipe_and_their_absence_is_told(tmp_path: Path) -> None:
    folder, out = tmp_path / "recipes", tmp_path / "out"
    folder.mkdir()
    for name in ("rows.jsonl", "general.jsonl", "spm.model"):
        (folder / name).write_text("x")
    checkpoint = folder / "base"
    (checkpoint / "iter_0000003").mkdir(parents=True)
    (checkpoint / "latest_checkpointed_iteration.txt").write_text("3")
    changes: dict[str, Any] = {
        "pretrain": None,
        "checkpoint": "base",
        "data": {"files": ["rows.jsonl", "owner/parallel"], "general": ["general.jsonl"]},
        "tokenizer": {"tokenizer-type": "SentencePieceTokenizer", "tokenizer-model": "spm.model"},
    }
    stages = plan(out, folder, **changes)
    assert "data" not in stages
    assert "pretrain" not in stages
    taxonomy = stages["taxonomy"]
    assert set(taxonomy.inputs) == {folder / "rows.jsonl", folder / "spm.model", checkpoint}
    assert option(taxonomy, "--ramoe-data") == [str(folder / "rows.jsonl"), "owner/parallel"]
    assert taxonomy.settings["hub"] == ["owner/parallel"]

    absent: list[tuple[dict[str, Any], str]] = [
        (
            {"data": {"files": ["absent.jsonl"], "general": ["general.jsonl"]}},
            "data.files: absent.jsonl exists neither",
        ),
        ({"checkpoint": "no/where"}, "checkpoint: no/where holds no latest_checkpointed_iteration.txt"),
        ({"checkpoint": str(folder)}, "it is no Megatron checkpoint folder"),
    ]
    for change, told in absent:
        with pytest.raises(RamoeError, match=told):
            plan(out, folder, **{**changes, **change})


def test_wrong_world_settings_and_an_absent_sib200_are_told(tmp_path: Path) -> None:
    with pytest.raises(RamoeError, match=r"data\.world: .*vocab_siz.*vocab_size"):
        plan(tmp_path, data={"world": {"vocab-siz": 3}})
    with pytest.raises(RamoeError, match=r"data\.sib200\.source"):
        plan(tmp_path, data={"sib200": {"source": "./absent"}})


def test_from_and_until_select_by_stage_or_kind(tmp_path: Path) -> None:
    stages = list(plan(tmp_path).values())
    names = [stage.name for stage in stages]

    def chosen(first: str | None, last: str | None) -> list[str]:
        begin, end = select_stages(stages, first, last)
        return names[begin:end]

    assert chosen(None, None) == names
    assert chosen("finetune", "finetune") == [name for name in names if name.startswith("finetune/")]
    assert chosen("profile", "finetune/sft-seed1") == [
        "profile",
        "evaluate/base",
        "predict",
        "finetune/sft-seed1",
    ]
    assert chosen(None, "data") == ["data"]
    with pytest.raises(RamoeError, match="no stage 'finetun'; did you mean finetune"):
        select_stages(stages, "finetun", None)
    with pytest.raises(RamoeError, match="comes after"):
        select_stages(stages, "report", "data")


def checkpoint(path: Path, iteration: int = 3, weights: bytes = b"w" * 300_000) -> Path:
    folder = path / f"iter_{iteration:07d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.json").write_text("{}")
    (folder / "__0_0.distcp").write_bytes(weights)
    (path / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return path


def test_a_checkpoint_digest_sees_what_matters_and_reads_little(tmp_path: Path) -> None:
    first = digest_path(checkpoint(tmp_path / "a"))
    assert first == digest_path(checkpoint(tmp_path / "b"))
    checkpoint(tmp_path / "c", iteration=2)
    assert first == digest_path(checkpoint(tmp_path / "c")), "older iterations do not count"
    others = [
        digest_path(tmp_path / "a", maker="other settings"),
        digest_path(checkpoint(tmp_path / "d", iteration=4)),
        digest_path(checkpoint(tmp_path / "e", weights=b"w" * 300_001)),
        digest_path(checkpoint(tmp_path / "f", weights=b"v" + b"w" * 299_999)),
        digest_path(checkpoint(tmp_path / "g", weights=b"w" * 299_999 + b"v")),
    ]
    assert len({first, *others}) == 6


def test_a_folder_digest_sees_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    first = digest_path(tmp_path / "a")
    (tmp_path / "a" / "x").write_text("2")
    assert digest_path(tmp_path / "a") != first
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    (tmp_path / "a" / "y").write_text("1")
    assert digest_path(tmp_path / "a") != first
    assert digest_path(tmp_path / "absent") is None
