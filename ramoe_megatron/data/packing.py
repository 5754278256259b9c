"""Several samples in one sequence (packed, THD), so that a fine-tuning step is not mostly padding."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ramoe_megatron.data.dataset import SEQUENCE_KEYS, EncodedExamples, pad
from ramoe_megatron.data.encode import Encoded, Tokenizer
from ramoe_megatron.data.parallel import Example
from ramoe_megatron.data.sampler import order


class PackedDataset(torch.utils.data.Dataset):
    """Packs of S = `seq_length` tokens, filled with whole samples in the order of the draws.

    A pack of K samples is a dict of tensors:
        tokens, labels, loss_mask, position_ids     [S], as of `SFTDataset`, sample after sample; positions start at 0 in each
        prompt_length, length, example              int64 [K], as of `SFTDataset`
        start           int64 [K]: the first row of each sample
        cu_seqlens      int32 [K + 1 or K + 2]: borders of the samples from 0 to S; what is left at the end is a segment of padding
        max_seqlen      int64 []: the longest segment
        sample_share    float32 []: packs / samples of the global batch that the pack belongs to, so that a mean over packs of
                        (share times the sum over a pack's samples) is the mean over the samples of the global batch

    Packs follow the order of the draws (next fit), which keeps it a pure function of the seed: the samples of a global batch of packs are
    consecutive draws, and resuming is slicing. Attributes: `examples`, `encoded`, `order` (int64 [draws]), `first` (int64 [packs + 1], the
    first draw of each pack).
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
            global_batch_size: in packs.
            multiple: what the room of each sample is rounded up to (2 cp under context parallelism).
            encoded: the examples, where they are tokenised already.

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
            if len(self.first) > num_packs + 1 or num_packs == 0:  # the last one may be cut short
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
        """Which draws of `order` a pack holds."""
        return slice(int(self.first[pack]), int(self.first[pack + 1]))

    def drawn(self, packs: int) -> np.ndarray:
        """The example of each draw in the first `packs` packs, int64."""
        return self.order[: self.first[packs]]

    def global_batches(self, global_batch_size: int) -> np.ndarray:
        """The global batch that each draw belongs to, int64 [draws]."""
        return np.repeat(np.arange(len(self)) // global_batch_size, np.diff(self.first))

    @property
    def fill(self) -> float:
        """Share of the packs' tokens that is not padding."""
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
    """First draw of each pack when each draw goes into the open pack or, if it does not fit, opens the next; then the number of draws.

    Args:
        lengths: of the draws, each at most `capacity`. [draws]
    """
    first, used = [0], 0
    for draw, length in enumerate(lengths.tolist()):
        if used + length > capacity:
            first.append(draw)
            used = 0
        used += length
    return np.array([*first, len(lengths)], dtype=np.int64)
