"""Ranks that compute what rank 0 asks of the model, while lm_eval runs on rank 0 alone."""

import datetime
from collections.abc import Sequence
from typing import Any

import torch

from ramoe_megatron.jobs.offline_job import ProgressLines
from ramoe_megatron.mcore.offline.continuations import (
    continuation_likelihoods,
    continuations,
    with_whole_vocabulary,
)
from ramoe_megatron.mcore.offline.model import OfflineModel

MODEL = "ramoe"
"""Name of the model in lm-eval."""
PATIENCE = datetime.timedelta(days=30)
"""How long a rank waits for the next request, since rank 0 may load a large data set meanwhile."""


class Ranks:
    """The model over all ranks. Rank 0 asks, and every rank computes.

    Attributes:
        loaded: whether loading the model has begun.
    """

    def __init__(self, args: Any, batch_tokens: int) -> None:
        """After `mcore.offline.model.start`, on every rank."""
        from megatron.training import get_tokenizer

        self.args, self.batch_tokens = args, batch_tokens
        self.tokenizer = get_tokenizer()
        self.loaded = False
        self._model: OfflineModel | None = None
        self._computing = False
        self._group: Any = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)

    def ask(self, what: str, *values: Any) -> Any:
        """Compute on every rank; on rank 0 only.

        Args:
            what: load, likelihoods (`continuation_likelihoods`) or continuations (`continuations`).
            values: their arguments after the model.
        """
        self._send((what, values))
        return self._compute(what, values)

    def follow(self) -> None:
        """Compute what rank 0 asks, until it releases this rank."""
        while (request := self._send(None)) is not None:
            self._compute(*request)

    def release(self) -> None:
        """Let the other ranks end, unless an error on every rank has ended them; on rank 0 only."""
        if not self._computing:
            self._send(None)

    def _send(self, request: tuple[str, tuple[Any, ...]] | None) -> Any:
        sent = [request]
        torch.distributed.broadcast_object_list(sent, src=0, group=self._group)
        return sent[0]

    def _compute(self, what: str, values: tuple[Any, ...]) -> Any:
        self._computing = True
        found = getattr(self, f"_{what}")(*values)
        self._computing = False
        return found

    def _load(self) -> None:
        self.loaded = True
        self._model = with_whole_vocabulary(OfflineModel(self.args, self.batch_tokens))

    def _likelihoods(self, sequences: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, bool]]:
        assert self._model
        return continuation_likelihoods(self._model, sequences, ProgressLines(len(sequences), "requests"))

    def _continuations(
        self, prompts: Sequence[Sequence[int]], limits: Sequence[int], until: Sequence[Sequence[str]]
    ) -> list[list[int]]:
        assert self._model
        progress = ProgressLines(len(prompts), "answers")
        return continuations(self._model, prompts, limits, until, progress)
