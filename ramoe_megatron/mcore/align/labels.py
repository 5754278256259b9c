"""Alignment labels: whether a sample's routing is aligned, and to which target."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.priors import Priors
from ramoe_megatron.artifacts.records import taxonomy_rows
from ramoe_megatron.data.codes import Codes, RowKeys, codes_of, pick
from ramoe_megatron.data.dataset import SFTDataset
from ramoe_megatron.data.packing import PackedDataset
from ramoe_megatron.data.parallel import Example
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.align.options import RoutingAlignmentConfig
from ramoe_megatron.mcore.align.resolve import resolve
from ramoe_megatron.method.categories import CATEGORIES

ALIGNED = {"ci": ("ci",), "ci+cc": ("ci", "cc"), "all": CATEGORIES}
"""The aligned categories for each value of `--ramoe-examples`."""
BLOCK_ROWS = 65536  # rows of a taxonomy that are objects at once


class ExampleLabels:
    """The alignment labels of all examples, from artefacts that are checked against the data.

    Attributes:
        aligned: whether an example is aligned. [examples], bool
        task: row of the example's task in the expert file; -1 if the file has no such task. [examples], int64
        category: cc, ci, ic or ii; "" for an example without a category. [examples]
        may_align: whether an example could be aligned in any category: it is not in the anchor language, and
            it has a target. [examples], bool
        unshuffled: number of aligned ids that keep their own target under `--ramoe-shuffle-targets`, because
            no other id of their task is aligned.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        config: RoutingAlignmentConfig,
        anchor: str,
        read: Callable[[], np.ndarray] | None = None,
    ) -> None:
        """
        Args:
            read: gives the `categories` of the examples. Default: they are read from the taxonomy.

        Raises:
            RamoeError: an artefact cannot be read, or belongs to another model, other data or another anchor;
                there is no zone; an example has no category; an aligned example has no task experts or no
                English routing (the message counts these and names five); or the control would shuffle no
                target.
        """
        resolved = resolve(config)
        experts = resolved.experts
        self.config, self.layers = config, resolved.layers
        rows = {task: row for row, task in enumerate(experts.tasks)}
        tasks = codes_of(examples, "task")
        self.task = tasks.mapped([rows.get(task, -1) for task in tasks.names], np.int64)
        self.category = read() if read else categories(examples, config.taxonomy, anchor)
        self.aligned = aligned_examples(examples, self.category, config, anchor)
        self._refuse_unknown_tasks(tasks, experts)
        self.may_align = ~codes_of(examples, "language").among([anchor]) & (self.task >= 0)
        refuse_other_anchor(config, experts, anchor)
        if config.target == "profile":
            has_pattern = experts.english_pattern[config.tokens].any(dim=-1).any(dim=-1).numpy()
            self.may_align &= has_pattern[self.task.clip(min=0)]
        self.priors = self._load_priors(examples, experts) if config.target == "example" else None
        self.target_ids = shuffled_ids(examples, self.aligned, config.shuffle_targets)
        self.unshuffled = 0 if config.shuffle_targets is None else self._unshuffled(examples)

    def target(self, index: int) -> Tensor:
        """The English routing that is an example's target, in the aligned layers. [Z, E]

        Zeros for an example that is not aligned.
        """
        assert self.priors is not None
        if not (self.aligned if self.config.refresh_interval is None else self.may_align)[index]:
            return torch.zeros(len(self.layers), self.priors.shape.num_experts)
        return self.priors.rows_at([int(self._prior_of[self.target_ids.codes[index]])], self.layers)[0]

    def _unshuffled(self, examples: Sequence[Example]) -> int:
        own, on = codes_of(examples, "id").codes, self.aligned
        ids, kept = np.unique(own[on]), np.unique(own[on & (own == self.target_ids.codes)])
        if len(ids) and len(kept) == len(ids):
            raise RamoeError(
                f"--ramoe-shuffle-targets {self.config.shuffle_targets} shuffles nothing: "
                f"each of the {len(ids)} aligned ids is the only one of its task. "
                "Add examples of a task, or remove the flag"
            )
        return len(kept)

    def _refuse_unknown_tasks(self, tasks: Codes, experts: ExpertFile) -> None:
        unknown = sorted(tasks.distinct(self.aligned & (self.task < 0)))
        if unknown:
            raise RamoeError(
                f"--ramoe-experts {self.config.experts}: no experts for the tasks {', '.join(unknown)} of "
                f"the training data; the file has {', '.join(experts.tasks)}. "
                "Run `ramoe profile` on data with these tasks"
            )
        if self.config.target == "profile":
            for task in sorted(tasks.distinct(self.aligned)):
                # raises if the task has no pattern to align to
                experts.profile_target(task, self.config.tokens)

    def _load_priors(self, examples: Sequence[Example], experts: ExpertFile) -> Priors:
        assert self.config.priors is not None
        priors = Priors.load(self.config.priors)
        if priors.tokens != self.config.tokens:
            raise RamoeError(
                f"--ramoe-priors {self.config.priors}: pooled over the tokens {priors.tokens!r}, "
                f"but --ramoe-tokens is {self.config.tokens!r}; run `ramoe profile --ramoe-save-priors` with "
                "the same --ramoe-tokens, or change the flag"
            )
        shape = experts.shape
        priors.check_model(shape.num_moe_layers, shape.num_experts, shape.topk, shape.score_function)
        priors.check_layers(self.layers)
        ids = codes_of(examples, "id")
        self._prior_of = priors.texts.find(ids.names)  # looked up once: a lookup reads all ids
        has_prior = (self._prior_of >= 0)[ids.codes]
        missing = sorted(ids.distinct(self.aligned & ~has_prior))
        self.may_align &= has_prior
        if self.config.missing_priors == "skip":
            self.aligned &= has_prior
        elif missing:
            raise RamoeError(
                f"--ramoe-priors {self.config.priors}: no English routing for {len(missing)} aligned "
                f"examples, first {', '.join(missing[:5])}; run `ramoe profile --ramoe-save-priors` on the "
                "training data, or use --ramoe-missing-priors skip"
            )
        return priors


