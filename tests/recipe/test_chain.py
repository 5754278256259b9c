"""A recipe as a chain of jobs: which job waits for which, concurrent records, and `ramoe status`."""

import json
import multiprocessing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramoe_megatron.artifacts.files import save_document
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.recipe import slurm
from ramoe_megatron.recipe.chain import forget, links, read_stage, refuse_live, submitted
from ramoe_megatron.recipe.manifest import Manifest
from ramoe_megatron.recipe.stage import Stage
from ramoe_megatron.recipe.status import run_status


def stage(folder: Path, name: str, *sources: str) -> Stage:
    return Stage(
        name,
        ("job", name),
        {},
        tuple(folder / f"{source}.txt" for source in sources),
        (folder / f"{name}.txt",),
        ranks=0,
    )


@given(st.data())
def test_each_stage_waits_for_those_that_it_reads_from_and_only_what_has_to_run_is_submitted(
    data: st.DataObject,
) -> None:
    """Checked against the definition: a stage is submitted if it has to run or reads from a submitted stage.

    It waits for the submitted stages that it reads from.
    """
    names = [f"s{number}" for number in range(data.draw(st.integers(1, 7)))]
    reads = {
        name: data.draw(st.sets(st.sampled_from(names[:place]))) if place else set()
        for place, name in enumerate(names)
    }
    stands = data.draw(st.sets(st.sampled_from(names)))

    class Told:
        def reason_to_run(self, stage: Stage) -> str | None:
            return None if stage.name in stands else "not run yet"

    stages = [stage(Path("/run"), name, *reads[name]) for name in names]
    found = links(stages, Told(), force_first=False)  # type: ignore[arg-type]
    expected: dict[str, list[str]] = {}
    for name in names:
        after = sorted(reads[name] & expected.keys())
        if name not in stands or after:
            expected[name] = after
    assert found == expected
    assert links(stages, Told(), force_first=True).keys() >= {names[0]}  # type: ignore[arg-type]


def record(folder: Path, name: str) -> None:
    manifest = Manifest(folder, "bench")  # all are read before any is written
    BARRIER.wait()
    own = stage(folder, name)
    for _ in range(5):
        manifest.start(own)
        (folder / f"{name}.txt").write_text(name)
        manifest.finish(own)


BARRIER = multiprocessing.get_context("fork").Barrier(6)


def test_jobs_that_record_their_stages_at_once_lose_none(tmp_path: Path) -> None:
    Manifest(tmp_path, "bench").write()
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=record, args=(tmp_path, f"s{number}")) for number in range(6)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
        assert job.exitcode == 0
    entries = Manifest(tmp_path, "bench").stages
    assert {name: entry.state for name, entry in entries.items()} == {
        f"s{number}": "done" for number in range(6)
    }


