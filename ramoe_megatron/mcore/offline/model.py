"""Runs a trained model forward only, over DP x TP x EP x PP ranks: the base of the offline jobs.

All data-parallel ranks run micro-batches of the same shape at the same time, because expert parallelism needs
this. Every rank gets all results, in the order of the input.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from ramoe_megatron.artifacts.tensors import ModelShape
from ramoe_megatron.data.dataset import pad
from ramoe_megatron.data.encode import Encoded
from ramoe_megatron.mcore import compat
from ramoe_megatron.mcore.carrier import RoutingContext, routing_context
from ramoe_megatron.mcore.checkpoint import explained_mismatch, require_checkpoint
from ramoe_megatron.mcore.router import moe_layer_numbers, observe_routers
from ramoe_megatron.mcore.trial import refuse_context_parallel

ContextMaker = Callable[["MicroBatch"], RoutingContext | None]


@dataclass(frozen=True)
class MicroBatch:
    """Padded sequences of one data-parallel rank.

    Attributes:
        batch: the sequences, from `data.dataset.pad`.
        places: index of each sequence in the job's input. A filler, which keeps the ranks in step, has -1.
    """

    batch: dict[str, Tensor]
    places: Tensor

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
        return max(1, self.batch_tokens // self._padded(length))

    def _padded(self, length: int) -> int:
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
        from megatron.core.pipeline_parallel import get_forward_backward_func

        length = self._padded(max(len(sequences[place].ids) - 1 for place in group))
        rows = -(-len(group) // (self.dp * self.pp))
        batches = [self._micro_batch(sequences, group, number, rows, length) for number in range(self.pp)]

        def forward_step(data: Any, model: Any) -> tuple[Tensor, Callable]:
            micro = next(data)
            batch = micro.batch
            with routing_context(context(micro) if context else None):
                output = model(batch["tokens"], batch["position_ids"], None)
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

    def _micro_batch(
        self, sequences: Sequence[Encoded], group: Sequence[int], number: int, rows: int, length: int
    ) -> MicroBatch:
        start = (number * self.dp + self.dp_rank) * rows
        places = list(group[start : start + rows])
        filler = [group[0]] * (rows - len(places))
        samples = [pad(sequences[place], length, self.tokenizer.eod) for place in [*places, *filler]]
        batch = {key: torch.stack([sample[key] for sample in samples]).to(self.device) for key in samples[0]}
        return MicroBatch(batch, torch.tensor(places + [-1] * len(filler), device=self.device))

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
    return chunks
