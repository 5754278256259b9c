"""The data sets of a training run, from the parsed arguments; and what can be checked about them before Megatron starts."""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

from ramoe_megatron.data.dataset import EncodedExamples, SFTDataset
from ramoe_megatron.data.encode import Tokenizer, check_conversations, check_tokenizer
from ramoe_megatron.data.packing import PackedDataset
from ramoe_megatron.data.paired import PairedDataset, view_places
from ramoe_megatron.data.parallel import Example, load_examples, select_examples
from ramoe_megatron.data.sampler import order
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.align.labels import AlignedDataset, ExampleLabels, refuse_weightless_views
from ramoe_megatron.mcore.align.options import RoutingAlignmentConfig
from ramoe_megatron.mcore.align.startup import samples_block
from ramoe_megatron.mcore.align.state import current_state
from ramoe_megatron.mcore.arguments import DataOptions
from ramoe_megatron.mcore.flags import options_from_args
from ramoe_megatron.mcore.train.refresh import (
    TaxonomyRefresh,
    refuse_other_anchors,
    refuse_refresh,
    refuse_unanswerable,
)
from ramoe_megatron.mcore.trial import tokenizer_flags


class TrainingInputs:
    """What a training run reads, from the parsed arguments: each part is read and made once, for the first
    check and for the run.

    Attributes: `options`, `alignment` (of the flags), `examples` (of training), `views` (the anchor's
    examples, None unless the target is paired), `held` (the examples and behind them the views: what the data
    set holds) and `validation` (None with `--eval-iters 0`).
    """

    def __init__(self, args: Any) -> None:
        """
        Raises:
            RamoeError: no data, no rows of a split that is asked for, sampling weights that do not fit the
                groups, examples without the view that the target paired needs, or batches that packing or a
                normaliser cannot work with.
        """
        self.args, self.flags = args, _flags_of(args)
        self.options, self.alignment = (
            options_from_args(DataOptions, args),
            RoutingAlignmentConfig.from_args(args),
        )
        _refuse_batches(args, self.options, self.alignment)
        self.examples = self._chosen(self.options.split)
        order(self.examples, 1, args.seed, self.options.weight_mapping())
        paired = self.alignment.coeff > 0 and self.alignment.target == "paired"
        self.views = self.anchors if paired else None
        if self.views is not None:
            view_places(self.examples, self.views)
        self.held = [*self.examples, *(self.views or [])]
        self.validation = self._validation_examples() if args.eval_iters else None
        self._encoded: dict[str, EncodedExamples] = {}

    @property
    def languages(self) -> list[str]:
        """Languages of the training examples, in alphabetical order."""
        return sorted({example.language for example in self.examples})

    @functools.cached_property
    def anchors(self) -> list[Example]:
        """The anchor's examples of the training split."""
        return self._chosen(self.options.split, [self.options.anchor])

    @functools.cached_property
    def labels(self) -> ExampleLabels:
        """The labels of `held`, of an alignment that is on.

        Raises:
            RamoeError: as `ExampleLabels`, or flags of the alignment that do not go with its files.
        """
        self.alignment.refuse_unread_rule(
            getattr(self.args, "ramoe_train", "all")
        )  # a script of one's own may have no such flag
        if self.alignment.refresh_interval is not None and self.alignment.taxonomy is not None:
            refuse_other_anchors(self.alignment.taxonomy, self.options.anchor)
        return ExampleLabels(self.held, self.alignment, self.options.anchor)

    def encoded(self, tokenizer: Tokenizer) -> dict[str, EncodedExamples]:
        """The tokens of "train" (`held`) and of "validation".

        Raises:
            RamoeError: conversations that the chat template cannot write (`check_conversations`), also of the
                anchor's rows that a taxonomy refresh scores; or as `EncodedExamples`.
        """
        made_by = (self.options, self.args.seq_length, tokenizer_flags(self.args))
        _once(
            repr(("conversations", made_by, self._all_views)),
            lambda: check_conversations(self._tokenised(), tokenizer),
        )
        parts = {"train": self.held}
        if self.validation is not None:
            parts["validation"] = self.validation
        for name, examples in parts.items():
            if name not in self._encoded:
                key = repr((name, made_by, self.views is not None))
                self._encoded[name] = _once(
                    key, partial(EncodedExamples, examples, tokenizer, self.args.seq_length)
                )
        return self._encoded

    def refuse_unanswerable(self, tokenizer: Tokenizer) -> None:
        """Raise RamoeError for examples that a taxonomy refresh may score and that no model can answer right."""
        if self.alignment.refresh_interval is not None:
            refuse_unanswerable(
                self.labels, self.held, self.anchors, tokenizer, self.args.max_position_embeddings
            )

    @property
    def _all_views(self) -> bool:
        """Whether the run reads the anchor's rows beside the languages of the flags."""
        return self.alignment.coeff > 0 and (
            self.alignment.target == "paired" or self.alignment.refresh_interval is not None
        )

    def _tokenised(self) -> list[Example]:
        """All examples that a run tokenises, each once."""
        languages = self.options.languages
        chosen = self._chosen(
            self.options.split, [*languages, self.options.anchor] if self._all_views and languages else None
        )
        return [*chosen, *(self.validation or [])]

    def _chosen(self, split: str | None, languages: list[str] | None = None) -> list[Example]:
        options = self.options
        if not options.data:
            raise RamoeError(
                "--ramoe-data is missing: expected JSONL files, folders of them, or the name of a data set"
            )
        columns = options.column_mapping()
        examples = _read(tuple(options.data), tuple(columns.items()) if columns else None)
        return select_examples(examples, split, languages or options.languages, ", ".join(options.data))

    def _validation_examples(self) -> list[Example]:
        if self.args.full_validation:
            raise RamoeError("--full-validation: parallel data is drawn by --eval-iters; remove that flag")
        if not any(example.split == "validation" for example in self._chosen(None)):
            raise RamoeError(
                f"--eval-iters {self.args.eval_iters} (100 when not given) needs rows of the split "
                f"'validation', and {', '.join(self.options.data)} has none: add them, or give --eval-iters 0"
            )
        return self._chosen("validation")


