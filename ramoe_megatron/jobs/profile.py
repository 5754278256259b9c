"""Stage 2: task experts of English, the divergence curve, the alignment zone, and the English routing to align to.

    torchrun --nproc-per-node N -m ramoe_megatron.jobs.profile MEGATRON_FLAGS --load DIR --ramoe-data FILE --ramoe-general FILE
        --ramoe-taxonomy FILE --ramoe-output DIR

One forward pass each over English task data, general English text and the parallel views. What it keeps does not grow with the
number of tokens; the priors alone grow with the number of examples. With neither general text nor taxonomy, the priors are all that is
written: what each further anchor has to bring (`ramoe anchors`).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ramoe_megatron.data.parallel import Example, load_examples, pair_with_anchor
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.jobs.offline import (
    OfflineOptions,
    Progress,
    checkpoint_name,
    data_digests,
    examples_with_anchor,
    offline_job,
    write_on_rank_0,
)
from ramoe_megatron.jobs.profile_passes import Passes
from ramoe_megatron.jobs.shards import Shards, depends_on
from ramoe_megatron.mcore.arguments import DataOptions
from ramoe_megatron.mcore.launch import is_rank_0, refuse_conversations, run_job
from ramoe_megatron.mcore.options import options_from_args
from ramoe_megatron.method.anchors import check_anchor
from ramoe_megatron.method.artefacts import TOKENS, ExpertFile, Priors, read_taxonomy, write_divergence
from ramoe_megatron.method.divergence import Zone, mean_curve, zone_from_curve
from ramoe_megatron.method.experts import delta, describe_empty, parse_rule, task_experts
from ramoe_megatron.method.files import files_by_tokens
from ramoe_megatron.method.layers import parse_layers


@dataclass(frozen=True)
class ProfileOptions:
    """Options of the profile."""

    general: list[str] = dataclasses.field(default_factory=list)
    """General English text, in the same format (its prompt may be empty): what task experts are compared with."""

    taxonomy: str | None = None
    """taxonomy.jsonl: which examples English answers correctly, for the English pattern."""

    select: str = "tau=0.3"
    """Rule for task experts: tau=X (frequency above that of general text by more than X) or top-m=M per layer."""

    select_tokens: list[str] = dataclasses.field(default_factory=lambda: ["all"])
    """Tokens of the task data whose counts choose the task experts: all (the paper's), prompt, response or last (our own, for experts of
    the aligned tokens); each further one makes a file of its own, experts-TOKENS.safetensors. Of general text all tokens count."""

    layers: str = "auto"
    """Alignment zone to record: auto (read off the divergence curve), FIRST-LAST or FRACTION-FRACTION."""

    tokens: list[str] = dataclasses.field(default_factory=lambda: ["last"])
    """Tokens that the priors pool: prompt, response, all or last; each further one makes a file of its own, priors-TOKENS.safetensors.
    (The expert file holds the English pattern of every choice.)"""

    save_priors: bool = False
    """Write priors.safetensors: the English routing of every example, for the target "example". With neither --ramoe-general nor
    --ramoe-taxonomy it is all that is written: of a further anchor, for `ramoe anchors`."""

    def __post_init__(self) -> None:
        for flag, tokens in (("tokens", self.tokens), ("select-tokens", self.select_tokens)):
            if not tokens or set(tokens) - set(TOKENS) or len(set(tokens)) < len(tokens):
                raise RamoeError(f"--ramoe-{flag} {' '.join(tokens)}: expected one or more of {', '.join(TOKENS)}, each once")

    save_usage: bool = False
    """Write usage.safetensors: how much each expert is used by each language, for training that selects experts (--ramoe-train)."""

    @property
    def priors_alone(self) -> bool:
        """Whether priors are all that is asked for. With one of the two files the other is rather a forgotten flag."""
        return self.save_priors and not self.general and self.taxonomy is None

    def check(self) -> None:
        """Raise RamoeError for a flag that is missing."""
        if self.priors_alone:
            if self.save_usage:
                raise RamoeError("--ramoe-save-usage is of a whole profile: give --ramoe-general and --ramoe-taxonomy, or leave it out")
            return
        if not self.general:
            raise RamoeError("--ramoe-general is missing: expected general English text to compare the task data with")
        if self.taxonomy is None:
            raise RamoeError("--ramoe-taxonomy is missing: expected taxonomy.jsonl; run `ramoe taxonomy` first")

    def rows_of(self, data: DataOptions) -> DataOptions:
        """What is run of the task data: for priors alone, the anchor's rows."""
        return dataclasses.replace(data, languages=[]) if self.priors_alone else data


def main() -> None:
    """Write `experts.safetensors`, `divergence.csv` and, when asked for, `priors.safetensors` and `usage.safetensors`; or priors alone."""
    with offline_job(ProfileOptions) as (args, data, options):
        own = options_from_args(ProfileOptions, args)
        own.check()
        if own.priors_alone:
            _priors_alone(args, data, options, own)
        else:
            _profile(args, data, options, own)


