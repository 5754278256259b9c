"""What would stop a job, from its command line alone: nothing is started, nothing is written. One process for many command lines.

    python -m ramoe_megatron.jobs.check < LINES.json

LINES.json: a list of `Line`s. The answer is one line on stdout, "RAMOE-CHECK " and JSON: {"flags": [every flag that is known],
"findings": {NAME: [`Finding`, ...]}}. Importing Megatron takes seconds, a command line after that some tenths of one.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from ramoe_megatron.jobs.check_common import Trial
from ramoe_megatron.jobs.evaluate import EvaluateOptions
from ramoe_megatron.jobs.offline_job import FORWARD_ONLY_FLAGS, OfflineOptions
from ramoe_megatron.jobs.predict import PredictOptions
from ramoe_megatron.jobs.profile import ProfileOptions
from ramoe_megatron.jobs.steer import SteerOptions
from ramoe_megatron.mcore import compat
from ramoe_megatron.mcore.align.options import RoutingAlignmentConfig
from ramoe_megatron.mcore.arguments import DataOptions, arguments_with, known_flags
from ramoe_megatron.mcore.cpu.backend import cpu_backend
from ramoe_megatron.mcore.findings import ANSWER, Finding, Line, attempt
from ramoe_megatron.mcore.flags import options_from_args
from ramoe_megatron.mcore.launch import command_line, run_job
from ramoe_megatron.mcore.select.selective_options import SelectiveOptions
from ramoe_megatron.mcore.steer.steering_options import SteeringOptions

OPTIONS: dict[str, tuple[type, ...]] = {
    "finetune": (RoutingAlignmentConfig, DataOptions, SelectiveOptions),
    "taxonomy": (DataOptions, OfflineOptions),
    "profile": (DataOptions, OfflineOptions, ProfileOptions),
    "evaluate": (DataOptions, OfflineOptions, EvaluateOptions, SteeringOptions),
    "steer": (DataOptions, OfflineOptions, SteerOptions),
    "predict": (DataOptions, OfflineOptions, PredictOptions),
}
"""The jobs that can be checked, and the option classes whose flags each takes."""


def main() -> None:
    """Check the command lines on stdin."""
    lines = [Line(**entry) for entry in json.load(sys.stdin)]
    with cpu_backend() as on_cpu:
        compat.remember_docstrings()
        read: dict[str, Any] = {}
        found = {line.name: [asdict(f) for f in check(line, on_cpu, read)] for line in lines}
        flags = sorted(known_flags())
    print(f"\n{ANSWER}{json.dumps({'flags': flags, 'findings': found})}", flush=True)


def check(line: Line, on_cpu: bool, read: dict[str, Any]) -> list[Finding]:
    """All findings about a command line, on the CPU backend or where there is a CUDA device. `read`: as in `Trial`."""
    from ramoe_megatron.mcore import trial

    flags = [*line.flags, *([] if line.job == "finetune" else FORWARD_ONLY_FLAGS)]
    with trial.standing_for_rank_0(line.ranks, line.nodes), command_line(flags, on_cpu) as left_out:
        return _check(line, left_out, read)


def _check(line: Line, left_out: Sequence[str], read: dict[str, Any]) -> list[Finding]:
    from ramoe_megatron.jobs.check_offline import offline_findings
    from ramoe_megatron.jobs.check_training import training_findings
    from ramoe_megatron.mcore import trial

    provider = arguments_with(*OPTIONS[line.job])
    held: dict[str, Any] = {}

    def keep(name: str, make: Callable[[], Any], told: str = "") -> Callable[[], str]:
        def look() -> str:
            held[name] = make()
            return told

        return look

    correct = f"correct the flag; `ramoe {line.job} -- --help` lists them"
    taken = "Megatron takes them" + (f"; the CPU backend leaves out {', '.join(left_out)}" if left_out else "")
    flags = attempt("flags", keep("parsed", lambda: trial.parsed(provider), taken), correct)
    if flags.state == "fatal":
        return [flags]
    if not held["parsed"].use_checkpoint_args:  # else the sizes may stand in the checkpoint
        layout = attempt("layout", keep("fits", lambda: _refuse_layout(line, held["parsed"])), "change the ranks or the parallel sizes")
        if layout.state == "fatal":
            return [flags, layout]

    def validate() -> Any:
        args = trial.validated(held["parsed"])
        for options in OPTIONS[line.job]:
            options_from_args(options, args)  # each refuses what does not go together
        return args

    flags = attempt("flags", keep("args", validate, taken), correct)
    if flags.state == "fatal":
        return [flags]
    args = held["args"]
    trying = Trial(line, args, read=read)
    tokenizer = attempt("tokenizer", lambda: _tokenizer(trying), "give --tokenizer-type and --tokenizer-model of the model")
    layout = attempt("layout", lambda: _layout(line, args), "change the ranks, the parallel sizes or the batch sizes")
    if layout.state == "fatal":
        return [flags, layout, tokenizer]

    def make() -> Any:
        with trial.micro_batches(args):
            return trial.made_from_arguments(args, trains=line.job == "finetune")

    config = attempt("flags", keep("config", make, taken), correct)
    if config.state == "fatal":
        return [config, layout, tokenizer]
    trying.config = held["config"]
    return [config, layout, tokenizer, *(training_findings if line.job == "finetune" else offline_findings)(trying)]


def _refuse_layout(line: Line, args: Any) -> None:
    from ramoe_megatron.mcore import trial

    trial.refuse_layout(args)
    if line.job != "finetune":
        from ramoe_megatron.mcore.offline.model import refuse_layout

        refuse_layout(args)


def _layout(line: Line, args: Any) -> str:
    from ramoe_megatron.mcore import trial

    _refuse_layout(line, args)
    told = trial.layout(args)
    return told if line.job == "finetune" else told.partition(";")[0]  # an offline job makes its own batches


def _tokenizer(trying: Trial) -> str:
    from ramoe_megatron.mcore import trial

    args = trying.args
    if written := trying.written_by(args.tokenizer_model, args.vocab_file, args.merge_file):
        return written
    trying.tokenizer = trial.tokenizer(args)
    return f"{args.tokenizer_type} of {trying.tokenizer.vocab_size} tokens, padded to {args.padded_vocab_size}"


if __name__ == "__main__":
    run_job(main)
