"""Build the data sets of a training run from the parsed arguments, and check them before Megatron starts."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from ramoe_megatron.artifacts.files import package_version
from ramoe_megatron.data.cache import Cache, default_folder, key_of, mapped
from ramoe_megatron.data.codes import codes_of
from ramoe_megatron.data.dataset import EncodedExamples, SFTDataset
from ramoe_megatron.data.encode import Tokenizer, check_tokenizer
from ramoe_megatron.data.packing import PackedDataset
from ramoe_megatron.data.paired import PairedDataset, view_places
from ramoe_megatron.data.parallel import select_examples
from ramoe_megatron.data.sampler import order, with_ids_per_task
from ramoe_megatron.data.store import StoredExamples, store_examples
from ramoe_megatron.data.token_cache import cached_tokens
from ramoe_megatron.data.workers import give_back_memory
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.align.labels import (
    AlignedDataset,
    ExampleLabels,
    categories,
    refuse_weightless_views,
)
from ramoe_megatron.mcore.align.options import RoutingAlignmentConfig
from ramoe_megatron.mcore.align.startup import samples_block
from ramoe_megatron.mcore.align.state import current_state
from ramoe_megatron.mcore.arguments import DataOptions
from ramoe_megatron.mcore.flags import options_from_args
from ramoe_megatron.mcore.progress import progress_lines
from ramoe_megatron.mcore.train.refresh import (
    TaxonomyRefresh,
    refuse_other_anchors,
    refuse_refresh,
    refuse_unanswerable,
)
from ramoe_megatron.mcore.trial import tokenizer_flags


class TrainingInputs:
    """Inputs of a training run. Each input is read and built once, for the check and for the run.

    Attributes:
        options: data options of the flags.
        alignment: alignment options of the flags.
        examples: training examples.
        views: the anchor's examples; None unless the target is paired.
        held: content of the training data set: the examples, followed by the views.
        validation: validation examples; None with `--eval-iters 0`.
    """

    def __init__(self, args: Any, keeps: bool = True) -> None:
        """
        Args:
            keeps: whether rows and tokens that no earlier start has made are kept for later starts, in the
                folder --data-cache-path.

        Raises:
            RamoeError: there is no data; a requested split has no rows; the sampling weights do not fit the
                groups; the target is paired and an example has no view; or packing or the normaliser does not
                support the batch flags.
        """
        self.args, self.flags = args, _flags_of(args)
        self.options, self.alignment = (
            options_from_args(DataOptions, args),
            RoutingAlignmentConfig.from_args(args),
        )
        _refuse_batches(args, self.options, self.alignment)
        folder = getattr(args, "data_cache_path", None)  # a user's own parser may lack the flag
        self._cache = Cache(Path(folder) if folder else default_folder(), keeps)
        self.examples = self._training_examples()
        order(self.examples, 1, args.seed, self.options.weight_mapping())
        paired = self.alignment.coeff > 0 and self.alignment.target == "paired"
        self.views = self.anchors if paired else None
        if self.views is not None:
            view_places(self.examples, self.views)
        self.held = self.examples if self.views is None else self.examples.joined(self.views)
        self.validation = self._validation_examples() if args.eval_iters else None
        self._encoded: dict[str, EncodedExamples] = {}

    @property
    def languages(self) -> list[str]:
        """Languages of the training examples, in alphabetical order."""
        return sorted(codes_of(self.examples, "language").counts())

    @functools.cached_property
    def anchors(self) -> StoredExamples:
        """The anchor's examples of the training split."""
        return self._chosen(self.options.split, [self.options.anchor])

    @functools.cached_property
    def labels(self) -> ExampleLabels:
        """The alignment labels of `held`. Alignment must be on.

        Raises:
            RamoeError: as `ExampleLabels`, or the alignment flags do not fit the alignment's files.
        """
        # a user's own script may lack the flag --ramoe-train
        self.alignment.refuse_unread_rule(getattr(self.args, "ramoe_train", "all"))
        if self.alignment.refresh_interval is not None and self.alignment.taxonomy is not None:
            refuse_other_anchors(self.alignment.taxonomy, self.options.anchor)
        return ExampleLabels(self.held, self.alignment, self.options.anchor, self._categories)

    def _categories(self) -> np.ndarray:
        """`categories` of `held`. They stay in the cache: a taxonomy of a million rows takes long to read."""
        held, taxonomy, anchor = self.held, self.alignment.taxonomy, self.options.anchor
        if taxonomy is None or not Path(taxonomy).is_file():
            return categories(held, taxonomy, anchor)

        def make(folder: Path) -> None:
            np.save(folder / "category.npy", categories(held, taxonomy, anchor))

        key = key_of([package_version(), held.digest, self._cache.digest(Path(taxonomy)), anchor])
        return mapped(self._cache.entry(f"categories-{key}", make) / "category.npy")

    def encoded(self, tokenizer: Tokenizer) -> dict[str, EncodedExamples]:
        """The tokens of "train" (`held`) and of "validation".

        Raises:
            RamoeError: as `EncodedExamples` and `check_examples`. This includes the anchor's rows that a
                taxonomy refresh scores.
        """
        if not self._encoded:
            all_rows = self._tokenised()
            flags = {name: repr(value) for name, value in tokenizer_flags(self.args).items()}
            tokens = cached_tokens(all_rows, tokenizer, flags, self._cache, progress_lines)
            parts = {"train": self.held}
            if self.validation is not None:
                parts["validation"] = self.validation
            for name, examples in parts.items():
                places = np.searchsorted(all_rows.rows, examples.rows).astype(np.int32)
                self._encoded[name] = EncodedExamples(
                    examples, tokenizer, self.args.seq_length, tokens, places
                )
        return self._encoded

    def refuse_unanswerable(self, tokenizer: Tokenizer) -> None:
        """Raise RamoeError when a taxonomy refresh may score an example that no model can answer."""
        if self.alignment.refresh_interval is not None:
            refuse_unanswerable(
                self.labels, self.held, self.anchors, tokenizer, self.args.max_position_embeddings
            )

    @property
    def _all_views(self) -> bool:
        """Whether the run reads the anchor's rows in addition to the languages of the flags."""
        return self.alignment.coeff > 0 and (
            self.alignment.target == "paired" or self.alignment.refresh_interval is not None
        )

    def _tokenised(self) -> StoredExamples:
        """All examples that a run tokenises, in the order of their rows."""
        languages = self.options.languages
        chosen = self._chosen(
            self.options.split, [*languages, self.options.anchor] if self._all_views and languages else None
        )
        parts = [chosen.rows, *([] if self.validation is None else [self.validation.rows])]
        return StoredExamples(chosen.folder, np.unique(np.concatenate(parts)))

    @functools.cached_property
    def _stored(self) -> StoredExamples:
        if not self.options.data:
            raise RamoeError(
                "--ramoe-data is missing: expected JSONL files, folders of them, or the name of a data set"
            )
        return store_examples(self.options.data, self.options.column_mapping(), self._cache, progress_lines)

    def _chosen(self, split: str | None, languages: list[str] | None = None) -> StoredExamples:
        where = ", ".join(self.options.data)
        found = select_examples(self._stored, split, languages or self.options.languages, where)
        assert isinstance(found, StoredExamples)
        return found

    def _training_examples(self) -> StoredExamples:
        found, count = self._chosen(self.options.split), self.options.ids_per_task
        if count is None:
            return found
        if count < 1:
            raise RamoeError(f"--ramoe-ids-per-task {count}: expected 1 or more")
        try:
            fewer = with_ids_per_task(found, count, self.args.seed)
        except RamoeError as error:
            raise RamoeError(f"--ramoe-ids-per-task: split {self.options.split!r}: {error}") from error
        assert isinstance(fewer, StoredExamples)
        return fewer

    def _validation_examples(self) -> StoredExamples:
        if self.args.full_validation:
            raise RamoeError(
                "--full-validation: --eval-iters sets how much parallel data is drawn for validation; "
                "remove --full-validation"
            )
        if "validation" not in codes_of(self._chosen(None), "split").counts():
            raise RamoeError(
                f"--eval-iters {self.args.eval_iters} (100 when not given) needs rows of the split "
                f"'validation', and {', '.join(self.options.data)} has none: add them, or give --eval-iters 0"
            )
        return self._chosen("validation")


