"""The script that README tells a team to copy from runs by itself: in a process that has started nothing of
ours before.

Under full recompute, where Megatron makes its causal mask, on a device called cuda, inside the backward pass.
"""

import os
import subprocess
import sys
from pathlib import Path

from layout_rows import FULL
from small_run import model_flags, write_world

SCRIPT = Path(__file__).parents[2] / "examples/pretrain_gpt.py"


def test_a_users_own_script_runs_alone(tmp_path: Path) -> None:
    write_world(tmp_path)
    flags = (
        "--micro-batch-size 4 --global-batch-size 8 --train-iters 2 --lr 1e-3 "
        "--eval-iters 0 --eval-interval 9 --log-interval 1"
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1",
              str(SCRIPT)),
            *(*model_flags(tmp_path), *FULL, *flags.split(), "--num-workers", "0", "--ramoe-data",
              str(tmp_path / "parallel.jsonl")),
        ],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "iteration        2/       2" in done.stdout
    assert "Megatron runs on the CPU backend" in done.stdout or "cuda" in done.stdout.lower()
