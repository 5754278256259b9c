"""From a sample's id and language to what its routing is to be: the part of a batch that the alignment loss reads."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.priors import Priors
from ramoe_megatron.artifacts.records import read_taxonomy
from ramoe_megatron.data.dataset import SFTDataset
from ramoe_megatron.data.packing import PackedDataset
from ramoe_megatron.data.parallel import Example
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.align.options import RoutingAlignmentConfig
from ramoe_megatron.mcore.align.resolve import resolve
from ramoe_megatron.method.taxonomy import CATEGORIES

ALIGNED = {"ci": ("ci",), "ci+cc": ("ci", "cc"), "all": CATEGORIES}
"""By `--ramoe-examples`, the categories that are aligned."""


class ExampleLabels:
    """Whether each example's routing is aligned, and to what: read from the artefacts, checked against each other and the data.

    Attributes: `aligned` bool [examples], `task` int64 [examples] (row of the expert file; -1 when the task is not in it), `category`
    (cc, ci, ic or ii of each example, "" where it has none), `may_align` bool [examples] (what it needs to be aligned, whatever its
    category: another language than the anchor, and a target), `unshuffled` (aligned ids that `--ramoe-shuffle-targets` has to leave their
    own target, the only aligned ones of their tasks).
    """

    def __init__(self, examples: Sequence[Example], config: RoutingAlignmentConfig, anchor: str) -> None:
        """
        Raises:
            RamoeError: an artefact that cannot be read or belongs to another model or other data: no zone, examples without a category,
                aligned examples of a task without experts, or without an English routing (how many, the first five); patterns of another
                anchor; or a control that would shuffle no target.
        """
        resolved = resolve(config)
        experts = resolved.experts
        self.config, self.layers = config, resolved.layers
        rows = {task: row for row, task in enumerate(experts.tasks)}
        self.task = np.array([rows.get(example.task, -1) for example in examples], dtype=np.int64)
        self.category = np.array(categories(examples, config.taxonomy, anchor))
        self.aligned = aligned_examples(examples, self.category, config, anchor)
        self._refuse_unknown_tasks(examples, experts)
        self.may_align = np.array([example.language != anchor for example in examples], dtype=bool) & (
            self.task >= 0
        )
        refuse_other_anchor(config, experts, anchor)
        if config.target == "profile":
            has_pattern = experts.english_pattern[config.tokens].any(dim=-1).any(dim=-1).numpy()
            self.may_align &= has_pattern[self.task.clip(min=0)]
        self.priors = self._load_priors(examples, experts) if config.target == "example" else None
        self.target_ids = shuffled_ids(examples, self.aligned, config.shuffle_targets)
        self.unshuffled = 0 if config.shuffle_targets is None else self._unshuffled(examples)

    def target(self, index: int) -> Tensor:
        """English routing that an example is pulled to in the aligned layers; zeros where it is not aligned. [Z, E]"""
        assert self.priors is not None
        if not (self.aligned if self.config.refresh_interval is None else self.may_align)[index]:
            return torch.zeros(len(self.layers), self.priors.shape.num_experts)
        return self.priors.rows([self.target_ids[index]])[0, list(self.layers)].float()

    def _unshuffled(self, examples: Sequence[Example]) -> int:
        moved = {
            e.id: e.id != target
            for e, target, on in zip(examples, self.target_ids, self.aligned, strict=True)
            if on
        }
        if moved and not any(moved.values()):
            raise RamoeError(
                f"--ramoe-shuffle-targets {self.config.shuffle_targets} shuffles nothing: each of the {len(moved)} aligned ids is the only "
                "one of its task. Give more examples of a task, or remove the flag"
            )
        return sum(not other for other in moved.values())

    def _refuse_unknown_tasks(self, examples: Sequence[Example], experts: ExpertFile) -> None:
        unknown = sorted(
            {e.task for e, row, on in zip(examples, self.task, self.aligned, strict=True) if on and row < 0}
        )
        if unknown:
            raise RamoeError(
                f"--ramoe-experts {self.config.experts}: no experts for the tasks {', '.join(unknown)} of the training data; it has "
                f"{', '.join(experts.tasks)}. Run `ramoe profile` on data with these tasks"
            )
        if self.config.target == "profile":
            for task in sorted({e.task for e, on in zip(examples, self.aligned, strict=True) if on}):
                experts.profile_target(
                    task, self.config.tokens
                )  # raises where there is no pattern to align to

    def _load_priors(self, examples: Sequence[Example], experts: ExpertFile) -> Priors:
        assert self.config.priors is not None
        priors = Priors.load(self.config.priors)
        if priors.tokens != self.config.tokens:
            raise RamoeError(
                f"--ramoe-priors {self.config.priors}: pooled over the tokens {priors.tokens!r}, but --ramoe-tokens is "
                f"{self.config.tokens!r}; run `ramoe profile --ramoe-save-priors` with the same --ramoe-tokens, or change the flag"
            )
        shape = experts.shape
        priors.check_model(shape.num_moe_layers, shape.num_experts, shape.topk, shape.score_function)
        known = set(priors.ids)
        missing = sorted({e.id for e, on in zip(examples, self.aligned, strict=True) if on} - known)
        has_prior = np.array([example.id in known for example in examples], dtype=bool)
        self.may_align &= has_prior
        if self.config.missing_priors == "skip":
            self.aligned &= has_prior
        elif missing:
            raise RamoeError(
                f"--ramoe-priors {self.config.priors}: no English routing for {len(missing)} aligned examples, first "
                f"{', '.join(missing[:5])}; run `ramoe profile --ramoe-save-priors` on the data that is trained on"
            )
        return priors


def refuse_other_anchor(config: RoutingAlignmentConfig, experts: ExpertFile, anchor: str) -> None:
    """Raise RamoeError for patterns of another anchor, where they are the target."""
    if config.target == "profile" and experts.anchor not in (
        anchor,
        None,
    ):  # files of old versions do not say theirs
        raise RamoeError(
            f"--ramoe-experts {config.experts}: its patterns, the target of --ramoe-target profile, are of the anchor {experts.anchor!r}, "
            f"but --ramoe-anchor is {anchor!r}. Run `ramoe profile` with that anchor, or change the flag"
        )


class AlignedDataset(torch.utils.data.Dataset):
    """A data set whose items also say whether, and to what, the routing of their samples is aligned.

    Added to each item: `ramoe_weight` float32 [] (0 = not aligned), `ramoe_task` int64 [] (row of the expert file; -1 when the task is
    not in it), with a taxonomy `ramoe_ci` bool [] and, for the target "example", `ramoe_target` float32 [Z, E]. For a pack of K samples
    each begins with a dimension K.

    Of a `PairedDataset` an aligned sample weighs 2, since half of the places are views of another: the term stays the mean over the samples
    that are trained on. (With per-token loss the views have no loss tokens, and it weighs 1.)
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
            labels: of the data set's examples, where they have been made before.

        Raises:
            RamoeError: as `ExampleLabels`, or English views that are to be aligned under per-token loss, where they weigh nothing.
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
        """Weight of each draw: 1 when aligned; under `normalize ci` divided by the aligned share of its global batch, which is known
        beforehand because the order of draws is."""
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
    """Raise RamoeError where the reversed control aligns samples that weigh nothing."""
    if config.reverse and per_token_loss:
        raise RamoeError(
            "--ramoe-reverse aligns views without loss tokens, which weigh nothing under --calculate-per-token-loss: remove that flag"
        )


