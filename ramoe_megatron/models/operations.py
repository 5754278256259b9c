"""Operations that make one Megatron tensor from Hugging Face tensors. Each has its inverse.

An operation moves values and never computes with them, so both directions are exact bit for bit. Only `Mxfp4`
decodes its input and has no inverse.

Shapes: H hidden size, I width of an expert, D size of an attention head, G query groups, n heads in a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Operation(Protocol):
    """Makes one Megatron tensor from its parts, which are Hugging Face tensors or slices of them."""

    def parts(self, shape: Shape) -> list[Shape]:
        """The shapes of the parts, from the shape of the Megatron tensor."""
        ...

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The Megatron tensor."""
        ...

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The parts of a Megatron tensor: the inverse of `join`."""
        ...


@dataclass(frozen=True)
class Copy:
    """The same tensor on both sides."""

    def parts(self, shape: Shape) -> list[Shape]:
        return [shape]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        (part,) = parts
        return part

    def split(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]


@dataclass(frozen=True)
class Transpose:
    """A matrix that Hugging Face stores as [in, out] and Megatron as [out, in]."""

    def parts(self, shape: Shape) -> list[Shape]:
        rows, columns = shape
        return [(columns, rows)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        (part,) = parts
        return part.t().contiguous()

    def split(self, tensor: Tensor) -> list[Tensor]:
        return [tensor.t().contiguous()]


@dataclass(frozen=True)
class QueryKeyValue:
    """Query, key and value projections.

    Megatron stores [G, n + 2, D, ...]: the queries of a group, its key and its value.

    The parts are the three weights [G n D, H], [G D, H], [G D, H], or the three biases without the H.
    """

    groups: int
    heads: int
    """Query heads of a group (n)."""
    head_size: int

    def parts(self, shape: Shape) -> list[Shape]:
        rows = self.groups * self.head_size
        return [(rows * self.heads, *shape[1:]), (rows, *shape[1:]), (rows, *shape[1:])]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        grouped = [part.reshape(self.groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def split(self, tensor: Tensor) -> list[Tensor]:
        rows = [self.heads * self.head_size, self.head_size, self.head_size]
        grouped = tensor.reshape(self.groups, sum(rows), *tensor.shape[1:])
        return [part.flatten(0, 1).contiguous() for part in grouped.split(rows, dim=1)]


@dataclass(frozen=True)
class GateUp:
    """Gate and up projection of a gated MLP. Megatron stores one tensor [2 I, ...], the gate first."""

    def parts(self, shape: Shape) -> list[Shape]:
        half = (shape[0] // 2, *shape[1:])
        return [half, half]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))

    def split(self, tensor: Tensor) -> list[Tensor]:
        return list(tensor.chunk(2))


@dataclass(frozen=True)
class Interleaved:
    """Gate and up rows that Hugging Face stores in turns: gate 0, up 0, gate 1, up 1 and so on."""

    then: Operation = Copy()
    """Applied to the Hugging Face part first."""

    def parts(self, shape: Shape) -> list[Shape]:
        return self.then.parts(shape)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        rows = self.then.join(parts)
        return torch.cat([rows[0::2], rows[1::2]])

    def split(self, tensor: Tensor) -> list[Tensor]:
        gate, up = tensor.chunk(2)
        return self.then.split(torch.stack([gate, up], dim=1).flatten(0, 1))


MXFP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
MXFP4_BLOCK = 32
"""Values that share one scale (OCP Microscaling Formats 1.0, section 5.2)."""


@dataclass(frozen=True)
class Mxfp4:
    """A bfloat16 matrix [rows, columns] from MXFP4.

    The values have 4 bits, the low half of a byte first. A block's values are multiplied by 2^(scale - 127).
    The parts are uint8: blocks [rows, columns / 32, 16] and scales [rows, columns / 32]. There is no inverse.
    """

    then: Operation = Copy()
    """Applied to the decoded matrix."""

    def parts(self, shape: Shape) -> list[Shape]:
        (decoded,) = self.then.parts(shape)
        rows, columns = decoded
        blocks = columns // MXFP4_BLOCK
        return [(rows, blocks, MXFP4_BLOCK // 2), (rows, blocks)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        blocks, scales = parts
        values = torch.tensor(MXFP4_VALUES, dtype=torch.bfloat16)
        halves = torch.stack([blocks & 0x0F, blocks >> 4], dim=-1).flatten(-2)
        decoded = torch.ldexp(values[halves.int()], scales.int()[..., None] - 127)
        return self.then.join([decoded.flatten(-2).to(torch.bfloat16)])

    def split(self, tensor: Tensor) -> list[Tensor]:
        # an export has no MXFP4 pieces: it plans without the tensors of the source
        raise NotImplementedError("MXFP4 is read and never written")
