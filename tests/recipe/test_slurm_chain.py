"""`ramoe run --launcher slurm` on a real Slurm: a small recipe, tensor parallel across two nodes."""

import json
import re
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
import yaml
from method_rows import document
from slurm_cluster import ENDED, SlurmCluster

# Megatron refuses the two warm-ups together, which neither the recipe nor its schema can know.
BROKEN = {"name": "sft", "train": {"lr-warmup-fraction": 0.1}}
pytestmark = pytest.mark.slurm


def write_recipe(path: Path, world: Path, *methods: object) -> None:
    """Pretraining and fine-tuning, with one rank on each of two nodes."""
    recipe = document(world, "one")
    del recipe["checkpoint"]
    recipe["data"]["pretrain"] = recipe["data"]["general"]
    recipe["pretrain"] = {"train-iters": 4}
    recipe["train"] |= {"train-iters": 8, "lr-warmup-iters": 2}
    recipe["parallel"] = {"tensor-model-parallel-size": 2, "sequence-parallel": True}
    recipe |= {"seeds": [1], "methods": list(methods)}
    recipe["launch"] = {
        "nodes": 2,
        "ranks-per-node": 1,
        "slurm": {"sbatch": {"partition": "cpu", "time": "00:30:00"}},
    }
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))


def ramoe(cluster: SlurmCluster, *words: object) -> subprocess.CompletedProcess[str]:
    environment = {**cluster.environment, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ramoe_megatron.cli", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def jobs_of(run: Path) -> dict[str, int]:
    return json.loads((run / "slurm.json").read_text())["jobs"]


def wait_for_all(cluster: SlurmCluster, jobs: dict[str, int], seconds: float = 1500) -> dict[str, str]:
    """Stage -> its job's last state."""
    deadline = time.monotonic() + seconds
    while True:
        states = {stage: cluster.state(job) for stage, job in jobs.items()}
        if all(state in ENDED for state in states.values()):
            return states
        assert time.monotonic() < deadline, f"{states}\n{cluster.log()}"
        time.sleep(2)


def rows(said: str) -> dict[str, str]:
    """Stage -> its line of `ramoe status`."""
    return {line.split()[0]: line for line in said.splitlines()[1:] if line.strip()}


def test_a_recipe_as_a_chain_across_two_nodes(
    cluster: SlurmCluster, slurm_world: Path, tmp_path: Path
) -> None:
    """One method fails: its chain stops with a message, and the others end.

    After the fault is corrected, only the missing stages are submitted.
    """
    recipe, run = tmp_path / "small.yaml", tmp_path / "run"
    write_recipe(recipe, slurm_world, BROKEN, "ra-moe")

    told = ramoe(cluster, "run", recipe, "--out", run, "--launcher", "slurm", "--dry-run")
    assert told.returncode == 0, told.stderr
    assert "--dependency=afterok:<pretrain>" in told.stdout
    assert "#SBATCH --partition=cpu" in told.stdout
    assert not run.exists()
    assert not cluster.call("squeue", "--noheader").strip(), "nothing was submitted"

    done = ramoe(cluster, "run", recipe, "--out", run, "--launcher", "slurm")
    assert done.returncode == 0, done.stderr
    first = jobs_of(run)
    assert set(re.findall(r"^(\d+)  ", done.stdout, re.MULTILINE)) == {str(job) for job in first.values()}
    for more in (["--set", "launch.nodes=1", "--set", "launch.ranks-per-node=2"], ["--launcher", "slurm"]):
        refused = ramoe(cluster, "run", recipe, "--out", run, *more)
        assert refused.returncode == 2
        assert f"{first['pretrain']} (pretrain)" in refused.stderr, "two runs into one folder"
    waiting = rows(ramoe(cluster, "status", run).stdout)
    assert list(waiting) == list(first)
    assert "waits for the stages before it" in waiting["report"]

    states = wait_for_all(cluster, first)
    stopped = {"evaluate/sft-seed1", "results", "report"}
    expected = (
        dict.fromkeys(first, "COMPLETED")
        | {"finetune/sft-seed1": "FAILED"}
        | dict.fromkeys(stopped, "CANCELLED")
    )
    assert states == expected, ramoe(cluster, "status", run).stdout
    for stage in (
        "pretrain",
        "taxonomy",
        "profile",
        "finetune/ra-moe-seed1",
        "evaluate/ra-moe-seed1",
        "predict",
    ):
        assert cluster.job(first[stage])["NumNodes"] == "2"
        assert "--nnodes 2" in (run / "logs" / f"{stage.replace('/', '-')}.log").read_text()
    assert_side_by_side(cluster, run, first)

    shown = rows(ramoe(cluster, "status", run).stdout)
    assert re.search(r"failed .*lr-warmup-fraction|failed .*lr_warmup", shown["finetune/sft-seed1"]), shown
    assert "8/8 iterations" in shown["finetune/ra-moe-seed1"]
    assert all("cancelled" in shown[stage] for stage in stopped)

    write_recipe(recipe, slurm_world, BROKEN | {"train": {"lr": 2.0e-4}}, "ra-moe")
    done = ramoe(cluster, "run", recipe, "--out", run, "--launcher", "slurm")
    assert done.returncode == 0, done.stderr
    second = {stage: job for stage, job in jobs_of(run).items() if job not in first.values()}
    assert set(second) == {"finetune/sft-seed1", *stopped}, done.stdout
    assert set(wait_for_all(cluster, second).values()) == {"COMPLETED"}, ramoe(cluster, "status", run).stdout
    assert all(" done " in line for line in rows(ramoe(cluster, "status", run).stdout).values())
    results = json.loads((run / "results.json").read_text())
    assert {row["method"] for row in results["rows"]} >= {"base", "sft", "ra-moe"}
    assert (run / "report.html").stat().st_size > 10_000
    again = ramoe(cluster, "run", recipe, "--out", run, "--launcher", "slurm")
    assert "0 jobs submitted" in again.stdout


def assert_side_by_side(cluster: SlurmCluster, run: Path, jobs: dict[str, int]) -> None:
    """Check that two jobs ran at the same time on the same nodes, each with its own port."""
    spans, ports = {}, {}
    for stage, job in jobs.items():
        told = cluster.job(job)
        if told["NumNodes"] == "2" and told["JobState"] == "COMPLETED":
            spans[stage] = (
                datetime.fromisoformat(told["StartTime"]),
                datetime.fromisoformat(told["EndTime"]),
                told["NodeList"],
            )
            output = (run / "logs" / f"{stage.replace('/', '-')}.slurm-{job}.out").read_text()
            ports[stage] = re.findall(r"MASTER_PORT=(\d+)", output)[0]
    together = [
        (a, b)
        for a in spans
        for b in spans
        if a < b and spans[a][0] < spans[b][1] and spans[b][0] < spans[a][1]
    ]
    assert any(spans[a][2] == spans[b][2] for a, b in together), spans
    assert all(ports[a] != ports[b] for a, b in together)