def categories(examples: Sequence[Example], taxonomy: str | None, anchor: str) -> list[str]:
    """The category (cc, ci, ic, ii) of each example; "" for the anchor's, and for all without a taxonomy.

    Raises:
        RamoeError: target-language examples that the taxonomy does not know (how many, the first five).
    """
    if taxonomy is None:
        return [""] * len(examples)
    category = {(row.id, row.language): row.category for row in read_taxonomy(taxonomy)}
    unknown = [e for e in examples if e.language != anchor and (e.id, e.language) not in category]
    if unknown:
        first = ", ".join(f"{e.id} ({e.language})" for e in unknown[:5])
        raise RamoeError(
            f"--ramoe-taxonomy {taxonomy}: {len(unknown)} training examples have no category, first {first}; run `ramoe taxonomy` "
            "on this data"
        )
    return ["" if e.language == anchor else category[e.id, e.language] for e in examples]


def aligned_examples(
    examples: Sequence[Example], category: Iterable[str], config: RoutingAlignmentConfig, anchor: str
) -> np.ndarray:
    """Which examples are aligned: target-language ones, of the chosen categories where there is a taxonomy. [examples], bool"""
    chosen = ALIGNED[config.examples] if config.taxonomy is not None else ("",)
    return np.array(
        [e.language != anchor and kind in chosen for e, kind in zip(examples, category, strict=True)],
        dtype=bool,
    )


def shuffled_ids(examples: Sequence[Example], aligned: np.ndarray, seed: int | None) -> list[str]:
    """The id whose English routing each example is pulled to: its own, or (control) another of the aligned ones of its task."""
    if seed is None:
        return [example.id for example in examples]
    generator = np.random.default_rng(seed)
    by_task: dict[str, list[str]] = {}
    for example, on in zip(examples, aligned, strict=True):
        if on and example.id not in by_task.setdefault(example.task, []):
            by_task[example.task].append(example.id)
    other: dict[str, str] = {}
    for _, ids in sorted(by_task.items()):
        order = [ids[i] for i in generator.permutation(len(ids))]
        other |= dict(zip(order, order[1:] + order[:1], strict=True))  # a cycle: nobody keeps its own
    return [other.get(example.id, example.id) for example in examples]
