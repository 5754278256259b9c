"""Parse and validate a job's command line with Megatron's own code, without Megatron's global state.

A job and its check share these functions (`launch.take_arguments`). They set no global state of Megatron and
create no folders or loggers, so one process can check many command lines. Callers wrap each command line in
`launch.command_line`. Without a CUDA device the CPU backend must be on.
"""

import contextlib
import copy
import json
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NoReturn

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore import compat


@contextlib.contextmanager
def standing_for_rank_0(ranks: int, nodes: int) -> Iterator[None]:
    """Set torchrun's environment variables for rank 0 of `nodes` nodes with `ranks` ranks each."""
    world = str(ranks * nodes)
    rank_0 = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": str(ranks)}
    before = {name: os.environ.get(name) for name in rank_0}
    os.environ.update(rank_0)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def parsed(provider: Callable) -> Any:
    """Parse `sys.argv` with Megatron's parser. Raises RamoeError for a flag that the parser rejects."""
    from megatron.training.arguments import parse_args

    def refusing(parser: Any) -> Any:
        parser.error = _refuse_flag  # argparse would print a thousand lines of usage on each rank
        return provider(parser)

    return parse_args(refusing)


def _refuse_flag(message: str) -> NoReturn:
    raise RamoeError(f"{message} (`--help` lists the flags)")


def validated(args: Any) -> Any:
    """Parsed arguments after Megatron's validation. Errors of Megatron pass through."""
    from megatron.training import arguments

    names = ("parse_args", "set_global_variables")
    before = {name: getattr(arguments, name) for name in names}
    arguments.parse_args = lambda *_, **__: args  # do not parse again: building the parser is slow
    arguments.set_global_variables = lambda *_, **__: None  # a later step makes tokenizer and loggers
    try:
        return arguments.parse_and_validate_args(args_defaults={})
    finally:
        for name, function in before.items():
            setattr(arguments, name, function)


def refuse_sizes(args: Any) -> None:
    """Raise RamoeError when the parallel sizes do not fit the number of ranks, the experts or the batch."""
    world, tp, pp, cp, ep, etp = _sizes(args)
    if world % (tp * pp * cp):
        raise RamoeError(f"{world} ranks, but TP {tp} x PP {pp} x CP {cp} needs a multiple of {tp * pp * cp}")
    if world % (ep * etp * pp):
        raise RamoeError(
            f"{world} ranks, but EP {ep} x expert-TP {etp} x PP {pp} needs a multiple of {ep * etp * pp}"
        )
    if args.num_experts and args.num_experts % ep:
        raise RamoeError(
            f"--expert-model-parallel-size {ep} does not divide --num-experts {args.num_experts}"
        )
    batch, micro, dp = args.global_batch_size, args.micro_batch_size, world // (tp * pp * cp)
    if (
        batch
        and micro
        and batch % (micro * dp)
        and not (args.decrease_batch_size_if_needed or args.step_batch_size_schedule)
    ):
        raise RamoeError(
            f"--global-batch-size {batch} is no multiple of "
            f"--micro-batch-size {micro} x DP {dp} = {micro * dp}"
        )


def refuse_context_parallel(args: Any) -> None:
    """Raise RamoeError for context parallelism, which the offline jobs do not support."""
    if args.context_parallel_size > 1:
        raise RamoeError(
            f"--context-parallel-size {args.context_parallel_size}: the offline jobs score whole sequences; "
            "run them with 1 (the checkpoint loads in any layout)"
        )


def layout(args: Any) -> str:
    """Describe the parallel layout. Raises AssertionError when the batch sizes do not fit the layout."""
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    world, tp, pp, cp, ep, etp = _sizes(args)
    with micro_batches(args):
        count = get_num_microbatches()
    dp, micro = args.data_parallel_size, args.micro_batch_size
    return (
        f"{world} rank{'s' * (world > 1)} = TP {tp} x PP {pp} x CP {cp} x DP {dp}, "
        f"experts EP {ep} x ETP {etp}; global batch {args.global_batch_size} = {count} micro-batches x "
        f"{micro} x DP {dp}"
    )


@contextlib.contextmanager
def micro_batches(args: Any) -> Iterator[None]:
    """Set up Megatron's global micro-batch calculator inside the context, as Megatron does at its start."""
    from megatron.core import num_microbatches_calculator as calculator

    try:
        calculator.init_num_microbatches_calculator(
            rank=0,
            global_batch_size=args.global_batch_size,
            micro_batch_size=args.micro_batch_size,
            data_parallel_size=args.data_parallel_size * args.gtp_weight_remat_size,
            decrease_batch_size_if_needed=args.decrease_batch_size_if_needed,
            step_batch_size_schedule=args.step_batch_size_schedule,
            seq_length=args.seq_length,
        )
        yield
    finally:
        calculator.unset_num_microbatches_calculator()


