"""OLMoE's norm of queries and keys: over the whole projection, where Megatron's is over each head.

The class serves the local and the transformer-engine layers. With transformer-engine it has not been run.
"""

from typing import Any

import torch
from torch import Tensor

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.cpu.backend import uncompiled
from ramoe_megatron.mcore.families.changes import Layer, ModelChanges, with_attention
from ramoe_megatron.models.note import ModelNote

with uncompiled():
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.mappings import (
        copy_to_tensor_model_parallel_region,
        reduce_from_tensor_model_parallel_region,
    )


class ProjectionNorm(torch.nn.Module):
    """RMS norm over all heads of a projection, also where tensor parallelism splits the heads.

    Every tensor-parallel rank has the whole weight [heads * head size] and uses the part of its own heads.
    Megatron sums the gradients of `q_layernorm` and `k_layernorm` over these ranks, because its own norms
    are replicated. So a weight that is split would get wrong gradients, and this weight gets the right ones.
    """

    def __init__(self, heads: int, head_size: int, eps: float) -> None:
        """
        Args:
            heads: number of heads on all tensor-parallel ranks.

        Raises:
            RamoeError: the heads cannot be split over the tensor-parallel ranks.
        """
        super().__init__()
        self.group = parallel_state.get_tensor_model_parallel_group()
        if heads % self.group.size():
            raise RamoeError(
                f"--tensor-model-parallel-size {self.group.size()} does not divide the {heads} heads whose "
                "queries or keys OLMoE's norm spans; give a divisor"
            )
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(heads * head_size))

    def forward(self, x: Tensor) -> Tensor:
        """`x` [S, B, heads of this rank, head size], normed. The sum of squares is in float32."""
        wide = x.float()
        squares = wide.square().sum((-2, -1), keepdim=True)
        # Both ways over all ranks: each rank's output depends on every rank's heads.
        squares = reduce_from_tensor_model_parallel_region(squares, group=self.group)
        squares = copy_to_tensor_model_parallel_region(squares, group=self.group)
        normed = wide * torch.rsqrt(squares / self.weight.numel() + self.eps)
        own = self.weight.view(self.group.size(), *x.shape[-2:])[self.group.rank()]
        return own * normed.to(x.dtype)


def query_norm(*, hidden_size: int, config: Any, eps: float) -> ProjectionNorm:
    """The norm of all queries. `hidden_size` is the size of a head."""
    return ProjectionNorm(config.num_attention_heads, hidden_size, eps).to(config.params_dtype)


def key_norm(*, hidden_size: int, config: Any, eps: float) -> ProjectionNorm:
    """The norm of all keys. `hidden_size` is the size of a head."""
    return ProjectionNorm(config.num_query_groups, hidden_size, eps).to(config.params_dtype)


def _layer(layer: Layer) -> Layer:
    return with_attention(layer, q_layernorm=query_norm, k_layernorm=key_norm)


def olmoe_changes(_: ModelNote) -> ModelChanges:
    """OLMoE's own modules."""
    return ModelChanges(layer=_layer)
