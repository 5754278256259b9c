"""Supervised fine-tuning samples for Megatron: padded, with the loss on the response only."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ramoe_megatron.data.encode import Encoded, Tokenizer, encode
from ramoe_megatron.data.parallel import Example
from ramoe_megatron.data.sampler import order
from ramoe_megatron.errors import RamoeError

SEQUENCE_KEYS = ("tokens", "labels", "loss_mask", "position_ids")
"""What an item has for each row of its sequence."""


class EncodedExamples:
    """Examples tokenised once, kept as one flat int32 array.

    Attributes: `eod`, and `lengths`, int64 [examples]: input tokens of each (all but the last, which is only ever a label).
    """

    def __init__(self, examples: Sequence[Example], tokenizer: Tokenizer, seq_length: int) -> None:
        """
        Raises:
            RamoeError: for examples longer than `seq_length` (their count and the longest).
        """
        self.eod = tokenizer.eod
        encoded = [encode(example, tokenizer) for example in examples]
        self.lengths = np.array([len(e.ids) - 1 for e in encoded], dtype=np.int64)
        too_long = np.flatnonzero(self.lengths > seq_length)
        if len(too_long):
            worst, longest = examples[int(self.lengths.argmax())], self.lengths.max()
            raise RamoeError(
                f"{len(too_long)} of {len(examples)} examples are longer than --seq-length {seq_length}. The longest "
                f"(id {worst.id!r}, language {worst.language!r}) needs {longest}. Set --seq-length to at "
                f"least {longest}, or drop the ids of the long examples in every language."
            )
        self._prompt_lengths = np.array([e.prompt_length for e in encoded], dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self.lengths + 1)])
        self._ids = np.fromiter(
            (i for e in encoded for i in e.ids), dtype=np.int32, count=int(self._starts[-1])
        )

    @property
    def loss_tokens(self) -> np.ndarray:
        """Tokens of each example that the loss is taken on, int64 [examples]."""
        return self.lengths + 1 - np.maximum(self._prompt_lengths, 1)

    def __getitem__(self, example: int) -> Encoded:
        """The token ids of one example, by its place among the examples."""
        ids = self._ids[self._starts[example] : self._starts[example + 1]]
        return Encoded(ids.tolist(), int(self._prompt_lengths[example]))


class SFTDataset(torch.utils.data.Dataset):
    """Samples of S = `seq_length` tokens, one example each, drawn by `sampler.order`.

    A sample is a dict of tensors:
        tokens, labels  int64 [S]: ids[:-1] and ids[1:] of prompt + response + eod, padded with eod
        loss_mask       float32 [S]: 1 where the label is a token of the response or its eod, else 0
        position_ids    int64 [S]: 0 .. S-1
        prompt_length   int64 []: tokens of the prompt (its last one stands at prompt_length - 1)
        length          int64 []: tokens that are real input; the rest is padding
        example         int64 []: index into `examples`
    An empty prompt leaves the first token of the response without a prediction, since there is nothing to predict it from.

    Attributes: `examples`, `encoded`, and `order`, int64 [num_samples], the example index of every sample.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: Tokenizer,
        seq_length: int,
        num_samples: int,
        seed: int,
        weights: Mapping[str, float] | None = None,
        encoded: EncodedExamples | None = None,
    ) -> None:
        """
        Args:
            encoded: the examples, where they are tokenised already.

        Raises:
            RamoeError: as `EncodedExamples` and `sampler.order`.
        """
        self.examples = examples
        self.order = order(examples, num_samples, seed, weights)
        self.encoded = EncodedExamples(examples, tokenizer, seq_length) if encoded is None else encoded
        self._seq_length = seq_length

    def __len__(self) -> int:
        return len(self.order)

    def draws(self, sample: int) -> int:
        """Which draw of `order` a sample holds."""
        return sample

    def drawn(self, samples: int) -> np.ndarray:
        """The example of each draw in the first `samples` samples, int64."""
        return self.order[:samples]

    def global_batches(self, global_batch_size: int) -> np.ndarray:
        """The global batch that each draw belongs to, int64 [draws]."""
        return np.arange(len(self.order)) // global_batch_size

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        index = int(self.order[sample])
        return pad(self.encoded[index], self._seq_length, self.encoded.eod) | {"example": torch.tensor(index)}


def pad(encoded: Encoded, seq_length: int, eod: int) -> dict[str, Tensor]:
    """One padded sample (see `SFTDataset`) without `example`; the ids must fit."""
    length = len(encoded.ids) - 1
    ids = torch.full((seq_length + 1,), eod, dtype=torch.int64)
    ids[: length + 1] = torch.tensor(encoded.ids)
    loss_mask = torch.zeros(seq_length)
    # the label at place j is token j + 1, so the place before the response predicts its first token
    loss_mask[max(encoded.prompt_length - 1, 0) : length] = 1.0
    return {
        "tokens": ids[:-1].clone(),
        "labels": ids[1:].clone(),
        "loss_mask": loss_mask,
        "position_ids": torch.arange(seq_length),
        "prompt_length": torch.tensor(encoded.prompt_length),
        "length": torch.tensor(length),
    }
