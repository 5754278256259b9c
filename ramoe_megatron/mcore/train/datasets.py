"""The data sets of a training run, from the parsed arguments; and what can be checked about them before Megatron starts."""

import functools
from typing import Any

from ramoe_megatron.data.dataset import EncodedExamples, SFTDataset
from ramoe_megatron.data.encode import check_tokenizer
from ramoe_megatron.data.packing import PackedDataset
from ramoe_megatron.data.paired import PairedDataset
from ramoe_megatron.data.parallel import Example, load_examples, select
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.align.labels import AlignedDataset, ExampleLabels, refuse_weightless_views
from ramoe_megatron.mcore.align.options import RoutingAlignmentConfig
from ramoe_megatron.mcore.align.startup import samples_block
from ramoe_megatron.mcore.align.state import current_state
from ramoe_megatron.mcore.arguments import DataOptions
from ramoe_megatron.mcore.flags import options_from_args
from ramoe_megatron.mcore.launch import refuse_conversations
from ramoe_megatron.mcore.train.refresh import TaxonomyRefresh, refuse_other_anchors, refuse_refresh


def check_data(args: Any) -> None:
    """Read the training data and the files of alignment, and raise what is wrong with them before any model is built.

    Raises:
        RamoeError: no data, no rows of a split that is asked for, labels that do not fit the data
            (`ExampleLabels`), batches that packing or a normaliser cannot work with, a tokenizer that
            `check_tokenizer` refuses, conversations that the chat template cannot write (`check_conversations`),
            or examples that are longer than a sequence (`EncodedExamples`).
    """
    from megatron.training import get_tokenizer

    _read.cache_clear()
    _encoded.clear()
    check_labels(args, check_examples(args))
    check_tokenizer(get_tokenizer(), "of the flags")
    refuse_conversations(examples_read(args))
    options, alignment = options_from_args(DataOptions, args), RoutingAlignmentConfig.from_args(args)
    _encode(args, options, "train", _examples(options, options.split), _views(options, alignment))
    if args.eval_iters:
        _encode(args, options, "validation", _validation_examples(args, options), None)


def check_examples(args: Any) -> list[Example]:
    """The part of `check_data` that concerns the data alone; returns the training examples."""
    options, alignment = options_from_args(DataOptions, args), RoutingAlignmentConfig.from_args(args)
    _refuse_batches(args, options, alignment)
    examples = _examples(options, options.split)
    if args.eval_iters:
        _validation_examples(args, options)
    return examples


def training_languages(args: Any) -> list[str]:
    """Languages of the training examples, in alphabetical order."""
    options = options_from_args(DataOptions, args)
    return sorted({example.language for example in _examples(options, options.split)})


def examples_read(args: Any) -> list[Example]:
    """All examples that a run tokenises: training, validation, and views in the anchor language where it runs them."""
    options, alignment = options_from_args(DataOptions, args), RoutingAlignmentConfig.from_args(args)
    views = alignment.coeff > 0 and (alignment.target == "paired" or alignment.refresh_interval is not None)
    languages = [*options.languages, options.anchor] if views and options.languages else None
    return [*_examples(options, options.split, languages), *(_validation_examples(args, options) if args.eval_iters else [])]


def check_labels(args: Any, examples: list[Example]) -> None:
    """The part of `check_data` that concerns the files of alignment; nothing without alignment."""
    alignment, anchor = RoutingAlignmentConfig.from_args(args), options_from_args(DataOptions, args).anchor
    if alignment.coeff == 0:
        return
    alignment.refuse_unread_rule(getattr(args, "ramoe_train", "all"))  # a script of one's own may have no such flag
    _refuse_taxonomy(alignment, anchor)
    ExampleLabels(examples, alignment, anchor)


