"""Recipes with benchmarks by name: what the data stage gets, what later stages read, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from plans import BASE, option, plan

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.jobs import generate
from ramoe_megatron.recipe.load import validate
from ramoe_megatron.recipe.plan import make_plan
from ramoe_megatron.recipe.stage import Stage

TOKENIZER = {"tokenizer-type": "HuggingFaceTokenizer", "tokenizer-model": "./tokenizer"}


@pytest.fixture
def mgsm(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "mgsm").mkdir()
    for code in ("en", "de", "sw"):
        rows = "".join(f"{code} {n}?\t{n}\n" for n in range(10))
        (tmp_path / "mgsm" / f"mgsm_{code}.tsv").write_text(rows)
    return tmp_path


def stages(folder: Path, **data: Any) -> dict[str, Stage]:
    base = {key: value for key, value in BASE.items() if key != "pretrain"}
    (folder / "base").mkdir(exist_ok=True)
    (folder / "base" / "latest_checkpointed_iteration.txt").write_text("1")
    recipe = validate({**base, "checkpoint": "./base", "tokenizer": TOKENIZER, "data": data}, "r")
    return {stage.name: stage for stage in make_plan(recipe, folder / "run", folder)}


def config(stage: Stage) -> dict[str, Any]:
    return json.loads(stage.command[stage.command.index("--config") + 1])


def test_the_data_stage_writes_what_later_stages_read(mgsm: Path) -> None:
    made = stages(mgsm, benchmark="mgsm", source="./mgsm", languages=["sw"], splits={"train": 0.5}, shots=1)
    data = made["data"]
    assert config(data)["benchmarks"][0]["languages"] == ["en", "sw"]
    assert config(data)["benchmarks"][0]["anchor"] == "en"
    parallel, general = (str(mgsm / "run" / "data" / f"{name}.jsonl") for name in ("parallel", "general"))
    for name in ("taxonomy", "profile", "finetune/sft-seed1", "evaluate/base"):
        assert option(made[name], "--ramoe-data") == [parallel]
    assert option(made["profile"], "--ramoe-general") == [general]
    assert generate.main(data.command[1:]) == 0
    assert all(path.is_file() for path in data.outputs)
    rows = [json.loads(line) for line in Path(parallel).read_text(encoding="utf-8").splitlines()]
    assert {(row["language"], row["split"]) for row in rows} == {
        (language, split) for language in ("en", "sw") for split in ("train", "test")
    }


def test_several_benchmarks_take_the_sections_values_as_defaults(mgsm: Path) -> None:
    given = [
        {"benchmark": "mgsm", "source": "./mgsm", "shots": 2},
        {"benchmark": "gsm8k", "languages": ["en"]},
    ]
    (mgsm / "test.jsonl").write_text("")
    made = stages(mgsm, benchmark=given, source=str(mgsm), languages=["de"], chat=True, splits={"train": 0.3})
    first, second = config(made["data"])["benchmarks"]
    assert (first["shots"], second["shots"], first["chat"], second["chat"]) == (2, 0, True, True)
    assert (first["languages"], second["languages"]) == (["en", "de"], ["en"])
    assert {str(path) for path in made["data"].inputs} == {str(mgsm), str(mgsm / "mgsm")}


def test_general_text_of_the_user_replaces_the_made_text(mgsm: Path) -> None:
    (mgsm / "general.jsonl").write_text("")
    made = stages(mgsm, benchmark="mgsm", source="./mgsm", general=["./general.jsonl"])
    assert not config(made["data"])["general"]
    assert "general.jsonl" not in {path.name for path in made["data"].outputs}
    assert option(made["profile"], "--ramoe-general") == [str(mgsm / "general.jsonl")]


def test_a_resolved_recipe_with_a_benchmark_resolves_to_itself() -> None:
    data = {"benchmark": "mgsm", "source": "a/b", "splits": {"train": 0.5, "validation": "dev"}, "limit": 3}
    changes = {"checkpoint": "./base", "tokenizer": TOKENIZER, "data": data, "pretrain": None}
    first = validate({**BASE, **changes}, "r").model_dump(by_alias=True, exclude_none=True)
    again = validate(first, "again").model_dump(by_alias=True, exclude_none=True)
    assert again == first
    assert first["data"]["splits"] == data["splits"]


def test_a_moved_folder_is_no_change_of_a_setting_and_a_shot_is(mgsm: Path) -> None:
    (mgsm / "other").mkdir()
    for path in (mgsm / "mgsm").iterdir():
        (mgsm / "other" / path.name).write_bytes(path.read_bytes())
    one, moved, shown = (
        stages(mgsm, benchmark="mgsm", splits={"train": 0.5}, **values)["data"].settings
        for values in ({"source": "./mgsm"}, {"source": "./other"}, {"source": "./mgsm", "shots": 1})
    )
    assert one == moved != shown


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"benchmark": "mgsm"}, r"data\.source is missing"),
        ({"benchmark": "mgsm", "source": "./absent"}, r"data\.source: \./absent"),
        ({"benchmark": "mgsm", "source": "./tokenizer"}, r"mgsm_\{language\}\.tsv"),
        ({"benchmark": "msgm", "source": "./mgsm"}, "'msgm' is not known"),
        ({"benchmark": [{"benchmark": "mgsm", "shot": 2}]}, r"data\.benchmark\.0: .*did you mean 'shots'"),
        ({"benchmark": "mgsm", "world": {}}, "found world, benchmark"),
        ({"files": ["a"], "general": ["b"], "shots": 2}, "shots belongs to benchmark"),
    ],
)
def test_what_is_refused_before_a_stage_runs(mgsm: Path, data: dict[str, Any], told: str) -> None:
    with pytest.raises(RamoeError, match=told):
        stages(mgsm, **data)


def test_a_benchmark_needs_a_tokenizer_and_text_to_pretrain_on(mgsm: Path) -> None:
    data = {"benchmark": "mgsm", "source": "./mgsm"}
    with pytest.raises(RamoeError, match=r"data\.benchmark needs tokenizer"):
        plan(mgsm, data=data)
    with pytest.raises(RamoeError, match=r"pretrain with data\.benchmark needs data\.pretrain"):
        plan(mgsm, data=data, tokenizer=TOKENIZER)
