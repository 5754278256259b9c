"""A job for the tests: Megatron's GPTModel on a pack of samples, over all ranks as context-parallel ranks,
written out with its gradients.

Written to OUT (argv[1]) by rank 0, rows in the order of the whole pack: "packed.*"; and with one rank
"alone.*", each sample in a run of its own, with what is refused in OUT.json.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ramoe_megatron.errors import RamoeError

LENGTHS = (8, 4, 12, 8)  # the last one is padding: a segment of its own that the loss leaves out
BORDERS = torch.tensor([0, 8, 12, 24, 32], dtype=torch.int32)
UNPADDED = torch.tensor(
    [0, 7, 11, 21, 29], dtype=torch.int32
)  # of the samples without the padding at the end of each
HIDDEN, VOCABULARY = 32, 64


def main() -> None:
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from ramoe_megatron.mcore.placement import context_parallel_rows

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    cp, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    parallel_state.initialize_model_parallel(context_parallel_size=cp)
    model_parallel_cuda_manual_seed(3)
    model = build_model(cp)
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(sum(LENGTHS), 1, HIDDEN, generator=generator)
    weight = torch.randn(1, sum(LENGTHS), VOCABULARY, generator=generator)  # of each output in the loss
    weight[:, BORDERS[-2] :] = 0
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=UNPADDED, cu_seqlens_kv=UNPADDED, cu_seqlens_q_padded=BORDERS,
        cu_seqlens_kv_padded=BORDERS,
        max_seqlen_q=max(LENGTHS), max_seqlen_kv=max(LENGTHS),
    )  # fmt: skip
    rows = context_parallel_rows(sum(LENGTHS), cp, rank, BORDERS)
    found = {f"packed.{name}": tensor for name, tensor in run(model, inputs, weight, rows, packed).items()}
    if cp == 1:
        pieces = [
            run(model, inputs, weight, rows, None) for rows in torch.arange(sum(LENGTHS)).split(LENGTHS)
        ]
        found |= {f"alone.{name}": sum(piece[name] for piece in pieces) for name in pieces[0]}
        Path(f"{sys.argv[1]}.json").write_text(json.dumps(refusals(model, packed)))
    if rank == 0:
        save_file(found, sys.argv[1])


def build_model(cp: int) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=2, hidden_size=HIDDEN, num_attention_heads=4, num_query_groups=2, normalization="RMSNorm",
        use_cpu_initialization=True, context_parallel_size=cp, attention_dropout=0.0, hidden_dropout=0.0,
        window_size=(3, 0), window_attn_skip_freq=2, softmax_type="learnable",
    )  # fmt: skip
    torch.manual_seed(3)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    model = GPTModel(config, spec, VOCABULARY, sum(LENGTHS), position_embedding_type="rope")
    assert config.context_parallel_size == cp  # the stand-in for the constructor gives it back
    with torch.no_grad():
        for layer in model.decoder.layers:
            # attention far from uniform, so that a wrong row shows
            layer.self_attention.linear_qkv.weight.mul_(20)
    return model


def run(model: Any, inputs: Tensor, weight: Tensor, rows: Tensor, packed: Any) -> dict[str, Tensor]:
    """Outputs and gradients of the given rows, each at its row of the whole pack, summed over ranks."""
    model.zero_grad()
    piece = inputs[rows].requires_grad_()
    output = model(None, None, None, decoder_input=piece, packed_seq_params=packed)
    (output * weight[:, rows]).sum().backward()
    found = {"output": torch.zeros_like(weight), "input gradient": torch.zeros_like(inputs)}
    found["output"][:, rows], found["input gradient"][rows] = output.detach(), piece.grad
    found |= {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    for tensor in found.values():
        torch.distributed.all_reduce(tensor)
    return {name: tensor.clone() for name, tensor in found.items()}


def refusals(model: Any, packed: Any) -> list[str]:
    """What attention over packed samples says to each setting that it does not have."""
    from megatron.core.transformer.enums import AttnMaskType

    attention = model.decoder.layers[0].self_attention.core_attention
    rows = torch.zeros(sum(LENGTHS), 4, HIDDEN // 4)
    plain = {"attention_mask": None, "packed_seq_params": packed}
    attention(rows, rows[:, :2], rows[:, :2], **plain)
    told = []
    for window, other in (
        (None, {"attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool)}),
        (None, {"attn_mask_type": AttnMaskType.no_mask}),
        ((4, 1), {}),
        (None, {"packed_seq_params": replace(packed, qkv_format="sbhd")}),
        (None, {"packed_seq_params": replace(packed, local_cp_size=1)}),
    ):
        attention.scale_mask_softmax.window_size = window
        try:
            attention(rows, rows[:, :2], rows[:, :2], **{**plain, **other})
            told.append("not refused")
        except RamoeError as error:
            told.append(str(error))
    return told
