"""Settings and the fixture shared by all tests."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# The tests are about gloo ranks on a CPU, also on a machine that has a GPU; before torch asks for devices.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# The first call of many torch functions is slow and CI machines are shared: a deadline per example would only be noise.
settings.register_profile("ramoe", deadline=None, max_examples=50)
settings.load_profile("ramoe")


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all rows of `layout_rows`, which run once for every `test_layouts*.py`: on one rank, on two, on four."""
    from layout_runs import run_all  # Megatron is slow to import

    folder = tmp_path_factory.mktemp("layouts")
    run_all(folder)
    return folder


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real Slurm of three nodes on this machine, for all tests marked `slurm`."""
    from slurm_cluster import SlurmCluster, missing

    if missing():
        pytest.skip(f"needs Slurm and munge (Debian: slurm-wlm, munge): {', '.join(missing())} not found")
    if os.getuid() != 0:
        pytest.skip("needs root: slurmd and munged start jobs and drop their rights")
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), cpus=8) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def slurm_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of data, base model and profile that the Slurm tests share."""
    from slurm_world import write  # Megatron is slow to import

    folder = tmp_path_factory.mktemp("slurm-world")
    write(folder)
    return folder


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The measured errors of the layout tests, where they ran."""
    if "layout_errors" in sys.modules and (lines := sys.modules["layout_errors"].measured.table()):
        terminalreporter.section("router gradients against one rank: worst relative error")
        for line in lines:
            terminalreporter.line(line)
