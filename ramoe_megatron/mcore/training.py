"""What Megatron's `pretrain()` asks for: the data sets, the batch of a step, the forward step and the loss."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ramoe_megatron.data.dataset import SFTDataset
from ramoe_megatron.data.parallel import load_examples
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.alignment import routing_batch
from ramoe_megatron.mcore.arguments import DataOptions, RoutingAlignmentConfig, options_from_args
from ramoe_megatron.mcore.labels import AlignedDataset

SEQUENCE_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


def dataset_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Megatron's `train_valid_test_datasets_provider` for parallel data, from the parsed arguments.

    Built on every rank: each pipeline stage needs the samples' labels, and drawing is a pure function of the seed.

    Args:
        num_samples: samples of training, validation and test that the schedule will draw.
        vp_stage: the virtual pipeline stage that asks, each once; all get the same.

    Returns:
        the training set (an `AlignedDataset` when alignment is on), the validation set (split "validation") unless
        `--eval-iters` is 0, and None.

    Raises:
        RamoeError: no data, no rows of a split that is asked for, or labels that do not fit the data (`AlignedDataset`).
    """
    from megatron.training import get_args, get_tokenizer, print_rank_0

    args = get_args()
    options, alignment = options_from_args(DataOptions, args), RoutingAlignmentConfig.from_args(args)
    if not options.data:
        raise RamoeError("--ramoe-data is missing: expected JSONL files, folders of them, or the name of a data set")

    def build(split: str, count: int) -> SFTDataset:
        examples = load_examples(options.data, options.column_mapping(), split, options.languages)
        if split == "validation" and count is None:
            raise RamoeError("--full-validation: parallel data is drawn by --eval-iters; remove that flag")
        weights = options.weight_mapping()
        return SFTDataset(examples, get_tokenizer(), args.seq_length, count, args.seed, weights)

    if alignment.coeff > 0 and alignment.normalize == "ci" and (args.rampup_batch_size or args.dataloader_type != "single"):
        raise RamoeError(
            "--ramoe-normalize ci weighs each sample by its global batch: it needs batches of one size in the order of the draws. "
            "Remove --rampup-batch-size and --dataloader-type, or use --ramoe-normalize samples"
        )
    # One batch more than is drawn: Megatron's sampler refuses to resume a run that has drawn all there is.
    train: Any = build(options.split, num_samples[0] + args.global_batch_size)
    print_rank_0(f"ramoe: {len(train.examples)} training examples, {num_samples[0]} draws")
    if alignment.coeff > 0:
        train = AlignedDataset(
            train, alignment, options.anchor, args.global_batch_size, args.calculate_per_token_loss
        )
        print_rank_0(f"ramoe: {int(train.aligned.sum())} of {len(train.aligned)} training examples are aligned")
    if args.eval_iters and not any(example.split == "validation" for example in load_examples(options.data, options.column_mapping())):
        raise RamoeError(
            f"--eval-iters {args.eval_iters} (100 when not given) needs rows of the split 'validation', and {', '.join(options.data)} "
            "has none: add them, or give --eval-iters 0"
        )
    validation = build("validation", num_samples[1]) if args.eval_iters else None
    return train, validation, None


dataset_provider.is_distributed = True  # type: ignore[attr-defined]  # Megatron: build on every rank


def next_batch(data_iterator: Iterator[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The next micro-batch, on the model's device, whole sequences."""
    return {key: value.cuda(non_blocking=True) for key, value in next(data_iterator).items()}


def on_context_parallel_rank(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The pieces of the batch's sequences that this context-parallel rank computes. [B, S_whole] to [B, S_whole / cp]"""
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    sequences: dict[str, Any] = {key: batch[key] for key in SEQUENCE_KEYS}
    if parallel_state.get_context_parallel_world_size() == 1:
        return sequences
    return get_batch_on_this_cp_rank(
        sequences, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group()
    )


def forward_step(data_iterator: Iterator, model: Any, return_schedule_plan: bool = False) -> tuple[Tensor, Callable]:
    """Megatron's `forward_step` for parallel data: cross-entropy on the responses, routing aligned where that is on."""
    if return_schedule_plan:
        raise RamoeError(
            "--overlap-moe-expert-parallel-comm schedules layers out of a micro-batch's order, where routing alignment is not "
            "defined; remove that flag"
        )
    batch = next_batch(data_iterator)
    local = on_context_parallel_rank(batch)
    with routing_batch(model, batch):
        output = model(local["tokens"], local["position_ids"], None, labels=local["labels"], loss_mask=local["loss_mask"])
    return output, partial(masked_loss, local["loss_mask"])


def masked_loss(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the token losses under the mask, the number of tokens, and both for the log, as Megatron's schedules expect them."""
    mask = loss_mask.view(-1).float()
    loss = (losses.view(-1).float() * mask).sum()
    tokens = mask.sum().detach().to(torch.int)
    return loss, tokens, {"lm loss": torch.cat([loss.detach().view(1), tokens.float().view(1)])}
