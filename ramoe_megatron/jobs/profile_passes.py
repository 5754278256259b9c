"""The forward passes of the profile: one each over English task data, general English text and the parallel views."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ramoe_megatron.artifacts.tables import TOKENS
from ramoe_megatron.artifacts.usage import UsageSum
from ramoe_megatron.data.encode import encode
from ramoe_megatron.data.parallel import Example
from ramoe_megatron.jobs.offline_job import Progress
from ramoe_megatron.jobs.shards import SHARD_EXAMPLES, Shards
from ramoe_megatron.method.divergence import DivergenceCurve
from ramoe_megatron.method.experts import FrequencySum

if TYPE_CHECKING:
    from ramoe_megatron.jobs.profile import ProfileOptions
    from ramoe_megatron.mcore.offline.model import OfflineModel
    from ramoe_megatron.mcore.offline.routing import SequenceRouting


class Passes:
    """The sums of the forward passes, on the model's device, the same on every rank.

    A shard is a part of the general text, or one of the English examples with all their targets.
    """

    def __init__(
        self, model: "OfflineModel", general: Sequence[Example], english: Sequence[Example], targets: Sequence[Example],
        correct: set[str], options: "ProfileOptions", anchor: str,
    ) -> None:  # fmt: skip
        layers, experts = len(model.layer_numbers), model.config.num_moe_experts
        self.model, self.correct, self.options = model, correct, options
        self.parts = [*_parts(general), *_parts(english)]
        self.english_shards = range(len(list(_parts(general))), len(self.parts))
        self.views: dict[str, dict[str, Example]] = {}
        for target in sorted(targets, key=lambda target: target.language):
            self.views.setdefault(target.language, {})[target.id] = target
        self.tasks = sorted({example.task for example in english})
        self.task_frequency = {
            tokens: FrequencySum(len(self.tasks), layers, experts, model.device) for tokens in options.select_tokens
        }
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
            **{f"task_frequency.{tokens}": frequency.sums for tokens, frequency in self.task_frequency.items()},
            **{f"task_sequences.{tokens}": frequency.sequences for tokens, frequency in self.task_frequency.items()},
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
        self.general_frequency.add(group, routing.frequency_NLE["all"], torch.ones_like(group))
        progress(len(part))

    def _parallel(
        self, part: Sequence[Example], targets: Mapping[str, Sequence[Example]], progress: Progress
    ) -> dict[str, torch.Tensor]:
        """English views (frequency, pattern), and each language's divergence from them. Gives the English priors, [n, L, E] by token
        choice."""
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
                self.curve.add(language, reference.pooled_NLE["all"][rows], routing.pooled_NLE["all"])
                progress(len(views))
        return {choice: reference.pooled_NLE[choice].float() for choice in self.options.tokens}

    def _add_english(self, part: Sequence[Example], routing: "SequenceRouting") -> None:
        device = self.model.device
        group = torch.tensor([self.tasks.index(example.task) for example in part], device=device)
        for tokens, frequency in self.task_frequency.items():
            chosen = routing.frequency_NLE[tokens]
            frequency.add(group, chosen, chosen[:, 0].sum(dim=-1) > 0)  # a sequence without such tokens is left out
        right = torch.tensor([example.id in self.correct for example in part], dtype=torch.float64, device=device)
        self.pattern_count.index_add_(0, group, right)
        for choice, total in self.pattern_sum.items():
            total.index_add_(0, group, routing.pooled_NLE[choice].double() * right[:, None, None])

    def _add_usage(self, language: str, routing: "SequenceRouting") -> None:
        if self.usage is not None:
            assert routing.gate_NLE is not None
            self.usage.add(language, routing.frequency_NLE["all"], routing.gate_NLE, routing.tokens_N)

    def english_pattern(self) -> dict[str, torch.Tensor]:
        """Mean pooled distribution over the English-correct examples of each task, by token choice. [G, L, E]"""
        count = self.pattern_count.clamp(min=1)[:, None, None]
        return {choice: (total / count).float().cpu() for choice, total in self.pattern_sum.items()}

    def _routing(self, examples: Sequence[Example], choices: Sequence[str], counted: Collection[str] = ()) -> "SequenceRouting":
        from ramoe_megatron.mcore.offline.routing import sequence_routing

        encoded = [encode(e, self.model.tokenizer) for e in examples]
        gate = self.usage is not None and bool(choices)  # not of general text
        return sequence_routing(self.model, encoded, choices, counted=dict.fromkeys(["all", *counted]), gate=gate)


def _parts(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    return (examples[start : start + SHARD_EXAMPLES] for start in range(0, len(examples), SHARD_EXAMPLES))