def check_data(args: Any) -> None:
    """Read the training data and the files of alignment, and raise what is wrong with them before any model
    is built.

    Raises:
        RamoeError: as `TrainingInputs`; labels that do not fit the data (`ExampleLabels`), a tokenizer that
            `check_tokenizer` refuses, conversations that the chat template cannot write, or examples that are
            longer than a sequence (`TrainingInputs.encoded`).
    """
    from megatron.training import get_tokenizer

    _read.cache_clear()
    _kept.clear()
    inputs = new_inputs(args)
    if inputs.alignment.coeff > 0:
        _ = inputs.labels
    check_tokenizer(get_tokenizer(), "of the flags")
    inputs.encoded(get_tokenizer())
    if inputs.alignment.coeff > 0:
        inputs.refuse_unanswerable(get_tokenizer())


def new_inputs(args: Any) -> TrainingInputs:
    """The inputs, read anew; `inputs_of` gives the same from now on. Raises RamoeError as `TrainingInputs`."""
    global _latest
    _latest = TrainingInputs(args)
    return _latest


def inputs_of(args: Any) -> TrainingInputs:
    """The inputs that `new_inputs` read last, where they are of the same flags. Raises RamoeError as `TrainingInputs`."""
    return _latest if _latest is not None and _latest.flags == _flags_of(args) else new_inputs(args)


_latest: TrainingInputs | None = None
"""Megatron calls `dataset_provider` without what the check has read."""


def _flags_of(args: Any) -> str:
    """What the inputs are read from."""
    options, alignment = options_from_args(DataOptions, args), RoutingAlignmentConfig.from_args(args)
    return repr((options, alignment, args.seed, args.eval_iters, args.seq_length, tokenizer_flags(args)))


_kept: dict[str, Any] = {}
"""What has been tokenised: once for all command lines that one process checks."""


