"""What a job without training reads, checked as the job itself would check it: data, checkpoint, the files of earlier jobs."""

from collections.abc import Callable, Sequence
from typing import Any

from ramoe_megatron.artifacts.anchor_files import check_anchor
from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.records import read_divergence, read_taxonomy
from ramoe_megatron.data.encode import check_conversations
from ramoe_megatron.data.parallel import Example, load_examples, pair_with_anchor
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.jobs.check_common import CHECKPOINT_FIX, DATA_FIX, FILE_FIX, Trial, moe_layers, named
from ramoe_megatron.jobs.evaluate import EvaluateOptions, check_steering
from ramoe_megatron.jobs.offline_job import examples_with_anchor, offline_options
from ramoe_megatron.jobs.predict import PredictOptions
from ramoe_megatron.jobs.profile import ProfileOptions
from ramoe_megatron.jobs.steer import SteerOptions
from ramoe_megatron.mcore.arguments import DataOptions
from ramoe_megatron.mcore.checkpoint import require_checkpoint
from ramoe_megatron.mcore.findings import Finding, attempt
from ramoe_megatron.mcore.flags import options_from_args
from ramoe_megatron.mcore.steer.steering_options import SteeringOptions
from ramoe_megatron.method.experts import parse_rule
from ramoe_megatron.method.layers import parse_layers


def offline_findings(trying: Trial) -> list[Finding]:
    """Findings about the data, the checkpoint, and the files of earlier jobs that this one reads."""
    job = trying.line.job

    def checkpoint() -> str:
        if written := trying.written_by(trying.args.load):
            return written
        require_checkpoint(trying.args.load, "--load")
        return named(trying.args.load)

    found = [attempt("data", lambda: _offline_data(trying), DATA_FIX), attempt("checkpoint", checkpoint, CHECKPOINT_FIX)]
    if job == "profile":
        found += _profile(trying)
    elif job == "predict":
        found += _predict(trying)
    elif job == "steer":
        found += _steer(trying)
    elif job == "evaluate":
        found += _evaluate(trying)
    return found


def _offline_data(trying: Trial) -> str:
    data, _ = offline_options(trying.args)
    if written := trying.written_by(*data.data):
        return written
    examples = _offline_examples(trying)
    # an evaluation compares no languages, nor do priors
    compares = trying.line.job != "evaluate" and not _priors_alone(trying)
    if compares and not pair_with_anchor(examples, data.anchor):
        raise RamoeError(f"{', '.join(data.data)}: only {data.anchor!r} rows in split {data.split!r}; nothing to compare")
    _refuse_unanswerable(trying, examples)
    return f"{len(examples)} examples of split {data.split}"


def _refuse_unanswerable(trying: Trial, examples: Sequence[Example]) -> None:
    """As the jobs that score; of a prediction, the targets. The expensive part of the check: once for the same examples and limits."""
    if trying.line.job == "profile" or trying.tokenizer is None:
        return
    args, (data, offline) = trying.args, offline_options(trying.args)
    scored = [example for example in examples if trying.line.job != "predict" or example.language != data.anchor]
    limits = (offline.max_new_tokens, args.max_position_embeddings, args.tokenizer_type, args.tokenizer_model)
    key = repr((data.data, data.split, data.languages, data.columns, len(scored), limits))
    if key not in trying.read:
        trying.read[key] = offline.limits(args, scored, trying.tokenizer)


def _offline_examples(trying: Trial) -> list[Example]:
    data, _ = offline_options(trying.args)
    if trying.line.job == "profile":
        data = options_from_args(ProfileOptions, trying.args).rows_of(data)
    args = trying.args
    tokenizer = (args.tokenizer_type, args.tokenizer_model, args.chat_template)
    key = repr((data.data, data.split, data.languages, data.anchor, data.columns, tokenizer))
    if key not in trying.read:
        trying.read[key] = _tried(examples_with_anchor(data), trying)
    return trying.read[key]


def _tried(examples: list[Example], trying: Trial) -> list[Example]:
    """The examples, whose conversations the tokenizer's chat template can write; unknown without a tokenizer."""
    if trying.tokenizer is not None:
        check_conversations(examples, trying.tokenizer)
    return examples


