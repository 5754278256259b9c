"""`ramoe doctor` of this node: versions, devices, ports, Slurm and the output folder."""

import contextlib
import socket
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from doctor_world import ramoe, told
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ramoe_megatron.mcore.findings import Finding
from ramoe_megatron.recipe import doctor_environment
from ramoe_megatron.recipe.doctor_environment import environment_findings, folder_findings

ROOT = Path(__file__).parents[2]
MINORS = ["0.16.1", "0.17.1", "0.18.2", "0.19.2", "0.20.0", "0.21.0"]
"""A version of megatron-core of each kind."""


def test_versions_asked_for_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"torch{doctor_environment.PACKAGES['torch']}" in project["dependencies"]
    # `attach` takes older versions than the jobs, and no newer ones
    jobs = SpecifierSet(doctor_environment.PACKAGES["megatron-core"])
    (package,) = (Requirement(text) for text in project["dependencies"] if "megatron-core" in text)
    assert [v for v in MINORS if v in package.specifier] == ["0.17.1", "0.18.2", "0.19.2", "0.20.0"]
    assert [v for v in MINORS if v in jobs] == ["0.19.2", "0.20.0"]
    assert project["requires-python"] == doctor_environment.PYTHON


@pytest.mark.parametrize("version", ["0.18.2", "0.21.0"])
def test_a_version_that_does_not_fit_is_fatal(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.9.1", "megatron-core": version}
    monkeypatch.setattr(doctor_environment, "_installed", versions.get)
    found = environment_findings(1, 1, None, {})
    assert {f.check: f.state for f in found}["megatron-core"] == "fatal"
    assert told(found, "torch").state == "ok"
    assert told(found, "transformer-engine").state == "ok", "not needed on the CPU"


@pytest.mark.parametrize(("local", "state"), [(False, "warning"), (True, "ok")])
def test_transformer_engine_is_missed_where_there_is_a_device(
    local: bool, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
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
            assert all(
                f.check != "MASTER_PORT" for f in environment_findings(1, 2, None, place | {"NODE_RANK": "1"})
            )
            assert all(f.check != "MASTER_PORT" for f in environment_findings(1, 1, None, place))
    free = {"NODE_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    assert told(environment_findings(1, 2, None, free), "MASTER_PORT").state == "ok"


def test_nodes_that_cannot_meet_are_fatal() -> None:
    assert told(environment_findings(1, 2, None, {}), "nodes").state == "warning", "a login node is no fault"
    assert told(environment_findings(1, 2, None, {"NODE_RANK": "0"}), "nodes").state == "fatal"
    assert (
        told(environment_findings(1, 2, None, {"NODE_RANK": "2", "MASTER_ADDR": "localhost"}), "nodes").state
        == "fatal"
    )
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
    found = told(
        environment_findings(
            1, 2, None, place | {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"} | variables
        ),
        "Slurm",
    )
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
        "file locks",
        "fatal",
        f"{tmp_path}: the file system grants two locks on one file at once",
        "put the run folder on a file system with flock",
    )
