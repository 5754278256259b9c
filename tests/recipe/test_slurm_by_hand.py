"""The four scripts of slurm/ in order on two nodes, as in slurm/README.md. One offline job is warned."""

import json
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, processes, wait_for
from slurm_world import MORE, ROOT, START, settings

pytestmark = pytest.mark.slurm


def test_the_stages_by_hand(cluster: SlurmCluster, slurm_world: Path, tmp_path: Path) -> None:
    """taxonomy -> profile -> fine-tune -> evaluate by `afterok`. The taxonomy is first requeued."""
    run = tmp_path / "run"

    def submit(stage: str, after: int | None, *words: str, **more: object) -> tuple[int, Path]:
        place = [
            "--nodes=2",
            f"--output={tmp_path}/{stage}-%j.out",
            *([f"--dependency=afterok:{after}"] if after else []),
        ]
        job = cluster.sbatch(
            *place, str(ROOT / "slurm" / f"{stage}.sbatch"), *words, **settings(slurm_world, run, **more)
        )
        return job, tmp_path / f"{stage}-{job}.out"

    taxonomy, said = submit("taxonomy", None)
    profile, _ = submit("profile", taxonomy, LAYERS="1-2")
    finetune, trained = submit("finetune", profile, *MORE, NAME="by-hand", TRAIN_ITERS=4)
    evaluate, _ = submit("evaluate", finetune, CHECKPOINT=run / "checkpoints/by-hand", METHOD="ra-moe")
    jobs = [taxonomy, profile, finetune, evaluate]

    def ranks_start() -> bool:
        """On both nodes: a signal that comes before a node's handlers would end the job."""
        lines = [line for _, line in processes()]
        return all(
            any(f"recipe.torchrun --nnodes 2 --node-rank {n}" in line for line in lines) for n in (0, 1)
        )

    wait_for(
        ranks_start,
        600,
        "the ranks of the taxonomy",
        cluster.log,
    )
    cluster.call("scancel", "--signal=USR1", str(taxonomy))
    wait_for(
        lambda: cluster.job(taxonomy)["Restarts"] == "1", 300, "its way back into the queue", said.read_text
    )
    states = cluster.wait(*jobs, seconds=1800)
    assert states == ["COMPLETED"] * 4, "\n".join(
        path.read_text()[-2000:] for path in sorted(tmp_path.glob("*.out"))
    )
    assert said.read_text().count(START) == 2
    for job in jobs:
        assert cluster.job(job)["NumNodes"] == "2"
    assert {path.name for path in run.iterdir()} >= {
        "taxonomy.jsonl",
        "taxonomy.json",
        "experts.safetensors",
        "divergence.csv",
    }
    assert "ramoe: routing alignment is on" in trained.read_text()
    assert (run / "checkpoints/by-hand/latest_checkpointed_iteration.txt").read_text() == "4"
    found = json.loads((run / "evaluations/ra-moe-seed7.json").read_text())
    assert found["checkpoint"] == "by-hand@4"
    assert sum(row["n"] for row in found["rows"]) > 0
