"""The training of the Slurm tests: small world, base model, profile, and settings of slurm/*.sbatch."""

import sys
from pathlib import Path

from small_run import STOCK, model_flags, profile_flags, run_table, training_flags, write_world

ROOT = Path(__file__).parents[2]
RAMOE = Path(sys.executable).parent / "ramoe"
START = "ramoe: RAMOE_HOME="  # what each attempt of a script's job prints first
ITERATIONS, INTERVAL = 60, 20
MORE = [
    "--num-workers",
    "0",
    "--eval-interval",
    "1000",
    "--distributed-timeout-minutes",
    "3",
    "--ramoe-layers",
    "1-2",
]


def write(folder: Path) -> None:
    """Data, base model, profile, and the model's file for the scripts with as much expert parallelism as
    there are ranks.

    And `ramoe` without its doctor, who is slow: what he says in a script's job is a matter of
    `test_slurm_by_hand`.
    """
    write_world(folder)
    base = training_flags(
        folder, "--train-iters", "4", "--save", str(folder / "base"), "--save-interval", "4"
    )
    profile = profile_flags(folder, "profile")
    run_table(
        1,
        [
            {"name": "base", "job": "finetune", "argv": base},
            {"name": "profile", "job": "profile", "argv": profile},
        ],
        folder,
    )
    quoted = " ".join([*model_flags(folder), *STOCK])
    (folder / "model.sh").write_text(
        f"MODEL_ARGS=({quoted})\nPARALLEL_ARGS=(--expert-model-parallel-size $GPUS)\n"
    )
    (folder / "ramoe").write_text(f'#!/bin/bash\nif [[ $1 != doctor ]]; then exec {RAMOE} "$@"; fi\n')
    (folder / "ramoe").chmod(0o755)
    (folder / "run").mkdir()
    for name in ("taxonomy.jsonl", "profile/experts.safetensors", "profile/priors.safetensors"):
        (folder / "run" / Path(name).name).symlink_to(folder / name)


def settings(world: Path, out: Path, **more: object) -> dict[str, str]:
    """Environment of the scripts, for all stages; `more` on top."""
    given = {
        "RAMOE_HOME": ROOT, "RAMOE": RAMOE, "RANKS_PER_NODE": 1, "OMP_NUM_THREADS": 1,
        "MODEL": world / "model.sh", "CHECKPOINT": world / "base", "DATA": world / "parallel.jsonl",
        "OUT": out,
        "GENERAL": world / "general.jsonl", "SELECT": "top-m=3", "MAX_NEW_TOKENS": 4,
        "COEFF": 20, "SEED": 7, "TRAIN_ITERS": ITERATIONS, "SAVE_INTERVAL": INTERVAL, "MICRO_BATCH": 4,
        "GLOBAL_BATCH": 16, "LR": "1e-3",
    }  # fmt: skip
    return {name: str(value) for name, value in {**given, **more}.items()}
