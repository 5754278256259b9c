"""A job for the tests: the logits of random sequences, and the experts of every token."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ramoe_megatron.data.encode import Encoded
from ramoe_megatron.jobs.offline_job import offline_job

LENGTHS = (31, 24, 12, 17)
"""Beyond the window of GPT-OSS, and not divisible by the tensor-parallel size."""


def sequences(vocabulary: int = 250) -> list[list[int]]:
    """Token ids of each sequence; the last one is no input."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocabulary, (length + 1,), generator=generator).tolist() for length in LENGTHS]


class Choices:
    """Keeps the choices of a micro-batch: (layer, sequence) -> [S, E], bool."""

    def __init__(self, micro: Any, found: dict[str, torch.Tensor]) -> None:
        self.places, self.found = micro.places.tolist(), found

    def on_logits(self, router: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def on_routing(
        self, router: Any, logits: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> torch.Tensor:
        for name, values in (("choice", routing_map.int()), ("weight", probs.float())):
            own = values.view(logits.shape)
            if router.config.sequence_parallel:
                pieces = [torch.empty_like(own) for _ in range(router.tp_group.size())]
                torch.distributed.all_gather(pieces, own.contiguous(), group=router.tp_group)
                own = torch.cat(pieces)
            for column, place in enumerate(self.places):
                if place >= 0:
                    key = f"{name}.{router.ramoe_layer}.{place}"
                    self.found[key] = own[: LENGTHS[place], column].clone()
        return probs


def main(answers_of: Callable[[Any], dict[str, Any]] | None = None) -> None:
    """`answers_of`: what else is computed with the model, for answers.json."""
    with offline_job() as (args, _, options):
        from megatron.core import parallel_state

        from ramoe_megatron.mcore.offline.model import OfflineModel

        model = OfflineModel(args, options.batch_tokens)
        encoded = [Encoded(ids, 1) for ids in sequences()]
        found: dict[str, torch.Tensor] = {}

        def read(micro: Any, logits: torch.Tensor) -> None:
            group = parallel_state.get_tensor_model_parallel_group()
            pieces = [torch.empty_like(logits) for _ in range(group.size())]
            torch.distributed.all_gather(pieces, logits.contiguous(), group=group)
            for row, place in enumerate(micro.places.tolist()):
                if place >= 0:
                    found[f"logits.{place}"] = torch.cat(pieces, -1)[row, : LENGTHS[place]]

        for group in model.groups([len(sequence.ids) for sequence in encoded]):
            model.run(encoded, group, read, context=lambda micro: Choices(micro, found))
        keys = {entry for chunk in model.chunks for entry in checkpoint_entries(chunk)}
        of_all: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(of_all, answers_of(model) if answers_of else None)
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, found)
        of_ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(of_ranks, keys)
        if torch.distributed.get_rank() == 0:
            out = Path(str(options.output))
            out.mkdir(parents=True, exist_ok=True)
            together = {key: value for rank in ranks for key, value in rank.items()}
            save_file({k: v.contiguous() for k, v in together.items()}, out / "family.safetensors")
            (out / "keys.json").write_text(json.dumps(sorted(set().union(*of_ranks))))
            if answers_of:
                (out / "answers.json").write_text(json.dumps(of_all))


def checkpoint_entries(chunk: Any) -> set[tuple[str, tuple[int, ...]]]:
    """Key and global shape of all that Megatron looks for in our checkpoint; an object has no shape."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = chunk.sharded_state_dict(metadata={"dp_cp_group": group})
    apply_factories(state)
    values = list(nested_values(state))
    found = {(value.key, tuple(value.global_shape)) for value in values if isinstance(value, ShardedTensor)}
    objects = {(value.unique_key, ()) for value in values if isinstance(value, ShardedObject)}
    assert len(values) == sum(isinstance(value, ShardedTensor | ShardedObject) for value in values)
    return found | objects
