"""Taxonomy refresh: scores a sample of the training examples again during training (our own option).

The categories are written to SAVE/ramoe-refresh/ITERATION.jsonl, in the taxonomy's format, so that a run that
resumes continues with them. If that run saves to another folder, it copies the files there.

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


def scorable(labels: ExampleLabels, examples: Sequence[Example], views: Mapping[str, Example]) -> list[int]:
    """The indices of the examples that a refresh may score. `views`: the anchor-language examples, by id."""
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
    """Raise RamoeError for examples to score that no model can answer right (`new_token_limits`).

    Args:
        anchors: the examples in the anchor language, of the same split.
        positions: number of position embeddings of the model.
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
        self.chunks, self.labels, self.examples, self.args = chunks, labels, list(examples), args
        self.views = {view.id: view for view in views}
        self.config = labels.config
        self.category = list(labels.category)
        self.scorable = scorable(labels, self.examples, self.views)
        self._resume()
        self._to_device()

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
        before = [self.category[n] for n in sample]
        for number, row in zip(sample, rows, strict=True):
            self.category[number] = row.category
        self._to_device()
        if torch.distributed.get_rank() == 0:
            self._tell(iteration, before, [row.category for row in rows])
            if self.args.save:
                write_taxonomy(Path(self.args.save) / FOLDER / f"{iteration:07d}.jsonl", rows)

    def _sample(self, iteration: int) -> list[int]:
        """Indices of the examples to score: all languages of the ids that the seed and the iteration draw."""
        ids = sorted({self.examples[n].id for n in self.scorable})
        count = min(len(ids), self.config.refresh_examples)
        drawn = named_rng(self.args.seed, f"refresh {iteration}").choice(len(ids), count, replace=False)
        chosen = {ids[n] for n in drawn}
        return [n for n in self.scorable if self.examples[n].id in chosen]

    def _score(self, sample: Sequence[int]) -> list[TaxonomyRow]:
        """The taxonomy of the sample with the current weights, on every rank."""
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
        changes = f"{len(after)} rows scored, {left} left ci, {entered} entered ci"
        shares = ", ".join(f"{now[category]} {category}" for category in CATEGORIES)
        print(f"ramoe: taxonomy refreshed at iteration {iteration}: {changes}; now {shares}", flush=True)

    def _resume(self) -> None:
        """Read the categories of earlier refreshes of this run, up to the iteration at which it resumes."""
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
                        f"{path}: {row.id} ({row.language}) is not a training example, "
                        "so the data has changed; train on the same data, or from the start"
                    )
                self.category[place[row.id, row.language]] = row.category
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