def refuse_other_anchor(config: RoutingAlignmentConfig, experts: ExpertFile, anchor: str) -> None:
    """Raise RamoeError if the target is the English patterns and these belong to another anchor language."""
    known = (anchor, None)  # files of old versions do not name their anchor
    if config.target == "profile" and experts.anchor not in known:
        raise RamoeError(
            f"--ramoe-experts {config.experts}: its patterns, the target of --ramoe-target profile, "
            f"have the anchor {experts.anchor!r}, but --ramoe-anchor is {anchor!r}. "
            f"Run `ramoe profile` with the anchor {anchor}, or change the flag"
        )


class AlignedDataset(torch.utils.data.Dataset):
    """A data set that adds the alignment labels to the items of another data set.

    Added to each item: `ramoe_weight` float32 [] (0 = not aligned); `ramoe_task` int64 [] (row of the expert
    file; -1 if the task is not in it); with a taxonomy `ramoe_ci` bool []; for the target "example"
    `ramoe_target` float32 [Z, E]. For a pack of K samples each shape begins with K.

    In a `PairedDataset` half of the places are English views. There an aligned sample weighs 2, so the loss
    is still the mean over the trained samples. With per-token loss the views have no loss tokens, and an
    aligned sample weighs 1.
    """

    def __init__(
        self,
        dataset: SFTDataset | PackedDataset,
        config: RoutingAlignmentConfig,
        anchor: str,
        global_batch_size: int,
        per_token_loss: bool = False,
        labels: ExampleLabels | None = None,
    ) -> None:
        """
        Args:
            labels: the labels of the data set's examples, if they exist already.

        Raises:
            RamoeError: as `ExampleLabels`, or the reversed control under per-token loss, where English views
                weigh nothing.
        """
        refuse_weightless_views(config, per_token_loss)
        self.dataset, self.labels = dataset, labels or ExampleLabels(dataset.examples, config, anchor)
        self.weight = self._weights(config.normalize, global_batch_size, per_token_loss)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        item, draws = self.dataset[place], self.dataset.draws(place)
        examples = self.dataset.order[draws]
        item["ramoe_weight"] = torch.as_tensor(self.weight[draws], dtype=torch.float32)
        item["ramoe_task"] = torch.as_tensor(self.labels.task[examples])
        if self.labels.config.taxonomy is not None:
            item["ramoe_ci"] = torch.as_tensor(self.labels.category[examples] == "ci")
        if self.labels.priors is not None:
            targets = torch.stack([self.labels.target(int(index)) for index in np.atleast_1d(examples)])
            item["ramoe_target"] = targets if isinstance(draws, slice) else targets[0]
        return item

    def _weights(self, normalize: str, global_batch_size: int, per_token_loss: bool) -> np.ndarray:
        """Weight of each draw: 1 if aligned; under `normalize ci` divided by the aligned share of its global
        batch.

        The share is known in advance because the order of the draws is known.
        """
        aligned = self.labels.aligned[self.dataset.order].astype(np.float64)
        if self.labels.config.target == "paired":
            if self.labels.config.reverse:
                aligned = aligned.reshape(-1, 2)[:, ::-1].ravel()
            return aligned if per_token_loss else 2 * aligned
        if normalize == "samples":
            return aligned
        unit = (
            self.dataset.encoded.loss_tokens[self.dataset.order] if per_token_loss else np.ones_like(aligned)
        )
        batch = self.dataset.global_batches(global_batch_size)
        share = np.bincount(batch, aligned * unit) / np.bincount(batch, unit)
        return np.divide(aligned, share[batch], out=np.zeros_like(aligned), where=share[batch] > 0)


