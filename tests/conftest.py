"""Settings and fixtures shared by all tests, and how they are spread over processes."""

import os
import resource
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# The tests are about gloo ranks on a CPU, also on a machine that has a GPU; before torch asks for devices.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
if "PYTEST_XDIST_WORKER" in os.environ:  # the cores are busy with the other processes
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in ("COLUMNS", "LINES"):  # of a screen that the processes of the tests do not have
        os.environ.pop(name, None)

# The first call of many torch functions is slow and CI machines are shared: a deadline per example would only
# be noise.
settings.register_profile("ramoe", deadline=None, max_examples=50)
settings.load_profile("ramoe")

# What starts ranks or jobs, by file or by the session fixture that several files share; what takes longest
# first.
STARTS = (
    "slurm",
    "layouts",
    "test_families",
    "test_method_layouts",
    "test_selective",
    "test_faults",
    "test_fork_server",
    "test_resume_jobs",
    "test_hybrid",
    "test_lm_eval",
    "test_anchor_stages",
    "test_steering_job",
    "test_benchmarks",
    "test_cpu_attention",
    "test_doctor",
    "test_doctor_recipes",
    "test_model_flags",
    "test_launch",
    "test_stages",
    "test_runner",
    "test_mcore_launch",
    "test_example_script",
    "test_smolmoe",
    "test_slurm_scripts",
    "test_versions",
)
SHARED = {
    **dict.fromkeys(("test_slurm_chain", "test_slurm_faults", "test_slurm_by_hand"), "slurm"),
    "test_operations": "test_cpu_attention",
    "test_adapters": "test_selective",  # one import for the ranks of both
    "test_family_methods": "test_families",
}


def started_by(stem: str) -> str:
    """The name in `STARTS` of a file, else its own. Tests of one name run in one process."""
    return SHARED.get(stem, "layouts" if stem.startswith("test_layouts") else stem)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first."""
    place = {name: number for number, name in enumerate(STARTS)}
    for item in items:
        if started_by(item.path.stem) in place:
            item.add_marker(pytest.mark.starts)
    items.sort(key=lambda item: place.get(started_by(item.path.stem), len(place)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files that share a session fixture go to one process, so that it is made once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFixture(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return started_by(Path(nodeid.partition("::")[0]).stem)

    return ByFixture(config, log)


CPU = pytest.StashKey[float]()


def pytest_collection_finish(session: pytest.Session) -> None:
    session.stash[CPU] = cpu_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Note in a report what was used and measured since the report before it."""
    report = yield
    before, item.session.stash[CPU] = item.session.stash[CPU], cpu_seconds()
    report.cpu = item.session.stash[CPU] - before
    report.layout_errors = sys.modules["layout_errors"].taken() if "layout_errors" in sys.modules else []
    return report


def cpu_seconds() -> float:
    """Of this process, of those that it has waited for, and of the worker's tables; not of Slurm's jobs."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    tables = sys.modules["small_run"].forked_seconds[0] if "small_run" in sys.modules else 0.0
    return sum(one.ru_utime + one.ru_stime for one in used) + tables


@pytest.fixture(scope="session", autouse=True)
def cache_of_data(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Training data are kept in a folder of the tests, also by the jobs that the tests start."""
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("data-cache"))


@pytest.fixture(scope="module", autouse=True)
def losses_of_megatron() -> None:
    """Megatron keeps the figures and the scale of its losses in the process: no file inherits them."""
    moe = "megatron.core.transformer.moe"
    if logging := sys.modules.get(f"{moe}.moe_logging"):
        logging.destroy_moe_metrics_tracker()
    if utils := sys.modules.get(f"{moe}.moe_utils"):
        utils.MoEAuxLossAutoScaler.main_loss_backward_scale = None


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all rows of `layout_rows`, which run once for all `test_layouts*.py`."""
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
    """The files that take most CPU seconds, and what the tests of layouts and of families measured."""
    reports = [
        report for found in terminalreporter.stats.values() for report in found if hasattr(report, "cpu")
    ]
    spent: Counter[str] = Counter()
    for report in reports:
        spent[report.nodeid.partition("::")[0]] += report.cpu
    if sum(spent.values()) > 60:
        terminalreporter.section("CPU seconds by file")
        for name, seconds in spent.most_common(20):
            terminalreporter.line(f"{seconds:7.1f}  {name}")
    called = [report for report in reports if report.when == "call"]
    found = [value for report in called for name, value in report.user_properties if name == "parity"]
    if found:
        terminalreporter.section("converted models against transformers: logits, in standard deviations")
        for model, layout, worst in sorted(found):
            terminalreporter.line(f"{model:<24} {layout:<8} {worst:.1e}   same first choice, same experts")
    if errors := [error for report in reports for error in report.layout_errors]:
        from layout_errors import table

        terminalreporter.section("router gradients against one rank: worst relative error")
        for line in table(errors):
            terminalreporter.line(line)