def _profile(args: Any, data: DataOptions, options: OfflineOptions, own: ProfileOptions) -> None:
    from ramoe_megatron.mcore.offline import OfflineModel

    rule = parse_rule(own.select)
    examples = examples_with_anchor(own.rows_of(data))
    pairs = pair_with_anchor(examples, data.anchor)
    general = load_examples(own.general, languages=[data.anchor])
    check_anchor(str(own.taxonomy), data.anchor)
    correct = {row.id for row in read_taxonomy(str(own.taxonomy)) if row.english_correct}
    english = [example for example in examples if example.language == data.anchor]
    refuse_conversations([*examples, *general])
    model = OfflineModel(args, options.batch_tokens)
    output, shape = Path(str(options.output)), model.shape
    given = None if own.layers == "auto" else parse_layers(own.layers, shape.num_moe_layers)
    passes = Passes(model, general, english, [target for _, target in pairs], correct, own, data.anchor)

    def key() -> dict[str, Any]:
        return depends_on(args, [*data.data, *own.general], [*examples, *general])

    with Shards(output, "profile", len(passes.parts), key) as shards:
        passes.run(shards, Progress(len(examples) + len(general), "sequences"))
        rows = passes.curve.rows(model.layer_numbers)
        zone = zone_from_curve(mean_curve(rows))
        if given is not None:
            zone = Zone(*given, own.layers, "given by --ramoe-layers")
        checkpoint = checkpoint_name(args.load)
        digests = data_digests([*data.data, *own.general])
        general_frequency, pattern = passes.general_frequency.mean()[0].cpu(), passes.english_pattern()

        def expert_file(tokens: str) -> ExpertFile:
            frequency = passes.task_frequency[tokens]
            task_frequency = frequency.mean().cpu()
            difference = delta(task_frequency, general_frequency)
            return ExpertFile(
                tasks=tuple(passes.tasks), shape=shape, expert_mask=task_experts(difference, rule), delta=difference,
                task_frequency=task_frequency, general_frequency=general_frequency, english_pattern=pattern,
                layer_number=torch.tensor(model.layer_numbers), rule=rule.as_dict(), zone=zone, checkpoint=checkpoint,
                data=digests, anchor=data.anchor, select_tokens=tokens,
                sequences={
                    "english_task": dict(zip(passes.tasks, frequency.sequences.tolist(), strict=True)),
                    "english_correct": dict(zip(passes.tasks, passes.pattern_count.int().tolist(), strict=True)),
                    "general": len(general), "pairs": len(pairs),
                },
            )  # fmt: skip

        files = {name: expert_file(tokens) for tokens, name in files_by_tokens("experts", own.select_tokens).items()}

        def write() -> None:
            output.mkdir(parents=True, exist_ok=True)
            write_divergence(output / "divergence.csv", rows)
            if own.save_priors:
                _write_priors(output, own, passes, shards, english, checkpoint, digests)
            if passes.usage is not None:
                passes.usage.file(shape, model.layer_numbers, checkpoint, digests).save(output / "usage.safetensors")
            for name, experts in files.items():
                experts.save(output / name)
            shards.remove()

        write_on_rank_0(model, write)
        if is_rank_0():
            empty = [f"{name}: {told}" for name, file in files.items() for told in describe_empty(file.expert_mask, passes.tasks, rule)]
            print(f"ramoe: zone: {zone}", *empty, sep="\nramoe: ", flush=True)


def _priors_alone(args: Any, data: DataOptions, options: OfflineOptions, own: ProfileOptions) -> None:
    from ramoe_megatron.mcore.offline import OfflineModel

    english = examples_with_anchor(own.rows_of(data))
    refuse_conversations(english)
    model = OfflineModel(args, options.batch_tokens)
    output, passes = Path(str(options.output)), Passes(model, [], english, [], set(), own, data.anchor)
    # the job's name is the whole profile's: both write priors.safetensors
    with Shards(output, "profile", len(passes.parts), lambda: depends_on(args, data.data, english)) as shards:
        passes.run(shards, Progress(len(english), "sequences"))

        def write() -> None:
            output.mkdir(parents=True, exist_ok=True)
            _write_priors(output, own, passes, shards, english, checkpoint_name(args.load), data_digests(data.data))
            shards.remove()

        write_on_rank_0(model, write)
    if is_rank_0():
        files = ", ".join(files_by_tokens("priors", own.tokens).values())
        told = f"no --ramoe-general, no --ramoe-taxonomy: {files} alone, the routing of {len(english)} examples in {data.anchor!r}"
        print(f"ramoe: {told}", flush=True)


def _write_priors(
    output: Path, own: ProfileOptions, passes: Passes, shards: Shards, english: Sequence[Example], checkpoint: str,
    digests: list[dict[str, str]],
) -> None:  # fmt: skip
    kept = [shards.kept(number) for number in passes.english_shards]
    for choice, name in files_by_tokens("priors", own.tokens).items():
        priors = torch.cat([part[choice] for part in kept])
        ids = [example.id for example in english]
        Priors.save(output / name, ids, priors, tokens=choice, shape=passes.model.shape, checkpoint=checkpoint, data=digests)


if __name__ == "__main__":
    run_job(main)
