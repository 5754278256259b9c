"""Stage 2: find task experts, divergence curve and alignment zone, and record the English routing targets.

    torchrun --nproc-per-node N -m ramoe_megatron.jobs.profile MEGATRON_FLAGS --load DIR --ramoe-data FILE \\
        --ramoe-general FILE --ramoe-taxonomy FILE --ramoe-output DIR

The job runs one forward pass over English task data, general English text and the parallel views. Its memory
use does not grow with the number of tokens; only the priors grow with the number of examples. Without general
text and taxonomy the job writes only priors, which `ramoe anchors` needs for each further anchor.
"""

import dataclasses
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ramoe_megatron.artifacts.anchor_files import check_anchor
from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.files import files_by_tokens
from ramoe_megatron.artifacts.priors import DTYPES, Priors, bytes_per_id
from ramoe_megatron.artifacts.records import read_taxonomy, write_divergence
from ramoe_megatron.artifacts.tensors import TOKENS
from ramoe_megatron.artifacts.usage import UsageSum
from ramoe_megatron.data.encode import encode
from ramoe_megatron.data.parallel import Example, load_examples
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.jobs.entry import DATA_FIX, FILE_FIX, Job
from ramoe_megatron.jobs.offline_job import (
    OfflineInputs,
    OfflineOptions,
    ProgressLines,
    checkpoint_name,
    data_digests,
    moe_layers,
    read_conversations,
    read_offline,
    write_on_rank_0,
)
from ramoe_megatron.jobs.shards import SHARD_EXAMPLES, Shards, depends_on
from ramoe_megatron.mcore.arguments import DataOptions
from ramoe_megatron.mcore.flags import options_from_args
from ramoe_megatron.mcore.launch import is_rank_0, run_job
from ramoe_megatron.mcore.start import Start
from ramoe_megatron.method.categories import TaxonomyRow
from ramoe_megatron.method.divergence import DivergenceCurve, Zone, mean_curve, zone_from_curve
from ramoe_megatron.method.experts import FrequencySum, Rule, delta, describe_empty, parse_rule, task_experts
from ramoe_megatron.method.layers import parse_layers

if TYPE_CHECKING:
    from ramoe_megatron.mcore.offline.model import OfflineModel
    from ramoe_megatron.mcore.offline.routing import SequenceRouting


@dataclass(frozen=True)
class ProfileOptions:
    """Options of the profile."""

    general: list[str] = dataclasses.field(default_factory=list)
    """General English text to compare the task data with, in the same format as --ramoe-data. Prompts may be
    empty. Required, except for a run that writes only priors."""

    taxonomy: str | None = None
    """Taxonomy file (taxonomy.jsonl). The English pattern averages over the examples that the model answers
    correctly in English. Required, except for a run that writes only priors."""

    select: str = "tau=0.3"
    """Rule that selects the task experts. tau=X selects the experts whose frequency on task data exceeds
    their frequency on general text by more than X. top-m=M selects the M experts of each layer with the
    largest excess."""

    select_tokens: list[str] = dataclasses.field(default_factory=lambda: ["all"])
    """Tokens of the task data that count for the selection of task experts: all (as in the paper), prompt,
    response or last (the last prompt token; our addition). The job writes one expert file for each value
    given; all but the first are named experts-TOKENS.safetensors. General text always counts all tokens."""

    layers: str = "auto"
    """MoE layers to record as the alignment zone: auto, FIRST-LAST or FRACTION-FRACTION. auto derives the
    zone from the divergence curve."""

    tokens: list[str] = dataclasses.field(default_factory=lambda: ["last"])
    """Tokens that the priors pool: prompt, response, all or last (the last prompt token). The job writes one
    priors file for each value given; all but the first are named priors-TOKENS.safetensors. The English
    pattern in the expert file always covers every value."""

    save_priors: bool = False
    """Write priors.safetensors, the English routing of every example. --ramoe-target example needs this file.
    Without --ramoe-general and --ramoe-taxonomy the job writes only this file, as `ramoe anchors` needs it
    for a further anchor."""

    priors_for: Literal["all", "ci"] = "all"
    """Examples and layers that the priors have. all: every example and MoE layer. ci: the examples that the
    model answers correctly in English, which are or may become ci, in the layers of the alignment zone. This
    is all that training with --ramoe-examples ci reads."""

    priors_dtype: Literal["float32", "bfloat16"] = "float32"
    """Numbers of the priors. bfloat16 halves the file; its numbers have 3 digits."""

    def __post_init__(self) -> None:
        for flag, tokens in (("tokens", self.tokens), ("select-tokens", self.select_tokens)):
            if not tokens or set(tokens) - set(TOKENS) or len(set(tokens)) < len(tokens):
                raise RamoeError(
                    f"--ramoe-{flag} {' '.join(tokens)}: expected one or more of {', '.join(TOKENS)}, "
                    "each once"
                )

    save_usage: bool = False
    """Write usage.safetensors, the usage of each expert by each language. Training that selects experts
    (--ramoe-train) needs this file."""

    @property
    def priors_alone(self) -> bool:
        """Whether the job writes only priors. If one of the two files is given, the other is required too."""
        return self.save_priors and not self.general and self.taxonomy is None

    def check(self) -> None:
        """Raise RamoeError for a flag that a run which writes only priors cannot have."""
        if self.save_usage:
            raise RamoeError(
                "--ramoe-save-usage needs a whole profile: give --ramoe-general and --ramoe-taxonomy, "
                "or remove --ramoe-save-usage"
            )
        if self.priors_for != "all":
            raise RamoeError(
                f"--ramoe-priors-for {self.priors_for} needs a whole profile: give --ramoe-general and "
                "--ramoe-taxonomy, or remove --ramoe-priors-for"
            )

    def keeps(self, example: Example, correct: Collection[str]) -> bool:
        """Whether the priors have this example. `correct`: the ids that are right in English."""
        return self.priors_for == "all" or example.id in correct

    def rows_of(self, data: DataOptions) -> DataOptions:
        """The data options of the run. A run that writes only priors reads only the anchor's rows."""
        return dataclasses.replace(data, languages=[]) if self.priors_alone else data


