"""`ramoe doctor` of a command line: it finds what would stop the job, and nothing else."""

import os
from pathlib import Path

import pytest
from broken_lines import FATAL, SOUND, alignment, broken_line, line, sound_line
from doctor_world import paths, ramoe, told, write
from small_run import LANGUAGES, training_flags

from ramoe_megatron.mcore.findings import Finding
from ramoe_megatron.recipe import doctor


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("doctor"))


@pytest.fixture(scope="module")
def listing(world: Path) -> list[str]:
    return paths(world)


@pytest.fixture(scope="module")
def answers(world: Path, listing: list[str]) -> dict[str, list[Finding]]:
    """The findings about every row of the tables, from one process."""
    lines = [sound_line(kind, world) for kind in SOUND]
    lines += [broken_line(name, world) for name in FATAL]
    board = ["--tensorboard-dir", str(world / "board"), "--ramoe-languages", *LANGUAGES]
    lines.append(line("board", "finetune", board, 1, world))
    coming = {str(world / name): "earlier" for name in ("absent", "no.jsonl", "no.safetensors", "no.model")}
    absent = f"--ramoe-data {world}/no.jsonl --ramoe-experts {world}/no.safetensors"
    absent += f" --tokenizer-model {world}/no.model"
    lines.append(
        line("later", "aligned", f"{absent} --pretrained-checkpoint {world}/absent".split(), 1, world, coming)
    )
    flags, found = doctor.ask(lines, os.environ)
    assert "--num-layers" in flags
    return found


@pytest.mark.parametrize("kind", SOUND)
def test_a_sound_command_line_is_not_accused(answers: dict[str, list[Finding]], kind: str) -> None:
    found = answers[f"sound {kind}"]
    # the plain fine-tune saves nothing, and is told so
    assert {f.check: f.found for f in found if f.state != "ok"} == (
        {"saving": "no --save: the trained weights would be lost"} if kind == "finetune" else {}
    )
    assert {"flags", "layout", "tokenizer", "data", "checkpoint"} <= {f.check for f in found}


def test_the_layout_is_told_with_its_batches(answers: dict[str, list[Finding]]) -> None:
    layout = told(answers["sound finetune"], "layout").found
    assert (
        layout == "2 ranks = TP 1 x PP 1 x CP 1 x DP 2, experts EP 1 x ETP 1; "
        "global batch 16 = 2 micro-batches x 4 x DP 2"
    )
    assert told(answers["sound taxonomy"], "layout").found == layout.partition(";")[0]


@pytest.mark.parametrize("name", FATAL)
def test_what_would_stop_a_job_is_told(answers: dict[str, list[Finding]], name: str) -> None:
    *_, check, words = FATAL[name]
    found = told(answers[name], check)
    assert found.state == "fatal"
    assert found.advice
    for word in words:
        assert word in found.found
    others = [f for f in answers[name] if f.state == "fatal" and f.check != check]
    assert not others or name in ("divergence", "load"), "one fault, one line"


def test_what_an_earlier_stage_writes_need_not_be_there(answers: dict[str, list[Finding]]) -> None:
    found = {f.check: f for f in answers["later"]}
    assert all(f.state == "ok" for f in found.values())
    for check in ("tokenizer", "data", "checkpoint", "expert file", "labels"):
        assert found[check].found == "written by stage earlier", check


def test_trying_a_command_line_leaves_nothing_behind(
    answers: dict[str, list[Finding]], world: Path, listing: list[str]
) -> None:
    """Megatron's own start would make the TensorBoard folder."""
    assert all(f.state != "fatal" for f in answers["board"])
    assert paths(world) == listing


def test_a_healthy_job_has_exit_status_0_and_no_line_that_is_not_ok(world: Path) -> None:
    before = paths(world)
    result = ramoe("--ranks", "2", "finetune", *training_flags(world, *alignment(world)))
    assert result.exit_code == 0, result.output
    states = [row.split("│")[2].strip() for row in result.output.splitlines() if row.startswith("│")]
    assert set(states) == {"ok"}
    assert len(states) > 12
    assert paths(world) == before


@pytest.mark.parametrize(
    "words",
    [
        ["absent.yaml"],
        ["fine-tune", "--num-layers", "2"],
        ["--num-layers", "2", "finetune"],
        ["finetune", "--set", "a=1"],
        ["--set", "a=1"],
    ],
)
def test_wrong_usage_has_exit_status_2(words: list[str]) -> None:
    result = ramoe(*words)
    assert result.exit_code == 2
    assert "ramoe: error: doctor" in result.stderr
