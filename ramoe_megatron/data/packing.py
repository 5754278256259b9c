"""Packed samples (THD format): several samples share a sequence, which avoids most of the padding."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ramoe_megatron.data.dataset import SEQUENCE_KEYS, EncodedExamples, pad
from ramoe_megatron.data.encode import Encoded, Tokenizer
from ramoe_megatron.data.parallel import Example
from ramoe_megatron.data.sampler import order


class PackedDataset(torch.utils.data.Dataset):
    """Packs of S = ``seq_length`` tokens, filled with whole samples in the order of the draws.

    A pack of K samples is a dict of tensors:
        tokens, labels, loss_mask, position_ids
                        [S]: those of `SFTDataset`, one sample after another; the positions of each sample
                        start at 0
        prompt_length, length, example
                        int64 [K]: those of `SFTDataset`
        start           int64 [K]: position of the first token of each sample
        cu_seqlens      int32 [K + 1 or K + 2]: borders of the samples from 0 to S. Free room at the end is a
                        last segment of padding
        max_seqlen      int64 []: length of the longest segment
        sample_share    float32 []: packs / samples in the global batch of this pack. The mean over packs of
                        (sample_share * sum over the samples of a pack) is the mean over the samples

    Packs are filled in the order of the draws (next fit). So packs depend only on the seed, the samples of a
    global batch are consecutive draws, and a resumed run continues with the same packs.

    Attributes:
        examples: the examples.
        encoded: their `EncodedExamples`.
        order: the example index of every draw, int64 [draws].
        first: the first draw of each pack, then the number of draws, int64 [packs + 1].
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: Tokenizer,
        seq_length: int,
        num_packs: int,
        seed: int,
        global_batch_size: int,
        weights: Mapping[str, float] | None = None,
        multiple: int = 1,
        encoded: EncodedExamples | None = None,
    ) -> None:
        """
        Args:
            global_batch_size: number of packs in a global batch.
            multiple: the length of each sample is padded to this multiple (2 cp under context parallelism).
            encoded: the tokenised examples, if they exist already.

        Raises:
            RamoeError: as `SFTDataset`.
        """
        self.examples = examples
        self.encoded = EncodedExamples(examples, tokenizer, seq_length) if encoded is None else encoded
        self.room = np.maximum(-(-self.encoded.lengths // multiple), 1) * multiple
        count = num_packs
        while True:  # a longer order starts with the shorter one
            self.order = order(examples, count, seed, weights)
            self.first = next_fit(self.room[self.order], seq_length)
            if len(self.first) > num_packs + 1 or num_packs == 0:  # the last pack may be incomplete
                break
            count *= 2
        self.first = self.first[: num_packs + 1]
        self.order = self.order[: self.first[-1]]
        self._seq_length = seq_length
        samples = np.bincount(self.global_batches(global_batch_size))
        packs = np.bincount(np.arange(num_packs) // global_batch_size)
        self._share = np.repeat(packs / samples, packs).astype(np.float32)

    def __len__(self) -> int:
        return len(self.first) - 1

    def draws(self, pack: int) -> slice:
        """The slice of ``order`` of a pack."""
        return slice(int(self.first[pack]), int(self.first[pack + 1]))

    def drawn(self, packs: int) -> np.ndarray:
        """The example index of each draw in the first ``packs`` packs, int64 [draws]."""
        return self.order[: self.first[packs]]

    def global_batches(self, global_batch_size: int) -> np.ndarray:
        """The global batch of each draw, int64 [draws]."""
        return np.repeat(np.arange(len(self)) // global_batch_size, np.diff(self.first))

    @property
    def fill(self) -> float:
        """Share of the packs' tokens that are not padding, in [0, 1]."""
        return float(self.encoded.lengths[self.order].sum() / (len(self) * self._seq_length))

    def __getitem__(self, pack: int) -> dict[str, Tensor]:
        places = self.order[self.draws(pack)]
        encoded, room = [self.encoded[int(place)] for place in places], self.room[places]
        parts = [pad(e, int(r), self.encoded.eod) for e, r in zip(encoded, room, strict=True)]
        borders = np.concatenate([[0], np.cumsum(room)])
        rest = self._seq_length - int(borders[-1])
        filler = [pad(Encoded([self.encoded.eod], 0), rest, self.encoded.eod)] if rest else []
        cu_seqlens = torch.from_numpy(
            np.concatenate([borders, [self._seq_length] * len(filler)]).astype(np.int32)
        )
        return {
            **{key: torch.cat([part[key] for part in [*parts, *filler]]) for key in SEQUENCE_KEYS},
            **{key: torch.stack([part[key] for part in parts]) for key in ("prompt_length", "length")},
            "example": torch.from_numpy(places),
            "start": torch.from_numpy(borders[:-1]),
            "cu_seqlens": cu_seqlens,
            "max_seqlen": cu_seqlens.diff().max().long(),
            "sample_share": torch.tensor(self._share[pack]),
        }


def next_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The first draw of each pack under next-fit packing, then the number of draws. int64 [packs + 1]

    Next fit adds each draw to the current pack, and starts a new pack for a draw that does not fit.

    Args:
        lengths: length of each draw, at most ``capacity``. [draws]
        capacity: length of a pack.
    """
    first, used = [0], 0
    for draw, length in enumerate(lengths.tolist()):
        if used + length > capacity:
            first.append(draw)
            used = 0
        used += length
    return np.array([*first, len(lengths)], dtype=np.int64)
