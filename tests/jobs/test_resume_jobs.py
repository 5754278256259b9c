"""Offline jobs that are killed with SIGKILL at a random moment, on one rank or on all, and started again with
the same command.

The law: their files have the bytes of a run that nothing stopped, and a restart repeats at most one shard.
Real Megatron on two gloo ranks; what the ranks do is in `resume_worker.py`.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from small_run import fork_server, offline_flags, profile_flags, training_flags, write_world

from ramoe_megatron.recipe.fork_server import Forked

HERE = Path(__file__).parents[1] / "support"
LAYOUT = ("--expert-model-parallel-size", "2")
OTHER = ("--tensor-model-parallel-size", "2")
JOBS = ("taxonomy", "profile", "evaluate", "steer")
KILLS = 3
OUTPUTS = {
    "taxonomy": {"taxonomy.jsonl", "taxonomy.json"},
    "profile": {
        "experts.safetensors",
        "experts-last.safetensors",
        "divergence.csv",
        "divergence-by-task.csv",
        "priors.safetensors",
        "usage.safetensors",
    },
    "evaluate": {"base.json", "base.jsonl"},
    "steer": {"steering.json"},
}


def argv(folder: Path, job: str, output: str, *more: str) -> list[str]:
    if job == "profile":
        return profile_flags(folder, output, "--ramoe-save-usage", *LAYOUT, *more)
    experts = (
        ["--ramoe-experts", str(folder / "profile-whole/experts.safetensors")]
        if job in ("evaluate", "steer")
        else []
    )
    if job == "steer":  # 13 settings
        experts += ["--ramoe-taus", "file", "--ramoe-zones", "1-2", "0-3", "2-3", "--ramoe-languages", "es"]
        experts += ["--ramoe-strengths", "0.25", "0.5", "1.0"]
    return offline_flags(
        folder, output, "--ramoe-split", "train,test", "--ramoe-max-new-tokens", "4", *experts, *LAYOUT, *more
    )


def killed_rows(folder: Path, job: str, generator: random.Random) -> list[dict[str, Any]]:
    """An undisturbed run, and a run that is killed `KILLS` times before it ends.

    Each kill comes within three shards of at least twelve.
    """
    rows = [{"name": f"{job}-whole", "job": job, "argv": argv(folder, job, f"{job}-whole")}]
    for number in range(KILLS):
        kill = [
            generator.choice([[0], [1], [0, 1]]),
            generator.randint(0 if number else 1, 2),
            generator.uniform(0, 0.06),
        ]
        if job == "evaluate" and number == KILLS - 1:
            kill[1] += 12  # the first 12 of its 18 shards are scores, the others routing mass
        rows.append(
            {
                "name": f"{job}-{number}",
                "job": job,
                "argv": argv(folder, job, f"{job}-killed"),
                "kill": kill,
                "slow": 0.03,
            }
        )
    return [*rows, {"name": f"{job}-{KILLS}", "job": job, "argv": argv(folder, job, f"{job}-killed")}]


def start(folder: Path, name: str, table: list[dict[str, Any]]) -> Forked:
    path = folder / f"{name}.table.json"
    path.write_text(json.dumps(table))
    worker = [str(HERE / "resume_worker.py"), str(path), str(folder)]
    leader = fork_server().start(worker, 2, {**os.environ, "OMP_NUM_THREADS": "1"})
    assert leader
    log = (folder / f"{name}.log").open("wb", buffering=0)
    threading.Thread(target=shutil.copyfileobj, args=(leader.stdout, log)).start()
    return leader


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(found for child in children for found in family(int(child)))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    write_world(folder)
    generator = random.Random(3)
    base = training_flags(
        folder, "--train-iters", "1", "--save", str(folder / "base"), "--save-interval", "1", *LAYOUT
    )
    group = {"name": "group-0", "job": "profile", "argv": argv(folder, "profile", "group"), "slow": 0.1}
    first = start(folder, "first", [{"name": "base", "job": "finetune", "argv": base}, group])
    log, limit = folder / "group-0.0.log", time.monotonic() + 120
    while not (log.exists() and log.read_text().count("SAVE") >= 4):
        assert first.poll() is None, (folder / "first.log").read_text()[-4000:]
        assert time.monotonic() < limit
        time.sleep(0.01)
    for pid in family(first.pid):  # their leader, the ranks, and the forks that run the job
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    first.wait()

    other = argv(folder, "profile", "other-layout")
    rows = [{"name": "group-1", "job": "profile", "argv": group["argv"]}]
    for job in ("profile", "taxonomy", "evaluate", "steer"):  # the last two need the profile's file
        rows += killed_rows(folder, job, generator)
    rows += [
        {"name": "layout-0", "job": "profile", "argv": other, "kill": [[0, 1], 3, 0.0]},
        {"name": "layout-1", "job": "profile", "argv": [*other, "--expert-model-parallel-size", "1", *OTHER]},
        {
            "name": "held",
            "job": "taxonomy",
            "argv": argv(folder, "taxonomy", "held"),
            "hold": "held/.taxonomy-shards/lock",
        },
        {
            "name": "damaged",
            "job": "profile",
            "argv": other,
            "truncate": "other-layout/.profile-shards/*/state.safetensors",
        },
    ]
    done = start(folder, "second", rows)
    assert done.wait(timeout=400) == 0, (folder / "second.log").read_text()[-4000:]
    return folder


def lines(folder: Path, name: str, rank: int = 0) -> list[str]:
    return (folder / f"{name}.{rank}.log").read_text().splitlines()


def saved(found: list[str]) -> list[int]:
    return [int(line.split()[1]) for line in found if line.startswith("SAVE")]


def attempts(folder: Path, job: str) -> list[list[str]]:
    return [lines(folder, f"{job}-{number}") for number in range(KILLS + 1)]


def same_files(one: Path, other: Path, names: set[str]) -> None:
    for folder in (one, other):
        assert {path.name for path in folder.iterdir()} == names, (
            "no shards are left, and no half-written file"
        )
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("job", JOBS)
def test_a_killed_job_gives_the_bytes_of_one_that_nothing_stopped(runs: Path, job: str) -> None:
    assert all("END" not in found for found in attempts(runs, job)[:-1]), "each kill came before the end"
    assert attempts(runs, job)[-1][-1] == "END"
    same_files(runs / f"{job}-whole", runs / f"{job}-killed", OUTPUTS[job])


@pytest.mark.parametrize("job", JOBS)
def test_each_restart_repeats_at_most_one_shard(runs: Path, job: str) -> None:
    whole = lines(runs, f"{job}-whole")
    total = len(saved(whole))
    assert saved(whole) == list(range(total))
    upcoming = 0
    for found in attempts(runs, job):
        numbers = saved(found)
        told = [line for line in found if "goes on after" in line]
        begun = int(told[0].split("goes on after ")[1].split()[0]) if told else 0
        assert not told or told == [f"ramoe: goes on after {begun} of {total} shards"]
        assert upcoming - 1 <= begun <= upcoming, (
            "the shard that was being saved may be repeated, none before it"
        )
        assert numbers == list(range(begun, begun + len(numbers)))
        upcoming = begun + len(numbers)
    assert upcoming == total
    passes = [line for line in whole if line == "RUN" or line.startswith("SAVE")]
    # forward passes of the longest shard
    a_shard = max(part.count("RUN") for part in " ".join(passes).split("SAVE"))
    again = sum(found.count("RUN") for found in attempts(runs, job)) - whole.count("RUN")
    assert 0 <= again <= KILLS * a_shard


@pytest.mark.parametrize("job", JOBS)
def test_progress_counts_what_is_skipped_and_ends_at_the_total(runs: Path, job: str) -> None:
    def progress(found: list[str]) -> list[dict[str, Any]]:
        return [
            json.loads(line.removeprefix("RAMOE-PROGRESS "))
            for line in found
            if line.startswith("RAMOE-PROGRESS")
        ]

    whole, last = progress(lines(runs, f"{job}-whole")), progress(lines(runs, f"{job}-{KILLS}"))
    assert last[-1] == whole[-1]
    assert last[-1]["done"] == last[-1]["total"]
    assert last[0]["done"] > whole[0]["done"]


def test_a_job_whose_launcher_and_ranks_were_killed_goes_on(runs: Path) -> None:
    assert "END" not in lines(runs, "group-0")
    before, after = saved(lines(runs, "group-0")), saved(lines(runs, "group-1"))
    assert after[0] in (before[-1], before[-1] + 1)
    same_files(runs / "group", runs / "profile-whole", OUTPUTS["profile"])


def test_another_layout_starts_from_the_beginning(runs: Path) -> None:
    assert saved(lines(runs, "layout-0"))
    assert not any("goes on" in line for line in lines(runs, "layout-1"))
    assert saved(lines(runs, "layout-1")) == saved(lines(runs, "profile-whole"))
    assert lines(runs, "layout-1")[-1] == "END"
    assert list((runs / "other-layout/.profile-shards").glob("*/state.safetensors")), (
        "the first layout's shards stay for it"
    )


def test_a_second_job_in_the_same_folder_is_refused_on_every_rank(runs: Path) -> None:
    for rank in (0, 1):
        last = lines(runs, "held", rank)[-1]
        assert last.startswith(f"ERROR {runs}/held: another taxonomy job is at work in this folder"), last
    assert {path.name for path in (runs / "held").iterdir()} == {".taxonomy-shards"}


def test_a_damaged_shard_is_refused_by_name_on_every_rank_and_stays(runs: Path) -> None:
    (path,) = (runs / "other-layout/.profile-shards").glob("*/state.safetensors")
    for rank in (0, 1):
        last = lines(runs, "damaged", rank)[-1]
        assert last.startswith(
            f"ERROR {path}: cannot go on from this shard ({path}: not a whole safetensors file"
        ), last
        assert f"remove {path.parent}" in last
        assert "RUN" not in lines(runs, "damaged", rank)