def refuse_weightless_views(config: RoutingAlignmentConfig, per_token_loss: bool) -> None:
    """Raise RamoeError if the reversed control would align samples that weigh nothing."""
    if config.reverse and per_token_loss:
        raise RamoeError(
            "--ramoe-reverse aligns English views, which have no loss tokens and so weigh nothing under "
            "--calculate-per-token-loss: remove one of the two flags"
        )


def categories(examples: Sequence[Example], taxonomy: str | None, anchor: str) -> np.ndarray:
    """The category (cc, ci, ic, ii) of each example; "" in the anchor language or without a taxonomy. [N]

    Raises:
        RamoeError: target-language examples are not in the taxonomy (the message counts these and names
            five).
    """
    found = np.zeros(len(examples), dtype="<U2")
    if taxonomy is None:
        return found
    keys = RowKeys(examples)
    scored = [
        (keys.of([row.id for row in block], [row.language for row in block]), [row.category for row in block])
        for block in itertools.batched(taxonomy_rows(taxonomy), BLOCK_ROWS)
    ]
    key = np.concatenate([key for key, _ in scored])
    category = np.concatenate([np.array(category, dtype="<U2") for _, category in scored])
    in_order = np.argsort(key)
    place = in_order[np.searchsorted(key, keys.of_examples, sorter=in_order).clip(max=len(key) - 1)]
    known, target = key[place] == keys.of_examples, ~codes_of(examples, "language").among([anchor])
    unknown = np.flatnonzero(target & ~known)
    if len(unknown):
        first = ", ".join(f"{e.id} ({e.language})" for e in pick(examples, unknown[:5]))
        raise RamoeError(
            f"--ramoe-taxonomy {taxonomy}: {len(unknown)} training examples have no category, "
            f"first {first}; run `ramoe taxonomy` on this data"
        )
    found[target] = category[place[target]]
    return found


def aligned_examples(
    examples: Sequence[Example], category: np.ndarray, config: RoutingAlignmentConfig, anchor: str
) -> np.ndarray:
    """Which examples are aligned. [examples], bool

    Aligned are target-language examples; with a taxonomy only examples of the chosen categories.
    """
    chosen = ALIGNED[config.examples] if config.taxonomy is not None else ("",)
    return ~codes_of(examples, "language").among([anchor]) & np.isin(category, chosen)


def shuffled_ids(examples: Sequence[Example], aligned: np.ndarray, seed: int | None) -> Codes:
    """The id whose English routing each example is aligned to.

    It is the example's own id or, with a seed (the control), another aligned id of the same task.
    """
    ids, tasks = codes_of(examples, "id"), codes_of(examples, "task")
    if seed is None:
        return ids
    generator = np.random.default_rng(seed)
    other = np.arange(len(ids.names))
    for task in sorted(tasks.distinct(aligned)):
        found, first = np.unique(ids.codes[aligned & tasks.among([task])], return_index=True)
        order = found[np.argsort(first)][generator.permutation(len(found))]
        other[order] = np.roll(order, -1)  # a cycle: no id keeps its own target
    return Codes(ids.names, other[ids.codes])