def _correct(rows: Sequence[TaxonomyRow]) -> set[str]:
    """The ids that the model answers correctly in English."""
    return {row.id for row in rows if row.english_correct}


def _refuse_full_disk(
    start: Start, inputs: OfflineInputs, own: ProfileOptions, keeps: Callable[[Example], bool]
) -> None:
    """The step that compares the size of the priors with the room on the disk, and prints both."""
    anchor = inputs.data.anchor

    def look() -> str:
        layers, experts = moe_layers(start, inputs.args), start.config.value.num_moe_experts
        if own.priors_for == "ci" and own.layers != "auto":
            first, last = parse_layers(own.layers, layers)
            layers = last - first + 1
        ids = sum(keeps(e) for e in inputs.examples.value if e.language == anchor)
        each = bytes_per_id(layers, experts, own.priors_dtype) * len(own.tokens)
        folder = inputs.output.value.resolve()
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
        told = (
            f"{each:,} bytes an id ({layers} layers, {experts} experts, {own.priors_dtype}), {ids:,} ids: "
            f"{each * ids / 1e9:.2f} GB, and as much for the shards until the files are written; "
            f"{free / 1e9:.2f} GB are free at {folder}"
        )
        if 2 * each * ids > free:
            raise RamoeError(
                f"--ramoe-save-priors: {told}. Make room, give another --ramoe-output, or keep less "
                "(--ramoe-priors-for ci, --ramoe-priors-dtype bfloat16)"
            )
        if not start.checks and is_rank_0():
            print(f"ramoe: priors: {told}", flush=True)
        return told

    start.step("room for priors", look, str, "make room, or keep less")


def main() -> None:
    """Write `experts.safetensors` and the divergence curves, and on request the priors and the usage file."""
    JOB.main()


def _read(start: Start, args: Any) -> Callable[[], None]:
    """Read the examples. A whole profile also needs the rule, the layers, general text and the taxonomy."""
    own, anchor = options_from_args(ProfileOptions, args), options_from_args(DataOptions, args).anchor
    inputs = read_offline(start, args, own.rows_of(options_from_args(DataOptions, args)))
    if own.priors_alone:
        start.step("priors", own.check, lambda _: f"alone, of {anchor!r}", "correct the flag")
        _refuse_full_disk(start, inputs, own, lambda example: True)
        return lambda: _priors_alone(inputs, own)

    def rule() -> tuple[Rule, tuple[int, int] | None]:
        return parse_rule(own.select), None if own.layers == "auto" else parse_layers(
            own.layers, moe_layers(start, args)
        )

    def general() -> list[Example]:
        if not own.general:
            raise RamoeError(
                "--ramoe-general is missing: expected general English text to compare the task data with"
            )
        return load_examples(own.general, languages=[anchor])

    def taxonomy() -> list[TaxonomyRow]:
        if own.taxonomy is None:
            raise RamoeError(
                "--ramoe-taxonomy is missing: expected taxonomy.jsonl; run `ramoe taxonomy` first"
            )
        rows = read_taxonomy(own.taxonomy)
        check_anchor(own.taxonomy, anchor)
        return rows

    pairs = inputs.pairs(start)
    chosen = start.step(
        "expert rule",
        rule,
        lambda _: f"{own.select}, layers {own.layers}",
        "correct --ramoe-select or --ramoe-layers",
    )
    texts = start.step("general text", general, lambda found: f"{len(found)} texts", DATA_FIX, own.general)
    read_conversations(start, args, texts, (own.general, anchor), "general text")
    rows = start.step("taxonomy", taxonomy, lambda found: f"{len(found)} rows", FILE_FIX, [own.taxonomy])
    if own.save_priors:
        _refuse_full_disk(start, inputs, own, lambda example: own.keeps(example, _correct(rows.value)))
    return lambda: _profile(
        inputs, own, *chosen.value, [target for _, target in pairs.value], texts.value, rows.value
    )


