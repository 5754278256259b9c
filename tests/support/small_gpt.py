"""A small GPT model made with megatron.core alone, one step of it, and the alignment loss in plain torch.

Run as a script, it attaches the alignment on the Megatron of its PYTHONPATH and prints what it measured, as
one line of JSON.

The reference shares nothing with the package. It reads the logits of the aligned routers with hooks, and
takes for each aligned sample KL(pattern, softmax) at its last prompt token in float64. Its gradients at all
weights are autograd's.
"""

import json
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ramoe_megatron.mcore.cpu.backend import cpu_backend, uncompiled

with uncompiled():
    try:
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    except ImportError:  # Megatron 0.17. By name and before `attach`, as its training loop does
        from megatron.core.transformer.moe.moe_utils import track_moe_metrics

LAYERS, EXPERTS, HIDDEN, VOCABULARY = 4, 8, 32, 64
ZONE = (1, 2)
"""Aligned layers. Every layer has experts, so Megatron's numbers are one higher."""
COEFF, MICRO_BATCHES = 3.0, 2
PROMPT, LENGTH = (2, 4, 3, 5), (5, 8, 6, 7)
ALIGNED = ((1, 0, 1, 1), (0, 1, 1, 0))
"""Which samples of the two micro-batches are aligned."""
MASK_LE = torch.arange(LAYERS * EXPERTS).view(LAYERS, EXPERTS) % 3 == 0
"""The task experts."""
PATTERN_LE = torch.rand(LAYERS, EXPERTS, generator=torch.Generator().manual_seed(3)).softmax(-1)


@contextmanager
def one_rank() -> Iterator[None]:
    """Megatron on the CPU backend, with the process groups of one gloo rank."""
    with cpu_backend():
        from megatron.core import parallel_state, tensor_parallel

        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


