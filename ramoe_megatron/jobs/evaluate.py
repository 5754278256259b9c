"""Measure a checkpoint's accuracy per task and language, and its routing mass on the task experts.

    torchrun --nproc-per-node N -m ramoe_megatron.jobs.evaluate MEGATRON_FLAGS --load DIR --ramoe-data FILE \\
        --ramoe-method NAME ...
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.files import atomic_write_text, digests, package_version, save_document
from ramoe_megatron.artifacts.samples import sample_line, sample_names
from ramoe_megatron.data.encode import encode
from ramoe_megatron.data.parallel import FIELDS, Example
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.jobs.entry import Job
from ramoe_megatron.jobs.offline_job import (
    OfflineInputs,
    OfflineOptions,
    ProgressLines,
    checkpoint_name,
    data_digests,
    read_experts,
    read_offline,
    write_on_rank_0,
)
from ramoe_megatron.jobs.shards import Shards, depends_on
from ramoe_megatron.mcore.arguments import DataOptions
from ramoe_megatron.mcore.flags import options_from_args
from ramoe_megatron.mcore.launch import is_rank_0, run_job
from ramoe_megatron.mcore.start import Start, Step
from ramoe_megatron.mcore.steer.steering_options import SteeringOptions, told
from ramoe_megatron.method.losses import mass
from ramoe_megatron.method.steering import NO_STEERING, Steering

if TYPE_CHECKING:
    from ramoe_megatron.mcore.offline.model import OfflineModel
    from ramoe_megatron.mcore.offline.scoring import ContextFor


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of the evaluation."""

    experts: str | None = None
    """Expert file (experts.safetensors). With it, the job also measures the routing mass on the task experts
    at the last prompt token. Default: measure accuracy only."""

    method: str = "base"
    """Method name to record in the results, such as base, sft or ra-moe."""

    seed: int | None = None
    """Seed of the fine-tuning run, to record in the results and in the file name. Default: no seed."""

    save_samples: bool = False
    """Also write what the model answered: the log-likelihood of each choice, or the generated text. For each
    task and language, a sample file of lm-evaluation-harness in the folder NAME-samples."""

    weights_digest: bool = False
    """Record a digest of the weights in the results. Two checkpoints that are loaded in the same parallel
    layout have the same digest if and only if their weights are equal bit for bit."""


def main() -> None:
    """Write the results (`NAME.json`) and the outcome of each example (`NAME.jsonl`) to the output folder.

    With --ramoe-save-samples, also what the model answered (`NAME-samples/`).
    """
    JOB.main()


def _read(start: Start, args: Any) -> Callable[[], None]:
    """Read the examples, the token limits of answers, the expert file and the steering setting."""
    from ramoe_megatron.jobs.scores import by_id

    own, steer = options_from_args(EvaluateOptions, args), options_from_args(SteeringOptions, args)
    inputs = read_offline(start, args)
    limits = inputs.limits(start, lambda: list(chain.from_iterable(by_id(inputs.examples.value))))
    experts = read_experts(start, args, own.experts) if own.experts else Step(None)
    setting: Step[Steering | None] = Step(None)
    if steer != SteeringOptions():
        fix = "correct the --ramoe-steer flags"
        flags = start.step("steering", lambda: check_steering(own, steer, args), None, fix)

        def chosen() -> Steering | None:
            _ = flags.value
            return steer.setting(experts.value, args) if experts.value else None

        needs = [own.experts, steer.steering]
        setting = start.step("steering", chosen, lambda found: str(found or "none is best"), fix, needs)
    return lambda: evaluate_and_write(inputs, own, steer, limits.value, experts.value, setting.value)


def evaluate_and_write(
    inputs: OfflineInputs,
    own: EvaluateOptions,
    steer: SteeringOptions,
    limits: Sequence[int],
    experts: ExpertFile | None,
    steering: Steering | None,
) -> None:
    """Score the examples and write the results.

    Args:
        limits: maximum number of new tokens of each example, in the order of `by_id`.
    """
    from ramoe_megatron.jobs.scores import answers, by_id, kept_answers, score_parts
    from ramoe_megatron.mcore.offline.model import OfflineModel
    from ramoe_megatron.mcore.steer.contexts import steering_contexts

    args, data, examples, output = inputs.args, inputs.data, inputs.examples.value, inputs.output.value
    parts, groups = by_id(examples), groups_of_tasks(examples, experts.tasks if experts else ())
    model = OfflineModel(args, inputs.options.batch_tokens)
    if experts is not None and steer.on and is_rank_0():
        print(
            *(f"ramoe: {line}" for line in told(steering, experts, {e.task for e in examples})),
            sep="\n",
            flush=True,
        )
    contexts = steering_contexts(model, experts, steering) if experts and steering else None
    digest = model.weights_digest() if own.weights_digest else None
    name = own.method if own.seed is None else f"{own.method}-seed{own.seed}"
    total = len(parts) + len(groups)
    with Shards(output, f"evaluate-{name}", total, lambda: depends_on(args, data.data, examples)) as shards:
        progress = ProgressLines(answers(examples), "answers")
        correct = score_parts(model, parts, limits, shards, progress, contexts, own.save_samples)
        outcomes = [(example, correct[example.id, example.language]) for example in examples]
        mass_rows = task_mass(model, groups, experts, shards, len(parts), contexts) if experts else []

        def write() -> None:
            output.mkdir(parents=True, exist_ok=True)
            lines = (
                json.dumps(
                    {"id": e.id, "task": e.task, "language": e.language, "correct": right}, ensure_ascii=False
                )
                for e, right in outcomes
            )
            atomic_write_text(output / f"{name}.jsonl", "".join(f"{line}\n" for line in lines))
            total, right = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
            guessed = defaultdict[tuple[str, str], float](float)
            for example, outcome in outcomes:
                total[example.task, example.language] += 1
                right[example.task, example.language] += outcome
                guessed[example.task, example.language] += 1 / len(example.choices) if example.choices else 0
            body: dict[str, Any] = {
                "method": own.method,
                "seed": own.seed,
                "checkpoint": checkpoint_name(args.load),
                "split": data.split,
                "data": data_digests(data.data),
                "package_version": package_version(),
                "rows": [
                    {
                        "task": task,
                        "language": language,
                        "n": n,
                        "correct": right[task, language],
                        "chance": guessed[task, language] / n,
                    }
                    for (task, language), n in sorted(total.items())
                ],
                "mass": mass_rows,
                "examples": f"{name}.jsonl",
            }
            if own.save_samples:
                body["samples"] = f"{name}-samples"
                asked = zip(chain.from_iterable(parts), limits, strict=True)
                most = {(e.id, e.language): limit for e, limit in asked}
                write_samples(output / body["samples"], outcomes, kept_answers(shards, parts), most)
            if digest:
                body["weights_sha256"] = digest
            if steer.on:
                body["steering"] = (steering.document() if steering else NO_STEERING) | {
                    "experts": digests([str(own.experts)])
                }
            save_document(output / f"{name}.json", "ramoe-evaluation", body)
            shards.remove()

        write_on_rank_0(model, write)