def test_a_stages_file_that_is_absent_foreign_or_cut_short_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "slurm" / "finetune-x.json"
    save_document(
        path, "ramoe-stage", {"recipe": "r", "stage": stage(tmp_path, "finetune/x", "a").document()}
    )
    assert read_stage(tmp_path, "finetune/x")[0] == stage(tmp_path, "finetune/x", "a")
    whole = path.read_text()
    for text in (
        whole[: len(whole) // 2],
        "{}",
        whole.replace("ramoe-stage", "ramoe-results"),
        whole.replace('"outputs"', '"other"'),
    ):
        path.write_text(text)
        with pytest.raises(RamoeError, match=r"finetune-x\.json"):
            read_stage(tmp_path, "finetune/x")
    path.unlink()
    with pytest.raises(RamoeError, match=r"finetune-x\.json"):
        read_stage(tmp_path, "finetune/x")


class Folder:
    """A run folder with a chain a -> b -> c, jobs 11 to 13."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest(folder, "bench")
        self.manifest.write()
        (folder / "logs").mkdir()
        save_document(
            folder / "slurm.json", "ramoe-slurm", {"recipe": "bench", "jobs": {"a": 11, "b": 12, "c": 13}}
        )

    def ran(self, name: str, job: int, state: str, log: str) -> None:
        self.manifest.start(stage(self.folder, name))
        entry = self.manifest.stages[name]
        entry.job, entry.nodes, entry.state = str(job), "n[1-2]", state  # type: ignore[assignment]
        self.manifest.write()
        (self.folder / f"logs/{name}.log").write_text(log)

    def states(self) -> dict[str, str]:
        return {found.name: found.state for found in run_status(self.folder)}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_each_stage_is_told_and_slurm_is_asked_only_about_what_is_not_done(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = " [2026-01-01 10:00:00.0] iteration        5/      20 | consumed samples: 40 "
    line += "| lm loss: 3.141593E+00 |"
    folder.ran("a", 11, "done", f"=== first\nold line\n=== second\n{line}\nlast words\n")
    folder.ran("b", 12, "failed", "=== x\nramoe: error: rows.jsonl:3: found no answer\n")
    folder.ran("c", 13, "done", "")
    monkeypatch.setattr(
        slurm, "queue", lambda jobs: {} if list(jobs) == [12] else pytest.fail("Slurm was asked about more")
    )
    found = {status.name: status for status in run_status(folder.folder)}
    assert {name: status.state for name, status in found.items()} == {"a": "done", "b": "failed", "c": "done"}
    assert (found["a"].progress, found["a"].line) == ("5/20 iterations, lm loss 3.142", "last words")
    assert (found["a"].job, found["a"].nodes) == ("11", "n[1-2]")
    assert found["b"].line == "rows.jsonl:3: found no answer"
    refuse_live(folder.folder, folder.manifest)


def test_what_the_queue_says_comes_before_the_record_of_an_older_attempt(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = {12: slurm.Queued("RUNNING", "n3", "None"), 13: slurm.Queued("PENDING", "", "Dependency")}
    monkeypatch.setattr(slurm, "queue", lambda jobs: {job: queue[job] for job in jobs if job in queue})
    folder.ran("a", 11, "done", "")
    folder.ran("b", 7, "failed", "")
    assert folder.states() == {"a": "done", "b": "running", "c": "waiting"}
    with pytest.raises(RamoeError, match=r"12 \(b\), 13 \(c\).*scancel 12 13"):
        refuse_live(folder.folder, folder.manifest)
    folder.ran("b", 12, "started", "")
    queue[12] = slurm.Queued("PENDING", "", "BeginTime")
    assert folder.states()["b"] == "requeued"
    queue[12] = slurm.Queued("SUSPENDED", "n3", "None")
    assert folder.states()["b"] == "suspended"
    queue.clear()
    assert folder.states() == {"a": "done", "b": "interrupted", "c": "cancelled"}
    said = "ramoe: RUN=x\nramoe: error: c was not started on node 0: see the table\nsrun: bye\n"
    (folder.folder / "logs/c.slurm-13.out").write_text(said)
    told = next(found for found in run_status(folder.folder) if found.name == "c")
    assert (told.state, told.line) == ("failed", "ramoe: error: c was not started on node 0: see the table")


def test_where_slurm_cannot_be_asked_status_says_so_and_a_run_is_refused(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    folder.ran("a", 11, "done", "")
    assert folder.states() == {"a": "done", "b": "unknown", "c": "unknown"}
    with pytest.raises(
        RamoeError, match=r"slurm\.json names jobs .*squeue is not installed.*remove that file"
    ):
        refuse_live(folder.folder, folder.manifest)
    forget(folder.folder)
    refuse_live(folder.folder, folder.manifest)
    assert folder.states() == {"a": "done"}


def test_a_result_of_before_is_not_shown_for_a_job_that_was_cancelled(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "queue", lambda jobs: {})
    folder.ran("b", 5, "done", "")
    assert folder.states()["b"] == "cancelled"
    (folder.folder / "logs/b.slurm-12.out").write_text("[1/1] b is up to date\n")
    assert folder.states()["b"] == "done"


def test_status_refuses_what_is_no_run_folder_and_a_damaged_chain(
    folder: Folder, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(RamoeError, match=r"holds no manifest\.json"):
        run_status(tmp_path_factory.mktemp("empty"))
    text = (folder.folder / "slurm.json").read_text()
    (folder.folder / "slurm.json").write_text(text[:40])
    with pytest.raises(RamoeError, match=r"slurm.json"):
        run_status(folder.folder)
    (folder.folder / "slurm.json").write_text(json.dumps(json.loads(text) | {"version": 9}))
    with pytest.raises(RamoeError, match="version 9"):
        submitted(folder.folder)
