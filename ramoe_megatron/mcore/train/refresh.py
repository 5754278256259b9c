"""Taxonomy refresh: while training goes on, a sample of its examples is scored anew with the current weights (our own option).

What is found stands in SAVE/ramoe-refresh/ITERATION.jsonl, in the taxonomy's format, so that a run that resumes goes on with the
categories that it had. One that saves elsewhere keeps what it took over there too.

Shape suffixes: N training examples, B samples of a micro-batch.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ramoe_megatron.artifacts.anchor_files import check_anchor
from ramoe_megatron.artifacts.records import read_taxonomy, write_taxonomy
from ramoe_megatron.data.encode import Tokenizer
from ramoe_megatron.data.limits import new_token_limits
from ramoe_megatron.data.parallel import Example
from ramoe_megatron.data.sampler import named_rng
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.align.labels import ALIGNED, ExampleLabels
from ramoe_megatron.method.taxonomy import CATEGORIES, TaxonomyRow

FOLDER = "ramoe-refresh"
BATCH_TOKENS = 4096


def refuse_refresh(args: Any) -> None:
    """Raise RamoeError for what keeps a model from being scored while it trains, or its samples from being told apart."""
    unsupported = {
        "--overlap-param-gather": args.overlap_param_gather,
        # Megatron draws it in evaluation mode too: scoring would change the random numbers of the training
        f"--moe-input-jitter-eps {args.moe_input_jitter_eps}": args.moe_input_jitter_eps is not None,
        "--ramoe-pack": args.ramoe_pack,
        f"--context-parallel-size {args.context_parallel_size}": args.context_parallel_size > 1,
    }
    if found := [flag for flag, on in unsupported.items() if on]:
        raise RamoeError(
            f"--ramoe-refresh-interval does not go with {', '.join(found)}: remove one of the two"
        )


def refuse_other_anchors(taxonomy: str, anchor: str) -> None:
    """Raise RamoeError for a taxonomy of another anchor language than `anchor`, or of several: a refresh scores "right in English" in
    `anchor` alone."""
    try:
        check_anchor(taxonomy, anchor)
    except RamoeError as error:
        raise RamoeError(
            f"--ramoe-refresh-interval scores the anchor {anchor} alone (--ramoe-anchor), and --ramoe-taxonomy: {error}; "
            "or remove --ramoe-refresh-interval"
        ) from error


def scorable(labels: ExampleLabels, examples: Sequence[Example], views: Mapping[str, Example]) -> list[int]:
    """The places of the examples that a refresh may score. `views`: the anchor's rows by id."""
    return [
        n for n, (e, may) in enumerate(zip(examples, labels.may_align, strict=True)) if may and e.id in views
    ]


def refuse_unanswerable(
    labels: ExampleLabels,
    examples: Sequence[Example],
    anchors: Sequence[Example],
    tokenizer: Tokenizer,
    positions: int,
) -> None:
    """Raise RamoeError for examples that may be scored and that no model can answer right (`new_token_limits`).

    Args:
        anchors: the anchor's rows of the same split.
        positions: the model's position embeddings.
    """
    views = {view.id: view for view in anchors}
    scored = [examples[n] for n in scorable(labels, examples, views)]
    asked = list({example.id: views[example.id] for example in scored}.values())
    try:
        new_token_limits([*asked, *scored], tokenizer, None, positions)
    except RamoeError as error:
        raise RamoeError(
            f"--ramoe-refresh-interval scores training examples: {error} Or remove --ramoe-refresh-interval."
        ) from error


