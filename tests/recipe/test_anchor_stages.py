"""Several anchors in a recipe: its stages, its errors, and a real run on a small model."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from anchor_tables import by_hand, save_priors
from click.testing import CliRunner
from method_rows import recipe, row
from plans import BASE, option, plan
from safetensors.torch import load_file
from small_run import bases_argv, offline_flags, outcome, profile_flags, run_table, write_world

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.files import ANCHOR_FILES, load_document, save_document
from ramoe_megatron.artifacts.priors import Priors
from ramoe_megatron.artifacts.records import read_taxonomy, write_taxonomy
from ramoe_megatron.cli import main
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.findings import Line
from ramoe_megatron.method.categories import TaxonomyRow
from ramoe_megatron.recipe import doctor
from ramoe_megatron.recipe.load import validate
from ramoe_megatron.recipe.manifest import Manifest
from ramoe_megatron.recipe.plan import make_plan
from ramoe_megatron.recipe.stage import Stage

ANCHORS = {"alignment": {"coeff": 10, "target": "example", "anchors": ["tr", "es"]}}


def further(name: str, *anchors: str, **alignment: Any) -> dict[str, Any]:
    """A method with its own further anchors."""
    return {"name": name, "preset": ["ra-moe"], "alignment": {"anchors": [*anchors], **alignment}}


def test_a_recipe_with_anchors_has_their_stages_after_the_profile(tmp_path: Path) -> None:
    stages = plan(tmp_path, **ANCHORS)
    names = list(stages)
    place = names.index("profile")
    assert names[place : place + 5] == [
        "profile",
        "priors/tr",
        "priors/es",
        "anchors/tr+es-last",
        "evaluate/base",
    ]
    assert [*plan(tmp_path)] == [name for name in names if not name.startswith(("priors/", "anchors/"))]
    written: set[Path] = set()
    for stage in stages.values():
        inside = {path for path in stage.inputs if path.is_relative_to(tmp_path)}
        assert inside - {tmp_path / "recipe.yaml", tmp_path / "data/weights.json"} <= written, stage.name
        assert not written & set(stage.outputs), stage.name
        written |= set(stage.outputs)


def test_only_methods_with_anchors_read_their_files_and_nothing_else_differs(tmp_path: Path) -> None:
    methods = ["sft", "ra-moe", "sara", further("several", "es")]
    alone, stages = plan(tmp_path, methods=["sft", "ra-moe", "sara"]), plan(tmp_path, methods=methods)
    for name in alone.keys() - {"results", "report"}:
        assert alone[name] == stages[name], name
    one, several, folder = (
        stages["finetune/ra-moe-seed1"],
        stages["finetune/several-seed1"],
        tmp_path / "anchors/es-last",
    )
    assert option(several, "--ramoe-taxonomy") == [str(folder / "taxonomy.jsonl")]
    assert option(several, "--ramoe-priors") == [str(folder / "priors.safetensors")]
    assert set(several.inputs) - set(one.inputs) == {folder / "taxonomy.jsonl", folder / "priors.safetensors"}
    assert several.settings == one.settings
    whole = plan(tmp_path, **ANCHORS, methods=["sft", "ra-moe", "sara", "xlr"])
    assert option(whole["finetune/sara-seed1"], "--ramoe-priors") == option(
        stages["finetune/sara-seed1"], "--ramoe-priors"
    ), "published"
    assert "--ramoe-priors" not in whole["finetune/xlr-seed1"].command


def test_a_profile_of_a_further_anchor_writes_its_priors_alone(tmp_path: Path) -> None:
    stages = plan(
        tmp_path,
        methods=[
            further("a", "es"),
            further("b", "es", "tr", tokens="all"),
            further("c", "es", layers="0-1"),
        ],
    )
    assert [name for name in stages if name.startswith(("priors/", "anchors/"))] == [
        "priors/es",
        "priors/tr",
        "anchors/es-last",
        "anchors/es+tr-all",
    ]
    spanish, whole = stages["priors/es"], stages["profile"]
    assert [path.name for path in spanish.outputs] == ["priors.safetensors", "priors-all.safetensors"]
    assert {path.parent for path in spanish.outputs} == {tmp_path / "priors/es"}
    assert (option(spanish, "--ramoe-anchor"), option(whole, "--ramoe-anchor")) == (["es"], ["en"])
    assert option(spanish, "--ramoe-split") == option(whole, "--ramoe-split")
    assert not {"--ramoe-general", "--ramoe-taxonomy", "--ramoe-save-usage"} & set(spanish.command)
    both = stages["anchors/es+tr-all"]
    assert [word for word in both.command if "=" in word] == [
        f"en={tmp_path}/priors-all.safetensors",
        f"es={tmp_path}/priors/es/priors-all.safetensors",
        f"tr={tmp_path}/priors/tr/priors.safetensors",
    ]
    assert {str(path) for path in both.inputs} >= {
        word.partition("=")[2] for word in both.command if "=" in word
    }
    assert (both.ranks, {path.name for path in both.outputs}) == (0, set(ANCHOR_FILES))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"target": "profile"},
            "ra-moe aligns to several anchors (es), but the profile has one pattern a task",
        ),
        ({"target": "paired"}, "but a sample has one view beside it, that of 'en'"),
        ({"refresh-interval": 2}, "but a refresh scores 'en' alone"),
        ({"anchors": ["en"]}, "alignment.anchors follow data.anchor, which is 'en'"),
        ({"anchors": ["es", "es"]}, "names one twice: es, es"),
        ({"anchors": ["../es"]}, "'../es' names a folder"),
        ({"anchors": ["fi"]}, "alignment.anchors fi not in data.languages (es, tr)"),
    ],
)
def test_anchors_without_meaning_are_refused_with_the_reason(changes: dict[str, Any], told: str) -> None:
    given = {"coeff": 1, "target": "example", "anchors": "es", **changes}
    with pytest.raises(RamoeError) as caught:
        validate({**BASE, "data": {"world": {}, "languages": ["es", "tr"]}, "alignment": given}, "r")
    assert told in str(caught.value)


def test_an_anchor_that_the_world_will_not_have_is_told_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(RamoeError, match=r"alignment\.anchors: the data will not contain zh, only es, tr"):
        plan(tmp_path, alignment={**ANCHORS["alignment"], "anchors": ["es", "zh"]})


def test_a_target_by_example_needs_priors_whatever_the_coefficient(tmp_path: Path) -> None:
    assert tmp_path / "priors.safetensors" in plan(tmp_path, methods=["sft", "coeff-zero"])["profile"].outputs
    with pytest.raises(
        RamoeError, match=r"which are the priors, but profile\.save-priors is false: leave it out"
    ):
        plan(tmp_path, profile={"save-priors": False})


# --- the stage of the choice ---


def choice(folder: Path) -> Stage:
    """The stage `anchors/zh-last` of a run folder in which every earlier stage is up to date."""
    data = {"files": "owner/rows", "general": "owner/general", "pretrain": "owner/text"}
    tokenizer = {"tokenizer-type": "NullTokenizer", "vocab-size": 9}
    alignment = {"coeff": 1, "target": "example", "anchors": ["zh"]}
    return plan(folder, data=data, tokenizer=tokenizer, alignment=alignment)["anchors/zh-last"]


def test_the_choice_is_skipped_where_it_stands_and_made_again_where_it_does_not(tmp_path: Path) -> None:
    stage, manifest = choice(tmp_path), Manifest(tmp_path, "small")
    (tmp_path / "priors/zh").mkdir(parents=True)
    write_taxonomy(
        tmp_path / "taxonomy.jsonl", [*by_hand(), TaxonomyRow("other", "t", "zh", "test", True, True)]
    )
    body = {"anchor": "en", "checkpoint": "base", "data": [], "package_version": "1", "pairs": []}
    save_document(tmp_path / "taxonomy.json", "ramoe-taxonomy", body)
    save_priors(tmp_path / "priors.safetensors", "abcd", 0.25)
    save_priors(tmp_path / "priors/zh/priors.safetensors", "abcd", 0.5)

    def run() -> list[bytes]:
        assert stage.command[0] == "ramoe_megatron.cli"
        done = CliRunner().invoke(main, stage.command[1:])
        assert done.exit_code == 0, done.output
        return [path.read_bytes() for path in stage.outputs]

    manifest.start(stage)
    first = run()
    stage.outputs[2].unlink()
    assert manifest.reason_to_run(stage) == "interrupted before"
    assert manifest.start(stage), "goes on in the folder of the interrupted one"
    assert run() == first
    manifest.finish(stage)
    assert manifest.reason_to_run(stage) is None
    assert {row.split for row in read_taxonomy(stage.outputs[0])} == {"train"}
    save_priors(tmp_path / "priors/zh/priors.safetensors", "abcd", 0.75)
    assert manifest.reason_to_run(stage) == "priors/zh/priors.safetensors changed"
    manifest.start(stage)
    assert run() != first


# --- a real run ---


def answers(folder: Path) -> list[TaxonomyRow]:
    """English is right in every second example, Spanish in two of three, Turkish never."""
    rows = [row for row in read_taxonomy(folder / "taxonomy.jsonl") if row.split != "validation"]
    numbers = [int(row.id.split("/")[1]) for row in rows]
    return [
        TaxonomyRow(
            row.id,
            row.task,
            row.language,
            row.split,
            number % 2 == 0,
            row.language == "es" and number % 3 != 0,
        )
        for row, number in zip(rows, numbers, strict=True)
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("anchors")
    write_world(folder)
    run_table(1, [{"name": "base", "job": "finetune", "argv": bases_argv(folder)}], folder, "base")
    out = folder / "run"
    out.mkdir()
    write_taxonomy(out / "taxonomy.jsonl", answers(folder))  # a base model of four steps answers nothing
    given = recipe(folder, "one").model_dump(by_alias=True, exclude_none=True)
    methods = ["ra-moe", further("several", "es")]
    stages = {
        stage.name: stage for stage in make_plan(validate({**given, "methods": methods}, "r"), out, folder)
    }
    alone = ["--ramoe-save-priors", "--ramoe-split", "train,test"]
    table = [
        {
            "name": "whole",
            "job": "profile",
            "argv": profile_flags(folder, "whole", "--ramoe-tokens", "last", "all"),
        },
        {
            "name": "alone",
            "job": "profile",
            "argv": offline_flags(folder, "alone", *alone, "--ramoe-tokens", "last", "all"),
        },
        {
            "name": "absent",
            "job": "profile",
            "argv": offline_flags(folder, "absent", *alone, "--ramoe-anchor", "zh"),
        },
        {
            "name": "usage",
            "job": "profile",
            "argv": offline_flags(folder, "usage", *alone, "--ramoe-save-usage"),
        },
        *(
            {"name": name.replace("/", "-"), "job": "profile", "argv": row("", stages[name])["argv"]}
            for name in ("profile", "priors/es")
        ),
    ]
    run_table(1, table, folder, "before")
    made = CliRunner().invoke(main, stages["anchors/es-last"].command[1:])
    assert made.exit_code == 0, made.output
    save_document(
        out / "taxonomy.json",
        "ramoe-taxonomy",
        load_document(out / "anchors/es-last/taxonomy.json", "ramoe-taxonomy"),
    )
    again = [{"name": "against-several", "job": "profile", "argv": row("", stages["profile"])["argv"]}]
    tunings = [
        row(name.rpartition("/")[2], stages[name])
        for name in ("finetune/ra-moe-seed1", "finetune/several-seed1")
    ]
    run_table(1, [*again, *tunings], folder, "after")
    return folder


def test_priors_alone_are_those_of_the_whole_profile_bit_for_bit(run: Path) -> None:
    assert {path.name for path in (run / "alone").iterdir()} == {
        "priors.safetensors",
        "priors-all.safetensors",
    }
    for name in ("priors.safetensors", "priors-all.safetensors"):
        alone, whole = (load_file(run / folder / name) for folder in ("alone", "whole"))
        assert all(torch.equal(alone[key], whole[key]) for key in ("ids", "priors")), name
    log = (run / "before.log").read_text()
    assert "priors.safetensors, priors-all.safetensors alone, the routing of 36 examples in 'en'" in log
    assert ExpertFile.load(run / "whole/experts.safetensors").anchor == "en"


def test_the_recipes_stages_bring_priors_of_their_language_and_more_aligned_examples(run: Path) -> None:
    folders = [run / "run" / name for name in (".", "priors/es", "anchors/es-last")]
    english, spanish, chosen = (Priors(folder / "priors.safetensors") for folder in folders)
    assert english.ids == spanish.ids
    assert not torch.equal(english.rows(english.ids), spanish.rows(english.ids))
    for id_ in english.ids:
        number = int(id_.split("/")[1])
        source = spanish if number % 2 and number % 3 else english  # the first that is right, else English
        assert torch.equal(chosen.rows([id_]), source.rows([id_])), id_
    shares = [
        [step["ramoe/aligned_share"] for step in outcome(run, f"{name}-seed1")["steps"]]
        for name in ("ra-moe", "several")
    ]
    assert all(0 < few <= many for few, many in zip(*shares, strict=True)), shares
    assert sum(shares[0]) < sum(shares[1]), shares


def test_what_priors_alone_cannot_give_and_a_taxonomy_of_several_anchors_are_refused(run: Path) -> None:
    def told(name: str) -> str:
        return json.loads((run / f"{name}.json").read_text())["error"]

    assert "unknown language 'zh'" in told("absent")
    assert "--ramoe-save-usage needs a whole profile" in told("usage")
    assert "is of the anchor 'en', 'es', expected 'en'" in told("against-several")
    assert not (run / "usage").exists()


def test_the_doctor_tells_the_same_before_anything_starts(run: Path) -> None:
    def flags(*more: str) -> list[str]:
        return offline_flags(run, "never", "--ramoe-anchor", "es", "--ramoe-save-priors", *more)

    several = str(run / "run/anchors/es-last/taxonomy.jsonl")
    rows = {
        "sound": (flags(), "priors", "alone, of 'es'"),
        "absent": (flags("--ramoe-anchor", "zh"), "data", "unknown language 'zh'"),
        "usage": (flags("--ramoe-save-usage"), "priors", "--ramoe-save-usage needs a whole profile"),
        "half": (flags("--ramoe-taxonomy", several), "general text", "--ramoe-general is missing"),
        "several": (
            profile_flags(run, "never", "--ramoe-taxonomy", several),
            "taxonomy",
            "is of the anchor 'en', 'es', expected 'en'",
        ),
    }
    _, answers = doctor.ask(
        [Line(name, "profile", given, 1) for name, (given, _, _) in rows.items()], os.environ
    )
    assert {finding.state for finding in answers["sound"]} == {"ok"}
    for name, (_, check, told) in rows.items():
        assert told in next(finding for finding in answers[name] if finding.check == check).found, name
    assert not (run / "never").exists()