def _profile(
    inputs: OfflineInputs,
    own: ProfileOptions,
    rule: Rule,
    given: tuple[int, int] | None,
    targets: Sequence[Example],
    general: Sequence[Example],
    taxonomy: Sequence[TaxonomyRow],
) -> None:
    """Run the passes and write the files. `given`: the zone to record; None derives it from the curve."""
    from ramoe_megatron.mcore.offline.model import OfflineModel

    args, data, examples, output = inputs.args, inputs.data, inputs.examples.value, inputs.output.value
    correct = _correct(taxonomy)
    english = [example for example in examples if example.language == data.anchor]
    model = OfflineModel(args, inputs.options.batch_tokens)
    shape = model.shape
    passes = Passes(model, general, english, targets, correct, own, data.anchor)

    def key() -> dict[str, Any]:
        return depends_on(args, [*data.data, *own.general], [*examples, *general])

    with Shards(output, "profile", len(passes.parts), key) as shards:
        passes.run(shards, ProgressLines(len(examples) + len(general), "sequences"))
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
            correct_counts = passes.pattern_count.int().tolist()
            return ExpertFile(
                tasks=tuple(passes.tasks),
                shape=shape,
                expert_mask=task_experts(difference, rule),
                delta=difference,
                task_frequency=task_frequency,
                general_frequency=general_frequency,
                english_pattern=pattern,
                layer_number=torch.tensor(model.layer_numbers),
                rule=rule.as_dict(),
                zone=zone,
                checkpoint=checkpoint,
                data=digests,
                anchor=data.anchor,
                select_tokens=tokens,
                sequences={
                    "english_task": dict(zip(passes.tasks, frequency.sequences.tolist(), strict=True)),
                    "english_correct": dict(zip(passes.tasks, correct_counts, strict=True)),
                    "general": len(general),
                    "pairs": len(targets),
                },
            )

        files = {
            name: expert_file(tokens)
            for tokens, name in files_by_tokens("experts", own.select_tokens).items()
        }

        def write() -> None:
            output.mkdir(parents=True, exist_ok=True)
            write_divergence(output / "divergence.csv", rows)
            by_task = passes.curve.rows_by_task(model.layer_numbers)
            write_divergence(output / "divergence-by-task.csv", by_task)
            if own.save_priors:
                kept: Sequence[int] | None = None  # all layers, also where the curve shows no zone
                if own.priors_for == "ci" and isinstance(zone, Zone):
                    kept = range(zone.first, zone.last + 1)
                _write_priors(output, own, passes, shards, checkpoint, digests, kept)
            if passes.usage is not None:
                passes.usage.file(shape, model.layer_numbers, checkpoint, digests).save(
                    output / "usage.safetensors"
                )
            for name, experts in files.items():
                experts.save(output / name)
            shards.remove()

        write_on_rank_0(model, write)
        if is_rank_0():
            empty = [
                f"{name}: {told}"
                for name, file in files.items()
                for told in describe_empty(file.expert_mask, passes.tasks, rule)
            ]
            print(f"ramoe: zone: {zone}", *empty, sep="\nramoe: ", flush=True)


