"""Start a job: turn the CPU backend on if needed, parse Megatron's arguments, and print our errors."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

from ramoe_megatron.artifacts.files import refuse_unwritable
from ramoe_megatron.data.encode import check_tokenizer
from ramoe_megatron.data.workers import die_with
from ramoe_megatron.errors import RamoeError, error_noted, note_error
from ramoe_megatron.mcore import compat, trial
from ramoe_megatron.mcore.cpu.backend import cpu_backend, cpu_command_line
from ramoe_megatron.mcore.findings import reason
from ramoe_megatron.mcore.flags import options_from_args
from ramoe_megatron.mcore.missing import name_missing_ranks
from ramoe_megatron.mcore.start import Absent, Start, Step

GRACE_SECONDS = 3.0
"""Seconds that a rank other than 0 waits before it prints an error. If rank 0 fails too, torchrun ends the
other ranks within this time, and the error is printed once."""


@contextlib.contextmanager
def megatron_arguments(
    extra_args_provider: Callable,
    flags: Sequence[str] = (),
    trains: bool = False,
    options: Sequence[type] = (),
    start: Start | None = None,
) -> Iterator[Any]:
    """Megatron's validated arguments. Without a CUDA device, the CPU backend is on inside the context.

    Args:
        extra_args_provider, trains, options: arguments of `take_arguments`.
        flags: flags that the job appends to the user's flags.
        start: the `Start` that runs the steps.

    Raises:
        RamoeError: as `take_arguments`, or an argument is not valid Unicode.
    """
    refuse_unwritable(sys.argv[1:], "command line")
    with cpu_backend() as on_cpu:
        compat.skip_helper_compilation()
        compat.merge_halves_in_place()
        with command_line([*sys.argv[1:], *flags], on_cpu) as left_out:
            if left_out and is_rank_0():
                print(f"ramoe: the CPU backend leaves out {', '.join(left_out)}", flush=True)
            args = take_arguments(start or Start(), extra_args_provider, left_out, trains, options)
        if on_cpu and args.save:
            fork_writer_queue()
        yield args


def take_arguments(
    start: Start,
    extra_args_provider: Callable,
    left_out: Sequence[str],
    trains: bool = False,
    options: Sequence[type] = (),
) -> Any:
    """The first steps of every job: validate `sys.argv`, make the tokenizer and the model configuration.

    A run sets Megatron's global state from them. A check sets no global state.

    Args:
        extra_args_provider: adds our flags to Megatron's parser.
        left_out: flags that the CPU backend leaves out.
        trains: whether the job trains. A job that does not train rejects context parallelism.
        options: option classes. Each class rejects incompatible flags.

    Returns:
        The validated arguments.

    Raises:
        RamoeError: Megatron rejects the flags, or `check_tokenizer` rejects the tokenizer.
        Absent: in a check, when the arguments are too broken for the next steps.
    """
    correct, relaid = "correct the flag", "change the ranks, the parallel sizes or the batch sizes"
    left = f"; the CPU backend leaves out {', '.join(left_out)}" if left_out else ""

    def taken(_: Any) -> str:
        return f"Megatron takes them{left}"

    def fits(args: Any) -> Any:
        trial.refuse_sizes(args)
        if not trains:
            trial.refuse_context_parallel(args)
        return args

    def validated() -> Any:
        args = trial.validated(sized.value)
        for group in options:
            options_from_args(group, args)
        return args

    def laid_out() -> str:
        fits(args)
        text = trial.layout(args) if start.checks else ""  # in a run the micro-batch calculator is set up
        return text if trains else text.partition(";")[0]  # an offline job makes its own batches

    def tokenizer() -> Any:
        from megatron.training import get_tokenizer
        from megatron.training.global_vars import set_global_variables

        if start.checks:
            made = trial.tokenizer(args)
        else:
            trial.refuse_tokenizer_flags(args)
            set_global_variables(args)
            made = get_tokenizer()
        check_tokenizer(made, f"{args.tokenizer_type} {args.tokenizer_model or ''}".strip())
        return made

    def model_config() -> Any:
        _ = fitting.value
        with trial.micro_batches(args) if start.checks else contextlib.nullcontext():
            return trial.made_from_arguments(args, trains)

    def step(
        check: str, look: Callable[[], Any], told: Callable[[Any], str] | None, advice: str, *needs: str
    ) -> Step[Any]:
        return start.step(check, refusals_of_megatron()(look), told, advice, needs)

    parsed = step("flags", lambda: trial.parsed(extra_args_provider), taken, correct)
    sized = step(  # with --use-checkpoint-args the sizes may be those in the checkpoint
        "layout",
        lambda: parsed.value if parsed.value.use_checkpoint_args else fits(parsed.value),
        None,
        relaid,
    )
    args = step("flags", validated, taken, correct).value
    start.tokenizer = step(
        "tokenizer",
        tokenizer,
        lambda made: f"{args.tokenizer_type} of {made.vocab_size} tokens, padded to {args.padded_vocab_size}",
        "give --tokenizer-type and --tokenizer-model of the model",
        *(args.tokenizer_model, args.vocab_file, args.merge_file),
    )
    fitting = step("layout", laid_out, str, relaid)
    start.config = step("flags", model_config, None, correct)
    _ = start.config.value
    return args


@contextlib.contextmanager
def refusals_of_megatron() -> Iterator[None]:
    """Turn any error of Megatron into a RamoeError with Megatron's file, line and condition.

    Use this only around code that depends on the flags alone.
    """
    try:
        yield
    except (RamoeError, Absent):
        raise
    except Exception as error:
        raise RamoeError(f"Megatron does not take these flags: {reason(error)}") from error


def fork_writer_queue() -> None:
    """Fork the small process that collects the results of Megatron's checkpoint writers.

    Without it, Megatron's first save spawns such a process on each rank. A spawned process imports torch
    again, which takes three seconds of a core, as long as a small training run. Call this before process
    groups start threads. Do not call it with a GPU, because a forked process must not inherit a CUDA context.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(_live_as_long_as, (os.getpid(),))
    filesystem_async._results_queue = manager.Queue()  # get_write_results_queue() returns this queue


