"""Fine-tune a model, or train it from scratch, with Megatron's `pretrain()` and the routing alignment loss.

    torchrun --nproc-per-node N -m ramoe_megatron.jobs.finetune MEGATRON_FLAGS --ramoe-data FILE \\
        --ramoe-coeff X ...

Imports are inside the functions on purpose: at a rank's first checkpoint Megatron starts a process that
imports this module again.
"""

from collections.abc import Callable
from typing import Any

from ramoe_megatron.jobs.entry import CHECKPOINT_FIX, DATA_FIX, FILE_FIX, Job
from ramoe_megatron.mcore.start import Start


def main() -> None:
    """Train the model. The job reads data and alignment; Megatron parses, builds, trains and saves."""
    JOB.main()


def _options() -> tuple[type, ...]:
    from ramoe_megatron.mcore.align.options import RoutingAlignmentConfig
    from ramoe_megatron.mcore.arguments import DataOptions
    from ramoe_megatron.mcore.select.selective_options import SelectiveOptions

    return RoutingAlignmentConfig, DataOptions, SelectiveOptions


def _read(start: Start, args: Any) -> Callable[[], None]:
    """Read the training data with tokens and labels, the starting checkpoint and the selection of weights."""
    from ramoe_megatron.mcore.align.options import RoutingAlignmentConfig
    from ramoe_megatron.mcore.checkpoint import named, starting_checkpoint
    from ramoe_megatron.mcore.select.trained import Selection, selection_from_args
    from ramoe_megatron.mcore.train.datasets import TrainingInputs, new_inputs

    def told_examples(inputs: TrainingInputs) -> str:
        return f"{len(inputs.examples)} examples of split {inputs.options.split}"

    def longest() -> int:
        return int(inputs.value.encoded(start.tokenizer.value)["train"].lengths.max())

    def told_tokens(longest: int) -> str:
        return f"{told_examples(inputs.value)}; the longest takes {longest} of --seq-length {args.seq_length}"

    def told_selection(selection: Selection | None) -> str | None:
        if selection is None:
            return None
        experts = (
            ""
            if selection.routers
            else f"; {int(selection.experts_LE.sum())} of {selection.experts_LE.numel()} experts"
        )
        return f"{selection.kind}: {selection.told}{experts}"

    inputs = start.step(
        "data", lambda: new_inputs(args, not start.checks), told_examples, DATA_FIX, args.ramoe_data
    )
    start.step("data", longest, told_tokens, DATA_FIX)
    base = start.step(
        "checkpoint",
        lambda: starting_checkpoint(args),
        lambda folder: named(folder) if folder else "none: training starts from random weights",
        CHECKPOINT_FIX,
        [args.pretrained_checkpoint],
    )
    if args.save:
        start.step("saving", lambda: args.save_interval, "every {} iterations".format)
    else:
        start.warn(
            "saving", "no --save: the trained weights would be lost", "give --save DIR and --save-interval N"
        )
    selection = start.step(
        "selection",
        lambda: selection_from_args(args, start.config.value, inputs.value.languages),
        told_selection,
        FILE_FIX,
        [] if args.ramoe_train == "all" else [args.ramoe_usage, args.ramoe_experts],
    )
    alignment = RoutingAlignmentConfig.from_args(args)
    _read_alignment(start, args, alignment, inputs)
    return lambda: train(args, alignment, base.value, selection.value)


def _read_alignment(start: Start, args: Any, alignment: Any, inputs: Any) -> None:
    """Check that the model can be aligned, and read the expert file and the labels."""
    from ramoe_megatron.mcore.align.labels import refuse_other_anchor
    from ramoe_megatron.mcore.align.refusals import refuse_unsupported
    from ramoe_megatron.mcore.align.resolve import ResolvedAlignment, resolve
    from ramoe_megatron.mcore.router import configured_moe_layer_numbers
    from ramoe_megatron.method.layers import span

    if alignment.coeff == 0:
        start.step("alignment", lambda: None, lambda _: "off (--ramoe-coeff 0)")
        return

    def experts() -> ResolvedAlignment:
        resolved = resolve(alignment)
        resolved.check_model(
            start.config.value,
            len(configured_moe_layer_numbers(start.config.value, args.hybrid_layer_pattern)),
        )
        refuse_other_anchor(alignment, resolved.experts, args.ramoe_anchor)
        return resolved

    def told_experts(resolved: ResolvedAlignment) -> str:
        file = resolved.experts
        layers = f"aligned MoE layers {span(resolved.layers)} of {file.shape.num_moe_layers}"
        return f"{len(file.tasks)} tasks; {layers}"

    def labels() -> Any:
        _ = resolved.value  # the step "expert file" has reported its error
        return inputs.value.labels

    start.step(
        "alignment",
        lambda: refuse_unsupported(start.config.value),
        lambda _: f"coefficient {alignment.coeff:g}, {alignment.divergence}",
        "remove the flag, or set --ramoe-coeff 0",
    )
    resolved = start.step(
        "expert file", experts, told_experts, FILE_FIX, [alignment.experts, alignment.layer_weights]
    )
    labelled = start.step(
        "labels", labels, lambda _: "every example has its category and its target", FILE_FIX,
        [alignment.experts, alignment.taxonomy, alignment.priors, *args.ramoe_data],
    )  # fmt: skip
    start.step(
        "labels",
        lambda: labelled.value and inputs.value.refuse_unanswerable(start.tokenizer.value),
        None,
        FILE_FIX,
    )


def train(args: Any, alignment: Any, base: str | None, selection: Any) -> None:
    """Train the model.

    Args:
        base: folder of the checkpoint to start from.
        selection: which weights are trained; None trains all weights.
    """
    from functools import partial

    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from ramoe_megatron.mcore import compat
    from ramoe_megatron.mcore.align.attach import attach
    from ramoe_megatron.mcore.checkpoint import explained_mismatch, told_when_unfinished
    from ramoe_megatron.mcore.families import keep_note
    from ramoe_megatron.mcore.launch import is_rank_0, memory_peak
    from ramoe_megatron.mcore.select.freeze import hold_to
    from ramoe_megatron.mcore.train.datasets import dataset_provider
    from ramoe_megatron.mcore.train.step import forward_step

    keep_note(args)
    model_config = compat.model_config_from_args(args)
    model_config.pre_wrap_hooks.append(partial(attach, config=alignment))
    hold_to(selection, model_config)
    with explained_mismatch(base), told_when_unfinished(args):
        pretrain(
            pretrain_cfg_container_from_args(args, model_config),
            dataset_provider,
            compat.model_type(),
            forward_step,
        )
    if is_rank_0():
        print(f"ramoe: peak {memory_peak()}", flush=True)


JOB = Job(_options, _read, trains=True)

if __name__ == "__main__":
    from ramoe_megatron.mcore.launch import run_job

    run_job(main)
