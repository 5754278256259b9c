"""Runs a trained model forward only, over DP x TP x EP x PP ranks: the base of the offline jobs.

All data-parallel ranks run micro-batches of the same shape at the same time, because expert parallelism needs
this. Every rank gets all results, in the order of the input.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor

from ramoe_megatron.artifacts.tensors import ModelShape
from ramoe_megatron.data.dataset import pad
from ramoe_megatron.data.encode import Encoded
from ramoe_megatron.mcore import compat
from ramoe_megatron.mcore.carrier import RoutingContext, routing_context
from ramoe_megatron.mcore.checkpoint import explained_mismatch, require_checkpoint
from ramoe_megatron.mcore.cpu.sequential_experts import transpose_weights
from ramoe_megatron.mcore.launch import is_rank_0
from ramoe_megatron.mcore.offline.rows import RowContext, rows_fault, teach_attention
from ramoe_megatron.mcore.router import moe_layer_numbers, observe_routers
from ramoe_megatron.mcore.trial import refuse_context_parallel

ContextMaker = Callable[["MicroBatch"], RoutingContext | None]


@dataclass(frozen=True)
class MicroBatch:
    """The tokens of padded sequences in one forward pass of one data-parallel rank.

    Attributes:
        batch: `tokens` and `position_ids` [B, S], `prompt_length` and `length` [B], as in `data.dataset.pad`.
            A step of cached decoding has one new token of each sequence, so `prompt_length` is 0 and `length`
            1. Where a prompt has several branches, `length` counts the tokens of them all.
        places: index of each sequence in the job's input. A filler, which keeps the ranks in step, has -1.
        rows: positions, mask and cache of the attention; None for Megatron's own.
    """

    batch: dict[str, Tensor]
    places: Tensor
    rows: RowContext | None = None

    @property
    def real(self) -> Tensor:
        """Which sequences are not filler. [B], bool"""
        return self.places >= 0


def start(args: Any) -> Any:
    """Start Megatron for validated arguments unless it is running, without building the model.

    Returns:
        the tokenizer.

    Raises:
        RamoeError: there is no checkpoint, or offline jobs do not support the parallel layout.
    """
    from megatron.training import get_tokenizer
    from megatron.training.initialize import initialize_megatron

    if not torch.distributed.is_initialized():
        refuse_context_parallel(args)
        require_checkpoint(args.load, "--load")
        initialize_megatron()
    return get_tokenizer()


class OfflineModel:
    """A loaded model in evaluation mode, with methods to run it."""

    def __init__(self, args: Any, batch_tokens: int) -> None:
        """Build the model and load `--load`, after `start`.

        Args:
            args: Megatron's validated arguments.
            batch_tokens: number of tokens of a micro-batch on one rank.

        Raises:
            RamoeError: as `start`, or the checkpoint does not fit the flags.
        """
        start(args)
        self._adopt(_load(args), args, batch_tokens)

    @classmethod
    def around(cls, chunks: Sequence[Any], args: Any, batch_tokens: int) -> Self:
        """An offline model from the unwrapped chunks of a model in training; the caller sets evaluation mode.

        Raises:
            RamoeError: as `refuse_context_parallel`.
        """
        refuse_context_parallel(args)
        model = cls.__new__(cls)
        model._adopt(list(chunks), args, batch_tokens)
        return model

    def _adopt(self, chunks: list[Any], args: Any, batch_tokens: int) -> None:
        from megatron.core import parallel_state
        from megatron.core.utils import get_model_config
        from megatron.training import get_tokenizer

        self.args, self.tokenizer, self.batch_tokens = args, get_tokenizer(), batch_tokens
        # the rows after these pad the vocabulary, and their values depend on the layout
        self.vocabulary = self.tokenizer.vocab_size
        self.chunks = chunks
        observe_routers(self.chunks)
        self.layer_numbers = moe_layer_numbers(self.chunks)
        self.config = get_model_config(self.chunks[0])
        self.tp, self.pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
        self.dp = parallel_state.get_data_parallel_world_size()
        self.dp_rank = parallel_state.get_data_parallel_rank()
        self.tp_rank = parallel_state.get_tensor_model_parallel_rank()
        self.last_stage = parallel_state.is_pipeline_last_stage()
        self.device = (
            torch.device("cpu")
            if not self.routers_on_cuda()
            else torch.device("cuda", torch.cuda.current_device())
        )

    def routers_on_cuda(self) -> bool:
        """Whether the weights are on a CUDA device (from any parameter, since a stage may have no router)."""
        return next(self.chunks[0].parameters()).is_cuda

    @functools.cached_property
    def has_rows(self) -> bool:
        """Whether the attention can be given a `RowContext`; rank 0 says why not. Every rank asks for it."""
        fault = rows_fault(self.chunks)
        if fault is None:
            teach_attention()
        elif is_rank_0():
            print(
                f"ramoe: no key/value cache: {fault}. Each new token runs its whole sequence, and each "
                "choice runs its prompt",
                flush=True,
            )
        return fault is None

    @property
    def shape(self) -> ModelShape:
        """The shape that an artefact for this model must have."""
        config = self.config
        return ModelShape(
            num_moe_layers=len(self.layer_numbers),
            num_experts=config.num_moe_experts,
            topk=config.moe_router_topk,
            score_function=config.moe_router_score_function,
            hidden_size=config.hidden_size,
        )

    def groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Input indices, longest sequence first, in groups of dp * pp micro-batches that run at once."""
        order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
        groups, start = [], 0
        while start < len(order):
            rows = self._rows(lengths[order[start]])
            groups.append(order[start : start + rows * self.dp * self.pp])
            start += len(groups[-1])
        return groups

    def _rows(self, length: int) -> int:
        return max(1, self.batch_tokens // self.padded(length))

    def padded(self, length: int) -> int:
        """The length of a batch's longest sequence with padding for sequence parallelism."""
        return -(-length // self.tp) * self.tp  # sequence parallelism splits a sequence into tp pieces

    def run(
        self,
        sequences: Sequence[Encoded],
        group: Sequence[int],
        read: Callable[[MicroBatch, Tensor], None] | None,
        context: ContextMaker | None = None,
    ) -> None:
        """Run one forward pass of a group of `sequences`.

        Args:
            sequences: all sequences of the job.
            group: indices of the sequences to run, from `groups`.
            read: called on the last stage with each micro-batch and this tensor-parallel rank's logits [B, S,
                V / tp].
            context: makes the routing context of a micro-batch, on every stage.
        """
        length = self.padded(max(len(sequences[place].ids) - 1 for place in group))
        own = self.own_places(group)
        needed = {group[0], *chain.from_iterable(own)} - {-1}
        samples = {place: pad(sequences[place], length, self.tokenizer.eod) for place in sorted(needed)}
        self.forward([self.micro_batch(samples, places) for places in own], read, context)

    def forward(
        self,
        batches: Sequence[MicroBatch],
        read: Callable[[MicroBatch, Tensor], None] | None,
        context: ContextMaker | None = None,
    ) -> None:
        """Run one forward pass of this rank's micro-batches, one for each pipeline stage.

        The micro-batches of all ranks have the same shape. `read` and `context` are as in `run`.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func

        rows, length = batches[0].batch["tokens"].shape

        def forward_step(data: Any, model: Any) -> tuple[Tensor, Callable]:
            micro = next(data)
            batch, more = micro.batch, {}
            if micro.rows is not None:
                more = {"inference_context": micro.rows}
            with routing_context(context(micro) if context else None):
                mask = micro.rows.mask if micro.rows else None
                output = model(batch["tokens"], batch["position_ids"], mask, **more)
            return output, partial(_collect, micro, read)

        iterators = [iter(batches) for _ in self.chunks]
        with torch.no_grad():
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
                num_microbatches=self.pp,
                seq_length=length,
                micro_batch_size=rows,
                decoder_seq_length=length,
                forward_only=True,
                collect_non_loss_data=True,
            )

    def all_places(self, group: Sequence[int]) -> list[list[list[int]]]:
        """The indices in each micro-batch of each data-parallel rank; some have fewer than the first."""
        rows = -(-len(group) // (self.dp * self.pp))
        parts = [list(group[start * rows : (start + 1) * rows]) for start in range(self.pp * self.dp)]
        return [parts[number * self.dp : (number + 1) * self.dp] for number in range(self.pp)]

    def own_places(self, group: Sequence[int]) -> list[list[int]]:
        """The indices in each micro-batch of this data-parallel rank, filled up with -1."""
        rows = -(-len(group) // (self.dp * self.pp))
        own = [places[self.dp_rank] for places in self.all_places(group)]
        return [places + [-1] * (rows - len(places)) for places in own]

    def micro_batch(self, samples: Mapping[int, dict[str, Tensor]], places: Sequence[int]) -> MicroBatch:
        """A micro-batch of padded samples by their index. The filler is -1, or any of them."""
        filler = samples.get(-1) or next(iter(samples.values()))
        chosen = [samples[place] if place >= 0 else filler for place in places]
        batch = {key: torch.stack([sample[key] for sample in chosen]).to(self.device) for key in filler}
        return MicroBatch(batch, torch.tensor(places, device=self.device))

    def weights_digest(self) -> str:
        """sha256 of all weights in this parallel layout; the same on every rank."""
        own = hashlib.sha256()
        for chunk in self.chunks:
            for name, parameter in sorted(chunk.named_parameters()):
                own.update(name.encode())
                own.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        found: list[str] = [""] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, own.hexdigest())
        return hashlib.sha256("".join(found).encode()).hexdigest()

    def share(self, values: Tensor) -> Tensor:
        """Sum over all ranks. Only the rank that computed a value may have added it."""
        torch.distributed.all_reduce(values)
        return values

    @property
    def reports(self) -> bool:
        """Whether this rank reports for its data-parallel rank: last stage, first tensor-parallel rank."""
        return self.last_stage and self.tp_rank == 0


def _collect(micro: MicroBatch, read: Callable | None, output: Tensor, non_loss_data: bool = True) -> None:
    if read is not None:
        read(micro, output)


def _load(args: Any) -> list[Any]:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.checkpointing import load_checkpoint

    config = compat.model_config_from_args(args)
    builder = config.get_builder_cls()(config)
    chunks = builder.build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        wrap_with_ddp=False,
        data_parallel_random_init=False,
    )
    with explained_mismatch(args.load):
        load_checkpoint(chunks, None, None)
    for chunk in chunks:
        chunk.eval()
        if not next(chunk.parameters()).is_cuda:
            transpose_weights(chunk.modules())
    return chunks
