"""Answers and choices of a converted model: cached, as whole sequences, and by transformers' `generate`.

    torchrun --nproc-per-node 1 -m benchmarks.decoding PRESET NAME FOLDER OUT.json ROUNDS

All run the same prompts in the same batches on one thread. The figure that the machine's other work does not
move is the process's own CPU time. transformers runs in a process of its own, without the CPU backend.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.measure import environment, machine
from benchmarks.shapes import DECODED, Decoded
from ramoe_megatron.data.encode import Encoded
from ramoe_megatron.jobs.offline_job import ProgressLines
from ramoe_megatron.mcore.launch import run_job
from ramoe_megatron.models.note import FLAGS
from ramoe_megatron.recipe.megatron_flags import render

CACHED, WHOLE, TRANSFORMERS = "cached", "whole sequence each token", "transformers generate()"
SHARED, APART = "prompt shared", "prompt for each choice"


def spent(action: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds of this process and wall-clock seconds of an action."""
    cpu, wall = time.process_time(), time.perf_counter()
    action()
    return time.process_time() - cpu, time.perf_counter() - wall


def ids(generator: torch.Generator, count: int) -> list[int]:
    """Random token ids."""
    return torch.randint(10, 500, (count,), generator=generator).tolist()


def prompts(task: Decoded) -> list[list[int]]:
    """Prompts of different lengths, from half of `prompt` up."""
    generator, half = torch.Generator().manual_seed(0), task.prompt // 2
    return [ids(generator, half + number % (half + 1)) for number in range(task.answers)]


def choices(task: Decoded) -> tuple[list[Encoded], list[int]]:
    """Four choices of one to four tokens and an end token for each prompt, and the prompt of each choice."""
    generator = torch.Generator().manual_seed(1)
    asked = [ids(generator, 2 * task.prompt) for _ in range(task.answers)]
    encoded = [
        Encoded([*prompt, *ids(generator, 2 + number % 4)], len(prompt))
        for number, prompt in enumerate(asked)
        for _ in range(4)
    ]
    return encoded, [number for number in range(len(asked)) for _ in range(4)]


def decoding_flags(folder: Path, task: Decoded) -> list[str]:
    """Flags of an offline job on the converted model."""
    model = yaml.safe_load((folder / "base" / FLAGS).read_text())
    own = ["--seq-length", str(task.shape.sequence), "--tokenizer-type", "SentencePieceTokenizer"]
    own += ["--tokenizer-model", str(folder / "tokenizer.model"), "--moe-token-dispatcher-type", "alltoall"]
    own += ["--load", str(folder / "base"), "--ramoe-batch-tokens", str(task.batch_tokens)]
    return [*render(model), *own, "--ramoe-output", str(folder)]


def main() -> None:
    """Measure the task that the command line names, and write OUT.json."""
    preset, _, place, out, rounds = sys.argv[1:]
    task, folder = DECODED[preset], Path(place)
    from ramoe_megatron.jobs.offline_job import offline_job

    sys.argv = [sys.argv[0], *decoding_flags(folder, task)]
    torch.set_num_threads(1)
    with offline_job() as (args, _, options):
        from ramoe_megatron.mcore.offline.model import OfflineModel

        model = OfflineModel(args, options.batch_tokens)
        result = {
            "machine": machine(on_cpu=True),
            "description": str(task),
            "task": asdict(task),
            **measured(model, task, folder, int(rounds)),
        }
        Path(out).write_text(json.dumps(result, indent=1))


def measured(model: Any, task: Decoded, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of every way, and whether their answers differ. The slow way without a cache runs once."""
    from ramoe_megatron.mcore.offline.generation import greedy
    from ramoe_megatron.mcore.offline.scoring import log_likelihoods

    asked, answers = prompts(task), dict[str, list[list[int]]]()
    progress = ProgressLines(2 * rounds + len(task.growth) + 4, "passes over the answers")

    def decode(name: str, tokens: int, cached: bool = True) -> tuple[float, float]:
        def run() -> None:
            answers[name] = greedy(model, asked, tokens, stops=[[]] * len(asked), cached=cached)

        taken = spent(run)
        progress(1)
        return taken

    def score(name: str, owners: Sequence[int]) -> tuple[float, float]:
        def run() -> None:
            likelihood[name] = log_likelihoods(model, encoded, owners=owners)

        taken = spent(run)
        progress(1)
        return taken

    decode("warm-up", 2)
    found: dict[str, list[tuple[float, float]]] = {
        CACHED: [decode(CACHED, task.tokens) for _ in range(rounds)],
        WHOLE: [decode(WHOLE, task.tokens, cached=False)],
    }
    batches = model.groups([len(prompt) + task.tokens for prompt in asked])
    theirs = by_transformers(folder, task, [[asked[place] for place in batch] for batch in batches], rounds)
    progress(rounds)
    found[TRANSFORMERS] = theirs["seconds"]
    answers[TRANSFORMERS] = [[] for _ in asked]
    for place, answer in zip([place for batch in batches for place in batch], theirs["answers"], strict=True):
        answers[TRANSFORMERS][place] = answer
    encoded, owners = choices(task)
    likelihood: dict[str, torch.Tensor] = {}
    scored = {SHARED: [score(SHARED, owners)], APART: [score(APART, range(len(encoded)))]}
    differing = (likelihood[SHARED] - likelihood[APART]).abs().max()
    growth = {tokens: decode("growth", tokens) for tokens in task.growth}
    return {
        "answers": found,
        "equal": {
            name: sum(a == b for a, b in zip(answers[CACHED], answers[name], strict=True))
            for name in (WHOLE, TRANSFORMERS)
        },
        "choices": scored,
        "largest_difference": float(differing),
        "growth": growth,
    }


def by_transformers(
    folder: Path, task: Decoded, batches: list[list[list[int]]], rounds: int
) -> dict[str, Any]:
    """Seconds of each round of transformers, and its answers in the order of the batches."""
    asked, told = folder / "batches.json", folder / "transformers.json"
    asked.write_text(json.dumps({"batches": batches, "tokens": task.tokens, "rounds": rounds}))
    command = [sys.executable, "-m", "benchmarks.decoding", "transformers", *map(str, (folder, asked, told))]
    subprocess.run(command, env=environment(OMP_NUM_THREADS="1"), check=True)
    return json.loads(told.read_text())


def generate(folder: Path, asked: Path, told: Path) -> None:
    """Answer the batches with transformers, padded on the left as its `generate` needs it."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
    task = json.loads(asked.read_text())
    answers: list[list[int]] = []

    def run(tokens: int) -> None:
        answers.clear()
        for batch in task["batches"]:
            longest = max(map(len, batch))
            padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in batch])
            mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch])
            more = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
            output = model.generate(
                padded, attention_mask=mask, eos_token_id=None, pad_token_id=0, use_cache=True, **more
            )
            answers.extend(output[:, longest:].tolist())

    run(2)
    seconds = [spent(lambda: run(task["tokens"])) for _ in range(task["rounds"])]
    told.write_text(json.dumps({"seconds": seconds, "answers": answers}))


if __name__ == "__main__":
    if sys.argv[1] == "transformers":
        generate(*map(Path, sys.argv[2:]))
    else:
        run_job(main)