def check_data(args: Any) -> None:
    """Read and check the training data and the alignment files before any model is built.

    Raises:
        RamoeError: as `TrainingInputs`; the labels do not fit the data (`ExampleLabels`); `check_tokenizer`
            rejects the tokenizer; the chat template cannot write a conversation; or an example is longer than
            a sequence (`TrainingInputs.encoded`).
    """
    from megatron.training import get_tokenizer

    inputs = new_inputs(args)
    if inputs.alignment.coeff > 0:
        _ = inputs.labels
    check_tokenizer(get_tokenizer(), "of the flags")
    inputs.encoded(get_tokenizer())
    if inputs.alignment.coeff > 0:
        inputs.refuse_unanswerable(get_tokenizer())


def new_inputs(args: Any, keeps: bool = True) -> TrainingInputs:
    """Read the inputs. Later calls of `inputs_of` return them. Arguments and errors as `TrainingInputs`."""
    global _latest
    _latest = TrainingInputs(args, keeps)
    return _latest


def inputs_of(args: Any) -> TrainingInputs:
    """The inputs of the last `new_inputs` if the flags are the same; otherwise the inputs are read again.

    Raises:
        RamoeError: as `TrainingInputs`.
    """
    return _latest if _latest is not None and _latest.flags == _flags_of(args) else new_inputs(args)


