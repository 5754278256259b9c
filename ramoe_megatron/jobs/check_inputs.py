"""What a job reads, checked as the job itself would check it: data, checkpoint, the files of earlier jobs."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ramoe_megatron.data.dataset import EncodedExamples
from ramoe_megatron.data.parallel import Example, load_examples, pair_with_anchor
from ramoe_megatron.data.sampler import order
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.findings import Finding, attempt
from ramoe_megatron.jobs.evaluate import EvaluateOptions, check_steering
from ramoe_megatron.jobs.offline import examples_with_anchor, offline_options
from ramoe_megatron.jobs.predict import PredictOptions
from ramoe_megatron.jobs.profile import ProfileOptions
from ramoe_megatron.jobs.steer import SteerOptions
from ramoe_megatron.jobs.steering import SteeringOptions
from ramoe_megatron.mcore.alignment import fitting_experts, layer_weights
from ramoe_megatron.mcore.alignment_options import RoutingAlignmentConfig
from ramoe_megatron.mcore.arguments import DataOptions
from ramoe_megatron.mcore.checkpoint import TRACKER, require_checkpoint, starting_checkpoint
from ramoe_megatron.mcore.options import options_from_args
from ramoe_megatron.mcore.refusals import refuse_unsupported
from ramoe_megatron.mcore.router import configured_moe_layer_numbers
from ramoe_megatron.mcore.selection import selection_from_args
from ramoe_megatron.mcore.selective_options import SelectiveOptions
from ramoe_megatron.mcore.training_data import check_examples, check_labels, training_languages
from ramoe_megatron.method.anchors import check_anchor
from ramoe_megatron.method.artefacts import ExpertFile, read_divergence, read_taxonomy
from ramoe_megatron.method.experts import parse_rule
from ramoe_megatron.method.layers import parse_layers, span

if TYPE_CHECKING:
    from ramoe_megatron.jobs.check import Trial

ENCODED = 20_000
"""Examples that are tokenised, the longest first: whether they fit --seq-length shows in these."""
_DATA, _CHECKPOINT = "correct the data or the flag", "correct the path, or run the job that writes it"
_FILE = "run the job that writes it (ramoe taxonomy, ramoe profile) on this model and data, or correct the path"


def input_findings(trying: "Trial") -> list[Finding]:
    """Findings about everything that the job reads, and whether a training run saves what it makes."""
    return _training(trying) if trying.line.job == "finetune" else _offline(trying)


def _training(trying: "Trial") -> list[Finding]:
    args, alignment = trying.args, RoutingAlignmentConfig.from_args(trying.args)
    files = (alignment.experts, alignment.taxonomy, alignment.priors)

    def checkpoint() -> str:
        if written := trying.written_by(args.pretrained_checkpoint):
            return written
        folder = starting_checkpoint(args)
        return _named(folder) if folder else "none: training starts from random weights"

    def labels() -> str:
        written = trying.written_by(*files, *args.ramoe_data)
        if written is None:
            check_labels(args, check_examples(args))
        return written or "every example has its category and its target"

    found = [
        attempt("data", lambda: _training_data(trying), _DATA),
        attempt("checkpoint", checkpoint, _CHECKPOINT),
        _saving(args),
    ]
    selective = options_from_args(SelectiveOptions, args)
    if selective.train != "all":
        selection_files = (selective.usage, alignment.experts, *args.ramoe_data)
        found.append(attempt("selection", lambda: trying.written_by(*selection_files) or _selection(trying), _FILE))
    if alignment.coeff == 0:
        return [*found, Finding("alignment", "ok", "off (--ramoe-coeff 0)")]
    experts = attempt("expert file", lambda: trying.written_by(alignment.experts) or _zone(trying, alignment), _FILE)
    found += [attempt("alignment", lambda: _alignment(trying, alignment), "remove the flag, or set --ramoe-coeff 0"), experts]
    # Labels are read from the expert file too: its fault is told once.
    return found if experts.state == "fatal" else [*found, attempt("labels", labels, _FILE)]


def _training_data(trying: "Trial") -> str:
    args, options = trying.args, options_from_args(DataOptions, trying.args)
    weights = options.weight_mapping()
    if written := trying.written_by(*options.data):
        return written
    examples = check_examples(args)
    order(examples, 1, args.seed, weights)
    told = f"{len(examples)} examples of split {options.split}"
    if trying.tokenizer is None:
        return told
    key = repr((options, args.seq_length, args.tokenizer_type, args.tokenizer_model))
    if key not in trying.read:
        longest = sorted(examples, key=lambda e: len(e.prompt) + len(e.response), reverse=True)[:ENCODED]
        trying.read[key] = EncodedExamples(longest, trying.tokenizer, args.seq_length).lengths.max()
    return f"{told}; the longest takes {trying.read[key]} of --seq-length {args.seq_length}"


def _saving(args: Any) -> Finding:
    if not args.save:
        return Finding("saving", "warning", "no --save: the trained weights would be lost", "give --save DIR and --save-interval N")
    return Finding("saving", "ok", f"every {args.save_interval} iterations")


def _alignment(trying: "Trial", alignment: RoutingAlignmentConfig) -> str:
    refuse_unsupported(trying.config)
    return f"coefficient {alignment.coeff:g}, {alignment.divergence}"


def _zone(trying: "Trial", alignment: RoutingAlignmentConfig) -> str:
    experts, layers = fitting_experts(alignment, trying.config, _moe_layers(trying))
    layer_weights(alignment, layers, _moe_layers(trying))
    return f"{len(experts.tasks)} tasks; aligned MoE layers {span(layers)} of {experts.shape.num_moe_layers}"


def _selection(trying: "Trial") -> str:
    selection = selection_from_args(trying.args, trying.config, training_languages(trying.args))
    assert selection is not None  # something else than "all" is asked for
    experts = "" if selection.routers else f"; {int(selection.experts_LE.sum())} of {selection.experts_LE.numel()} experts"
    return f"{selection.kind}: {selection.told}{experts}"


def _moe_layers(trying: "Trial") -> int:
    return len(configured_moe_layer_numbers(trying.config, trying.args.hybrid_layer_pattern))


def _offline(trying: "Trial") -> list[Finding]:
    job = trying.line.job

    def checkpoint() -> str:
        if written := trying.written_by(trying.args.load):
            return written
        require_checkpoint(trying.args.load, "--load")
        return _named(trying.args.load)

    found = [attempt("data", lambda: _offline_data(trying), _DATA), attempt("checkpoint", checkpoint, _CHECKPOINT)]
    if job == "profile":
        found += _profile(trying)
    elif job == "predict":
        found += _predict(trying)
    elif job == "steer":
        found += _steer(trying)
    elif job == "evaluate":
        found += _evaluate(trying)
    return found


def _offline_data(trying: "Trial") -> str:
    data, _ = offline_options(trying.args)
    if written := trying.written_by(*data.data):
        return written
    examples = _offline_examples(trying)
    # an evaluation compares no languages, nor do priors
    compares = trying.line.job != "evaluate" and not _priors_alone(trying)
    if compares and not pair_with_anchor(examples, data.anchor):
        raise RamoeError(f"{', '.join(data.data)}: only {data.anchor!r} rows in split {data.split!r}; nothing to compare")
    return f"{len(examples)} examples of split {data.split}"


def _offline_examples(trying: "Trial") -> list[Example]:
    data, _ = offline_options(trying.args)
    if trying.line.job == "profile":
        data = options_from_args(ProfileOptions, trying.args).rows_of(data)
    key = repr((data.data, data.split, data.languages, data.anchor, data.columns))
    if key not in trying.read:
        trying.read[key] = examples_with_anchor(data)
    return trying.read[key]


def _priors_alone(trying: "Trial") -> bool:
    return trying.line.job == "profile" and options_from_args(ProfileOptions, trying.args).priors_alone


def _profile(trying: "Trial") -> list[Finding]:
    own, data = options_from_args(ProfileOptions, trying.args), options_from_args(DataOptions, trying.args)

    def rule() -> str:
        parse_rule(own.select)
        if own.layers != "auto":
            parse_layers(own.layers, _moe_layers(trying))
        return f"{own.select}, layers {own.layers}"

    def general() -> str:
        if not own.general:
            raise RamoeError("--ramoe-general is missing: expected general English text to compare the task data with")
        if written := trying.written_by(*own.general):
            return written
        return f"{len(load_examples(own.general, languages=[data.anchor]))} texts"

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
        attempt("general text", general, _DATA),
        attempt("taxonomy", taxonomy, _FILE),
    ]


def _predict(trying: "Trial") -> list[Finding]:
    own = options_from_args(PredictOptions, trying.args)
    return [
        attempt("taxonomy", lambda: _read(trying, own.taxonomy, "taxonomy", read_taxonomy), _FILE),
        attempt("divergence", lambda: _read(trying, own.divergence_file, "divergence-file", read_divergence), _FILE),
        attempt("expert file", lambda: _fits(trying, own.experts, own.layers), _FILE),
    ]


def _evaluate(trying: "Trial") -> list[Finding]:
    own, steer = options_from_args(EvaluateOptions, trying.args), options_from_args(SteeringOptions, trying.args)

    def steering() -> str:
        check_steering(own, steer, trying.args)
        if written := trying.written_by(own.experts, steer.steering):
            return written
        return str(steer.setting(ExpertFile.load(str(own.experts)), trying.args) or "none is best")

    found = [attempt("expert file", lambda: _fits(trying, own.experts), _FILE)] if own.experts else []
    asked = steer != SteeringOptions()
    return [*found, attempt("steering", steering, "correct the --ramoe-steer flags")] if asked else found


def _steer(trying: "Trial") -> list[Finding]:
    own, data = options_from_args(SteerOptions, trying.args), options_from_args(DataOptions, trying.args)

    def settings() -> str:
        own.check(trying.args)
        if written := trying.written_by(own.experts, *data.data):
            return written
        _, tried, skipped = own.to_try(_offline_examples(trying), data.anchor)
        return "\n".join([f"{len(tried)} settings, no steering among them", *skipped])

    found = attempt("expert file", lambda: _fits(trying, own.experts), _FILE)
    return [found] if found.state == "fatal" else [found, attempt("settings", settings, "correct the flag")]


def _read(trying: "Trial", path: str | None, flag: str, read: Callable[[str], list[Any]]) -> str:
    if path is None:
        raise RamoeError(f"--ramoe-{flag} is missing: expected the file that `ramoe taxonomy` or `ramoe profile` wrote")
    return trying.written_by(path) or f"{len(read(path))} rows"


def _fits(trying: "Trial", path: str | None, layers: str | None = None) -> str:
    """That an expert file is the model's, and its zone where it is to be used."""
    if path is None:
        raise RamoeError("--ramoe-experts is missing: expected the file that `ramoe profile` wrote")
    if written := trying.written_by(path):
        return written
    experts, config = ExpertFile.load(path), trying.config
    experts.check_model(
        _moe_layers(trying), config.num_moe_experts, config.moe_router_topk, config.moe_router_score_function
    )
    if layers is None:
        return f"{len(experts.tasks)} tasks"
    first, last = parse_layers(layers, experts.shape.num_moe_layers, experts.zone)
    return f"{len(experts.tasks)} tasks; MoE layers {first}-{last} of {experts.shape.num_moe_layers}"


def _named(folder: str) -> str:
    path = Path(folder)
    return f"{path.name} at iteration {(path / TRACKER).read_text(encoding='utf-8').strip()}"
