"""Accuracy per task and language of one checkpoint, and its routing mass on the task experts.

    torchrun --nproc-per-node N -m ramoe_megatron.jobs.evaluate MEGATRON_FLAGS --load DIR --ramoe-data FILE --ramoe-method NAME ...
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ramoe_megatron.data.encode import encode
from ramoe_megatron.data.parallel import Example
from ramoe_megatron.jobs.offline import (
    Progress,
    checkpoint_name,
    data_digests,
    examples_with_anchor,
    offline_job,
    write_on_rank_0,
)
from ramoe_megatron.mcore.arguments import options_from_args
from ramoe_megatron.mcore.launch import run_job
from ramoe_megatron.method.artefacts import ExpertFile, atomic_write_text, package_version, save_document
from ramoe_megatron.method.losses import mass

if TYPE_CHECKING:
    from ramoe_megatron.mcore.offline import OfflineModel


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of the evaluation."""

    experts: str | None = None
    """experts.safetensors, to measure the routing mass on the task experts at the last prompt token; without it, accuracy alone."""

    method: str = "base"
    """Name of what is evaluated, in the results."""

    seed: int | None = None
    """Seed of the fine-tune, in the results and in the file name."""


def main() -> None:
    """Write `NAME.json` and the outcome of each example, `NAME.jsonl`, to the output folder."""
    with offline_job(EvaluateOptions) as (args, data, options):
        from ramoe_megatron.mcore.offline import OfflineModel
        from ramoe_megatron.mcore.scoring import score

        own = options_from_args(EvaluateOptions, args)
        examples = examples_with_anchor(data)
        model = OfflineModel(args, options.batch_tokens)
        progress = Progress(sum(len(e.choices or (e,)) for e in examples), "answers")
        correct = score(model, examples, options.max_new_tokens, progress=progress)
        masses = task_mass(model, examples, own.experts) if own.experts else []

        output = Path(str(options.output))
        name = own.method if own.seed is None else f"{own.method}-seed{own.seed}"

        def write() -> None:
            output.mkdir(parents=True, exist_ok=True)
            lines = (
                json.dumps({"id": e.id, "task": e.task, "language": e.language, "correct": right}, ensure_ascii=False)
                for e, right in zip(examples, correct, strict=True)
            )
            atomic_write_text(output / f"{name}.jsonl", "".join(f"{line}\n" for line in lines))
            total, right = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
            for example, outcome in zip(examples, correct, strict=True):
                total[example.task, example.language] += 1
                right[example.task, example.language] += outcome
            body = {
                "method": own.method,
                "seed": own.seed,
                "checkpoint": checkpoint_name(args.load),
                "split": data.split,
                "data": data_digests(data.data),
                "package_version": package_version(),
                "rows": [
                    {"task": task, "language": language, "n": n, "correct": right[task, language]}
                    for (task, language), n in sorted(total.items())
                ],
                "mass": masses,
                "examples": f"{name}.jsonl",
            }
            save_document(output / f"{name}.json", "ramoe-evaluation", body)

        write_on_rank_0(model, write)


def task_mass(model: "OfflineModel", examples: list[Example], path: str) -> list[dict[str, object]]:
    """Mean routing mass on each task's experts at the last prompt token, per language and MoE layer."""
    from ramoe_megatron.mcore.routing import sequence_routing

    experts = ExpertFile.load(path)
    model.check(experts)
    rows: list[dict[str, object]] = []
    groups: dict[tuple[str, str], list[Example]] = {}
    for example in examples:
        if example.task in experts.tasks:
            groups.setdefault((example.task, example.language), []).append(example)
    for (task, language), members in sorted(groups.items()):
        encoded = [encode(example, model.tokenizer) for example in members]
        pooled_NLE = sequence_routing(model, encoded, choices=("last",)).pooled_NLE["last"]
        mask_LE = experts.expert_mask[experts.tasks.index(task)].to(pooled_NLE.device)
        rows.append({"task": task, "language": language, "mass": mass(pooled_NLE, mask_LE).mean(dim=0).tolist()})
    return rows


if __name__ == "__main__":
    run_job(main)