def _priors_alone(inputs: OfflineInputs, own: ProfileOptions) -> None:
    from ramoe_megatron.mcore.offline.model import OfflineModel

    args, data, english, output = inputs.args, inputs.data, inputs.examples.value, inputs.output.value
    model = OfflineModel(args, inputs.options.batch_tokens)
    passes = Passes(model, [], english, [], set(), own, data.anchor)
    # the shards have the name of a whole profile, because both runs write priors.safetensors
    with Shards(output, "profile", len(passes.parts), lambda: depends_on(args, data.data, english)) as shards:
        passes.run(shards, ProgressLines(len(english), "sequences"))

        def write() -> None:
            output.mkdir(parents=True, exist_ok=True)
            _write_priors(output, own, passes, shards, checkpoint_name(args.load), data_digests(data.data))
            shards.remove()

        write_on_rank_0(model, write)
    if is_rank_0():
        files = ", ".join(files_by_tokens("priors", own.tokens).values())
        print(
            f"ramoe: no --ramoe-general, no --ramoe-taxonomy: {files} alone, "
            f"the routing of {len(english)} examples in {data.anchor!r}",
            flush=True,
        )


def _write_priors(
    output: Path,
    own: ProfileOptions,
    passes: "Passes",
    shards: Shards,
    checkpoint: str,
    digests: list[dict[str, str]],
    layers: Sequence[int] | None = None,
) -> None:
    """Write the priors, one shard at a time. `layers`: the MoE layers to write; None writes all."""
    ids = [example.id for number in passes.english_shards for example in passes.kept(passes.parts[number])]
    chosen = slice(None) if layers is None else list(layers)
    for choice, name in files_by_tokens("priors", own.tokens).items():
        Priors.save(
            output / name,
            ids,
            (shards.kept(number)[choice][:, chosen].float() for number in passes.english_shards),
            tokens=choice,
            shape=passes.model.shape,
            checkpoint=checkpoint,
            data=digests,
            layers=layers,
            dtype=own.priors_dtype,
        )


