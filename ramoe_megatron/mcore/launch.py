"""How a job starts: one place that turns the CPU backend on, parses Megatron's arguments, and prints our errors."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any, NoReturn

from ramoe_megatron.artifacts.files import refuse_unwritable
from ramoe_megatron.data.encode import check_conversations, check_tokenizer
from ramoe_megatron.data.parallel import Example
from ramoe_megatron.errors import RamoeError, error_noted, note_error
from ramoe_megatron.mcore import compat, trial
from ramoe_megatron.mcore.cpu.backend import cpu_backend, cpu_command_line
from ramoe_megatron.mcore.findings import reason
from ramoe_megatron.mcore.missing import name_missing_ranks

GRACE_SECONDS = 3.0
"""How long a rank waits before it tells an error: where rank 0 met it too, torchrun has ended the others by then."""


@contextlib.contextmanager
def megatron_arguments(
    extra_args_provider: Callable, flags: list[str] | None = None, trains: bool = False
) -> Iterator[Any]:
    """Megatron's validated arguments, with the CPU backend around the body where there is no CUDA device.

    Args:
        extra_args_provider: adds our flags to Megatron's parser.
        flags: flags that the job itself sets, after the user's.
        trains: whether the job trains, for `trial.made_from_arguments`.

    Raises:
        RamoeError: a flag that the parser refuses, arguments that Megatron refuses, an argument that is no Unicode, or a
            tokenizer that `check_tokenizer` refuses.
    """
    refuse_unwritable(sys.argv[1:], "command line")

    def provider(parser: Any) -> Any:
        parser.error = _refuse_flag  # argparse prints a thousand lines of usage for each rank
        return extra_args_provider(parser)

    with cpu_backend() as on_cpu:
        from megatron.training import get_tokenizer
        from megatron.training.arguments import parse_and_validate_args

        compat.skip_helper_compilation()
        with command_line(sys.argv[1:] + (flags or []), on_cpu) as left_out:
            if left_out and is_rank_0():
                print(f"ramoe: the CPU backend leaves out {', '.join(left_out)}", flush=True)
            with refusals_of_megatron():
                args = parse_and_validate_args(extra_args_provider=provider, args_defaults={})
                trial.made_from_arguments(args, trains)
        check_tokenizer(get_tokenizer(), f"{args.tokenizer_type} {args.tokenizer_model or ''}".strip())
        if on_cpu and args.save:
            fork_writer_queue()
        yield args


def _refuse_flag(message: str) -> NoReturn:
    raise RamoeError(f"{message} (`--help` lists the flags)")


@contextlib.contextmanager
def refusals_of_megatron() -> Iterator[None]:
    """Around what depends on the flags alone: whatever Megatron raises becomes a RamoeError with Megatron's file, line
    and condition."""
    try:
        yield
    except RamoeError:
        raise
    except Exception as error:
        raise RamoeError(f"Megatron does not take these flags: {reason(error)}") from error


def refuse_conversations(examples: Sequence[Example]) -> None:
    """Try the chat template of the job's tokenizer on the examples that have `messages`. Raises as `check_conversations`."""
    if any(example.messages is not None for example in examples):
        from megatron.training import get_tokenizer  # Megatron builds the tokenizer with the arguments, before any model

        check_conversations(examples, get_tokenizer())


def fork_writer_queue() -> None:
    """Fork the small process through which Megatron's checkpoint writers report.

    Its first save would otherwise spawn one a rank, which imports torch again: three seconds of a core, as long as a small run trains.
    Called before there are process groups, hence threads. Not where there is a GPU: a fork must not inherit a CUDA context.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(_live_as_long_as, (os.getpid(),))
    filesystem_async._results_queue = manager.Queue()  # what get_write_results_queue() returns from now on


def _live_as_long_as(rank: int) -> None:
    """In the forked process: a SIGTERM to the whole group asks the rank to save, which needs this process; its end is the rank's."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != rank:
        os._exit(1)


@contextlib.contextmanager
def command_line(arguments: list[str], on_cpu: bool) -> Iterator[list[str]]:
    """`sys.argv`, which is where Megatron's parser reads, with these arguments, as the CPU backend runs them where it is on.

    Yields:
        the flags that the CPU backend leaves out.
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
    """Run a job's main: an error meant for the user is printed without a traceback, and ends the job with status 2.

    Rank 0 tells it at once. Another rank does so a moment later, with its number, so that an error that rank 0 did not meet (a
    file absent on one node, one pipeline stage) is told too, and one that all ranks met is told once. Under
    `ramoe`, ranks that fail after another one has told its error, since their collectives end with it, say
    nothing.
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
    """Leave with the process group taken down; a rank that failed must not wait for the others."""
    import torch

    sys.stdout.flush()
    sys.stderr.flush()
    if status == 0 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if status:
        for process in multiprocessing.active_children():  # Megatron's checkpoint writer keeps one, which would outlive its parent
            process.terminate()
        os._exit(status)


def memory_peak() -> str:
    """The most memory that this rank has held: of its device, or of its process where there is none."""
    import resource

    import torch

    if allocated := torch.cuda.max_memory_allocated():  # the CPU backend's stand-in says 0
        return f"device memory: {allocated / 2**20:.1f} MiB"
    return f"resident memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.1f} MiB"


def is_rank_0() -> bool:
    """Whether this process is the first of the job, before the process group exists."""
    return os.environ.get("RANK", "0") == "0"