def _sizes(args: Any) -> tuple[int, int, int, int, int, int]:
    tp, etp = args.tensor_model_parallel_size, args.expert_tensor_parallel_size
    sizes = (
        tp,
        args.pipeline_model_parallel_size,
        args.context_parallel_size,
        args.expert_model_parallel_size,
    )
    return (args.world_size, *sizes, tp if etp is None else etp)


def tokenizer(args: Any) -> Any:
    """Build Megatron's tokenizer. Sets the padded vocabulary size in the validated arguments."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    refuse_tokenizer_flags(args)
    return build_tokenizer(args)


def tokenizer_flags(args: Any) -> dict[str, Any]:
    """The arguments that determine the tokenizer."""
    further = ("vocab_file", "merge_file", "vocab_size", "chat_template", "special_tokens", "metadata_path")
    return {
        name: value
        for name, value in vars(args).items()
        if name.startswith(("tokenizer", "tiktoken")) or name in further
    }


def refuse_tokenizer_flags(args: Any) -> None:
    """Raise RamoeError for tokenizer flags for which Megatron has no message, or one without advice.

    They are a missing type, the legacy mode of SentencePiece, and a vocabulary of tiktoken that does not have
    the size of the flags.
    """
    if args.tokenizer_type is None:
        raise RamoeError(
            "--tokenizer-type is missing: expected a type that Megatron has, such as SentencePieceTokenizer"
        )
    if "SentencePiece" in args.tokenizer_type and args.tokenizer_sentencepiece_legacy:
        raise RamoeError(
            "--tokenizer-sentencepiece-legacy: in this mode Megatron's tokenizer has no end token. Leave the "
            "flag out: a chat template can write the control tokens of the model file without it"
        )
    if args.tokenizer_type == "TikTokenizer" and os.path.isfile(args.tokenizer_model or ""):
        _refuse_tiktoken_size(args)


def _refuse_tiktoken_size(args: Any) -> None:
    """Raise RamoeError unless --vocab-size is at most the tokens of the file and the special tokens."""
    from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import DEFAULT_TIKTOKEN_MAX_VOCAB

    try:
        with open(args.tokenizer_model, encoding="utf-8") as file:
            tokens = json.load(file)
    except ValueError:
        tokens = None
    if not isinstance(tokens, list) or not args.tokenizer_model.endswith(".json"):
        raise RamoeError(
            f"--tokenizer-model {args.tokenizer_model}: Megatron's TikTokenizer reads a file *.json with a "
            "list of objects `rank`, `token_bytes` (base64) and `token_str`. Write the merges of a .tiktoken "
            "file in this form"
        )
    special, size = args.tiktoken_num_special_tokens, args.vocab_size or DEFAULT_TIKTOKEN_MAX_VOCAB
    if size > len(tokens) + special:
        raise RamoeError(
            f"--tokenizer-model {args.tokenizer_model}: {len(tokens)} tokens and "
            f"--tiktoken-num-special-tokens {special}, fewer than --vocab-size {size}. "
            f"Give --vocab-size {len(tokens) + special}"
        )


def made_from_arguments(args: Any, trains: bool) -> Any:
    """Build everything that Megatron derives from the arguments alone, so that bad arguments fail early.

    For every job this is the model's configuration. For a training job it is also all other configurations,
    the schedules of learning rate and weight decay, and the number of samples. Megatron's micro-batch
    calculator must be set up. Without a tokenizer the vocabulary has the smallest padded size.

    Returns:
        The model's `TransformerConfig`.

    Raises:
        RamoeError: the parallel sizes do not fit the ranks. Errors of Megatron pass through.
    """
    refuse_sizes(args)
    args = copy.copy(args)  # Megatron changes the arguments
    args.padded_vocab_size = (
        getattr(args, "padded_vocab_size", None)
        or args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    )
    args.iteration = 0
    config = compat.model_config_from_args(args)
    if trains:
        from megatron.training import training
        from megatron.training.argument_utils import pretrain_cfg_container_from_args

        pretrain_cfg_container_from_args(args, config)
        get_args, training.get_args = training.get_args, lambda: args
        try:
            if not args.skip_train:
                optimizer = SimpleNamespace(param_groups=[{}])  # the schedules read only the groups
                training.get_optimizer_param_scheduler(optimizer)
            training.get_train_valid_test_num_samples()
        finally:
            training.get_args = get_args
    return config.transformer
