"""`ramoe doctor`: what would stop a job is told before it starts, what is in order is not accused, and nothing stays behind."""

import contextlib
import json
import os
import socket
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from small_run import LANGUAGES, load_flags, model_flags, offline_flags, profile_flags, training_flags, write_world

from ramoe_megatron.cli import main
from ramoe_megatron.findings import Finding, Line
from ramoe_megatron.method.artefacts import ExpertFile, ModelShape, UsageFile
from ramoe_megatron.method.divergence import NoZone, Zone
from ramoe_megatron.recipe import doctor, doctor_environment
from ramoe_megatron.recipe.doctor_environment import environment_findings, folder_findings

ROOT = Path(__file__).parents[1]


def ramoe(*words: str) -> Result:
    return CliRunner(env={"COLUMNS": "300"}).invoke(main, ["doctor", *words])


def told(findings: list[Finding], check: str) -> Finding:
    (found,) = [finding for finding in findings if finding.check == check]
    return found


def paths(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def save_experts(path: Path, zone: Zone | NoZone = Zone(1, 2, "1-2", "given"), layers: int = 4, experts: int = 8) -> Path:  # noqa: B008
    even = torch.full((2, layers, experts), 1 / experts)
    mask = torch.zeros(2, layers, experts, dtype=torch.bool)
    mask[..., 0] = True
    ExpertFile(
        tasks=("even", "odd"), shape=ModelShape(layers, experts, 2, "softmax", 32), expert_mask=mask, delta=torch.zeros_like(even),
        task_frequency=even * 2, general_frequency=even[0] * 2, english_pattern={"last": even}, layer_number=torch.arange(1, layers + 1),
        rule={"name": "top-m", "m": 1}, zone=zone, checkpoint="base@1",
    ).save(path)  # fmt: skip
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, tokenizer, taxonomy, expert files, and a folder that passes for a checkpoint."""
    folder = tmp_path_factory.mktemp("doctor")
    write_world(folder)
    (folder / "base").mkdir()
    (folder / "base" / "latest_checkpointed_iteration.txt").write_text("1")
    save_experts(folder / "experts.safetensors")
    save_experts(folder / "foreign.safetensors", layers=6)
    save_experts(folder / "zoneless.safetensors", NoZone("the curve is flat"))
    shape, used = ModelShape(6, 8, 2, "softmax", 32), torch.full((1, 6, 8), 0.25)
    UsageFile(("en",), shape, torch.tensor([9]), used, used, torch.arange(1, 7), "base@1").save(folder / "usage.safetensors")
    rows = (folder / "parallel.jsonl").read_text().splitlines()
    (folder / "broken.jsonl").write_text("\n".join([*rows[:4], rows[4][:-9], *rows[5:]]) + "\n")
    (folder / "short.jsonl").write_text("\n".join((folder / "taxonomy.jsonl").read_text().splitlines()[:6]) + "\n")
    return folder


def alignment(world: Path, experts: str = "experts.safetensors") -> list[str]:
    flags = ["--ramoe-coeff", "1", "--ramoe-experts", str(world / experts), "--ramoe-taxonomy", str(world / "taxonomy.jsonl")]
    return [*load_flags(world), *flags, "--save", str(world / "tuned"), "--save-interval", "2"]


# name -> job, further flags, ranks, the check that fails, what is told of it
FATAL: dict[str, tuple[str, str, int, str, list[str]]] = {
    "tp 3": ("finetune", "--tensor-model-parallel-size 3", 2, "layout", ["2 ranks, but TP 3 x PP 1 x CP 1", "multiple of 3"]),
    "ep": ("finetune", "--expert-model-parallel-size 4", 2, "layout", ["EP 4", "multiple of 4"]),
    "experts": ("finetune", "--expert-model-parallel-size 2 --num-experts 5", 2, "layout", ["does not divide --num-experts 5"]),
    "batch": ("finetune", "--global-batch-size 20", 2, "layout", ["20 is no multiple", "4 x DP 2 = 8"]),
    "cp": ("taxonomy", "--context-parallel-size 2", 2, "layout", ["--context-parallel-size 2", "whole sequences"]),
    "flag": ("finetune", "--tensor-model-paralel-size 2", 1, "flags", ["unrecognized arguments: --tensor-model-paralel-size 2"]),
    "value": ("finetune", "--micro-batch-size many", 1, "flags", ["--micro-batch-size", "'many'"]),
    "interval": ("finetune", "--save there", 1, "flags", ["save_interval"]),
    "heads": ("finetune", "--num-attention-heads 3", 1, "flags", ["hidden_size % args.num_attention_heads"]),
    "together": ("finetune", "--ramoe-coeff 1", 1, "flags", ["--ramoe-coeff 1.0 without --ramoe-experts"]),
    "tokenizer": ("finetune", "--tokenizer-model absent.model", 1, "tokenizer", ["absent.model"]),
    "tokenizer offline": ("evaluate", "--tokenizer-model absent.model", 1, "tokenizer", ["absent.model"]),
    "data": ("finetune", "--ramoe-data {world}/broken.jsonl", 1, "data", ["broken.jsonl, line 5"]),
    "data offline": ("evaluate", "--ramoe-data {world}/broken.jsonl", 1, "data", ["broken.jsonl, line 5"]),
    "split": ("finetune", "--ramoe-split dev", 1, "data", ["empty split 'dev'"]),
    "languages": ("taxonomy", "--ramoe-languages en", 1, "data", ["only 'en' rows"]),
    "weights": ("finetune", "--ramoe-weights even/*=1", 1, "data", ["no pattern matches", "odd/en"]),
    "long": ("finetune", "--seq-length 24", 1, "data", ["longer than --seq-length 24", "needs 28"]),
    "base": ("finetune", "--pretrained-checkpoint {world}/absent", 1, "checkpoint", ["--pretrained-checkpoint", "no checkpoint there"]),
    "load": ("predict", "--load {world}/absent", 1, "checkpoint", ["--load", "no checkpoint there"]),
    "foreign": ("aligned", "--ramoe-experts {world}/foreign.safetensors", 1, "expert file", ["num_moe_layers is 6", "4 in the model"]),
    "frequency": ("aligned", "--moe-layer-freq [1,0,1,0]", 1, "expert file", ["num_moe_layers is 4", "2 in the model"]),
    "evaluation": ("evaluate", "--ramoe-experts {world}/foreign.safetensors", 1, "expert file", ["num_moe_layers is 6"]),
    "steering": ("evaluate", "--ramoe-steer soft", 1, "steering", ["--ramoe-experts is missing"]),
    "steering file": (
        "evaluate", "--ramoe-method x --ramoe-steering no.json --ramoe-experts {world}/experts.safetensors", 1, "steering", ["no.json"]
    ),
    "steering hard": (
        "evaluate", "--ramoe-method x --ramoe-steer hard --ramoe-experts {world}/later.safetensors --moe-router-score-function sigmoid", 1,
        "steering", ["--moe-router-score-function sigmoid", "--ramoe-steer soft"],
    ),
    "search hard": (
        "steer", "--moe-router-num-groups 4 --moe-router-group-topk 2", 1, "settings", ["--moe-router-group-topk 2", "--ramoe-kinds soft"]
    ),
    "settings": ("steer", "--ramoe-taus best", 1, "settings", ["'best'"]),
    "steer foreign": ("steer", "--ramoe-experts {world}/foreign.safetensors", 1, "expert file", ["num_moe_layers is 6"]),
    "zone": ("aligned", "--ramoe-experts {world}/zoneless.safetensors", 1, "expert file", ["--ramoe-layers auto", "the curve is flat"]),
    "layers": ("aligned", "--ramoe-layers 2-7", 1, "expert file", ["2-7", "0 to 3"]),
    "labels": ("aligned", "--ramoe-taxonomy {world}/short.jsonl", 1, "labels", ["have no category"]),
    "forced": ("aligned", "--moe-router-force-load-balancing", 1, "alignment", ["--moe-router-force-load-balancing"]),
    "usage": ("finetune", "--ramoe-train esft-gate --ramoe-train-top-p 0.3 --ramoe-usage {world}/no.safetensors", 1, "selection",
              ["no.safetensors", "no such file"]),
    "usage of another": ("finetune", "--ramoe-train rise --ramoe-train-budget 3 --ramoe-usage {world}/usage.safetensors", 1, "selection",
                         ["num_moe_layers is 6", "4 in the model"]),
    "budget": ("finetune", "--ramoe-train rise", 1, "flags", ["without --ramoe-usage"]),
    "rule": ("profile", "--ramoe-select best", 1, "expert rule", ["'best'"]),
    "general": ("profile", "--ramoe-general {world}/absent.jsonl", 1, "general text", ["absent.jsonl"]),
    "taxonomy": ("profile", "--ramoe-taxonomy {world}/general.jsonl", 1, "taxonomy", ["general.jsonl:1"]),
    "divergence": ("predict", "", 1, "divergence", ["--ramoe-divergence-file is missing"]),
}  # fmt: skip
SOUND = {"finetune": 2, "aligned": 1, "taxonomy": 2, "profile": 1, "evaluate": 1, "steer": 1}


def line(name: str, kind: str, more: list[str], ranks: int, world: Path) -> Line:
    flags = {
        "finetune": lambda: training_flags(world, *load_flags(world), *more),
        "aligned": lambda: training_flags(world, *alignment(world), *more),
        "profile": lambda: profile_flags(world, "out", *more),
        "steer": lambda: offline_flags(world, "out", "--ramoe-experts", str(world / "experts.safetensors"), "--ramoe-taus", "file", *more),
    }.get(kind, lambda: offline_flags(world, "out", *more))()
    coming = {str(world / "later.safetensors"): "earlier"}
    return Line(name, "finetune" if kind == "aligned" else kind, flags, ranks, coming=coming)


@pytest.fixture(scope="module")
def listing(world: Path) -> list[str]:
    return paths(world)


@pytest.fixture(scope="module")
def answers(world: Path, listing: list[str]) -> dict[str, list[Finding]]:
    """The findings about every row of the tables, from one process."""
    lines = [line(f"sound {kind}", kind, [], ranks, world) for kind, ranks in SOUND.items()]
    for name, (kind, more, ranks, _, _) in FATAL.items():
        lines.append(line(name, kind, more.format(world=world).split(), ranks, world))
    board = ["--tensorboard-dir", str(world / "board"), "--ramoe-languages", *LANGUAGES]
    lines.append(line("board", "finetune", board, 1, world))
    coming = {str(world / name): "earlier" for name in ("absent", "no.jsonl", "no.safetensors", "no.model")}
    absent = f"--ramoe-data {world}/no.jsonl --ramoe-experts {world}/no.safetensors --tokenizer-model {world}/no.model"
    later = line("later", "aligned", f"{absent} --pretrained-checkpoint {world}/absent".split(), 1, world)
    lines.append(Line("later", later.job, later.flags, coming=coming))
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
    assert layout == "2 ranks = TP 1 x PP 1 x CP 1 x DP 2, experts EP 1 x ETP 1; global batch 16 = 2 micro-batches x 4 x DP 2"
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


def test_trying_a_command_line_leaves_nothing_behind(answers: dict[str, list[Finding]], world: Path, listing: list[str]) -> None:
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


# ---- this node ----


def test_versions_asked_for_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [f"torch{doctor_environment.PACKAGES['torch']}", f"megatron-core[training]{doctor_environment.PACKAGES['megatron-core']}"]
    assert set(asked) <= set(project["dependencies"])
    assert project["requires-python"] == doctor_environment.PYTHON


def test_a_version_that_does_not_fit_is_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.9.1", "megatron-core": "0.20.0"}
    monkeypatch.setattr(doctor_environment, "_installed", versions.get)
    found = environment_findings(1, 1, None, {})
    assert {f.check: f.state for f in found}["megatron-core"] == "fatal"
    assert told(found, "torch").state == "ok"
    assert told(found, "transformer-engine").state == "ok", "not needed on the CPU"


@pytest.mark.parametrize(("local", "state"), [(False, "warning"), (True, "ok")])
def test_transformer_engine_is_missed_where_there_is_a_device(local: bool, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_environment, "_installed", lambda name: None)
    assert doctor_environment._transformer_engine(8, local).state == state


def test_devices_that_torch_does_not_see_are_fatal() -> None:
    """Real torch, which sees no device here."""
    if torch.cuda.device_count():
        pytest.skip("torch sees devices")
    assert doctor_environment._devices(8, 4)[0].state == "fatal"
    assert "on the CPU" in doctor_environment._devices(8, 4)[0].found


def test_too_few_devices_are_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [doctor_environment._devices(ranks, 4)[0].state for ranks in (4, 5)] == ["ok", "fatal"]


@contextlib.contextmanager
def taken_port() -> Iterator[int]:
    with socket.create_server(("", 0)) as server:
        yield server.getsockname()[1]


def test_a_port_that_is_taken_is_fatal_on_node_0_alone() -> None:
    with taken_port() as port:
        for offset in (0, 1):  # the ranks' own port, and the one that the nodes of a recipe meet at
            place = {"NODE_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port - offset)}
            found = told(environment_findings(1, 2, None, place), "MASTER_PORT")
            assert found.state == "fatal"
            assert f"port {port} " in found.found
            assert all(f.check != "MASTER_PORT" for f in environment_findings(1, 2, None, place | {"NODE_RANK": "1"}))
            assert all(f.check != "MASTER_PORT" for f in environment_findings(1, 1, None, place))
    free = {"NODE_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    assert told(environment_findings(1, 2, None, free), "MASTER_PORT").state == "ok"


def test_nodes_that_cannot_meet_are_fatal() -> None:
    assert told(environment_findings(1, 2, None, {}), "nodes").state == "warning", "a login node is no fault"
    assert told(environment_findings(1, 2, None, {"NODE_RANK": "0"}), "nodes").state == "fatal"
    assert told(environment_findings(1, 2, None, {"NODE_RANK": "2", "MASTER_ADDR": "localhost"}), "nodes").state == "fatal"
    place = {"NODE_RANK": "1", "MASTER_ADDR": "no-such-host.invalid"}
    assert told(environment_findings(1, 2, None, place), "MASTER_ADDR").state == "fatal"


@pytest.mark.parametrize(
    ("variables", "state"),
    [
        ({}, "ok"),
        ({"SLURM_NTASKS_PER_NODE": "1"}, "ok"),
        ({"SLURM_NTASKS_PER_NODE": "8"}, "fatal"),
        ({"SLURM_JOB_NUM_NODES": "1"}, "fatal"),
    ],
)
def test_slurm_is_to_start_one_task_a_node(variables: dict[str, str], state: str) -> None:
    place = {"NODE_RANK": "1", "MASTER_ADDR": "localhost"}
    found = told(environment_findings(1, 2, None, place | {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"} | variables), "Slurm")
    assert found.state == state
    assert "job 7 on n[1-2]" in found.found


def test_a_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("x")
    for folder in (tmp_path, tmp_path / "a" / "b"):
        found = folder_findings(folder)
        assert {f.check: f.state for f in found} == {"output folder": "ok", "file locks": "ok", "disk": "ok"}
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert folder_findings(tmp_path, needed=1 << 60)[-1].state == "warning"


@pytest.mark.parametrize("place", ["file", "file/below", "/proc"])
def test_a_folder_that_cannot_be_written_is_fatal(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    result = ramoe("--out", str(tmp_path / place))  # /proc refuses root too
    assert result.exit_code == 1
    assert "fatal" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_locks_that_do_not_exclude_are_fatal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import filelock

    monkeypatch.setattr(filelock, "FileLock", lambda *_, **__: contextlib.nullcontext())
    assert folder_findings(tmp_path)[1] == Finding(
        "file locks", "fatal", f"{tmp_path}: two locks on one file at once", "put the run folder on a file system with flock"
    )


# ---- recipes ----


def recipe(world: Path, folder: Path, **changes: Any) -> Path:
    model: dict[str, Any] = {}
    name = ""
    for word in model_flags(world):
        if word.startswith("--"):
            name, word = word.removeprefix("--"), True
        if not name.startswith("tokenizer"):
            model[name] = word
    train = {"train-iters": 4, "micro-batch-size": 2, "global-batch-size": 8, "lr": 1e-3, "eval-iters": 0}
    whole = {
        "name": "small", "model": model, "train": train, "pretrain": {"train-iters": 8}, "data": {"world": {}},
        "alignment": {"coeff": 1}, "methods": ["sft", "ra-moe"], "seeds": 2, **changes,
    }  # fmt: skip
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(whole))
    return path


def test_a_recipe_whose_files_are_still_to_be_written_is_healthy(world: Path, tmp_path: Path) -> None:
    """What lies in the run folder from another time is going to be replaced: nothing is said against it either."""
    path, out = recipe(world, tmp_path), tmp_path / "run"
    out.mkdir()
    manifest = {"format": "ramoe-manifest", "version": 1, "recipe": "small", "megatron_flags": {}, "stages": {}}
    (out / "manifest.json").write_text(json.dumps(manifest))
    for name in ("experts.safetensors", "divergence.csv"):
        (out / name).write_text("of another model")
    before = paths(tmp_path)
    result = ramoe(str(path), "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "fatal" not in result.output
    rows = {row.split("│")[1].strip(): row for row in result.output.splitlines() if row.startswith("│")}
    assert "written by stage data" in rows["tokenizer"]
    assert "written by stage profile" in rows["expert file"]
    assert paths(tmp_path) == before


def test_a_fault_of_one_stage_is_told_of_that_stage_and_no_other(world: Path, tmp_path: Path) -> None:
    methods = ["sft", {"name": "ra-moe", "train": {"lr": "fast"}}, {"name": "long", "train": {"sequence-lenght": 3}}]
    path = recipe(world, tmp_path, methods=methods, seeds=2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").write_text("no run folder")
    found = doctor.recipe_findings(path, ["train.global-batch-size=9"], tmp_path / "run", os.environ)
    flags = told(found, "flags")
    assert flags.state == "fatal"
    assert flags.found.splitlines() == [
        "finetune (2): argument --lr: invalid float value: 'fast'",
        "finetune (2): unrecognized arguments: --sequence-lenght 3",
    ]
    assert "sequence-lenght" in told(found, "flag names").found
    assert "9 would have to be a multiple of" in told(found, "recipe").found
    assert "no run folder" in told(found, "run folder").found
    assert told(found, "layout").found.startswith("pretrain, finetune (2): --global-batch-size 9")
    assert told(found, "tokenizer").state == "ok"


def test_a_checkpoint_that_a_recipe_names_in_vain_is_fatal_and_no_usage_error(world: Path, tmp_path: Path) -> None:
    path = recipe(world, tmp_path)
    found = doctor.recipe_findings(path, ["checkpoint=no/where", "pretrain=null"], tmp_path / "run", os.environ)
    assert "no Megatron checkpoint folder" in told(found, "recipe").found


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


def test_findings_of_stages_are_merged_into_a_line_a_check() -> None:
    ok, low, bad = Finding("a", "ok", "fine"), Finding("a", "warning", "slow", "hurry"), Finding("a", "fatal", "gone", "look")
    assert doctor.merged({"x/1": [ok], "x/2": [ok]}) == [ok]
    assert doctor.merged({"x/1": [bad], "x/2": [bad]}) == [bad]
    assert doctor.merged({"x/1": [ok], "y": [bad], "x/2": [bad]}) == [Finding("a", "fatal", "y, x/2: gone", "look")]
    assert doctor.merged({"x/1": [low], "y": [bad]}) == [Finding("a", "fatal", "x/1: slow\ny: gone", "look")]
    waits = [Finding("a", "ok", f"written by stage finetune/{n}") for n in (1, 2)]
    assert doctor.merged({f"evaluate/{n}": [f] for n, f in enumerate(waits)})[0].found == "written by stage finetune (2)"
    assert [doctor.healthy(f) for f in ([ok, low], [ok, bad])] == [True, False]


def test_space_is_reckoned_for_the_fine_tunes_to_come(world: Path, tmp_path: Path) -> None:
    from ramoe_megatron.recipe.load import load_recipe
    from ramoe_megatron.recipe.manifest import Manifest
    from ramoe_megatron.recipe.plan import make_plan

    base = tmp_path / "base"
    (base / "iter_0000003").mkdir(parents=True)
    (base / "iter_0000003" / "weights").write_bytes(bytes(1000))
    (base / "latest_checkpointed_iteration.txt").write_text("3")
    path = recipe(world, tmp_path, pretrain=None, checkpoint=str(base))
    plan = make_plan(load_recipe(path), tmp_path / "run", tmp_path)
    coming = doctor.coming_files(plan, Manifest(tmp_path / "run", "small"))
    assert doctor.expected_bytes(plan, coming) == 4 * 1000
    assert doctor.expected_bytes(plan, {stage.name: {} for stage in plan}) == 0
