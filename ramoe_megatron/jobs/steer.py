"""The search for the setting of routing steering (arXiv 2510.04694, eq. 4-5) that answers best, on data that no result is told of.

    torchrun --nproc-per-node N -m ramoe_megatron.jobs.steer MEGATRON_FLAGS --load DIR --ramoe-data FILE --ramoe-split validation
        --ramoe-experts FILE --ramoe-output DIR

The model is loaded once. A shard is one setting: all examples answered under it.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ramoe_megatron.data.parallel import Example
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.jobs.offline import (
    Progress,
    checkpoint_name,
    data_digests,
    examples_with_anchor,
    offline_job,
    write_on_rank_0,
)
from ramoe_megatron.jobs.shards import Shards, depends_on
from ramoe_megatron.mcore.launch import is_rank_0, refuse_conversations, run_job
from ramoe_megatron.mcore.options import options_from_args
from ramoe_megatron.mcore.refusals import refuse_hard_steering
from ramoe_megatron.method.artefacts import ExpertFile, digests, package_version, save_document
from ramoe_megatron.method.steering_search import Answer, Candidate, best, candidates, parse_tau, table


@dataclass(frozen=True)
class SteerOptions:
    """Options of the search for a setting of steering: every combination is tried, and no steering too."""

    experts: str | None = None
    """experts.safetensors of the profile job: the experts to steer to, and the zone."""

    taus: list[str] = dataclasses.field(default_factory=lambda: ["0.25", "0.3", "0.4", "0.5"])
    """Steer the experts whose delta is above tau; file stands for those that the expert file chose."""

    strengths: list[float] = dataclasses.field(default_factory=lambda: [0.25, 0.5, 1.0])
    """Strengths of soft steering, in standard deviations of a token's router logits."""

    zones: list[str] = dataclasses.field(default_factory=lambda: ["auto"])
    """Steered layers: auto (the zone in the expert file), FIRST-LAST or FRACTION-FRACTION."""

    kinds: list[Literal["soft", "hard"]] = dataclasses.field(default_factory=lambda: ["soft", "hard"])
    """soft (by a strength), hard (above all other experts; needs a router whose top-k are the largest logits), or both."""

    def check(self, args: Any) -> None:
        """Raise RamoeError for a kind that the router of the validated arguments cannot be steered by."""
        if "hard" in self.kinds:
            refuse_hard_steering(args)

    def to_try(self, examples: Sequence[Example], anchor: str) -> tuple[ExpertFile, list[Candidate], list[str]]:
        """The expert file, the settings to try on the targets among the examples, and what is left out.

        Raises:
            RamoeError: for a missing file, a bad value, examples without a target, or when nothing is left to try.
        """
        if self.experts is None:
            raise RamoeError("--ramoe-experts is missing: expected the file that `ramoe profile` wrote")
        for strength in self.strengths:
            if not math.isfinite(strength):
                raise RamoeError(f"--ramoe-strengths {strength}: expected finite numbers (the paper: 0.5)")
        taus = [parse_tau(text) for text in self.taus]
        tasks = {example.task for example in examples if example.language != anchor}
        if not tasks:
            raise RamoeError(f"only {anchor!r} examples: nothing to search on; give data and a --ramoe-split with target languages")
        file = ExpertFile.load(self.experts)
        return file, *candidates(file, tasks, self.kinds, taus, self.strengths, self.zones)


def main() -> None:
    """Write `steering.json` to the output folder."""
    with offline_job(SteerOptions) as (args, data, options):
        import torch

        from ramoe_megatron.jobs.scores import answers
        from ramoe_megatron.mcore.offline import OfflineModel
        from ramoe_megatron.mcore.scoring import score
        from ramoe_megatron.mcore.steering import steering_contexts

        own = options_from_args(SteerOptions, args)
        own.check(args)
        examples = examples_with_anchor(data)
        refuse_conversations(examples)
        experts, tried, skipped = own.to_try(examples, data.anchor)
        model = OfflineModel(args, options.batch_tokens)
        model.check(experts)
        if is_rank_0():
            print(*(f"ramoe: {line}" for line in (*skipped, f"{len(tried)} settings, no steering among them")), sep="\n", flush=True)
        output = Path(str(options.output))
        with Shards(output, "steering", len(tried), lambda: depends_on(args, data.data, examples)) as shards:
            progress = Progress(answers(examples) * len(tried), "answers")
            correct: list[list[bool]] = shards.state["correct"].bool().tolist() if shards.done else []
            if correct:
                progress(answers(examples) * len(correct))
            for number in range(shards.done, len(tried)):
                steering = tried[number].steering
                context_for = steering_contexts(model, experts, steering)(examples) if steering else None
                progress.note = str(steering or "no steering")
                correct.append(score(model, examples, options.max_new_tokens, context_for, progress))
                shards.save(number, {"correct": torch.tensor(correct, dtype=torch.uint8)})

            rows = table(tried, [Answer(e.id, e.language) for e in examples], correct, data.anchor)

            def write() -> None:
                body = {
                    "anchor": data.anchor,
                    "checkpoint": checkpoint_name(args.load),
                    "split": data.split,
                    "data": data_digests(data.data),
                    "experts": digests([str(experts.path)]),
                    "package_version": package_version(),
                    "settings": rows,
                    "skipped": skipped,
                    "best": best(rows),
                }
                save_document(output / "steering.json", "ramoe-steering", body)
                shards.remove()

            write_on_rank_0(model, write)
            if is_rank_0():
                number = rows.index(best(rows))
                print(f"ramoe: best of {len(rows)}: {tried[number].steering or 'no steering'}", flush=True)


if __name__ == "__main__":
    run_job(main)
