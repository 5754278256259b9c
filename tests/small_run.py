"""A small world on disk, the flags of a small MoE model, and the tables of jobs that the layout tests run on it."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from ramoe_megatron.data.tokenizer import train_tokenizer
from ramoe_megatron.mcore.cpu import cpu_command_line

LANGUAGES = {"en": "What is {a} plus {b}?", "es": "Cuanto es {a} mas {b}?", "tr": "{a} arti {b} kac eder?"}
LAYERS = range(1, 3)  # the aligned MoE layers, 0-based
SAMPLES = 16  # global batch


def write_world(folder: Path) -> list[dict[str, Any]]:
    """Parallel sums in three languages, general text, a tokenizer, and a taxonomy written by hand with all four categories."""
    generator = random.Random(0)
    rows: list[dict[str, Any]] = []
    for number in range(36):
        a, b = generator.randint(1, 12), generator.randint(1, 12)
        task = "even" if number % 2 == 0 else "odd"
        for language, frame in LANGUAGES.items():
            fields = {"id": f"sum/{number}", "language": language, "task": task, "prompt": frame.format(a=a, b=b)}
            answer = {"response": str(a + b), "answer": str(a + b), "split": "train" if number < 24 else "test"}
            rows.append(fields | answer | ({"choices": [str(a + b), str(a + b + 1)]} if number >= 30 else {}))
    general = [
        {"id": f"g{n}", "language": "en", "task": "general", "prompt": "", "response": f"{n} is a number, {n * n} too", "split": "train"}
        for n in range(12)
    ]
    taxonomy = []
    for row in rows:
        if row["language"] != "en":
            number = int(row["id"].split("/")[1])
            english, target = number % 4 != 3, (number + len(row["language"])) % 3 == 0
            category = ("c" if english else "i") + ("c" if target else "i")
            kept = {key: row[key] for key in ("id", "task", "language", "split")}
            taxonomy.append(kept | {"english_correct": english, "target_correct": target, "category": category})
    for name, content in (("parallel", rows), ("general", general), ("taxonomy", taxonomy)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    texts = [f"{row['prompt']} {row['response']}" for row in [*rows, *general]]
    (folder / "tokenizer.model").write_bytes(train_tokenizer(texts, 384))
    return rows


def model_flags(folder: Path) -> list[str]:
    """A model of 4 MoE layers; its padded vocabulary is the same with TP 1 and 2, so that the loss is too."""
    flags = (
        "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 24 --max-position-embeddings 48 --num-experts 8 "
        "--moe-router-topk 2 --moe-ffn-hidden-size 32 --ffn-hidden-size 32 --moe-router-load-balancing-type aux_loss "
        "--moe-aux-loss-coeff 0.01 --moe-z-loss-coeff 0.001 --position-embedding-type rope --normalization RMSNorm --swiglu "
        "--disable-bias-linear --attention-dropout 0 --hidden-dropout 0 --moe-token-dispatcher-type alltoall "
        "--make-vocab-size-divisible-by 64 --tokenizer-type SentencePieceTokenizer"
    ).split()
    return [*flags, "--tokenizer-model", str(folder / "tokenizer.model")]


def training_flags(folder: Path, *more: str) -> list[str]:
    flags = f"--micro-batch-size 4 --global-batch-size {SAMPLES} --train-iters 2 --lr 1e-3 --eval-iters 0 --eval-interval 1000 --seed 7"
    data = ["--num-workers", "0", "--log-interval", "1", "--ramoe-data", str(folder / "parallel.jsonl")]
    # last, so that a script that knows nothing of our launcher gets the CPU's flags too
    return cpu_command_line([*model_flags(folder), *flags.split(), *data, *more])[0]


def load_flags(folder: Path) -> list[str]:
    return ["--pretrained-checkpoint", str(folder / "base"), "--finetune", "--no-load-optim", "--no-load-rng"]


def aligned_flags(folder: Path, *more: str) -> list[str]:
    """Fine-tuning from the base checkpoint with alignment on; the coefficient is large, so that its scale shows."""
    profile = folder / "profile"
    alignment = ["--ramoe-coeff", "20", "--ramoe-experts", str(profile / "experts.safetensors"), "--ramoe-layers", "1-2"]
    alignment += ["--ramoe-taxonomy", str(folder / "taxonomy.jsonl"), "--ramoe-tokens", "last", "--ramoe-target", "example"]
    alignment += ["--ramoe-priors", str(profile / "priors.safetensors")]
    return training_flags(folder, *load_flags(folder), *alignment, *more)


def offline_flags(folder: Path, output: str, *more: str) -> list[str]:
    data = ["--ramoe-data", str(folder / "parallel.jsonl"), "--ramoe-output", str(folder / output), "--load", str(folder / "base")]
    return [*model_flags(folder), "--seq-length", "24", *data, "--ramoe-batch-tokens", "256", *more]


def profile_flags(folder: Path, output: str, *more: str) -> list[str]:
    own = ["--ramoe-general", str(folder / "general.jsonl"), "--ramoe-taxonomy", str(folder / "taxonomy.jsonl")]
    own += ["--ramoe-select", "top-m=3", "--ramoe-tokens", "last", "--ramoe-save-priors", "--ramoe-split", "train,test"]
    return offline_flags(folder, output, *own, *more)


def run_table(ranks: int, table: list[dict[str, Any]], folder: Path) -> None:
    """Run the jobs of a table in one set of gloo ranks; the log goes to folder/ranksN.log."""
    path = folder / f"table{ranks}.json"
    path.write_text(json.dumps(table))
    log = folder / f"ranks{ranks}.log"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as stream:
        done = subprocess.run(
            [*command, str(Path(__file__).parent / "worker.py"), str(path), str(folder)],
            stdout=stream, stderr=subprocess.STDOUT, env=environment, check=False,
        )  # fmt: skip
    assert done.returncode == 0, f"the worker failed:\n{log.read_text()[-6000:]}"