class TaxonomyRefresh:
    """The categories of the training examples as they stand now, on the device."""

    def __init__(
        self,
        chunks: Sequence[Any],
        labels: ExampleLabels,
        examples: Sequence[Example],
        views: Sequence[Example],
        args: Any,
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
        self.scorable = scorable(labels, self.examples, self.views)
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
        ids = sorted({self.examples[n].id for n in self.scorable})
        count = min(len(ids), self.config.refresh_examples)
        drawn = named_rng(self.args.seed, f"refresh {iteration}").choice(len(ids), count, replace=False)
        chosen = {ids[n] for n in drawn}
        return [n for n in self.scorable if self.examples[n].id in chosen]

    def _score(self, sample: Sequence[int]) -> list[TaxonomyRow]:
        """The taxonomy of the sample by the current weights, on every rank."""
        from ramoe_megatron.mcore.offline.model import OfflineModel
        from ramoe_megatron.mcore.offline.scoring import score

        model = OfflineModel.around(self.chunks, self.args, BATCH_TOKENS)
        views = [self.views[id_] for id_ in sorted({self.examples[n].id for n in sample})]
        targets = [self.examples[n] for n in sample]
        limits = self._limits([*views, *targets], model.tokenizer)
        for chunk in self.chunks:
            chunk.eval()
        right = score(model, [*views, *targets], limits)
        for chunk in self.chunks:
            chunk.train()
        english = {view.id: outcome for view, outcome in zip(views, right, strict=False)}
        return [
            TaxonomyRow(e.id, e.task, e.language, e.split, english[e.id], outcome)
            for e, outcome in zip(targets, right[len(views) :], strict=True)
        ]

    def _limits(self, examples: Sequence[Example], tokenizer: Tokenizer) -> list[int]:
        return new_token_limits(examples, tokenizer, None, self.args.max_position_embeddings)

    def _to_device(self) -> None:
        device = next(parameter.device for chunk in self.chunks for parameter in chunk.parameters())
        chosen = np.isin(self.category, ALIGNED[self.config.examples]) & self.labels.may_align
        self.aligned_N = torch.as_tensor(chosen, dtype=torch.float32, device=device)
        self.ci_N = torch.as_tensor(np.array(self.category) == "ci", device=device)

    def _tell(self, iteration: int, before: Sequence[str], after: Sequence[str]) -> None:
        left = sum(old == "ci" != new for old, new in zip(before, after, strict=True))
        entered = sum(old != "ci" == new for old, new in zip(before, after, strict=True))
        now = Counter(
            category for category, may in zip(self.category, self.labels.may_align, strict=True) if may
        )
        told = f"{len(after)} rows scored, {left} left ci, {entered} entered it"
        shares = ", ".join(f"{now[category]} {category}" for category in CATEGORIES)
        print(f"ramoe: taxonomy refreshed at iteration {iteration}: {told}; now {shares}", flush=True)

    def _resume(self) -> None:
        """Take over what earlier refreshes of this run found, up to the iteration that it goes on from."""
        if not self.args.iteration:
            return
        place = {(example.id, example.language): n for n, example in enumerate(self.examples)}
        first, interval, foreign = torch.distributed.get_rank() == 0, self.config.refresh_interval, []
        assert interval is not None
        for path in sorted((Path(self.args.load or "") / FOLDER).glob("*.jsonl")):
            if not path.stem.isdigit() or int(path.stem) > self.args.iteration:
                continue
            if int(path.stem) % interval:
                foreign.append(path.name)
                continue
            rows = read_taxonomy(path)
            for row in rows:
                if (row.id, row.language) not in place:
                    raise RamoeError(
                        f"{path}: {row.id} ({row.language}) is no training example: the data changed; train on the same, or from "
                        "the start"
                    )
                self.category[place[row.id, row.language]] = row.category
            if first and self.args.save:
                _keep(rows, path, Path(self.args.save) / FOLDER / path.name)
        if (
            first and foreign
        ):  # left by an attempt that ended before its first checkpoint, or of a run with another interval
            told = f"{', '.join(foreign)}: not taken over, since they are no refreshes of --ramoe-refresh-interval {interval}"
            print(f"ramoe: {self.args.load}/{FOLDER}: {told}", flush=True)


def _keep(rows: Sequence[TaxonomyRow], path: Path, kept: Path) -> None:
    """Rows read from `path`, in the run's own folder: in place of what an earlier attempt may have left there."""
    if not kept.is_file() or kept.read_bytes() != path.read_bytes():
        write_taxonomy(kept, rows)