class Passes:
    """Sums over the forward passes. They lie on the model's device and are equal on every rank.

    A shard is a part of the general text, or a part of the English examples with all their targets.
    """

    def __init__(
        self,
        model: "OfflineModel",
        general: Sequence[Example],
        english: Sequence[Example],
        targets: Sequence[Example],
        correct: set[str],
        options: ProfileOptions,
        anchor: str,
    ) -> None:
        layers, experts = len(model.layer_numbers), model.config.num_moe_experts
        self.model, self.correct, self.options = model, correct, options
        self.parts = [*_parts(general), *_parts(english)]
        self.english_shards = range(len(list(_parts(general))), len(self.parts))
        self.views: dict[str, dict[str, Example]] = {}
        for target in sorted(targets, key=lambda target: target.language):
            self.views.setdefault(target.language, {})[target.id] = target
        self.tasks = sorted({example.task for example in english})
        self.task_frequency = {
            tokens: FrequencySum(len(self.tasks), layers, experts, model.device)
            for tokens in options.select_tokens
        }
        self.general_frequency = FrequencySum(1, layers, experts, model.device)
        self.curve = DivergenceCurve(self.tasks, list(self.views), layers, model.device)
        zeros = torch.zeros(len(self.tasks), layers, experts, dtype=torch.float64, device=model.device)
        self.pattern_sum = {choice: zeros.clone() for choice in TOKENS}
        self.pattern_count = torch.zeros(len(self.tasks), dtype=torch.float64, device=model.device)
        self.anchor = anchor
        self.usage = (
            UsageSum([anchor, *self.views], layers, experts, model.device) if options.save_usage else None
        )

    def run(self, shards: Shards, progress: ProgressLines) -> None:
        """Add every part to the sums. A restart takes the sums of finished shards from their saved state."""
        for name, total in self._sums().items():
            if shards.done:
                total.copy_(shards.state[name])
        skipped = self.parts[: shards.done]
        if skipped:
            progress(
                sum(
                    len(part) + sum(map(len, self._targets(n, part).values()))
                    for n, part in enumerate(skipped)
                )
            )
        for number in range(shards.done, len(self.parts)):
            part = self.parts[number]
            if number in self.english_shards:
                priors = self._parallel(part, self._targets(number, part), progress)
                kept = self._kept_rows(part, priors) if self.options.save_priors else None
            else:
                self._general(part, progress)
                kept = None
            shards.save(number, self._sums(), kept)

    def kept(self, part: Sequence[Example]) -> list[Example]:
        """The examples of a part that the priors have."""
        return [example for example in part if self.options.keeps(example, self.correct)]

    def _kept_rows(
        self, part: Sequence[Example], priors: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        places = [n for n, e in enumerate(part) if self.options.keeps(e, self.correct)]
        return {choice: rows[places].to(DTYPES[self.options.priors_dtype]) for choice, rows in priors.items()}

    def _sums(self) -> Mapping[str, torch.Tensor]:
        return {
            "general_frequency": self.general_frequency.sums,
            "general_sequences": self.general_frequency.sequences,
            **{
                f"task_frequency.{tokens}": frequency.sums
                for tokens, frequency in self.task_frequency.items()
            },
            **{
                f"task_sequences.{tokens}": frequency.sequences
                for tokens, frequency in self.task_frequency.items()
            },
            "divergence": self.curve.sums,
            "pattern_count": self.pattern_count,
            **{f"pattern.{choice}": total for choice, total in self.pattern_sum.items()},
            **(self.usage.state() if self.usage is not None else {}),
        }

    def _targets(self, number: int, part: Sequence[Example]) -> dict[str, list[Example]]:
        """Targets of an English part by language, in the part's order. Empty for general text."""
        if number not in self.english_shards:
            return {}
        return {
            language: [by_id[example.id] for example in part if example.id in by_id]
            for language, by_id in self.views.items()
        }

    def _general(self, part: Sequence[Example], progress: ProgressLines) -> None:
        """Add the expert frequency of a part of the general text."""
        routing = self._routing(part, choices=())
        group = torch.zeros(len(part), dtype=torch.int64, device=self.model.device)
        self.general_frequency.add(group, routing.frequency_NLE["all"], torch.ones_like(group))
        progress(len(part))

    def _parallel(
        self, part: Sequence[Example], targets: Mapping[str, Sequence[Example]], progress: ProgressLines
    ) -> dict[str, torch.Tensor]:
        """Add a part: frequency and pattern of the English views, and the divergence of each language.

        Returns:
            The English priors by token choice, each [n, L, E].
        """
        reference = self._routing(part, choices=TOKENS, counted=self.task_frequency)
        self._add_english(part, reference)
        self._add_usage(self.anchor, reference)
        progress(len(part))
        row_of = {example.id: row for row, example in enumerate(part)}
        for language, views in targets.items():
            if views:
                routing = self._routing(views, choices=("all",))
                rows = [row_of[view.id] for view in views]
                self._add_usage(language, routing)
                pooled = reference.pooled_NLE["all"][rows], routing.pooled_NLE["all"]
                self.curve.add(language, self._task_N(views), *pooled)
                progress(len(views))
        return {choice: reference.pooled_NLE[choice].float() for choice in self.options.tokens}

    def _add_english(self, part: Sequence[Example], routing: "SequenceRouting") -> None:
        device = self.model.device
        group = self._task_N(part)
        for tokens, frequency in self.task_frequency.items():
            chosen = routing.frequency_NLE[tokens]
            # a sequence without such tokens does not count
            frequency.add(group, chosen, chosen[:, 0].sum(dim=-1) > 0)
        right = torch.tensor(
            [example.id in self.correct for example in part], dtype=torch.float64, device=device
        )
        self.pattern_count.index_add_(0, group, right)
        for choice, total in self.pattern_sum.items():
            total.index_add_(0, group, routing.pooled_NLE[choice].double() * right[:, None, None])

    def _task_N(self, part: Sequence[Example]) -> torch.Tensor:
        """Index into the tasks of each example. int64 [n]"""
        return torch.tensor([self.tasks.index(example.task) for example in part], device=self.model.device)

    def _add_usage(self, language: str, routing: "SequenceRouting") -> None:
        if self.usage is not None:
            assert routing.gate_NLE is not None
            self.usage.add(language, routing.frequency_NLE["all"], routing.gate_NLE, routing.tokens_N)

    def english_pattern(self) -> dict[str, torch.Tensor]:
        """Mean pooled routing over the English-correct examples of each task, [G, L, E], by token choice."""
        count = self.pattern_count.clamp(min=1)[:, None, None]
        return {choice: (total / count).float().cpu() for choice, total in self.pattern_sum.items()}

    def _routing(
        self, examples: Sequence[Example], choices: Sequence[str], counted: Collection[str] = ()
    ) -> "SequenceRouting":
        from ramoe_megatron.mcore.offline.routing import sequence_routing

        encoded = [encode(e, self.model.tokenizer) for e in examples]
        gate = self.usage is not None and bool(choices)  # no usage of general text
        return sequence_routing(
            self.model, encoded, choices, counted=dict.fromkeys(["all", *counted]), gate=gate
        )


def _parts(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    return (examples[start : start + SHARD_EXAMPLES] for start in range(0, len(examples), SHARD_EXAMPLES))


JOB = Job(lambda: (DataOptions, OfflineOptions, ProfileOptions), _read)

if __name__ == "__main__":
    run_job(main)
