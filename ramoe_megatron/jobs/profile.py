"""Stage 2: task experts of English, the divergence curve, the alignment zone, and the English routing to align to.

    torchrun --nproc-per-node N -m ramoe_megatron.jobs.profile MEGATRON_FLAGS --load DIR --ramoe-data FILE --ramoe-general FILE
        --ramoe-taxonomy FILE --ramoe-output DIR

One forward pass each over English task data, general English text and the parallel views. What it keeps does not grow with the
number of tokens; the priors alone grow with the number of examples.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ramoe_megatron.data.encode import encode
from ramoe_megatron.data.parallel import Example, load_examples, pair_with_anchor
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.jobs.offline import (
    Progress,
    checkpoint_name,
    data_digests,
    examples_with_anchor,
    offline_job,
    write_on_rank_0,
)
from ramoe_megatron.jobs.shards import SHARD_EXAMPLES, Shards, depends_on
from ramoe_megatron.mcore.launch import is_rank_0, run_job
from ramoe_megatron.mcore.options import options_from_args
from ramoe_megatron.method.artefacts import TOKENS, ExpertFile, Priors, read_taxonomy, write_divergence
from ramoe_megatron.method.divergence import DivergenceCurve, Zone, mean_curve, zone_from_curve
from ramoe_megatron.method.experts import FrequencySum, delta, describe_empty, parse_rule, task_experts
from ramoe_megatron.method.files import priors_files
from ramoe_megatron.method.layers import parse_layers
from ramoe_megatron.method.usage import UsageSum

if TYPE_CHECKING:
    from ramoe_megatron.mcore.offline import OfflineModel
    from ramoe_megatron.mcore.routing import SequenceRouting

@dataclass(frozen=True)
class ProfileOptions:
    """Options of the profile."""

    general: list[str] = dataclasses.field(default_factory=list)
    """General English text, in the same format (its prompt may be empty): what task experts are compared with."""

    taxonomy: str | None = None
    """taxonomy.jsonl: which examples English answers correctly, for the English pattern."""

    select: str = "tau=0.3"
    """Rule for task experts: tau=X (frequency above that of general text by more than X) or top-m=M per layer."""

    layers: str = "auto"
    """Alignment zone to record: auto (read off the divergence curve), FIRST-LAST or FRACTION-FRACTION."""

    tokens: list[str] = dataclasses.field(default_factory=lambda: ["last"])
    """Tokens that the priors pool: prompt, response, all or last; each further one makes a file of its own, priors-TOKENS.safetensors.
    (The expert file holds the English pattern of every choice.)"""

    save_priors: bool = False
    """Write priors.safetensors: the English routing of every example, for the target "example"."""

    def __post_init__(self) -> None:
        if not self.tokens or set(self.tokens) - set(TOKENS) or len(set(self.tokens)) < len(self.tokens):
            raise RamoeError(f"--ramoe-tokens {' '.join(self.tokens)}: expected one or more of {', '.join(TOKENS)}, each once")

    save_usage: bool = False
    """Write usage.safetensors: how much each expert is used by each language, for training that selects experts (--ramoe-train)."""


def main() -> None:
    """Write `experts.safetensors`, `divergence.csv` and, when asked for, `priors.safetensors` and `usage.safetensors`."""
    with offline_job(ProfileOptions) as (args, data, options):
        from ramoe_megatron.mcore.offline import OfflineModel

        own = options_from_args(ProfileOptions, args)
        rule = parse_rule(own.select)
        if not own.general:
            raise RamoeError("--ramoe-general is missing: expected general English text to compare the task data with")
        if own.taxonomy is None:
            raise RamoeError("--ramoe-taxonomy is missing: expected taxonomy.jsonl; run `ramoe taxonomy` first")
        examples = examples_with_anchor(data)
        pairs = pair_with_anchor(examples, data.anchor)
        general = load_examples(own.general, languages=[data.anchor])
        correct = {row.id for row in read_taxonomy(own.taxonomy) if row.english_correct}
        english = [example for example in examples if example.language == data.anchor]
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
            task_frequency = passes.task_frequency.mean().cpu()
            general_frequency = passes.general_frequency.mean()[0].cpu()
            difference = delta(task_frequency, general_frequency)
            mask = task_experts(difference, rule)
            checkpoint = checkpoint_name(args.load)
            digests = data_digests([*data.data, *own.general])
            experts = ExpertFile(
                tasks=tuple(passes.tasks), shape=shape, expert_mask=mask, delta=difference, task_frequency=task_frequency,
                general_frequency=general_frequency, english_pattern=passes.english_pattern(),
                layer_number=torch.tensor(model.layer_numbers), rule=rule.as_dict(), zone=zone, checkpoint=checkpoint,
                data=digests,
                sequences={
                    "english_task": dict(zip(passes.tasks, passes.task_frequency.sequences.tolist(), strict=True)),
                    "english_correct": dict(zip(passes.tasks, passes.pattern_count.int().tolist(), strict=True)),
                    "general": len(general), "pairs": len(pairs),
                },
            )  # fmt: skip

            def write() -> None:
                output.mkdir(parents=True, exist_ok=True)
                write_divergence(output / "divergence.csv", rows)
                if own.save_priors:
                    kept = [shards.kept(number) for number in passes.english_shards]
                    for choice, name in priors_files(own.tokens).items():
                        priors = torch.cat([part[choice] for part in kept])
                        Priors.save(
                            output / name, [e.id for e in english], priors, tokens=choice, shape=shape, checkpoint=checkpoint,
                            data=digests,
                        )  # fmt: skip
                if passes.usage is not None:
                    passes.usage.file(shape, model.layer_numbers, checkpoint, digests).save(output / "usage.safetensors")
                experts.save(output / "experts.safetensors")
                shards.remove()

            write_on_rank_0(model, write)
            if is_rank_0():
                print(f"ramoe: zone: {zone}", *describe_empty(mask, passes.tasks, rule), sep="\nramoe: ", flush=True)


class Passes:
    """The sums of the forward passes, on the model's device, the same on every rank.

    A shard is a part of the general text, or one of the English examples with all their targets.
    """

    def __init__(
        self, model: "OfflineModel", general: Sequence[Example], english: Sequence[Example], targets: Sequence[Example],
        correct: set[str], options: ProfileOptions, anchor: str,
    ) -> None:  # fmt: skip
        layers, experts = len(model.layer_numbers), model.config.num_moe_experts
        self.model, self.correct, self.options = model, correct, options
        self.parts = [*_parts(general), *_parts(english)]
        self.english_shards = range(len(list(_parts(general))), len(self.parts))
        self.views: dict[str, dict[str, Example]] = {}
        for target in sorted(targets, key=lambda target: target.language):
            self.views.setdefault(target.language, {})[target.id] = target
        self.tasks = sorted({example.task for example in english})
        self.task_frequency = FrequencySum(len(self.tasks), layers, experts, model.device)
        self.general_frequency = FrequencySum(1, layers, experts, model.device)
        self.curve = DivergenceCurve(list(self.views), layers, model.device)
        zeros = torch.zeros(len(self.tasks), layers, experts, dtype=torch.float64, device=model.device)
        self.pattern_sum = {choice: zeros.clone() for choice in TOKENS}
        self.pattern_count = torch.zeros(len(self.tasks), dtype=torch.float64, device=model.device)
        self.anchor = anchor
        self.usage = UsageSum([anchor, *self.views], layers, experts, model.device) if options.save_usage else None

    def run(self, shards: Shards, progress: Progress) -> None:
        """Add every part to the sums; those of finished shards come from their state, bit for bit."""
        for name, total in self._sums().items():
            if shards.done:
                total.copy_(shards.state[name])
        skipped = self.parts[: shards.done]
        if skipped:
            progress(sum(len(part) + sum(map(len, self._targets(n, part).values())) for n, part in enumerate(skipped)))
        for number in range(shards.done, len(self.parts)):
            part = self.parts[number]
            if number in self.english_shards:
                priors = self._parallel(part, self._targets(number, part), progress)
                kept = priors if self.options.save_priors else None
            else:
                self._general(part, progress)
                kept = None
            shards.save(number, self._sums(), kept)

    def _sums(self) -> Mapping[str, torch.Tensor]:
        return {
            "general_frequency": self.general_frequency.sums,
            "general_sequences": self.general_frequency.sequences,
            "task_frequency": self.task_frequency.sums,
            "task_sequences": self.task_frequency.sequences,
            "divergence": self.curve.sums,
            "pattern_count": self.pattern_count,
            **{f"pattern.{choice}": total for choice, total in self.pattern_sum.items()},
            **(self.usage.state() if self.usage is not None else {}),
        }

    def _targets(self, number: int, part: Sequence[Example]) -> dict[str, list[Example]]:
        """By language, the targets of an English part, in its order; of general text, none."""
        if number not in self.english_shards:
            return {}
        return {language: [by_id[example.id] for example in part if example.id in by_id] for language, by_id in self.views.items()}

    def _general(self, part: Sequence[Example], progress: Progress) -> None:
        """Expert frequency of general English text."""
        routing = self._routing(part, choices=())
        group = torch.zeros(len(part), dtype=torch.int64, device=self.model.device)
        self.general_frequency.add(group, routing.frequency_NLE, torch.ones_like(group))
        progress(len(part))

    def _parallel(
        self, part: Sequence[Example], targets: Mapping[str, Sequence[Example]], progress: Progress
    ) -> dict[str, torch.Tensor]:
        """English views (frequency, pattern), and each language's divergence from them. Gives the English priors, [n, L, E] by token
        choice."""
        reference = self._routing(part, choices=TOKENS)
        self._add_english(part, reference)
        self._add_usage(self.anchor, reference)
        progress(len(part))
        row_of = {example.id: row for row, example in enumerate(part)}
        for language, views in targets.items():
            if views:
                routing = self._routing(views, choices=("all",))
                rows = [row_of[view.id] for view in views]
                self._add_usage(language, routing)
                self.curve.add(language, reference.pooled_NLE["all"][rows], routing.pooled_NLE["all"])
                progress(len(views))
        return {choice: reference.pooled_NLE[choice].float() for choice in self.options.tokens}

    def _add_english(self, part: Sequence[Example], routing: "SequenceRouting") -> None:
        device = self.model.device
        group = torch.tensor([self.tasks.index(example.task) for example in part], device=device)
        self.task_frequency.add(group, routing.frequency_NLE, torch.ones_like(group))
        right = torch.tensor([example.id in self.correct for example in part], dtype=torch.float64, device=device)
        self.pattern_count.index_add_(0, group, right)
        for choice, total in self.pattern_sum.items():
            total.index_add_(0, group, routing.pooled_NLE[choice].double() * right[:, None, None])

    def _add_usage(self, language: str, routing: "SequenceRouting") -> None:
        if self.usage is not None:
            assert routing.gate_NLE is not None
            self.usage.add(language, routing.frequency_NLE, routing.gate_NLE, routing.tokens_N)

    def english_pattern(self) -> dict[str, torch.Tensor]:
        """Mean pooled distribution over the English-correct examples of each task, by token choice. [G, L, E]"""
        count = self.pattern_count.clamp(min=1)[:, None, None]
        return {choice: (total / count).float().cpu() for choice, total in self.pattern_sum.items()}

    def _routing(self, examples: Sequence[Example], choices: Sequence[str]) -> "SequenceRouting":
        from ramoe_megatron.mcore.routing import sequence_routing

        encoded = [encode(e, self.model.tokenizer) for e in examples]
        return sequence_routing(self.model, encoded, choices, gate=self.usage is not None and bool(choices))  # not of general text


def _parts(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    return (examples[start : start + SHARD_EXAMPLES] for start in range(0, len(examples), SHARD_EXAMPLES))


if __name__ == "__main__":
    run_job(main)
