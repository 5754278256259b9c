"""Taxonomy refresh: while training goes on, a sample of its examples is scored anew with the current weights (our own option).

What is found stands in SAVE/ramoe-refresh/ITERATION.jsonl, in the taxonomy's format, so that a run that resumes goes on with the
categories that it had.

Shape suffixes: N training examples, B samples of a micro-batch.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ramoe_megatron.data.parallel import Example
from ramoe_megatron.data.sampler import named_rng
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.artefacts import read_taxonomy, write_taxonomy
from ramoe_megatron.method.taxonomy import CATEGORIES, TaxonomyRow

if TYPE_CHECKING:
    from ramoe_megatron.mcore.labels import ExampleLabels

FOLDER = "ramoe-refresh"
BATCH_TOKENS = 4096


def refuse_refresh(args: Any) -> None:
    """Raise RamoeError for what keeps a model from being scored while it trains, or its samples from being told apart."""
    unsupported = {
        "--overlap-param-gather": args.overlap_param_gather,
        "--ramoe-pack": args.ramoe_pack,
        f"--context-parallel-size {args.context_parallel_size}": args.context_parallel_size > 1,
    }
    if found := [flag for flag, on in unsupported.items() if on]:
        raise RamoeError(f"--ramoe-refresh-interval does not go with {', '.join(found)}: remove one of the two")


class TaxonomyRefresh:
    """The categories of the training examples as they stand now, on the device."""

    def __init__(
        self, chunks: Sequence[Any], labels: "ExampleLabels", examples: Sequence[Example], views: Sequence[Example], args: Any
    ) -> None:
        """
        Args:
            chunks: the model chunks of this rank, unwrapped.
            labels: of the training examples.
            examples, views: the training examples, and the anchor's rows of the same split.

        Raises:
            RamoeError: a file of an earlier refresh is damaged, or knows other examples.
        """
        self.chunks, self.labels, self.examples, self.args = chunks, labels, list(examples), args
        self.views = {view.id: view for view in views}
        self.config = labels.config
        self.category = list(labels.category)
        self._resume()
        self._to_device()

    def weight(self, example_B: Tensor) -> Tensor:
        """1 where an example is aligned now, else 0. [B]"""
        return self.aligned_N[example_B]

    def is_ci(self, example_B: Tensor) -> Tensor:
        """Whether it is ci now. [B], bool"""
        return self.ci_N[example_B]

    def step(self, iteration: int) -> None:
        """After iteration `iteration` (from 1): refresh where it is due. Every rank calls it."""
        assert self.config.refresh_interval is not None
        if iteration % self.config.refresh_interval or iteration >= self.args.train_iters:
            return
        sample = self._sample(iteration)
        rows = self._score(sample)
        before = [self.category[n] for n in sample]
        for number, row in zip(sample, rows, strict=True):
            self.category[number] = row.category
        self._to_device()
        if torch.distributed.get_rank() == 0:
            self._tell(iteration, before, [row.category for row in rows])
            if self.args.save:
                write_taxonomy(Path(self.args.save) / FOLDER / f"{iteration:07d}.jsonl", rows)

    def _sample(self, iteration: int) -> list[int]:
        """Places of the examples to score: all languages of ids drawn by the seed and the iteration."""
        ids = sorted({e.id for e, may in zip(self.examples, self.labels.may_align, strict=True) if may and e.id in self.views})
        count = min(len(ids), self.config.refresh_examples)
        drawn = named_rng(self.args.seed, f"refresh {iteration}").choice(len(ids), count, replace=False)
        chosen = {ids[n] for n in drawn}
        return [n for n, (e, may) in enumerate(zip(self.examples, self.labels.may_align, strict=True)) if may and e.id in chosen]

    def _score(self, sample: Sequence[int]) -> list[TaxonomyRow]:
        """The taxonomy of the sample by the current weights, on every rank."""
        from ramoe_megatron.mcore.offline import OfflineModel
        from ramoe_megatron.mcore.scoring import score

        model = OfflineModel.around(self.chunks, self.args, BATCH_TOKENS)
        views = [self.views[id_] for id_ in sorted({self.examples[n].id for n in sample})]
        targets = [self.examples[n] for n in sample]
        for chunk in self.chunks:
            chunk.eval()
        longest = max(len(model.tokenizer.tokenize(example.answer)) for example in [*views, *targets]) + 2
        right = score(model, [*views, *targets], longest)
        for chunk in self.chunks:
            chunk.train()
        english = {view.id: outcome for view, outcome in zip(views, right, strict=False)}
        return [
            TaxonomyRow(e.id, e.task, e.language, e.split, english[e.id], outcome)
            for e, outcome in zip(targets, right[len(views) :], strict=True)
        ]

    def _to_device(self) -> None:
        from ramoe_megatron.mcore.labels import ALIGNED

        device = next(parameter.device for chunk in self.chunks for parameter in chunk.parameters())
        chosen = np.isin(self.category, ALIGNED[self.config.examples]) & self.labels.may_align
        self.aligned_N = torch.as_tensor(chosen, dtype=torch.float32, device=device)
        self.ci_N = torch.as_tensor(np.array(self.category) == "ci", device=device)

    def _tell(self, iteration: int, before: Sequence[str], after: Sequence[str]) -> None:
        left = sum(old == "ci" != new for old, new in zip(before, after, strict=True))
        entered = sum(old != "ci" == new for old, new in zip(before, after, strict=True))
        now = Counter(category for category, may in zip(self.category, self.labels.may_align, strict=True) if may)
        told = f"{len(after)} rows scored, {left} left ci, {entered} entered it"
        shares = ", ".join(f"{now[category]} {category}" for category in CATEGORIES)
        print(f"ramoe: taxonomy refreshed at iteration {iteration}: {told}; now {shares}", flush=True)

    def _resume(self) -> None:
        """Take over what earlier refreshes of this run found, up to the iteration that it goes on from."""
        if not self.args.iteration:
            return
        place = {(example.id, example.language): n for n, example in enumerate(self.examples)}
        for path in sorted((Path(self.args.load or "") / FOLDER).glob("*.jsonl")):
            if not path.stem.isdigit() or int(path.stem) > self.args.iteration:
                continue
            for row in read_taxonomy(path):
                if (row.id, row.language) not in place:
                    raise RamoeError(
                        f"{path}: {row.id} ({row.language}) is no training example: the data changed; train on the same, or from "
                        "the start"
                    )
                self.category[place[row.id, row.language]] = row.category
