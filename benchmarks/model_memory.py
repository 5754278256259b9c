"""Estimated memory per GPU of the models in examples/models, as in the tables of their headers.

    python -m benchmarks.model_memory [--write]

The columns "Megatron" are from `report_theoretical_memory` of Megatron 0.19. Its weights are correct under
TP, PP, EP and ETP: bfloat16 weights, float32 gradients, and the distributed optimizer's share of float32
weights and two moments, which is 18 bytes per parameter in total. They leave out biases and the norms of
queries and keys (below 0.1 % here). They take --quick-geglu for a plain MLP, with two matrices per expert
instead of three. They keep the optimizer on the GPU under --optimizer-cpu-offload. Its activations are those
of a dense layer of the hidden size. They ignore recompute (except "selective" with sequence parallelism),
experts, top-k, the dispatcher's copies, context parallelism and a separate head size, and count the logits
once, in two bytes.

The columns "ours" correct the weights for --quick-geglu and --optimizer-cpu-offload, and count the
activations by `activations` below, with evenly loaded experts. No column includes the buffers of NCCL and
CUDA (some GB), fragmentation, uneven experts, or the optimizer's temporaries. GB are 10^9 bytes. Nothing was
measured.
"""

import argparse
import contextlib
import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

FOLDER = Path(__file__).parents[1] / "examples/models"
GPUS = (8, 16, 64)
BEGIN, END = "# memory table\n", "# end of memory table\n"
_FLAGS = 'set -euo pipefail; source "$1"; printf "%s\\0" "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}"'


def model_files() -> list[Path]:
    """The bash files of the models."""
    return sorted(FOLDER.glob("*.sh"))


def flags_of(path: Path, gpus: int, **variables: str) -> list[str]:
    """MODEL_ARGS and PARALLEL_ARGS that bash sets from a model's file."""
    environment = {"PATH": os.environ["PATH"], "GPUS": str(gpus), **variables}
    done = subprocess.run(
        ["bash", "-c", _FLAGS, "bash", str(path)], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split("\0")[:-1]


def validated(flags: list[str], gpus: int, extra_args_provider: Callable | None = None) -> Any:
    """Megatron's arguments, parsed and validated as in a job of `gpus` GPUs.

    This is `parse_and_validate_args` without its last step, which builds the tokenizer. One check needs a
    GPU: --moe-grouped-gemm asks for its compute capability, and gets that of an H100.
    """
    from megatron.training.arguments import parse_args, validate_args

    ranks = {"WORLD_SIZE": str(gpus), "RANK": "0"}
    with (
        mock.patch.dict(os.environ, ranks),
        mock.patch.object(sys, "argv", ["model_memory", *flags]),
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
        _quiet(),
    ):
        args = parse_args(extra_args_provider)
        validate_args(args)
    return args


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress Megatron's output of all its arguments."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def megatron_estimate(args: Any) -> tuple[float, float]:
    """Megatron's estimates in bytes: weights with optimizer, and activations."""
    from megatron.training.theoretical_memory_usage import NUM_BYTES_IN_MEGABYTE, report_theoretical_memory

    with _quiet():
        weights, activations, _ = report_theoretical_memory(copy.copy(args))
    return weights * NUM_BYTES_IN_MEGABYTE, activations * NUM_BYTES_IN_MEGABYTE


def weights_and_optimizer(args: Any) -> float:
    """Megatron's formula in bytes, with the gate of --quick-geglu and without an optimizer on the host."""
    from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory

    args = copy.copy(args)
    args.swiglu = args.swiglu or args.quick_geglu
    if not args.optimizer_cpu_offload:
        return compute_weight_and_optimizer_memory(args)
    # 18 bytes for each parameter of this GPU, of which 6 stay: weight and gradient.
    args.use_distributed_optimizer = False
    return compute_weight_and_optimizer_memory(args) * 6 / 18


def parameters(args: Any) -> float:
    """Number of parameters of the model by Megatron's formula, with the gate of --quick-geglu."""
    one = copy.copy(args)
    one.tensor_model_parallel_size = one.pipeline_model_parallel_size = one.expert_model_parallel_size = 1
    one.expert_tensor_parallel_size = one.data_parallel_size = one.world_size = 1
    one.use_distributed_optimizer = one.optimizer_cpu_offload = False
    return weights_and_optimizer(one) / 18


def activations(args: Any) -> float:
    """Activations in bytes at TP, PP and CP 1: two bytes for each element that backward needs.

    A layer keeps for each token the inputs and outputs of both norms, queries and keys before and after the
    rotary embedding, values once, and the attention's output. For each of the k experts it keeps the token's
    copy for dispatch and as received, the output as computed and as returned, gate and up, and their product.
    Full recompute keeps all this for one layer, and the input of each layer. The logits are kept in bfloat16,
    as a float32 copy and as its gradient.
    """
    assert (
        args.tensor_model_parallel_size
        == args.pipeline_model_parallel_size
        == args.context_parallel_size
        == 1
    )
    tokens, hidden = args.seq_length * args.micro_batch_size, args.hidden_size
    query, key = args.num_attention_heads * args.kv_channels, args.num_query_groups * args.kv_channels
    attention = 4 * hidden + 3 * query + 3 * key
    experts = args.moe_router_topk * (4 * hidden + 3 * args.moe_ffn_hidden_size)
    layer = 2 * tokens * (attention + experts)
    kept = (
        layer + 2 * tokens * hidden * args.num_layers
        if args.recompute_granularity == "full"
        else layer * args.num_layers
    )
    return kept + tokens * args.padded_vocab_size * (2 + 4 + 4)


def table(path: Path) -> str:
    """The table of a model's header, as comment lines."""
    lines = [
        "#  GB per GPU      | Megatron's estimate            | ours",
        "#  GPUs  EP  DP    | weights  activations  total    | weights  activations  total",
    ]
    for gpus in GPUS:
        args = validated(flags_of(path, gpus), gpus)
        estimates = megatron_estimate(args), (weights_and_optimizer(args), activations(args))
        cells = [
            f"{weights / 1e9:8.1f} {acts / 1e9:12.1f} {(weights + acts) / 1e9:6.1f}"
            for weights, acts in estimates
        ]
        lines.append(
            f"#  {gpus:4}  {args.expert_model_parallel_size:2}  {args.data_parallel_size:2}    |{cells[0]}   "
            f" |{cells[1]}"
        )
    return "".join(f"{line}\n" for line in lines)


def table_in(path: Path) -> str:
    """The current table in a model's header."""
    return path.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]


def main() -> None:
    """Print the tables, or write them into the headers."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model_memory", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--write", action="store_true", help="put the tables into the files' headers")
    write = parser.parse_args().write
    os.environ.setdefault("RANK", "0")  # Megatron warns when it is not set
    for path in model_files():
        count = parameters(validated(flags_of(path, GPUS[0]), GPUS[0])) / 1e9
        print(f"{path.name}: {count:.2f} billion parameters", table(path), sep="\n")
        if write:
            text = path.read_text(encoding="utf-8")
            path.write_text(
                text.replace(BEGIN + table_in(path) + END, BEGIN + table(path) + END), encoding="utf-8"
            )


if __name__ == "__main__":
    main()
