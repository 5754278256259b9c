"""The functions that Megatron's `pretrain()` needs for a step: the batch, the forward step and the loss."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ramoe_megatron.data.dataset import SEQUENCE_KEYS
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.align.batch import routing_batch
from ramoe_megatron.mcore.align.state import current_state
from ramoe_megatron.mcore.placement import context_parallel_rows


def next_batch(data_iterator: Iterator[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The next micro-batch on the model's device, with whole sequences.

    `max_seqlen` of a pack stays on the host, which reads it.
    """
    batch = next(data_iterator)
    return {
        key: value if key == "max_seqlen" else value.cuda(non_blocking=True) for key, value in batch.items()
    }


def on_context_parallel_rank(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows that this context-parallel rank computes. [B, S_whole] to [B, S_whole / cp]"""
    from megatron.core import parallel_state

    cp = parallel_state.get_context_parallel_world_size()
    if cp == 1:
        return {key: batch[key] for key in SEQUENCE_KEYS}
    tokens, cu_seqlens = batch["tokens"], batch["cu_seqlens"][0] if "cu_seqlens" in batch else None
    rows = context_parallel_rows(
        tokens.shape[1], cp, parallel_state.get_context_parallel_rank(), cu_seqlens, tokens.device
    )
    return {key: batch[key].index_select(1, rows) for key in SEQUENCE_KEYS}


def packed_seq_params(batch: Mapping[str, Tensor]) -> Any:
    """The model's `packed_seq_params` for a batch of `data.packing`; None for a padded batch.

    They keep attention and positions within each sample.
    """
    from megatron.core.packed_seq_params import PackedSeqParams

    if "cu_seqlens" not in batch:
        return None
    # Padding belongs to the sample before it. No token of the sample attends to it, because it comes later.
    cu_seqlens, longest = batch["cu_seqlens"][0], int(batch["max_seqlen"])
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def forward_step(
    data_iterator: Iterator, model: Any, return_schedule_plan: bool = False
) -> tuple[Tensor, Callable]:
    """Megatron's `forward_step` for parallel data: cross-entropy on the responses, and alignment if on."""
    if return_schedule_plan:
        raise RamoeError(
            "--overlap-moe-expert-parallel-comm runs the layers of two micro-batches at the same time, "
            "where routing alignment is not defined; remove the flag"
        )
    batch = next_batch(data_iterator)
    local = on_context_parallel_rank(batch)
    with routing_batch(model, batch):
        output = model(
            local["tokens"],
            local["position_ids"],
            None,
            labels=local["labels"],
            loss_mask=local["loss_mask"],
            packed_seq_params=packed_seq_params(batch),
        )
    return output, partial(masked_loss, local["loss_mask"])


def masked_loss(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the masked token losses, number of tokens, and both for the log, as Megatron expects them."""
    mask = loss_mask.view(-1).float()
    loss = (losses.view(-1).float() * mask).sum()
    tokens = mask.sum().detach().to(torch.int)
    record_lm_loss(loss, tokens)
    return loss, tokens, {"lm loss": torch.cat([loss.detach().view(1), tokens.float().view(1)])}


def record_lm_loss(loss: Tensor, tokens: Tensor) -> None:
    """Record a micro-batch's language-model loss, for `--ramoe-coeff-unit lm-loss`.

    Call it in the loss function of a `forward_step`. Without alignment, or once the unit is measured, it does
    nothing.

    Args:
        loss: sum over this rank's loss tokens. []
        tokens: number of these tokens. []
    """
    state = current_state()
    if state is not None:
        state.record_lm_loss(loss, tokens)
