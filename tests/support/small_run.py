"""A small world on disk, the flags of a small MoE model, and the tables of jobs for the layout tests."""

import functools
import json
import os
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ramoe_megatron.data.tokenizer import train_tokenizer
from ramoe_megatron.mcore.cpu.backend import cpu_command_line
from ramoe_megatron.recipe.fork_server import ForkServer
from ramoe_megatron.recipe.launcher import launch

# On two sequence-parallel ranks, the last prompt token is on rank 0 in an es sample and on rank 1 in a tr
# sample.
LANGUAGES = {
    "en": "Please tell me what is the sum of {a} plus {b}?",
    "es": "Por favor dime cuanto es la suma de {a} mas {b}?",
    "tr": "Lutfen bana hemen soyle bakalim dostum simdi {a} arti {b} acaba toplam kac eder?",
}
LAYERS = range(1, 3)  # the aligned MoE layers, 0-based
SAMPLES = 16  # global batch
SEQUENCE = 32  # tokens of a padded sample


def write_world(folder: Path) -> list[dict[str, Any]]:
    """Parallel sums in three languages, general text, a tokenizer, and a taxonomy of all four categories."""
    generator = random.Random(0)
    rows: list[dict[str, Any]] = []
    for number in range(42):
        a, b = generator.randint(1, 12), generator.randint(1, 12)
        split = "train" if number < 24 else "test" if number < 36 else "validation"
        task = "even" if number % 2 == 0 else "odd"
        for language, frame in LANGUAGES.items():
            fields = {
                "id": f"sum/{number}",
                "language": language,
                "task": task,
                "prompt": frame.format(a=a, b=b),
            }
            # loss tokens differ between samples
            response = f"{a + b} it is" if number < 24 and number % 3 == 0 else str(a + b)
            answer = {"response": response, "answer": str(a + b), "split": split}
            rows.append(fields | answer | ({"choices": [str(a + b), str(a + b + 1)]} if number >= 30 else {}))
    general = [
        {
            "id": f"g{n}",
            "language": "en",
            "task": "general",
            "prompt": "",
            "response": f"{n} is a number, {n * n} too",
            "split": "train",
        }
        for n in range(12)
    ]
    taxonomy = []
    for row in rows:
        if row["language"] != "en":
            number = int(row["id"].split("/")[1])
            english, target = number % 4 != 3, (number + len(row["language"])) % 3 == 0
            category = ("c" if english else "i") + ("c" if target else "i")
            kept = {key: row[key] for key in ("id", "task", "language", "split")}
            taxonomy.append(
                kept | {"english_correct": english, "target_correct": target, "category": category}
            )
    for name, content in (("parallel", rows), ("general", general), ("taxonomy", taxonomy)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    texts = [f"{row['prompt']} {row['response']}" for row in [*rows, *general]]
    (folder / "tokenizer.model").write_bytes(train_tokenizer(texts, 384))
    return rows


def model_flags(folder: Path) -> list[str]:
    """A model of 4 MoE layers; its padded vocabulary is the same with TP 1 and 2, so that the loss is too."""
    flags = (
        "--num-layers 4 --hidden-size 32 --init-method-std 0.1 --num-attention-heads 4 --seq-length "
        f"{SEQUENCE} --max-position-embeddings 48 --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size "
        "32 --ffn-hidden-size 32 --position-embedding-type rope --normalization RMSNorm --swiglu "
        "--disable-bias-linear --attention-dropout 0 --hidden-dropout 0 --moe-token-dispatcher-type "
        "alltoall --make-vocab-size-divisible-by 64 --tokenizer-type SentencePieceTokenizer"
    ).split()
    return [*flags, "--tokenizer-model", str(folder / "tokenizer.model")]


def stock_losses(kind: str) -> tuple[str, ...]:
    """Megatron's own losses at the routers: a load-balancing loss, and the z-loss."""
    return (
        "--moe-router-load-balancing-type",
        kind,
        "--moe-aux-loss-coeff",
        "0.01",
        "--moe-z-loss-coeff",
        "0.001",
    )


STOCK = stock_losses("aux_loss")
ALONE = ("--moe-router-load-balancing-type", "none")


def training_flags(folder: Path, *more: str, losses: tuple[str, ...] = STOCK) -> list[str]:
    flags = (
        f"--micro-batch-size 4 --global-batch-size {SAMPLES} --train-iters 2 --lr 1e-3 "
        "--eval-iters 0 --eval-interval 1000 --seed 7"
    )
    data = ["--num-workers", "0", "--log-interval", "1", "--ramoe-data", str(folder / "parallel.jsonl")]
    waits = ["--distributed-timeout-minutes", "3"]  # ranks that wait for each other end in an error
    # last, so that a script that knows nothing of our launcher gets the CPU's flags too
    return cpu_command_line([*model_flags(folder), *losses, *flags.split(), *waits, *data, *more])[0]


def without_value(flags: list[str], name: str) -> list[str]:
    """The flags without this one and its value."""
    place = flags.index(name)
    return flags[:place] + flags[place + 2 :]


def bases_argv(folder: Path) -> list[str]:
    """Training of the base model, saved to folder/base."""
    return training_flags(
        folder, "--train-iters", "4", "--save", str(folder / "base"), "--save-interval", "4"
    )


def load_flags(folder: Path, base: str = "base") -> list[str]:
    return ["--pretrained-checkpoint", str(folder / base), "--finetune", "--no-load-optim", "--no-load-rng"]


def alignment_flags(folder: Path, profile: str = "profile") -> list[str]:
    """Alignment of MoE layers 1 and 2; the coefficient is large, so that its scale shows."""
    made = folder / profile
    flags = [
        "--ramoe-coeff",
        "20",
        "--ramoe-experts",
        str(made / "experts.safetensors"),
        "--ramoe-layers",
        "1-2",
    ]
    flags += [
        "--ramoe-taxonomy",
        str(folder / "taxonomy.jsonl"),
        "--ramoe-tokens",
        "last",
        "--ramoe-target",
        "example",
    ]
    return [*flags, "--ramoe-priors", str(made / "priors.safetensors")]


def aligned_flags(folder: Path, *more: str) -> list[str]:
    """Fine-tuning from the base checkpoint with alignment on."""
    return training_flags(folder, *load_flags(folder), *alignment_flags(folder), *more)


def offline_flags(folder: Path, output: str, *more: str) -> list[str]:
    data = [
        "--ramoe-data",
        str(folder / "parallel.jsonl"),
        "--ramoe-output",
        str(folder / output),
        "--load",
        str(folder / "base"),
    ]
    return [*model_flags(folder), *data, "--ramoe-batch-tokens", "256", *more]


def profile_flags(folder: Path, output: str, *more: str) -> list[str]:
    own = [
        "--ramoe-general",
        str(folder / "general.jsonl"),
        "--ramoe-taxonomy",
        str(folder / "taxonomy.jsonl"),
    ]
    own += ["--ramoe-select", "top-m=3", "--ramoe-select-tokens", "all", "last"]
    own += ["--ramoe-tokens", "last", "--ramoe-save-priors", "--ramoe-split", "train,test"]
    return offline_flags(folder, output, *own, *more)


def run_table(ranks: int, table: list[dict[str, Any]], folder: Path, name: str = "") -> None:
    """Run the jobs of a table in one set of gloo ranks. The log is folder/NAME.log, by default ranksN.log."""
    name = name or f"ranks{ranks}"
    path = folder / f"{name}.table.json"
    path.write_text(json.dumps(table))
    log = folder / f"{name}.log"
    worker = [str(Path(__file__).parent / "worker.py"), str(path), str(folder)]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        *worker,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = launch(command, environment, log, fork=partial(fork_server().start, worker, ranks))
    forked_seconds[0] += sum(
        float(line.rpartition(" ")[2]) for line in done.last_lines if line.startswith("cpu seconds: ")
    )
    assert done.status == 0, f"the worker failed:\n{log.read_text()[-6000:]}"


forked_seconds = [0.0]
"""CPU seconds of all tables so far, which are no children of the tests' process."""


@functools.cache
def fork_server() -> ForkServer:
    """One for all tables: what the ranks import is imported once. It ends with the tests' process."""
    return ForkServer()


def outcome(folder: Path, name: str) -> dict[str, Any]:
    """What `worker.py` wrote about a row, which must not have ended in an error."""
    result = json.loads((folder / f"{name}.json").read_text())
    assert "error" not in result, result
    return result


def gradients(folder: Path, name: str) -> dict[int, torch.Tensor]:
    """Router gradient of each layer; every rank that holds a layer must have the same one."""
    found: dict[int, torch.Tensor] = {}
    for path in sorted(folder.glob(f"{name}.[0-9].safetensors")):
        for key, tensor in load_file(path).items():
            if key.startswith("grad."):
                layer = int(key.removeprefix("grad."))
                torch.testing.assert_close(tensor, found.setdefault(layer, tensor), rtol=0, atol=0)
    return found


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """All parameters at the end, on every rank: "RANK.CHUNK.NAME"."""
    return {
        f"{path.suffixes[-2]}.{key}": tensor
        for path in sorted(folder.glob(f"{name}.[0-9].safetensors"))
        for key, tensor in load_file(path).items()
        if key.startswith("weight.")
    }
