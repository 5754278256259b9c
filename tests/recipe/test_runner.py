"""Running stages: what is skipped, rerun, moved aside or rejected. Stages are real processes."""

import dataclasses
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench import JOB, Bench
from rich.console import Console

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.recipe.manifest import Manifest
from ramoe_megatron.recipe.runner import StageFailed, run_stages


def test_a_second_run_runs_nothing(bench: Bench) -> None:
    assert bench.run() == ["a", "b", "c", "d"]
    assert bench.run() == []
    assert bench.shown.count("is up to date") == 4


def test_a_changed_setting_reruns_its_stage_and_what_depends_on_it(bench: Bench) -> None:
    bench.run()
    bench.numbers["b"] = 22
    assert bench.run() == ["b", "c"]
    assert bench.superseded() == ["b.txt", "c.txt"], "old results are kept"
    assert (bench.folder / "c.txt").read_text() == str(10 + 22 + 30)


def test_a_rerun_with_an_identical_result_stops_there(bench: Bench) -> None:
    bench.run()
    bench.numbers["b"] = 21  # rounded down to the same result
    assert bench.run() == ["b"]
    assert bench.run() == []


def test_a_result_that_was_changed_or_removed_by_hand_is_made_again(bench: Bench) -> None:
    bench.run()
    (bench.folder / "b.txt").write_text("999")
    assert bench.run() == ["b"]
    assert (bench.folder / "b.txt").read_text() == "30"
    assert bench.superseded() == ["b.txt"]
    (bench.folder / "c.txt").unlink()
    assert bench.run() == ["c"]


def test_a_failure_tells_why_and_the_next_run_goes_on_from_there(bench: Bench) -> None:
    (bench.code / "fail-b").touch()
    with pytest.raises(StageFailed) as caught:
        bench.run()
    assert bench.ran == ["a", "b"]
    assert caught.value.status == 2
    assert "stage b failed" in caught.value.text
    assert "rows.jsonl:3: found no answer\n    ids: a, b" in caught.value.text
    assert str(bench.folder / "logs" / "b.log") in caught.value.text
    (bench.code / "fail-b").unlink()
    assert bench.run() == ["b", "c", "d"]


def test_a_crash_is_told_by_its_exception_and_exit_status_1(bench: Bench) -> None:
    (bench.code / "crash-a").touch()
    with pytest.raises(StageFailed) as caught:
        bench.run()
    assert caught.value.status == 1
    assert "RuntimeError: out of memory" in caught.value.text
    assert "Traceback" not in caught.value.text


def test_an_unfinished_result_is_resumed_under_its_own_settings_and_moved_aside_under_others(
    bench: Bench,
) -> None:
    (bench.code / "crash-a").touch()
    half = bench.folder / "a.txt"

    def crash() -> None:
        with pytest.raises(StageFailed):
            bench.run()

    crash()
    half.write_text("half a checkpoint")
    crash()
    assert "resumes where it stopped" in bench.shown
    assert half.read_text() == "half a checkpoint"
    bench.numbers["a"] = 12
    crash()
    assert "resumes" not in bench.shown
    assert bench.superseded() == ["a.txt"]


def test_from_leaves_earlier_stages_and_forces_the_first(bench: Bench) -> None:
    bench.run()
    bench.numbers["a"] = 100
    assert bench.run(begin=1, force=True) == ["b"], "a is outdated but left; b runs, and gives what it gave"
    assert bench.run(end=1) == ["a"]


def test_a_missing_input_names_the_stage_that_writes_it(bench: Bench) -> None:
    with pytest.raises(RamoeError, match=r"b reads a\.txt, which does not exist: run `--from a`"):
        bench.run(begin=1)


def test_a_stage_that_writes_nothing_is_a_failure(bench: Bench) -> None:
    words = ("job", "a", "3", str(bench.code / "elsewhere.txt"))
    stage = dataclasses.replace(bench.plan()[0], command=words)
    bench.folder.mkdir()
    manifest = Manifest(bench.folder, "bench")
    with pytest.raises(RamoeError, match=r"ended without an error, but a\.txt is missing"):
        run_stages([stage], 0, 1, manifest, Console(file=io.StringIO()))
    assert bench.run()[0] == "a"


def test_a_moved_run_folder_still_stands(bench: Bench, tmp_path: Path) -> None:
    bench.run()
    bench.folder = bench.folder.rename(tmp_path / "moved")
    assert bench.run() == []


def test_folders_of_another_recipe_and_other_folders_are_refused(bench: Bench, tmp_path: Path) -> None:
    bench.run()
    with pytest.raises(RamoeError, match="holds the results of the recipe 'bench', not of 'other'"):
        Manifest(bench.folder, "other")
    with pytest.raises(RamoeError, match="it is no run folder"):
        Manifest(bench.code, "bench")
    (bench.folder / "manifest.json").write_text('{"format": "ramoe-manifest"')
    with pytest.raises(RamoeError, match=r"manifest\.json is damaged"):
        Manifest(bench.folder, "bench")
    assert (bench.folder / "c.txt").exists()


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_lives(bench: Bench) -> None:
    code = (
        "import sys, time; from pathlib import Path; from ramoe_megatron.recipe.manifest import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(bench.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RamoeError, match="another run is at work in"):
            bench.run()
        other.kill()
    assert bench.run() == ["a", "b", "c", "d"], "a killed run leaves no lock behind"


def test_an_interrupted_run_is_recorded_and_goes_on(bench: Bench) -> None:
    waiting = (
        "open(here / 'here', 'w').close(); import time; time.sleep(60 if (here / 'wait').exists() else 0)\n"
    )
    (bench.code / "job.py").write_text(JOB.replace("total = ", waiting + "total = ", 1))
    (bench.code / "wait").touch()
    code = f"""
import sys, os
sys.path.insert(0, {str(Path(__file__).parents[1] / "support")!r})
from pathlib import Path
from bench import Bench
from ramoe_megatron.recipe.processes import stop_signals
bench = object.__new__(Bench)
bench.folder, bench.code = Path({str(bench.folder)!r}), Path({str(bench.code)!r})
bench.numbers = {bench.numbers!r}
with stop_signals():
    bench.run()
"""
    run = subprocess.Popen([sys.executable, "-c", code], env={**os.environ}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (bench.code / "here").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    assert run.wait(30) != 0
    assert Manifest(bench.folder, "bench").reason_to_run(bench.plan()[0]) == "interrupted before"
    (bench.code / "wait").unlink()
    assert bench.run() == ["a", "b", "c", "d"]