def dataset_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Megatron's `train_valid_test_datasets_provider` for parallel data, from the parsed arguments.

    Built on every rank: each pipeline stage needs the samples' labels, and drawing is a pure function of the seed.

    Args:
        num_samples: samples (packs, under `--ramoe-pack`) of training, validation and test that the schedule will draw.
        vp_stage: the virtual pipeline stage that asks, each once; all get the same.

    Returns:
        the training set (an `AlignedDataset` when alignment is on), the validation set (split "validation") unless
        `--eval-iters` is 0, and None.

    Raises:
        RamoeError: as `check_data`.
    """
    from megatron.training import get_args, get_tokenizer, print_rank_0, training

    args = get_args()
    if getattr(args, "ramoe_train", "all") != "all" and not hasattr(training.get_megatron_optimizer, "holds_to_selection"):
        raise RamoeError(
            f"--ramoe-train {args.ramoe_train}: this script trains all weights; call ramoe_megatron.train_selected(args, model_config) "
            "before pretrain(), or remove the flag"
        )
    options, alignment = options_from_args(DataOptions, args), RoutingAlignmentConfig.from_args(args)
    _refuse_batches(args, options, alignment)
    # One batch more than is drawn: Megatron's sampler refuses to resume a run that has drawn all there is.
    count, views = num_samples[0] + args.global_batch_size, _views(options, alignment)
    train: Any = _dataset(args, options, "train", _examples(options, options.split), count, views)
    if isinstance(train, PackedDataset):
        per_pack = len(train.order) / len(train)
        print_rank_0(f"ramoe: packed: {per_pack:.1f} samples a sequence, {100 * train.fill:.0f} % of its tokens are samples")
    drawn = train.drawn(num_samples[0])
    if alignment.coeff > 0:
        _refuse_taxonomy(alignment, options.anchor)
        train = AlignedDataset(train, alignment, options.anchor, args.global_batch_size, args.calculate_per_token_loss)
        labels = train.labels
        if alignment.refresh_interval is not None:
            state = current_state()
            assert state is not None  # attached before the data are read
            anchors = _examples(options, options.split, [options.anchor])
            refresh = TaxonomyRefresh(state.chunks, labels, train.dataset.examples, anchors, args)
            refresh.refuse_unanswerable(get_tokenizer())
            state.refresh = refresh
        print_rank_0(samples_block(train.dataset.examples, labels.category, labels.aligned, drawn, options.anchor))
        if labels.unshuffled:
            print_rank_0(f"  note: {labels.unshuffled} aligned ids keep their own target: each is the only aligned one of its task")
    else:
        print_rank_0(f"ramoe: {len(train.examples)} training examples, {len(drawn)} draws")
    if not args.eval_iters:
        return train, None, None
    validation = _dataset(args, options, "validation", _validation_examples(args, options), num_samples[1])
    return train, validation, None


dataset_provider.is_distributed = True  # type: ignore[attr-defined]  # Megatron: build on every rank


def _dataset(
    args: Any,
    options: DataOptions,
    name: str,
    examples: list[Example],
    count: int,
    views: list[Example] | None = None,
) -> SFTDataset | PackedDataset:
    from megatron.training import get_tokenizer

    weights, encoded = options.weight_mapping(), _encode(args, options, name, examples, views)
    if views is not None:
        return PairedDataset(
            examples, views, get_tokenizer(), args.seq_length, count, args.seed, weights, encoded
        )
    if not options.pack:
        return SFTDataset(examples, get_tokenizer(), args.seq_length, count, args.seed, weights, encoded)
    multiple = 2 * args.context_parallel_size if args.context_parallel_size > 1 else 1  # each sample is sliced apart
    return PackedDataset(
        examples,
        get_tokenizer(),
        args.seq_length,
        count,
        args.seed,
        args.global_batch_size,
        weights,
        multiple,
        encoded,
    )


def _views(options: DataOptions, alignment: RoutingAlignmentConfig) -> list[Example] | None:
    """The anchor's examples, for the target paired."""
    paired = alignment.coeff > 0 and alignment.target == "paired"
    return _examples(options, options.split, [options.anchor]) if paired else None


_encoded: dict[str, EncodedExamples] = {}
"""What has been tokenised: once for the check, and for the data set of each virtual stage."""


def _encode(
    args: Any, options: DataOptions, name: str, examples: list[Example], views: list[Example] | None
) -> EncodedExamples:
    from megatron.training import get_tokenizer

    key = repr((name, options, views is not None, args.seq_length, args.tokenizer_type, args.tokenizer_model))
    if key not in _encoded:
        _encoded[key] = EncodedExamples([*examples, *(views or [])], get_tokenizer(), args.seq_length)
    return _encoded[key]


def _validation_examples(args: Any, options: DataOptions) -> list[Example]:
    if args.full_validation:
        raise RamoeError("--full-validation: parallel data is drawn by --eval-iters; remove that flag")
    if not any(example.split == "validation" for example in _examples(options, None)):
        raise RamoeError(
            f"--eval-iters {args.eval_iters} (100 when not given) needs rows of the split 'validation', and {', '.join(options.data)} "
            "has none: add them, or give --eval-iters 0"
        )
    return _examples(options, "validation")


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
        flag, way_out = ("--ramoe-pack", "leave it out") if options.pack else ("--ramoe-normalize ci", "use --ramoe-normalize samples")
        raise RamoeError(
            f"{flag} weighs each sample by its global batch: it needs batches of one size in the order of the draws. "
            f"Remove {', '.join(found)}, or {way_out}"
        )
    if options.pack and args.micro_batch_size != 1:
        raise RamoeError(
            f"--ramoe-pack with --micro-batch-size {args.micro_batch_size}: a pack is one sequence of --seq-length tokens; give "
            "--micro-batch-size 1 and choose --seq-length for the memory"
        )


def _refuse_taxonomy(alignment: RoutingAlignmentConfig, anchor: str) -> None:
    if alignment.refresh_interval is not None and alignment.taxonomy is not None:
        refuse_other_anchors(alignment.taxonomy, anchor)


def _refuse_pairs(args: Any, options: DataOptions, loader: list[str]) -> None:
    why = "--ramoe-target paired keeps each sample and its English view side by side in a micro-batch"
    if args.micro_batch_size % 2:
        raise RamoeError(f"{why}: --micro-batch-size {args.micro_batch_size} has to be even")
    if options.pack or loader:
        raise RamoeError(f"{why}: remove {', '.join(['--ramoe-pack'] * options.pack + loader)}")


def _examples(options: DataOptions, split: str | None, languages: list[str] | None = None) -> list[Example]:
    if not options.data:
        raise RamoeError("--ramoe-data is missing: expected JSONL files, folders of them, or the name of a data set")
    columns = options.column_mapping()
    examples = _read(tuple(options.data), tuple(columns.items()) if columns else None)
    return select(examples, split, languages or options.languages, ", ".join(options.data))


@functools.lru_cache(maxsize=1)
def _read(sources: tuple[str, ...], columns: tuple[tuple[str, str], ...] | None) -> list[Example]:
    """Read once for the check, the training and the validation set."""
    return load_examples(sources, dict(columns) if columns else None)