def _priors_alone(trying: Trial) -> bool:
    return trying.line.job == "profile" and options_from_args(ProfileOptions, trying.args).priors_alone


def _profile(trying: Trial) -> list[Finding]:
    own, data = options_from_args(ProfileOptions, trying.args), options_from_args(DataOptions, trying.args)

    def rule() -> str:
        parse_rule(own.select)
        if own.layers != "auto":
            parse_layers(own.layers, moe_layers(trying))
        return f"{own.select}, layers {own.layers}"

    def general() -> str:
        if not own.general:
            raise RamoeError("--ramoe-general is missing: expected general English text to compare the task data with")
        if written := trying.written_by(*own.general):
            return written
        return f"{len(_tried(load_examples(own.general, languages=[data.anchor]), trying))} texts"

    def taxonomy() -> str:
        told = _read(trying, own.taxonomy, "taxonomy", read_taxonomy)
        if trying.written_by(own.taxonomy) is None:
            check_anchor(str(own.taxonomy), data.anchor)
        return told

    def priors() -> str:
        own.check()
        return f"alone, of {data.anchor!r}"

    if own.priors_alone:
        return [attempt("priors", priors, "correct the flag")]
    return [
        attempt("expert rule", rule, "correct --ramoe-select or --ramoe-layers"),
        attempt("general text", general, DATA_FIX),
        attempt("taxonomy", taxonomy, FILE_FIX),
    ]


def _predict(trying: Trial) -> list[Finding]:
    own = options_from_args(PredictOptions, trying.args)
    return [
        attempt("taxonomy", lambda: _read(trying, own.taxonomy, "taxonomy", read_taxonomy), FILE_FIX),
        attempt("divergence", lambda: _read(trying, own.divergence_file, "divergence-file", read_divergence), FILE_FIX),
        attempt("expert file", lambda: _fits(trying, own.experts, own.layers), FILE_FIX),
    ]


def _evaluate(trying: Trial) -> list[Finding]:
    own, steer = options_from_args(EvaluateOptions, trying.args), options_from_args(SteeringOptions, trying.args)

    def steering() -> str:
        check_steering(own, steer, trying.args)
        if written := trying.written_by(own.experts, steer.steering):
            return written
        return str(steer.setting(ExpertFile.load(str(own.experts)), trying.args) or "none is best")

    found = [attempt("expert file", lambda: _fits(trying, own.experts), FILE_FIX)] if own.experts else []
    asked = steer != SteeringOptions()
    return [*found, attempt("steering", steering, "correct the --ramoe-steer flags")] if asked else found


def _steer(trying: Trial) -> list[Finding]:
    own, data = options_from_args(SteerOptions, trying.args), options_from_args(DataOptions, trying.args)

    def settings() -> str:
        own.check(trying.args)
        if written := trying.written_by(own.experts, *data.data):
            return written
        _, tried, skipped = own.to_try(_offline_examples(trying), data.anchor)
        return "\n".join([f"{len(tried)} settings, no steering among them", *skipped])

    found = attempt("expert file", lambda: _fits(trying, own.experts), FILE_FIX)
    return [found] if found.state == "fatal" else [found, attempt("settings", settings, "correct the flag")]


def _read(trying: Trial, path: str | None, flag: str, read: Callable[[str], list[Any]]) -> str:
    if path is None:
        raise RamoeError(f"--ramoe-{flag} is missing: expected the file that `ramoe taxonomy` or `ramoe profile` wrote")
    return trying.written_by(path) or f"{len(read(path))} rows"


def _fits(trying: Trial, path: str | None, layers: str | None = None) -> str:
    """That an expert file is the model's, and its zone where it is to be used."""
    if path is None:
        raise RamoeError("--ramoe-experts is missing: expected the file that `ramoe profile` wrote")
    if written := trying.written_by(path):
        return written
    experts, config = ExpertFile.load(path), trying.config
    experts.check_model(
        moe_layers(trying), config.num_moe_experts, config.moe_router_topk, config.moe_router_score_function
    )
    if layers is None:
        return f"{len(experts.tasks)} tasks"
    first, last = parse_layers(layers, experts.shape.num_moe_layers, experts.zone)
    return f"{len(experts.tasks)} tasks; MoE layers {first}-{last} of {experts.shape.num_moe_layers}"
