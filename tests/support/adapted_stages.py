"""Adapters in a model of two pipeline stages, as a row of `worker.py`: what each stage's weights get.

    adapted_stages.py OUT

Each rank writes OUT/adapted.RANK.stage.json: for each case the worst error of its gradients against the whole
model on one rank, how many of its weights got a gradient, and the refusal of the first report. The stages
hold layers 0-1 and 2-3, of which 1 and 2 are aligned.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from small_gpt import alignment, built, logged, reference, stepped, whole_name, worst_error

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.cpu.backend import cpu_backend

Choice = Callable[[str], bool]
CASES: dict[str, tuple[Choice, dict[str, Any]]] = {
    "first stage only": (lambda name: name.startswith("decoder.layers.0.self_attention"), {}),
    "last stage only": (lambda name: name.startswith("decoder.layers.2.mlp.router"), {}),
    "aligned in the last, trained in the first": (
        lambda name: name.startswith("decoder.layers.1.mlp.experts"),
        {"layers": "2-3"},
    ),
    "nothing below": (lambda name: name.startswith(("decoder.layers.3", "output_layer")), {}),
}
"""Names of the trained weights, and changes of the alignment."""


def main() -> None:
    from megatron.core import parallel_state, tensor_parallel

    from ramoe_megatron import attach

    out, found = Path(sys.argv[1]), {}
    with cpu_backend():
        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
        folder = out / f"adapted-{rank}"
        folder.mkdir()
        for case, (chosen, changes) in CASES.items():
            expected = {}
            for stages in (1, 2):
                parallel_state.initialize_model_parallel(pipeline_model_parallel_size=stages)
                tensor_parallel.model_parallel_cuda_manual_seed(1)
                if stages == 1:
                    model = train_only(built(), chosen)
                    zone = (2, 3) if changes else (1, 2)
                    expected = reference(model, zone=zone)[1]
                else:
                    model = built(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
                    attach(train_only(model, chosen), alignment(folder, **changes))
                    gradients = {whole_name(name): grad for name, grad in stepped(model).items()}
                    mine = {whole_name(name) for name, _ in model.named_parameters()}
                    error = worst_error(gradients, {name: expected[name] for name in mine & expected.keys()})
                    found[case] = {
                        "error": error,
                        "gradients": sum(bool(g.any()) for g in gradients.values()),
                    }
                    try:
                        logged()
                    except RamoeError as refusal:
                        found[case]["refusal"] = str(refusal)
                parallel_state.destroy_model_parallel()
    (out / f"adapted.{rank}.stage.json").write_text(json.dumps(found))


def train_only(model: Any, chosen: Choice) -> Any:
    for name, weight in model.named_parameters():
        weight.requires_grad_(chosen(whole_name(name)))
    return model
