"""What a fine-tuning run reads, checked as the run itself would check it: data, checkpoint, the files of earlier jobs."""

from typing import Any

from ramoe_megatron.data.dataset import EncodedExamples
from ramoe_megatron.data.encode import check_conversations
from ramoe_megatron.data.sampler import order
from ramoe_megatron.jobs.check_common import CHECKPOINT_FIX, DATA_FIX, FILE_FIX, Trial, moe_layers, named
from ramoe_megatron.mcore.align.labels import refuse_other_anchor
from ramoe_megatron.mcore.align.options import RoutingAlignmentConfig
from ramoe_megatron.mcore.align.refusals import refuse_unsupported
from ramoe_megatron.mcore.align.resolve import resolve
from ramoe_megatron.mcore.arguments import DataOptions
from ramoe_megatron.mcore.checkpoint import starting_checkpoint
from ramoe_megatron.mcore.findings import Finding, attempt
from ramoe_megatron.mcore.flags import options_from_args
from ramoe_megatron.mcore.select.selective_options import SelectiveOptions
from ramoe_megatron.mcore.select.trained import selection_from_args
from ramoe_megatron.mcore.train.datasets import check_examples, check_labels, examples_read, training_languages
from ramoe_megatron.method.layers import span

ENCODED = 20_000
"""Examples that are tokenised, the longest first: whether they fit --seq-length shows in these."""


def training_findings(trying: Trial) -> list[Finding]:
    """Findings about the data, the checkpoint, the saving, and what selective training and alignment read."""
    args, alignment = trying.args, RoutingAlignmentConfig.from_args(trying.args)
    files = (alignment.experts, alignment.taxonomy, alignment.priors)

    def checkpoint() -> str:
        if written := trying.written_by(args.pretrained_checkpoint):
            return written
        folder = starting_checkpoint(args)
        return named(folder) if folder else "none: training starts from random weights"

    def labels() -> str:
        written = trying.written_by(*files, *args.ramoe_data)
        if written is None:
            check_labels(args, check_examples(args))
        return written or "every example has its category and its target"

    found = [
        attempt("data", lambda: _training_data(trying), DATA_FIX),
        attempt("checkpoint", checkpoint, CHECKPOINT_FIX),
        _saving(args),
    ]
    selective = options_from_args(SelectiveOptions, args)
    if selective.train != "all":
        selection_files = (selective.usage, alignment.experts, *args.ramoe_data)
        found.append(attempt("selection", lambda: trying.written_by(*selection_files) or _selection(trying), FILE_FIX))
    if alignment.coeff == 0:
        return [*found, Finding("alignment", "ok", "off (--ramoe-coeff 0)")]
    experts = attempt("expert file", lambda: trying.written_by(alignment.experts) or _zone(trying, alignment), FILE_FIX)
    found += [attempt("alignment", lambda: _alignment(trying, alignment), "remove the flag, or set --ramoe-coeff 0"), experts]
    # Labels are read from the expert file too: its fault is told once.
    return found if experts.state == "fatal" else [*found, attempt("labels", labels, FILE_FIX)]


def _training_data(trying: Trial) -> str:
    args, options = trying.args, options_from_args(DataOptions, trying.args)
    weights = options.weight_mapping()
    if written := trying.written_by(*options.data):
        return written
    examples = check_examples(args)
    order(examples, 1, args.seed, weights)
    told = f"{len(examples)} examples of split {options.split}"
    if trying.tokenizer is None:
        return told
    key = repr((options, args.seq_length, args.tokenizer_type, args.tokenizer_model, args.chat_template))
    if key not in trying.read:
        check_conversations(examples_read(args), trying.tokenizer)
        longest = sorted(examples, key=lambda e: len(e.prompt) + len(e.response), reverse=True)[:ENCODED]
        trying.read[key] = EncodedExamples(longest, trying.tokenizer, args.seq_length).lengths.max()
    return f"{told}; the longest takes {trying.read[key]} of --seq-length {args.seq_length}"


def _saving(args: Any) -> Finding:
    if not args.save:
        return Finding("saving", "warning", "no --save: the trained weights would be lost", "give --save DIR and --save-interval N")
    return Finding("saving", "ok", f"every {args.save_interval} iterations")


def _alignment(trying: Trial, alignment: RoutingAlignmentConfig) -> str:
    refuse_unsupported(trying.config)
    return f"coefficient {alignment.coeff:g}, {alignment.divergence}"


def _zone(trying: Trial, alignment: RoutingAlignmentConfig) -> str:
    resolved = resolve(alignment)
    resolved.check_model(trying.config, moe_layers(trying))
    experts = resolved.experts
    refuse_other_anchor(alignment, experts, options_from_args(DataOptions, trying.args).anchor)
    return f"{len(experts.tasks)} tasks; aligned MoE layers {span(resolved.layers)} of {experts.shape.num_moe_layers}"


def _selection(trying: Trial) -> str:
    selection = selection_from_args(trying.args, trying.config, training_languages(trying.args))
    assert selection is not None  # something else than "all" is asked for
    experts = "" if selection.routers else f"; {int(selection.experts_LE.sum())} of {selection.experts_LE.numel()} experts"
    return f"{selection.kind}: {selection.told}{experts}"
