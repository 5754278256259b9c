"""Taxonomy refresh: scores a sample of the training examples again during training (our own option).

The categories are written to SAVE/ramoe-refresh/ITERATION.jsonl, in the taxonomy's format, so that a run that
resumes continues with them. If that run saves to another folder, it copies the files there.

Shape suffixes: N training examples, B samples of a micro-batch.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ramoe_megatron.artifacts.anchor_files import check_anchor
from ramoe_megatron.artifacts.records import read_taxonomy, write_taxonomy
from ramoe_megatron.data.codes import RowKeys, codes_of, joined, pick
from ramoe_megatron.data.encode import Tokenizer
from ramoe_megatron.data.limits import new_token_limits
from ramoe_megatron.data.parallel import Example
from ramoe_megatron.data.sampler import named_rng
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.align.labels import ALIGNED, ExampleLabels
from ramoe_megatron.method.categories import CATEGORIES, TaxonomyRow

FOLDER = "ramoe-refresh"
BATCH_TOKENS = 4096


def refuse_refresh(args: Any) -> None:
    """Raise RamoeError for settings under which a model in training, or its samples, cannot be scored."""
    unsupported = {
        "--overlap-param-gather": args.overlap_param_gather,
        # Megatron draws the jitter in evaluation mode too, so scoring would change the random numbers of the
        # training
        f"--moe-input-jitter-eps {args.moe_input_jitter_eps}": args.moe_input_jitter_eps is not None,
        "--ramoe-pack": args.ramoe_pack,
        f"--context-parallel-size {args.context_parallel_size}": args.context_parallel_size > 1,
    }
    if found := [flag for flag, on in unsupported.items() if on]:
        raise RamoeError(
            f"--ramoe-refresh-interval does not work with {', '.join(found)}: remove one of the two flags"
        )


def refuse_other_anchors(taxonomy: str, anchor: str) -> None:
    """Raise RamoeError if the taxonomy has another anchor language than `anchor`, or several.

    A refresh scores "right in English" in the language `anchor` only.
    """
    try:
        check_anchor(taxonomy, anchor)
    except RamoeError as error:
        raise RamoeError(
            f"--ramoe-refresh-interval scores only the anchor {anchor} (--ramoe-anchor), "
            f"but --ramoe-taxonomy: {error}; or remove --ramoe-refresh-interval"
        ) from error


def scorable(labels: ExampleLabels, examples: Sequence[Example], views: Sequence[Example]) -> np.ndarray:
    """The indices of the examples that a refresh may score: those with a view in the anchor language."""
    id_ = codes_of(joined(examples, views), "id").codes
    return np.flatnonzero(labels.may_align & np.isin(id_[: len(examples)], id_[len(examples) :]))


def views_of(examples: Sequence[Example], views: Sequence[Example]) -> Sequence[Example]:
    """The view of each id of the examples, once, in the order of the examples."""
    id_ = codes_of(joined(examples, views), "id").codes
    wanted, first = np.unique(id_[: len(examples)], return_index=True)
    seen, place = np.unique(id_[len(examples) :][::-1], return_index=True)  # the last view of an id
    last = len(views) - 1 - place[np.searchsorted(seen, wanted)]
    return pick(views, last[np.argsort(first)])


def refuse_unanswerable(
    labels: ExampleLabels,
    examples: Sequence[Example],
    anchors: Sequence[Example],
    tokenizer: Tokenizer,
    positions: int,
) -> None:
    """Raise RamoeError for examples to score that no model can answer right (`new_token_limits`).

    Args:
        anchors: the examples in the anchor language, of the same split.
        positions: number of position embeddings of the model.
    """
    scored = pick(examples, scorable(labels, examples, anchors))
    asked = joined(views_of(scored, anchors), scored)
    try:
        new_token_limits(asked, tokenizer, None, positions)
    except RamoeError as error:
        raise RamoeError(
            f"--ramoe-refresh-interval scores training examples: {error} Or remove --ramoe-refresh-interval."
        ) from error


class TaxonomyRefresh:
    """The current categories of the training examples, on the device."""

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
            labels: the labels of the training examples.
            examples, views: the training examples, and the examples in the anchor language of the same split.

        Raises:
            RamoeError: a file of an earlier refresh is damaged, or has an example that is not in the training
                data.
        """
        self.chunks, self.labels, self.examples, self.args = chunks, labels, examples, args
        self.views = views
        self.config = labels.config
        self.category_N = labels.category.copy()
        self.scorable = scorable(labels, examples, views)
        self._resume()
        self._to_device()

    @property
    def category(self) -> list[str]:
        """The current category of each training example."""
        return self.category_N.tolist()

    def weight(self, example_B: Tensor) -> Tensor:
        """1 for an example that is currently aligned, else 0. [B]"""
        return self.aligned_N[example_B]

    def is_ci(self, example_B: Tensor) -> Tensor:
        """Whether an example is currently ci. [B], bool"""
        return self.ci_N[example_B]

    def step(self, iteration: int) -> None:
        """After iteration `iteration` (counted from 1): refresh if it is due. Every rank calls it."""
        assert self.config.refresh_interval is not None
        if iteration % self.config.refresh_interval or iteration >= self.args.train_iters:
            return
        sample = self._sample(iteration)
        rows = self._score(sample)
        before = self.category_N[sample]
        self.category_N[sample] = [row.category for row in rows]
        self._to_device()
        if torch.distributed.get_rank() == 0:
            self._tell(iteration, before.tolist(), [row.category for row in rows])
            if self.args.save:
                write_taxonomy(Path(self.args.save) / FOLDER / f"{iteration:07d}.jsonl", rows)

    def _sample(self, iteration: int) -> np.ndarray:
        """Indices of the examples to score: all languages of the ids that the seed and the iteration draw."""
        ids = codes_of(self.examples, "id")[self.scorable]
        known = sorted(ids.distinct())
        count = min(len(known), self.config.refresh_examples)
        drawn = named_rng(self.args.seed, f"refresh {iteration}").choice(len(known), count, replace=False)
        return self.scorable[ids.among([known[n] for n in drawn])]

    def _score(self, sample: np.ndarray) -> list[TaxonomyRow]:
        """The taxonomy of the sample with the current weights, on every rank."""
        from ramoe_megatron.mcore.offline.model import OfflineModel
        from ramoe_megatron.mcore.offline.scoring import score

        model = OfflineModel.around(self.chunks, self.args, BATCH_TOKENS)
        scored = pick(self.examples, sample)
        targets, views = list(scored), sorted(views_of(scored, self.views), key=lambda view: view.id)
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
        chosen = np.isin(self.category_N, ALIGNED[self.config.examples]) & self.labels.may_align
        self.aligned_N = torch.as_tensor(chosen, dtype=torch.float32, device=device)
        self.ci_N = torch.as_tensor(self.category_N == "ci", device=device)

    def _tell(self, iteration: int, before: Sequence[str], after: Sequence[str]) -> None:
        left = sum(old == "ci" != new for old, new in zip(before, after, strict=True))
        entered = sum(old != "ci" == new for old, new in zip(before, after, strict=True))
        now = Counter(self.category_N[self.labels.may_align].tolist())
        changes = f"{len(after)} rows scored, {left} left ci, {entered} entered ci"
        shares = ", ".join(f"{now[category]} {category}" for category in CATEGORIES)
        print(f"ramoe: taxonomy refreshed at iteration {iteration}: {changes}; now {shares}", flush=True)

    def _resume(self) -> None:
        """Read the categories of earlier refreshes of this run, up to the iteration at which it resumes."""
        if not self.args.iteration:
            return
        keys = RowKeys(self.examples)
        in_order = np.argsort(keys.of_examples)
        first, interval, foreign = torch.distributed.get_rank() == 0, self.config.refresh_interval, []
        assert interval is not None
        for path in sorted((Path(self.args.load or "") / FOLDER).glob("*.jsonl")):
            if not path.stem.isdigit() or int(path.stem) > self.args.iteration:
                continue
            if int(path.stem) % interval:
                foreign.append(path.name)
                continue
            rows = read_taxonomy(path)
            key = keys.of([row.id for row in rows], [row.language for row in rows])
            place = np.searchsorted(keys.of_examples, key, sorter=in_order).clip(max=len(in_order) - 1)
            place = in_order[place]
            for row in itertools.compress(rows, keys.of_examples[place] != key):
                raise RamoeError(
                    f"{path}: {row.id} ({row.language}) is not a training example, "
                    "so the data has changed; train on the same data, or from the start"
                )
            self.category_N[place] = [row.category for row in rows]
            if first and self.args.save:
                _keep(rows, path, Path(self.args.save) / FOLDER / path.name)
        # Such files are from an attempt that ended before its first checkpoint, or from another interval.
        if first and foreign:
            print(
                f"ramoe: {self.args.load}/{FOLDER}: {', '.join(foreign)}: not used, "
                f"because they do not belong to --ramoe-refresh-interval {interval}",
                flush=True,
            )


def _keep(rows: Sequence[TaxonomyRow], path: Path, kept: Path) -> None:
    """Write the rows from `path` to the run's own folder, over a different file of an earlier attempt."""
    if not kept.is_file() or kept.read_bytes() != path.read_bytes():
        write_taxonomy(kept, rows)
