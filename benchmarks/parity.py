"""A small converted model on this machine's device, compared with the CPU: logits and router gradients.

    python -m benchmarks.parity [--shape cpu|tiny] [--out FOLDER]

The model is a Mixtral with random weights, which `ramoe convert` converts. The CPU and the device compute in
float32 and in bfloat16, which rounds and so routes some tokens to other experts. In bfloat16 the device may
be no farther from float32 than the CPU. Without a CUDA device, only the CPU computes. The gradients are
those of cross-entropy and alignment together, before clipping.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.measure import environment, torchrun
from benchmarks.shapes import PRESETS, Shape, precision_flags
from benchmarks.world import VOCABULARY, write_world
from ramoe_megatron.models.convert import convert_folder, plan_conversion
from ramoe_megatron.models.note import FLAGS
from ramoe_megatron.recipe.megatron_flags import render

FLOAT32_LIMIT = 1e-3
"""Largest relative difference of logits and router gradients in float32."""
FARTHER = 1.5
"""Largest ratio of the device's difference in bfloat16 to the CPU's."""
DIFFERENCES = ("logits", "router gradients")


def main() -> None:
    """Compute all, print their differences, and write OUT/parity.json. Status 1 above a limit."""
    if len(sys.argv) > 1 and sys.argv[1] == "compute":
        from ramoe_megatron.mcore.launch import run_job

        run_job(compute)
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__)
    parser.add_argument("--shape", choices=("cpu", "tiny"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    shape = PRESETS[options.shape][0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_world(folder / "world", shape)
        write_converted(folder, shape)
        right = computed(options.shape, folder, "CPU", "float32")
        found = {
            f"{where}, {precision}": compare(computed(options.shape, folder, where, precision), right)
            for where, precision in (("CPU", "bfloat16"), ("device", "float32"), ("device", "bfloat16"))
            if where == "CPU" or torch.cuda.is_available()
        }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    (options.out / "parity.json").write_text(json.dumps({"device": device, "found": found}, indent=1))
    Console(width=None if sys.stdout.isatty() else 140).print(table(device, found))
    for name in DIFFERENCES:
        limits = {"float32": FLOAT32_LIMIT, "bfloat16": FARTHER * found["CPU, bfloat16"][name]}
        for precision, limit in limits.items():
            if not found.get(f"device, {precision}", {name: 0.0})[name] <= limit:
                raise SystemExit(f"benchmarks: {name} in {precision}: more than {limit:.3g} from the CPU's")


def write_converted(folder: Path, shape: Shape) -> None:
    """Write a Mixtral of this shape with random weights, and its checkpoint `folder`/base."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=shape.hidden, intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.heads // 2,
        num_local_experts=shape.experts, num_experts_per_tok=shape.topk, sliding_window=None,
        max_position_embeddings=4 * shape.sequence, initializer_range=0.05,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder / "hf")
    convert_folder(plan_conversion(folder / "hf"), folder / "base")


def computed(shape: str, folder: Path, where: str, precision: str) -> dict[str, Tensor]:
    """Run `compute` in a process of its own. Returns what it wrote."""
    name = f"{where}-{precision}"
    command = torchrun("parity", 1, "compute", shape, str(folder), name, precision)
    unseen = {"CUDA_VISIBLE_DEVICES": ""} if where == "CPU" else {}
    exact = {"NVIDIA_TF32_OVERRIDE": "0"} if precision == "float32" else {}  # transformer-engine allows TF32
    own = environment(**unseen, **exact)
    done = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}benchmarks: {name}: status {done.returncode}")
    return load_file(folder / f"{name}.safetensors")


def flags(folder: Path, shape: Shape, precision: str) -> list[str]:
    """Megatron's flags of one step over the converted model."""
    model = yaml.safe_load((folder / "base" / FLAGS).read_text())
    own = (
        f"--seq-length {shape.sequence} --micro-batch-size {shape.samples} --train-iters 1 --lr 1e-12 "
        f"--global-batch-size {shape.samples} --lr-decay-style constant --eval-iters 0 --eval-interval 1000 "
        "--seed 7 --num-workers 0 --moe-token-dispatcher-type alltoall --finetune "
        "--tokenizer-type SentencePieceTokenizer"
    )
    files = ["--tokenizer-model", str(folder / "world/tokenizer.model"), "--load", str(folder / "base")]
    files += ["--ramoe-data", str(folder / "world/parallel.jsonl")]
    bf16 = precision == "bfloat16"
    own_device = precision_flags(bf16) if torch.cuda.is_available() else ["--bf16"] * bf16
    return [*render(model), *own.split(), *files, *own_device]


def compute() -> None:
    """Write the logits of a micro-batch and the gradients of the routers: NAME.safetensors."""
    _, _, shape_name, place, name, precision = sys.argv
    shape, folder = PRESETS[shape_name][0], Path(place)
    from benchmarks.training import Arm, build, samples
    from ramoe_megatron.mcore.align.attach import attach
    from ramoe_megatron.mcore.arguments import add_arguments
    from ramoe_megatron.mcore.launch import megatron_arguments
    from ramoe_megatron.mcore.train.step import forward_step, next_batch

    sys.argv = [sys.argv[0], *flags(folder, shape, precision)]
    with megatron_arguments(add_arguments, trains=True) as args:
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.training.initialize import initialize_megatron, set_jit_fusion_options

        initialize_megatron()
        set_jit_fusion_options(tp_size=1)
        trained, config = build(args), shape.variants[0].config(folder / "world")
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            batch = next_batch(samples(args, 1))
            logits = trained.model[0](batch["tokens"], batch["position_ids"], None)
        found["logits"] = logits.float().cpu().contiguous()

        def schedule(**arguments: Any) -> Any:
            losses = get_forward_backward_func()(**arguments)
            for key, parameter in trained.model[0].named_parameters():
                if key.endswith("router.weight"):
                    # bfloat16 has one more module around the model
                    found[key[key.index("decoder") :]] = parameter.main_grad.float().cpu().clone()
            return losses

        before = partial(attach, trained.model, config)
        Arm(args, trained, forward_step, samples(args, 1, config), before).step(schedule)
        save_file(found, folder / f"{name}.safetensors")


def compare(found: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, float]:
    """Relative differences of logits and router gradients (Frobenius norm), and equal first choices."""

    def difference(keys: list[str]) -> float:
        one, other = (
            torch.cat([values[key].flatten() for key in keys]).double() for values in (found, right)
        )
        return float((one - other).norm() / other.norm())

    same = found["logits"].argmax(-1) == right["logits"].argmax(-1)
    return {
        DIFFERENCES[0]: difference(["logits"]),
        DIFFERENCES[1]: difference([key for key in right if key != "logits"]),
        "same first token": float(same.float().mean()),
    }


def table(device: str, found: dict[str, dict[str, float]]) -> Table:
    """The differences of each place and precision."""
    made = Table(title=f"{device}: relative differences from the CPU in float32", title_justify="left")
    for column in ("computed on", *next(iter(found.values()))):
        made.add_column(column, justify="left" if column == "computed on" else "right")
    for name, row in found.items():
        made.add_row(name, *(f"{value:.3g}" for value in row.values()))
    return made


if __name__ == "__main__":
    main()