_latest: TrainingInputs | None = None
"""Kept here because Megatron calls `dataset_provider` without passing the inputs of the check."""


def _flags_of(args: Any) -> str:
    """Everything that the inputs depend on, as one string."""
    options, alignment = options_from_args(DataOptions, args), RoutingAlignmentConfig.from_args(args)
    return repr((options, alignment, args.seed, args.eval_iters, args.seq_length, tokenizer_flags(args)))


def dataset_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Megatron's `train_valid_test_datasets_provider` for parallel data, from the parsed arguments.

    Every rank builds the data sets, because each pipeline stage needs the samples' labels. All ranks draw the
    same samples, because drawing is a pure function of the seed.

    Args:
        num_samples: number of training, validation and test samples that the schedule will draw. With
            `--ramoe-pack` these are numbers of packs.
        vp_stage: virtual pipeline stage that calls. Each stage calls once, and all get the same data sets.

    Returns:
        The training set, the validation set and None. The training set is an `AlignedDataset` when alignment
        is on. The validation set is the split "validation", or None with `--eval-iters 0`.

    Raises:
        RamoeError: as `check_data`.
    """
    from megatron.training import get_args, get_tokenizer, print_rank_0, training

    args = get_args()
    if getattr(args, "ramoe_train", "all") != "all" and not hasattr(
        training.get_megatron_optimizer, "holds_to_selection"
    ):
        raise RamoeError(
            f"--ramoe-train {args.ramoe_train}: this script trains all weights; "
            "call ramoe_megatron.train_selected(args, model_config) before pretrain(), or remove the flag"
        )
    inputs = inputs_of(args)
    options, encoded = inputs.options, inputs.encoded(get_tokenizer())
    # One batch more than is drawn: Megatron's sampler cannot resume a run that has drawn the whole data set.
    count = num_samples[0] + args.global_batch_size
    train: Any = _dataset(inputs, inputs.examples, count, encoded["train"], inputs.views)
    if isinstance(train, PackedDataset):
        per_pack = len(train.order) / len(train)
        print_rank_0(
            f"ramoe: packed: {per_pack:.1f} samples a sequence, "
            f"{100 * train.fill:.0f} % of its tokens are samples"
        )
    drawn = train.drawn(num_samples[0])
    if inputs.alignment.coeff > 0:
        labels = inputs.labels
        train = AlignedDataset(
            train,
            inputs.alignment,
            options.anchor,
            args.global_batch_size,
            args.calculate_per_token_loss,
            labels,
        )
        if inputs.alignment.refresh_interval is not None:
            state = current_state()
            assert state is not None  # alignment is attached before the data are read
            inputs.refuse_unanswerable(get_tokenizer())
            state.refresh = TaxonomyRefresh(
                state.chunks, labels, train.dataset.examples, inputs.anchors, args
            )
        print_rank_0(samples_block(inputs.held, labels.category, labels.aligned, drawn, options.anchor))
        if labels.unshuffled:
            print_rank_0(
                f"  note: {labels.unshuffled} aligned ids keep their own target: "
                "each is the only aligned one of its task"
            )
    else:
        print_rank_0(f"ramoe: {len(train.examples)} training examples, {len(drawn)} draws")
    give_back_memory()
    if inputs.validation is None:
        return train, None, None
    return train, _dataset(inputs, inputs.validation, num_samples[1], encoded["validation"]), None


dataset_provider.is_distributed = True  # type: ignore[attr-defined]  # Megatron: build on every rank


def _dataset(
    inputs: TrainingInputs,
    examples: StoredExamples,
    count: int,
    encoded: EncodedExamples,
    views: StoredExamples | None = None,
) -> SFTDataset | PackedDataset:
    from megatron.training import get_tokenizer

    args, weights, tokenizer = inputs.args, inputs.options.weight_mapping(), get_tokenizer()
    if views is not None:
        return PairedDataset(examples, views, tokenizer, args.seq_length, count, args.seed, weights, encoded)
    if not inputs.options.pack:
        return SFTDataset(examples, tokenizer, args.seq_length, count, args.seed, weights, encoded)
    # context parallelism slices each sample separately
    multiple = 2 * args.context_parallel_size if args.context_parallel_size > 1 else 1
    return PackedDataset(
        examples,
        tokenizer,
        args.seq_length,
        count,
        args.seed,
        args.global_batch_size,
        weights,
        multiple,
        encoded,
    )


def _refuse_batches(args: Any, options: DataOptions, alignment: RoutingAlignmentConfig) -> None:
    ci = alignment.coeff > 0 and alignment.normalize == "ci"
    changing = {
        "--rampup-batch-size": args.rampup_batch_size,
        "--step-batch-size-schedule": args.step_batch_size_schedule,
        f"--dataloader-type {args.dataloader_type}": args.dataloader_type not in (None, "single"),
    }
    found = [flag for flag, on in changing.items() if on]
    if alignment.coeff > 0 and alignment.refresh_interval is not None:
        refuse_refresh(args)
    if alignment.coeff > 0 and alignment.target == "paired":
        refuse_weightless_views(alignment, args.calculate_per_token_loss)
        _refuse_pairs(args, options, [flag for flag in found if "dataloader" in flag])
    if found and (ci or options.pack):
        flag, way_out = (
            ("--ramoe-pack", "leave it out")
            if options.pack
            else ("--ramoe-normalize ci", "use --ramoe-normalize samples")
        )
        raise RamoeError(
            f"{flag} weighs each sample by its global batch, so it needs batches of one size in the order of "
            f"the draws. Remove {', '.join(found)}, or {way_out}"
        )
    if options.pack and args.micro_batch_size != 1:
        raise RamoeError(
            f"--ramoe-pack with --micro-batch-size {args.micro_batch_size}: a pack is one sequence of "
            "--seq-length tokens. Give --micro-batch-size 1, and choose --seq-length to fit the memory"
        )


def _refuse_pairs(args: Any, options: DataOptions, loader: list[str]) -> None:
    why = "--ramoe-target paired keeps each sample and its English view side by side in a micro-batch"
    if args.micro_batch_size % 2:
        raise RamoeError(f"{why}: --micro-batch-size {args.micro_batch_size} has to be even")
    if options.pack or loader:
        raise RamoeError(f"{why}: remove {', '.join(['--ramoe-pack'] * options.pack + loader)}")
