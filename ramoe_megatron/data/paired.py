"""Paired samples: each draw follows the anchor-language view of its example, in the same micro-batch."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ramoe_megatron.data.codes import codes_of, joined
from ramoe_megatron.data.dataset import EncodedExamples, SFTDataset
from ramoe_megatron.data.encode import Tokenizer
from ramoe_megatron.data.parallel import Example
from ramoe_megatron.data.sampler import order
from ramoe_megatron.errors import RamoeError


class PairedDataset(SFTDataset):
    """An `SFTDataset` of pairs: an anchor-language view without loss, then the draw.

    Even positions have the view, odd positions the draw. The draws and their order are those of `SFTDataset`,
    so twice the batch size trains on the same samples. A draw in the anchor language is its own view. A
    micro-batch of even size keeps each pair together.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        views: Sequence[Example],
        tokenizer: Tokenizer,
        seq_length: int,
        num_samples: int,
        seed: int,
        weights: Mapping[str, float] | None = None,
        encoded: EncodedExamples | None = None,
    ) -> None:
        """
        Args:
            views: the anchor-language examples, matched by id.
            num_samples: number of samples, views included.
            encoded: the tokenised examples followed by the views, if they exist already.

        Raises:
            RamoeError: as `SFTDataset`; also when examples have no view. The message counts the examples and
                names the first five.
        """
        draws = order(examples, -(-num_samples // 2), seed, weights)
        view_of = view_places(examples, views)
        self.examples = joined(examples, views)
        self.order = np.stack([view_of[draws], draws], axis=1).ravel()
        self.encoded = EncodedExamples(self.examples, tokenizer, seq_length) if encoded is None else encoded
        self._seq_length = seq_length

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        item = super().__getitem__(sample)
        return item if sample % 2 else item | {"loss_mask": torch.zeros_like(item["loss_mask"])}


def view_places(examples: Sequence[Example], views: Sequence[Example]) -> np.ndarray:
    """The place of each example's anchor view among the examples and behind them the views, int64 [examples].

    Raises:
        RamoeError: examples without a view (how many, the first five).
    """
    id_ = codes_of(joined(examples, views), "id")
    in_anchor = codes_of(examples, "language").among(codes_of(views, "language").distinct())
    own = np.arange(len(examples))
    place = np.full(len(id_.names), -1, dtype=np.int64)
    place[id_.codes[len(examples) :]] = np.arange(len(examples), len(id_))
    view_of = place[id_.codes[: len(examples)]]
    lacking = ~in_anchor & (view_of < 0)
    if lacking.any():
        missing = sorted(id_[: len(examples)].distinct(lacking))
        raise RamoeError(
            f"{len(missing)} training examples have no view in the anchor language, "
            f"first {', '.join(missing[:5])}; --ramoe-target paired needs a view of each example; "
            "add the views to the data, or use --ramoe-target example"
        )
    return np.where(in_anchor, own, view_of)
