"""Samples of supervised fine-tuning for Megatron: padded, with the loss on the response only."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ramoe_megatron.data.encode import Encoded, Tokenizer
from ramoe_megatron.data.parallel import Example
from ramoe_megatron.data.sampler import order
from ramoe_megatron.data.token_cache import Tokens
from ramoe_megatron.errors import RamoeError

SEQUENCE_KEYS = ("tokens", "labels", "loss_mask", "position_ids")
"""The tensors of a sample with one entry per token."""


class EncodedExamples:
    """Examples tokenised once.

    Attributes:
        eod: id of the end-of-document token.
        lengths: number of input tokens of each example, int64 [examples]. The last token is never an input,
            only a label, and does not count.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: Tokenizer,
        seq_length: int,
        tokens: Tokens | None = None,
        places: np.ndarray | None = None,
    ) -> None:
        """
        Args:
            tokens: tokens that have those of the examples, if they exist already.
            places: the place of each example in ``tokens``, integers [examples]. Default: its own place.

        Raises:
            RamoeError: examples are longer than ``seq_length``. The message gives their count and the
                longest.
        """
        self.eod = tokenizer.eod
        self._tokens = Tokens.of(examples, tokenizer) if tokens is None else tokens
        self._places = np.arange(len(examples), dtype=np.int32) if places is None else places
        self.lengths = self._tokens.lengths[self._places].astype(np.int64) - 1
        too_long = np.count_nonzero(self.lengths > seq_length)
        if too_long:
            worst, longest = examples[int(self.lengths.argmax())], self.lengths.max()
            raise RamoeError(
                f"{too_long} of {len(examples)} examples are longer than --seq-length {seq_length}. "
                f"The longest (id {worst.id!r}, language {worst.language!r}) needs {longest}. "
                f"Set --seq-length to at least {longest}, or drop the ids of the long examples in every "
                "language."
            )

    @property
    def loss_tokens(self) -> np.ndarray:
        """Number of tokens with a loss in each example, int64 [examples]."""
        return self.lengths + 1 - np.maximum(self._tokens.prompt_lengths[self._places], 1)

    def __getitem__(self, example: int) -> Encoded:
        """The token ids of one example, by its index."""
        return self._tokens[int(self._places[example])]


class SFTDataset(torch.utils.data.Dataset):
    """Samples of S = ``seq_length`` tokens with one example each, in the order of `sampler.order`.

    A sample is a dict of tensors:
        tokens, labels  int64 [S]: ids[:-1] and ids[1:] of prompt + response + eod, padded with eod
        loss_mask       float32 [S]: 1 where the label is a token of the response or its eod, otherwise 0
        position_ids    int64 [S]: 0 .. S-1
        prompt_length   int64 []: number of prompt tokens; the last prompt token is at prompt_length - 1
        length          int64 []: number of input tokens; the rest is padding
        example         int64 []: index into ``examples``

    With an empty prompt, the first token of the response has no loss, because no token comes before it.

    Attributes:
        examples: the examples.
        encoded: their `EncodedExamples`.
        order: the example index of every sample, int64 [num_samples].
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
            encoded: the tokenised examples, if they exist already.

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
        """The index into ``order`` of a sample."""
        return sample

    def drawn(self, samples: int) -> np.ndarray:
        """The example index of each draw in the first ``samples`` samples, int64 [draws]."""
        return self.order[:samples]

    def global_batches(self, global_batch_size: int) -> np.ndarray:
        """The global batch of each draw, int64 [draws]."""
        return np.arange(len(self.order)) // global_batch_size

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        index = int(self.order[sample])
        return pad(self.encoded[index], self._seq_length, self.encoded.eod) | {"example": torch.tensor(index)}


def pad(encoded: Encoded, seq_length: int, eod: int) -> dict[str, Tensor]:
    """One padded sample, as in `SFTDataset` but without ``example``. The ids must fit into ``seq_length``."""
    length = len(encoded.ids) - 1
    ids = torch.full((seq_length + 1,), eod, dtype=torch.int64)
    ids[: length + 1] = torch.tensor(encoded.ids)
    loss_mask = torch.zeros(seq_length)
    # The label at position j is token j + 1, so the position before the response predicts its first token.
    loss_mask[max(encoded.prompt_length - 1, 0) : length] = 1.0
    return {
        "tokens": ids[:-1].clone(),
        "labels": ids[1:].clone(),
        "loss_mask": loss_mask,
        "position_ids": torch.arange(seq_length),
        "prompt_length": torch.tensor(encoded.prompt_length),
        "length": torch.tensor(length),
    }