def _once[Value](key: str, make: Callable[[], Value]) -> Value:
    if key not in _kept:
        _kept[key] = make()
    return _kept[key]


def dataset_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Megatron's `train_valid_test_datasets_provider` for parallel data, from the parsed arguments.

    Built on every rank: each pipeline stage needs the samples' labels, and drawing is a pure function of the
    seed.

    Args:
        num_samples: samples (packs, under `--ramoe-pack`) of training, validation and test that the schedule
            will draw.
        vp_stage: the virtual pipeline stage that asks, each once; all get the same.

    Returns:
        the training set (an `AlignedDataset` when alignment is on), the validation set (split "validation")
        unless `--eval-iters` is 0, and None.

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
    # One batch more than is drawn: Megatron's sampler refuses to resume a run that has drawn all there is.
    count = num_samples[0] + args.global_batch_size
    train: Any = _dataset(inputs, inputs.examples, count, encoded["train"], inputs.views)
    if isinstance(train, PackedDataset):
        per_pack = len(train.order) / len(train)
        print_rank_0(
            f"ramoe: packed: {per_pack:.1f} samples a sequence, {100 * train.fill:.0f} % of its tokens are "
            "samples"
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
            assert state is not None  # attached before the data are read
            inputs.refuse_unanswerable(get_tokenizer())
            state.refresh = TaxonomyRefresh(
                state.chunks, labels, train.dataset.examples, inputs.anchors, args
            )
        print_rank_0(
            samples_block(inputs.held, labels.category.tolist(), labels.aligned, drawn, options.anchor)
        )
        if labels.unshuffled:
            print_rank_0(
                f"  note: {labels.unshuffled} aligned ids keep their own target: "
                "each is the only aligned one of its task"
            )
    else:
        print_rank_0(f"ramoe: {len(train.examples)} training examples, {len(drawn)} draws")
    if inputs.validation is None:
        return train, None, None
    return train, _dataset(inputs, inputs.validation, num_samples[1], encoded["validation"]), None


dataset_provider.is_distributed = True  # type: ignore[attr-defined]  # Megatron: build on every rank


def _dataset(
    inputs: TrainingInputs,
    examples: list[Example],
    count: int,
    encoded: EncodedExamples,
    views: list[Example] | None = None,
) -> SFTDataset | PackedDataset:
    from megatron.training import get_tokenizer

    args, weights, tokenizer = inputs.args, inputs.options.weight_mapping(), get_tokenizer()
    if views is not None:
        return PairedDataset(examples, views, tokenizer, args.seq_length, count, args.seed, weights, encoded)
    if not inputs.options.pack:
        return SFTDataset(examples, tokenizer, args.seq_length, count, args.seed, weights, encoded)
    multiple = (
        2 * args.context_parallel_size if args.context_parallel_size > 1 else 1
    )  # each sample is sliced apart
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
            f"{flag} weighs each sample by its global batch: it needs batches of one size in the order of "
            f"the draws. Remove {', '.join(found)}, or {way_out}"
        )
    if options.pack and args.micro_batch_size != 1:
        raise RamoeError(
            f"--ramoe-pack with --micro-batch-size {args.micro_batch_size}: "
            "a pack is one sequence of --seq-length tokens; give --micro-batch-size 1 and choose "
            "--seq-length for the memory"
        )


def _refuse_pairs(args: Any, options: DataOptions, loader: list[str]) -> None:
    why = "--ramoe-target paired keeps each sample and its English view side by side in a micro-batch"
    if args.micro_batch_size % 2:
        raise RamoeError(f"{why}: --micro-batch-size {args.micro_batch_size} has to be even")
    if options.pack or loader:
        raise RamoeError(f"{why}: remove {', '.join(['--ramoe-pack'] * options.pack + loader)}")


@functools.lru_cache(maxsize=1)
def _read(sources: tuple[str, ...], columns: tuple[tuple[str, str], ...] | None) -> list[Example]:
    """Read once for the check, the training and the validation set."""
    return load_examples(sources, dict(columns) if columns else None)