def write_samples(
    folder: Path,
    outcomes: Sequence[tuple[Example, bool]],
    answers: Mapping[tuple[str, str], list[float] | str],
    limits: Mapping[tuple[str, str], int],
) -> None:
    """Write a sample file of each task and language, the examples in their order.

    Args:
        outcomes: the examples, and whether each is answered correctly.
        answers: (id, language) -> log-likelihood of each choice, or generated text.
        limits: (id, language) -> maximum number of new tokens.
    """
    lines: dict[tuple[str, str], list[str]] = {}
    for example, right in outcomes:
        key = (example.id, example.language)
        own, answer = lines.setdefault((example.task, example.language), []), answers[key]
        doc = {name: value for name in FIELDS if (value := getattr(example, name)) is not None}
        if isinstance(answer, str):
            target = example.answer
            how = {"until": list(example.stop or ()), "max_gen_toks": limits[key]}
            asked: list[tuple[str, object]] = [(example.prompt, how)]
            given: Sequence[tuple[float, bool | None]] | str = answer
        else:
            choices = example.choices or ()
            target = str(choices.index(example.answer))
            asked = [(example.prompt, choice) for choice in choices]
            given = [(score, None) for score in answer]
        own.append(sample_line(len(own), doc, target, asked, given, "acc", right))
    for name, (_, text) in zip(sample_names(lines), sorted(lines.items()), strict=True):
        atomic_write_text(folder / name, "".join(text))


def groups_of_tasks(
    examples: Sequence[Example], tasks: Sequence[str]
) -> dict[tuple[str, str], list[Example]]:
    """The examples of `tasks`, grouped by (task, language) and sorted by that key."""
    groups: dict[tuple[str, str], list[Example]] = {}
    for example in examples:
        if example.task in tasks:
            groups.setdefault((example.task, example.language), []).append(example)
    return dict(sorted(groups.items()))


def check_steering(own: EvaluateOptions, steer: SteeringOptions, args: Any) -> None:
    """Check the steering flags.

    Raises:
        RamoeError: the flags are incompatible, or the steered result has the method name of the base model.
    """
    steer.check(own.experts, args)
    if steer.on and (own.method, own.seed) == (EvaluateOptions.method, None):
        raise RamoeError(
            f"--ramoe-method {own.method} names the base model as it is; "
            "a steered evaluation would take its place. Give the steered evaluation another name"
        )


def task_mass(
    model: "OfflineModel",
    groups: dict[tuple[str, str], list[Example]],
    experts: ExpertFile,
    shards: Shards,
    first: int,
    contexts: "Callable[[Sequence[Example]], ContextFor] | None" = None,
) -> list[dict[str, object]]:
    """Mean routing mass on the task experts at the last prompt token, by task, language and MoE layer.

    Each group is one shard, numbered from `first`. The shard state stores "mass", float32 [groups, L].
    """
    import torch

    from ramoe_megatron.mcore.offline.routing import sequence_routing

    means = list(shards.state.get("mass", ()))
    for number, ((task, _), members) in list(enumerate(groups.items(), first))[len(means) :]:
        encoded = [encode(example, model.tokenizer) for example in members]
        steered = contexts(members)(range(len(members))) if contexts else None
        pooled_NLE = sequence_routing(model, encoded, choices=("last",), steered=steered).pooled_NLE["last"]
        mask_LE = experts.expert_mask[experts.tasks.index(task)].to(pooled_NLE.device)
        means.append(mass(pooled_NLE, mask_LE).mean(dim=0).cpu())
        shards.save(number, shards.state | {"mass": torch.stack(means)})
    return [
        {"task": task, "language": language, "mass": mean.tolist()}
        for (task, language), mean in zip(groups, means, strict=True)
    ]


JOB = Job(lambda: (DataOptions, OfflineOptions, EvaluateOptions, SteeringOptions), _read)

if __name__ == "__main__":
    run_job(main)