def _live_as_long_as(rank: int) -> None:
    """Tie the forked process to its rank: it ignores SIGTERM and is killed when the rank ends.

    A SIGTERM to the whole process group asks the rank to save, and the save needs this process.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with(rank)


@contextlib.contextmanager
def command_line(arguments: list[str], on_cpu: bool) -> Iterator[list[str]]:
    """Put these arguments into `sys.argv`, which Megatron's parser reads, adapted to the CPU backend if on.

    Yields:
        The flags that the CPU backend leaves out.
    """
    before = sys.argv
    left_out: list[str] = []
    if on_cpu:
        arguments, left_out = cpu_command_line(arguments)
    sys.argv = [before[0], *arguments]
    try:
        yield left_out
    finally:
        sys.argv = before


def run_job(main: Callable[[], None]) -> None:
    """Run a job's main function. A RamoeError is printed without a traceback and ends the job with status 2.

    Rank 0 prints the error at once. Another rank waits `GRACE_SECONDS` and prints the error with its rank
    number. So an error on all ranks is printed once, and an error that rank 0 does not have is printed too,
    such as a file that is missing on one node. Under `ramoe`, a rank whose collective fails because another
    rank has reported an error prints nothing.
    """
    from torch.distributed.checkpoint import CheckpointException  # not an Exception

    try:
        main()
    except RamoeError as error:
        where = ""
        if not is_rank_0():
            time.sleep(GRACE_SECONDS)
            where = f"(rank {os.environ['RANK']}) "
        if note_error(f"{where}{error}"):
            print(f"ramoe: error: {where}{error}", file=sys.stderr, flush=True)
        _leave(2)
    except (Exception, CheckpointException) as error:
        if error_noted():
            _leave(2)
        traceback.print_exc()
        name_missing_ranks(error, Path(sys.argv[0]).stem)
        _leave(1)
    _leave(0)


def _leave(status: int) -> None:
    """Exit the process. Only a successful rank destroys its process group; a failed rank must not wait."""
    import torch

    sys.stdout.flush()
    sys.stderr.flush()
    if status == 0 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if status:
        # Megatron's checkpoint writer would outlive its parent
        for process in multiprocessing.active_children():
            process.terminate()
        os._exit(status)


def memory_peak() -> str:
    """Peak memory of this rank: of its CUDA device, or of its process without one."""
    import resource

    import torch

    if allocated := torch.cuda.max_memory_allocated():  # the CPU backend's stand-in says 0
        return f"device memory: {allocated / 2**20:.1f} MiB"
    return f"resident memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.1f} MiB"


def is_rank_0() -> bool:
    """Whether this process is rank 0. Also works before the process group exists."""
    return os.environ.get("RANK", "0") == "0"
