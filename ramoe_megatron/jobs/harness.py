"""Run the tasks of lm-evaluation-harness on a Megatron checkpoint.

    torchrun --nproc-per-node N -m ramoe_megatron.jobs.harness MEGATRON_FLAGS --load DIR -- --tasks TASK ...

What follows `--` is for `lm_eval`. Rank 0 runs lm_eval: it reads the tasks and writes the files. The other
ranks follow its requests to the model, so they need no data, and they cannot differ in a request.
"""

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.jobs.entry import CHECKPOINT_FIX, Job
from ramoe_megatron.jobs.offline_job import OfflineOptions
from ramoe_megatron.mcore.checkpoint import named, require_checkpoint
from ramoe_megatron.mcore.flags import options_from_args
from ramoe_megatron.mcore.launch import is_rank_0, run_job
from ramoe_megatron.mcore.start import Start


def main() -> None:
    """Run lm_eval. It writes its own files, to its --output_path."""
    line = sys.argv[1:]
    place = line.index("--") if "--" in line else len(line)
    sys.argv = [sys.argv[0], *line[:place]]
    Job(lambda: (OfflineOptions,), partial(_read, line[place + 1 :])).main()


def _read(words: Sequence[str], start: Start, args: Any) -> Callable[[], None]:
    """Check that lm_eval is installed, and the checkpoint."""
    options = options_from_args(OfflineOptions, args)
    start.step("lm-eval", require_lm_eval, None, "install it")
    start.step(
        "checkpoint",
        lambda: require_checkpoint(args.load, "--load"),
        lambda _: named(args.load),
        CHECKPOINT_FIX,
        [args.load],
    )
    return lambda: run_over_ranks(args, options.batch_tokens, words)


def require_lm_eval() -> None:
    """Raise RamoeError if lm-evaluation-harness is not installed."""
    if find_spec("lm_eval") is None:
        raise RamoeError(
            "lm-evaluation-harness is not installed: pip install 'ramoe-megatron[lm-eval]' "
            "(in a checkout: pip install -c constraints.txt -e '.[lm-eval]')"
        )


def run_over_ranks(args: Any, batch_tokens: int, words: Sequence[str]) -> None:
    """Run lm_eval on rank 0 with these words, while the other ranks follow."""
    from ramoe_megatron.jobs.harness_ranks import MODEL, Ranks
    from ramoe_megatron.mcore.offline.model import start

    start(args)
    ranks = Ranks(args, batch_tokens)
    if not is_rank_0():
        ranks.follow()
        return
    from lm_eval.__main__ import cli_evaluate

    from ramoe_megatron.jobs.harness_model import RamoeLM

    RamoeLM.started = ranks
    # lm_eval names its output folder after the argument `pretrained`
    folder = ["--model_args", json.dumps({"pretrained": args.load})]
    before, sys.argv = sys.argv, ["lm-eval", "run", "--model", MODEL, *words, *folder]
    try:
        cli_evaluate()
    except RamoeError:
        raise
    except Exception as error:
        if ranks.loaded:
            raise
        raise RamoeError(f"lm-eval: {error}") from error  # a task or a flag, before the model is loaded
    finally:
        sys.argv = before
        ranks.release()


if __name__ == "__main__":
    run_job(main)
