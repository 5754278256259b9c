"""Convert and export a model of real size with random weights: GB/s beside `cp`, and the anonymous memory.

python -m benchmarks.conversion [--layers N] [--out FOLDER]

The shape is OLMoE-1B-7B's: 16 layers, 6.9 billion parameters, 13.8 GB in bfloat16. The disk needs three times
that. The folders `hf` and `mg` stay in --out; the copy and the exported folder are removed. At the end two
ranks with EP 2 load the checkpoint and profile a few examples, which runs them forward.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.measure import environment
from benchmarks.shapes import TINY
from benchmarks.world import write_world
from ramoe_megatron.models.note import FLAGS
from ramoe_megatron.models.olmoe import OLMOE
from ramoe_megatron.models.safetensors_folder import INDEX, bytes_of, header_of
from ramoe_megatron.recipe.megatron_flags import render

CONFIG: dict[str, Any] = {
    "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "dtype": "bfloat16", "hidden_act": "silu",
    "vocab_size": 50304, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16,
    "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "clip_qkv": None,
    "attention_bias": False, "tie_word_embeddings": False, "router_aux_loss_coef": 0.01, "use_cache": True,
    "initializer_range": 0.02, "output_router_logits": False, "eos_token_id": 50279, "pad_token_id": 1,
}  # fmt: skip
SHAPE = replace(TINY, hidden=2048, layers=16, experts=64, topk=8, sequence=64)
"""Of the files that the profile job reads."""
SHARD = 5 * 10**9
BLOCK = 64 << 20  # bytes that are compared at once


def main() -> None:
    """Write the model, time cp, convert and export, compare the bytes, and print the figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conversion", description=__doc__)
    parser.add_argument("--layers", type=int, default=16, help="layers of the model (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/conversion"))
    options = parser.parse_args()
    hf, mg, back, copy = (options.out / name for name in ("hf", "mg", "back", "copy"))
    if not hf.exists():
        write_random_model(hf, options.layers)
    size = sum(path.stat().st_size for path in hf.glob("*.safetensors"))
    largest = 50304 * 2048 * 2
    figures = {"GB": size / 1e9, "largest tensor, GB": largest / 1e9}
    for folder in (mg, back, copy):
        shutil.rmtree(folder, ignore_errors=True)
    ramoe = [sys.executable, "-m", "ramoe_megatron.cli"]
    for name, command in {
        "cp": ["cp", "-r", str(hf), str(copy)],
        "convert": [*ramoe, "convert", str(hf), "--out", str(mg)],
        "export": [*ramoe, "export", str(mg), "--out", str(back)],
    }.items():
        forget(options.out)
        seconds, memory = measured(command)
        figures |= {f"{name}, GB/s": size / 1e9 / seconds, f"{name}, anonymous memory, GB": memory / 1e9}
        if name == "cp":
            shutil.rmtree(copy)
        print(json.dumps(figures), file=sys.stderr, flush=True)
    figures["convert / cp"] = figures["convert, GB/s"] / figures["cp, GB/s"]
    figures["export / cp"] = figures["export, GB/s"] / figures["cp, GB/s"]
    compare(hf, back)
    shutil.rmtree(back)
    seconds, memory = measured([*ramoe, "profile", "--ranks", "2", "--", *profile_flags(options.out)])
    figures |= {"profile on two ranks, s": seconds, "profile, anonymous memory of both, GB": memory / 1e9}
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}, indent=1))


def write_random_model(folder: Path, layers: int) -> None:
    """A folder as save_pretrained writes it, with normal weights of standard deviation 0.02."""
    from transformers import OlmoeConfig

    folder.mkdir(parents=True)
    config: dict[str, Any] = CONFIG | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    shapes = {
        part.name: shape
        for piece in OLMOE.pieces(OlmoeConfig(**config), {})
        for part, shape in zip(piece.parts, piece.operation.parts(piece.shape), strict=True)
    }
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        if filled + 2 * math.prod(shape) > SHARD:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += 2 * math.prod(shape)
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        where |= dict.fromkeys(names, file)
        with (folder / file).open("wb") as out:
            out.write(header_of((name, torch.bfloat16, shapes[name]) for name in names))
            for name in names:
                values = torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02)
                out.write(bytes_of(values + 1 if "norm" in name else values))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def profile_flags(folder: Path) -> list[str]:
    """Flags of the profile job with EP 2, over a few examples that are written beside the model."""
    world = folder / "world"
    if not world.exists():
        write_world(world, SHAPE, examples=4)
    model = yaml.safe_load((folder / "mg" / FLAGS).read_text())
    own = "--bf16 --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall --seq-length 64".split()
    own += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(world / "tokenizer.model")]
    own += ["--load", str(folder / "mg"), "--ramoe-data", str(world / "parallel.jsonl")]
    own += ["--ramoe-general", str(world / "parallel.jsonl")]
    own += ["--ramoe-taxonomy", str(world / "taxonomy.jsonl"), "--ramoe-output", str(folder / "profile")]
    return [*render(model), *own]


def measured(command: list[str]) -> tuple[float, int]:
    """Run a command to its end and to the disk.

    Returns its seconds and the peak of the anonymous memory of its processes.
    """
    started, peak = time.monotonic(), 0
    # a fixed threshold: else glibc keeps what building the model frees, 2 GB a rank
    process = subprocess.Popen(command, env=environment(MALLOC_MMAP_THRESHOLD_=str(1 << 20)))
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.05)
    if process.wait():
        raise SystemExit(f"{' '.join(command)}: status {process.returncode}")
    os.sync()
    return time.monotonic() - started, peak


def anonymous(process: int) -> int:
    """Bytes of anonymous memory of a process and its descendants. 0 for one that has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        tasks = list(Path(f"/proc/{process}/task").iterdir())
        children = [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
    except OSError:
        return 0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
    return (1024 * int(found[0]) if found else 0) + sum(map(anonymous, children))


def forget(folder: Path) -> None:
    """Drop the files of a folder from the page cache, so that each command reads from the disk."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(one: Path, other: Path) -> None:
    """Raise SystemExit unless both folders have the same tensors with the same bytes."""
    from ramoe_megatron.models.safetensors_folder import SafetensorsFolder

    first, second = SafetensorsFolder(one), SafetensorsFolder(other)
    if first.tensors.keys() != second.tensors.keys():
        raise SystemExit(f"{one} and {other} have different tensors")
    for name, stored in first.tensors.items():
        twin = second.tensors[name]
        with stored.file.open("rb") as a, twin.file.open("rb") as b:
            a.seek(stored.offset)
            b.seek(twin.offset)
            left = stored.bytes
            while left:
                count = min(left, BLOCK)
                if a.read(count) != b.read(count):
                    raise SystemExit(f"{name} differs")
                left -= count


if __name__ == "__main__":
    main()