def built(**changes: Any) -> Any:
    """The model, or this rank's pipeline stage of it: the same weights in every process."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=4, num_moe_experts=EXPERTS,
        moe_router_topk=2, moe_ffn_hidden_size=16, add_bias_linear=False, gated_linear_unit=True,
        use_cpu_initialization=True,
        bias_dropout_fusion=False, hidden_dropout=0.0, attention_dropout=0.0, normalization="RMSNorm",
        masked_softmax_fusion=False, gradient_accumulation_fusion=False,
        moe_router_load_balancing_type="none", **changes,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(num_experts=EXPERTS, normalization="RMSNorm")
    ends = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    model = GPTModel(
        config,
        spec,
        VOCABULARY,
        16,
        *ends,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    ).train()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            seed = zlib.crc32(whole_name(name).encode())
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) * 0.3)
    return model


def whole_name(name: str) -> str:
    """The name in the whole model of a weight of this rank's stage."""
    from megatron.core import parallel_state

    stages, stage = (
        ask() for ask in (parallel_state.get_pipeline_model_parallel_world_size,
                          parallel_state.get_pipeline_model_parallel_rank)
    )  # fmt: skip
    words = name.split(".")
    if words[:2] == ["decoder", "layers"]:
        words[2] = str(int(words[2]) + stage * LAYERS // stages)
    return ".".join(words)


def alignment(folder: Path, **changes: Any) -> Any:
    """The configuration of an alignment to one pattern, with its expert file in `folder`."""
    from ramoe_megatron.artifacts.expert_file import ExpertFile
    from ramoe_megatron.artifacts.tensors import ModelShape
    from ramoe_megatron.mcore.align.options import RoutingAlignmentConfig
    from ramoe_megatron.method.divergence import NoZone

    path = folder / "experts.safetensors"
    ExpertFile(
        tasks=("sum",), shape=ModelShape(LAYERS, EXPERTS, 2, "softmax", HIDDEN), expert_mask=MASK_LE[None],
        delta=MASK_LE[None].float(), task_frequency=PATTERN_LE[None], general_frequency=PATTERN_LE,
        english_pattern={"last": PATTERN_LE[None]}, layer_number=torch.arange(1, LAYERS + 1),
        rule={"name": "tau", "tau": 0.3}, zone=NoZone("given by hand"), checkpoint="base",
        data=[{"path": "parallel.jsonl", "sha256": "0" * 64}], sequences={"task": {"sum": 1}, "general": 1},
    ).save(path)  # fmt: skip
    chosen = {"layers": f"{ZONE[0]}-{ZONE[1]}", "divergence": "kl", "examples": "all"} | changes
    return RoutingAlignmentConfig(coeff=COEFF, experts=str(path), **chosen)


def batch(number: int, width: int = 8) -> dict[str, torch.Tensor]:
    """A micro-batch of samples that are padded to `width`."""
    tokens = torch.randint(0, VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(number))
    length = torch.tensor(LENGTH)
    return {
        "tokens": torch.nn.functional.pad(tokens, (0, width - 8)),
        "prompt_length": torch.tensor(PROMPT), "length": length,
        "loss_mask": (torch.arange(width) < length[:, None]).float(),
        "ramoe_weight": torch.tensor(ALIGNED[number]).float(),
        "ramoe_task": torch.zeros(4, dtype=torch.int64),
    }  # fmt: skip


def forward(model: Any, micro: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of the next token, [B, S, V]."""
    width = micro["tokens"].shape[1]
    places = torch.arange(width).expand(4, width)
    mask = torch.ones(width, width, dtype=torch.bool).triu(1)[None, None]
    return model(micro["tokens"], places, mask)


def stepped(model: Any, weigh: float = 0.0, width: int = 8) -> dict[str, torch.Tensor]:
    """Gradients after Megatron's schedule of the micro-batches, with `weigh` times a loss of the model."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from ramoe_megatron.mcore.align.batch import routing_batch

    def forward_step(data: Iterator[dict[str, torch.Tensor]], chunk: Any) -> Any:
        micro = next(data)
        with routing_batch(chunk, micro):
            output = forward(chunk, micro)
        return output, lambda logits: (weigh * logits.square().mean(), {})

    model.zero_grad(set_to_none=True)
    get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iter([batch(n, width) for n in range(MICRO_BATCHES)]),
        model=model, num_microbatches=MICRO_BATCHES, seq_length=width, micro_batch_size=4, forward_only=False,
    )  # fmt: skip
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def reference(
    model: Any, weigh: float = 0.0, zone: tuple[int, ...] = ZONE
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """What is to be logged, and the gradients of the alignment loss with `weigh` times a loss of the model.

    A router's logits are those of its `weight`, which of an adapter is the sum of both weights.
    """
    found: dict[int, torch.Tensor] = {}

    def keep(layer: int, router: Any, inputs: tuple[torch.Tensor, ...], _: Any) -> None:
        found[layer] = inputs[0].double() @ router.weight.double().T

    hooks = [model.decoder.layers[n].mlp.router.register_forward_hook(partial(keep, n)) for n in zone]
    losses, masses = torch.zeros(LAYERS), torch.zeros(LAYERS, 2)
    total = torch.zeros((), dtype=torch.float64)
    for number in range(MICRO_BATCHES):
        output = forward(model, batch(number))
        total = total + weigh * output.square().mean() / MICRO_BATCHES
        for layer in zone:
            p_E = PATTERN_LE[layer].double()
            for sample, aligned in enumerate(ALIGNED[number]):
                q_E = found[layer][PROMPT[sample] - 1, sample].softmax(-1)
                part = aligned * (p_E * (p_E / q_E).log()).sum() / (len(PROMPT) * MICRO_BATCHES)
                total = total + COEFF / len(zone) * part
                losses[layer] += part.item()
                masses[layer, 1 - aligned] += q_E[MASK_LE[layer]].sum().item()
    for hook in hooks:
        hook.remove()
    count = sum(map(sum, ALIGNED))
    masses /= torch.tensor([count, len(PROMPT) * MICRO_BATCHES - count])
    mean = len(zone)
    figures = {
        "routing_alignment_loss": losses.sum() / mean,
        "ramoe/aligned_share": count / (len(PROMPT) * MICRO_BATCHES),
        "ramoe/task_expert_mass_ci": masses[:, 0].sum() / mean,
        "ramoe/task_expert_mass_other": masses[:, 1].sum() / mean,
    } | {f"moe/routing_alignment_loss_layer_{layer}": losses[layer] for layer in zone}
    model.zero_grad(set_to_none=True)
    if total.requires_grad:
        total.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {name: float(value) for name, value in figures.items()}, gradients


def worst_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative error (of the norm) of a weight's gradient. An absent gradient is zero."""
    errors, scale = [0.0], max((gradient.norm().item() for gradient in expected.values()), default=0.0)
    for name in found.keys() | expected.keys():
        one, other = (side.get(name, torch.zeros(())) for side in (found, expected))
        size = max(one.norm().item(), other.norm().item())
        errors.append((one - other).norm().item() / size if size > 1e-6 * scale else 0.0)
    return max(errors)


class Board:
    """Stands for TensorBoard's writer: keeps what it is given."""

    def __init__(self) -> None:
        self.seen: dict[str, float] = {}

    def add_scalar(self, name: str, value: Any, _: int) -> None:
        self.seen[name] = float(value)


def logged() -> tuple[dict[str, float], dict[str, float]]:
    """What Megatron's training loop would log after the step: to TensorBoard, and to its table of losses."""
    board, table = Board(), {"advanced iterations": 1, "skipped iterations": 0}
    report = {
        "loss_scale": 1 / MICRO_BATCHES, "iteration": 1, "writer": board, "per_layer_logging": True,
        "force_initialize": True, "track_names": ["z_loss"], "num_layers": LAYERS, "moe_layer_freq": 1,
        "total_loss_dict": table,
    }  # fmt: skip
    if "track_moe_metrics" in globals():
        track_moe_metrics(**report)
    else:
        get_moe_metrics_tracker().report(**report)
    return board.seen, {name: float(value) for name, value in table.items()}


def refused_jobs() -> dict[str, str]:
    """How each job refuses to run with a flag that does not exist."""
    from ramoe_megatron.errors import RamoeError

    refusals, sys.argv = {}, ["job", "--no-such-flag"]
    for name in ("taxonomy", "profile", "predict", "finetune", "evaluate", "steer"):
        try:
            import_module(f"ramoe_megatron.jobs.{name}").JOB.main()
        except RamoeError as error:
            refusals[name] = str(error)
    return refusals


def measure(folder: Path) -> dict[str, Any]:
    """One attached step beside the reference, what it logged, and Megatron's z-loss in two paddings."""
    import megatron.core

    import ramoe_megatron

    with one_rank():
        model = built()
        figures, expected = reference(model)
        ramoe_megatron.attach(model, alignment(folder))
        error = worst_error(stepped(model), expected)
        seen, table = logged()
        balanced = built(moe_z_loss_coeff=0.3)
        narrow, wide = (stepped(balanced, width=width) for width in (8, 12))
        return {
            "version": megatron.core.__version__, "place": next(iter(megatron.core.__path__)),
            "error": error, "gradient": max(gradient.norm().item() for gradient in expected.values()),
            "figures": figures, "seen": seen, "table": table,
            "left": model.ramoe_alignment.metrics.sums_LM.abs().sum().item(),
            "padding": worst_error(narrow, wide), "z_gradients": len(narrow), "z_loss": logged()[0]["z_loss"],
            "jobs": refused_jobs(),
        }  # fmt: skip


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        print(json.dumps(measure(Path(made))), file=sys.__stdout__)
