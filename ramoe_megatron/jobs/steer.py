"""Search, on a validation split, for the steering setting with the highest accuracy.

Steering is that of arXiv 2510.04694, eq. 4-5.

    torchrun --nproc-per-node N -m ramoe_megatron.jobs.steer MEGATRON_FLAGS --load DIR --ramoe-data FILE \\
        --ramoe-split validation --ramoe-experts FILE --ramoe-output DIR

The model is loaded once. A shard scores all examples under one setting.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.files import digests, package_version, save_document
from ramoe_megatron.data.parallel import Example
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
from ramoe_megatron.mcore.align.refusals import refuse_hard_steering
from ramoe_megatron.mcore.arguments import DataOptions
from ramoe_megatron.mcore.flags import options_from_args
from ramoe_megatron.mcore.launch import is_rank_0, run_job
from ramoe_megatron.mcore.start import Start
from ramoe_megatron.method.layers import parse_layers
from ramoe_megatron.method.steering import NO_STEERING, Kind, Steering
from ramoe_megatron.statistics import Difference, clustered_difference, paired_proportions


@dataclass(frozen=True)
class SteerOptions:
    """Options of the steering search. The search tries every combination of them, and no steering."""

    experts: str | None = None
    """Expert file (experts.safetensors) with the experts to steer to and the alignment zone. Required."""

    taus: list[str] = dataclasses.field(default_factory=lambda: ["0.25", "0.3", "0.4", "0.5"])
    """Thresholds to try. A setting steers the experts whose delta is above tau. The value file steers the
    task experts stored in the expert file."""

    strengths: list[float] = dataclasses.field(default_factory=lambda: [0.25, 0.5, 1.0])
    """Strengths of soft steering to try, in standard deviations of a token's router logits."""

    zones: list[str] = dataclasses.field(default_factory=lambda: ["auto"])
    """Ranges of MoE layers to try: auto, FIRST-LAST or FRACTION-FRACTION. auto is the zone in the expert
    file."""

    kinds: list[Literal["soft", "hard"]] = dataclasses.field(default_factory=lambda: ["soft", "hard"])
    """Kinds of steering to try. soft raises the logits of the steered experts by the strength. hard raises
    them above all other experts; it needs a router that selects the experts with the largest logits."""

    def check(self, args: Any) -> None:
        """Raise RamoeError for a kind of steering that the router of the arguments does not support."""
        if "hard" in self.kinds:
            refuse_hard_steering(args)

    def to_try(
        self, file: ExpertFile, examples: Sequence[Example], anchor: str
    ) -> tuple[list["Candidate"], list[str]]:
        """The settings to try on the target-language examples, and a sentence for each setting left out.

        Raises:
            RamoeError: a value is invalid, no example is in a target language, or no setting is left to try.
        """
        for strength in self.strengths:
            if not math.isfinite(strength):
                raise RamoeError(f"--ramoe-strengths {strength}: expected finite numbers (the paper: 0.5)")
        taus = [parse_tau(text) for text in self.taus]
        tasks = {example.task for example in examples if example.language != anchor}
        if not tasks:
            raise RamoeError(
                f"only {anchor!r} examples: nothing to search on; give data and a --ramoe-split "
                "with target languages"
            )
        return candidates(file, tasks, self.kinds, taus, self.strengths, self.zones)


def main() -> None:
    """Write `steering.json` to the output folder."""
    JOB.main()


def _read(start: Start, args: Any) -> Callable[[], None]:
    """Read the examples, the token limits of answers, the expert file and the settings to try."""
    own = options_from_args(SteerOptions, args)
    inputs = read_offline(start, args)
    limits = inputs.limits(start, lambda: inputs.examples.value)
    experts = read_experts(start, args, own.experts)
    flags = start.step("settings", lambda: own.check(args), None, "correct the flag")

    def settings() -> tuple[list[Candidate], list[str]]:
        _ = flags.value
        return own.to_try(experts.value, inputs.examples.value, inputs.data.anchor)

    tried = start.step(
        "settings",
        settings,
        lambda found: "\n".join(_told(*found)),
        "correct the flag",
        [own.experts, *inputs.data.data],
    )
    return lambda: search_and_write(inputs, experts.value, *tried.value, limits.value)


def _told(tried: Sequence["Candidate"], skipped: Sequence[str]) -> list[str]:
    return [*skipped, f"{len(tried)} settings, no steering among them"]


def search_and_write(
    inputs: OfflineInputs,
    experts: ExpertFile,
    tried: Sequence["Candidate"],
    skipped: Sequence[str],
    limits: Sequence[int],
) -> None:
    """Score all examples under each setting and write the results.

    Args:
        limits: maximum number of new tokens of each example.
    """
    import torch

    from ramoe_megatron.jobs.scores import answers
    from ramoe_megatron.mcore.offline.model import OfflineModel
    from ramoe_megatron.mcore.offline.scoring import score
    from ramoe_megatron.mcore.steer.contexts import steering_contexts

    args, data, examples, output = inputs.args, inputs.data, inputs.examples.value, inputs.output.value
    model = OfflineModel(args, inputs.options.batch_tokens)
    if is_rank_0():
        print(*(f"ramoe: {line}" for line in _told(tried, skipped)), sep="\n", flush=True)
    with Shards(output, "steering", len(tried), lambda: depends_on(args, data.data, examples)) as shards:
        progress = ProgressLines(answers(examples) * len(tried), "answers")
        correct: list[list[bool]] = shards.state["correct"].bool().tolist() if shards.done else []
        if correct:
            progress(answers(examples) * len(correct))
        for number in range(shards.done, len(tried)):
            steering = tried[number].steering
            context_for = steering_contexts(model, experts, steering)(examples) if steering else None
            progress.note = str(steering or "no steering")
            correct.append(score(model, examples, limits, context_for, progress))
            shards.save(number, {"correct": torch.tensor(correct, dtype=torch.uint8)})

        rows = search_table(tried, [Answer(e.id, e.language) for e in examples], correct, data.anchor)

        def write() -> None:
            body = {
                "anchor": data.anchor,
                "checkpoint": checkpoint_name(args.load),
                "split": data.split,
                "data": data_digests(data.data),
                "experts": digests([str(experts.path)]),
                "package_version": package_version(),
                "settings": rows,
                "skipped": list(skipped),
                "best": best(rows),
            }
            save_document(output / "steering.json", "ramoe-steering", body)
            shards.remove()

        write_on_rank_0(model, write)
        if is_rank_0():
            number = rows.index(best(rows))
            print(f"ramoe: best of {len(rows)}: {tried[number].steering or 'no steering'}", flush=True)


# ---- settings to try, their results, and the best setting ----


@dataclass(frozen=True, slots=True)
class Candidate:
    """A setting to try."""

    steering: Steering | None
    """None: no steering."""
    zone: str | None
    """The layers as the user wrote them."""
    experts: int
    """Number of steered (task, layer, expert) triples of the tasks in the data."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One example that every setting answers."""

    id: str
    language: str


def parse_tau(text: str) -> float | None:
    """Parse a value of ``--ramoe-taus``: a number, or ``file``. Returns None for ``file``.

    Raises:
        RamoeError: the value is neither ``file`` nor a number in [-1, 1).
    """
    if text == "file":
        return None
    try:
        tau = float(text)
    except ValueError:
        tau = math.nan
    if not -1 <= tau < 1:
        raise RamoeError(
            f"--ramoe-taus: found {text!r}, expected numbers in [-1, 1), "
            "or file (the task experts stored in the expert file)"
        )
    return tau


def candidates(
    file: ExpertFile,
    tasks: Collection[str],
    kinds: Sequence[Kind],
    taus: Sequence[float | None],
    strengths: Sequence[float],
    zones: Sequence[str],
) -> tuple[list[Candidate], list[str]]:
    """The settings to try: no steering, then every combination of kind, layers, tau and strength.

    A tau is left out if it selects no expert of the tasks in the layers, or the same experts as an earlier
    tau.

    Returns:
        The settings, and one sentence for each tau that is left out.

    Raises:
        RamoeError: a value is invalid, the file has none of the tasks, or no setting is left to try.
    """
    rows = [row for row, task in enumerate(file.tasks) if task in tasks]
    if not rows:
        raise RamoeError(
            f"{file.path}: profiled on {', '.join(file.tasks)}, none of which is in the data "
            f"({', '.join(sorted(tasks))})"
        )
    chosen: dict[bytes, tuple[str, float | None, tuple[int, int], int]] = {}
    skipped: list[str] = []
    for zone in zones:
        layers = parse_layers(zone, file.shape.num_moe_layers, file.zone)
        for tau in taus:
            name = f"{'file' if tau is None else f'tau={tau:g}'} in MoE layers {layers[0]}-{layers[1]}"
            mask_GLE = file.steered_by(Steering("hard", None, tau, layers))[rows]
            key = mask_GLE.numpy().tobytes()
            if not mask_GLE.any():
                skipped.append(f"{name}: no expert to steer; left out")
            elif key in chosen:
                skipped.append(f"{name}: the experts of an earlier setting; left out")
            else:
                chosen[key] = (zone, tau, layers, int(mask_GLE.sum()))
    found = [Candidate(None, None, 0)]
    for kind in kinds:
        for zone, tau, layers, count in chosen.values():
            for strength in strengths if kind == "soft" else (None,):
                found.append(Candidate(Steering(kind, strength, tau, layers), zone, count))
    if len(found) == 1:
        why = "; ".join(skipped) or "no kind, tau, strength or zone is given"
        raise RamoeError(
            f"{file.path}: nothing to try ({why}); give lower --ramoe-taus, file, or other --ramoe-zones"
        )
    return found, skipped


def search_table(
    tried: Sequence[Candidate], answers: Sequence[Answer], correct: Sequence[Sequence[bool]], anchor: str
) -> list[dict[str, Any]]:
    """Accuracy of each candidate on the target languages, and its difference from candidate 0 (no steering).

    The interval of the difference is that of paired proportions. If an id occurs in several languages, the
    interval is clustered by id, because parallel rows are not independent draws.

    Args:
        correct: one sequence per candidate: whether each answer is correct, in the order of `answers`.
        anchor: anchor language. Its accuracy is reported, but does not count for the best setting.
    """
    targets = [place for place, answer in enumerate(answers) if answer.language != anchor]
    english = [place for place, answer in enumerate(answers) if answer.language == anchor]
    if not targets:
        raise RamoeError(f"only {anchor!r} examples: nothing to search on; give data with target languages")
    plain = [bool(correct[0][place]) for place in targets]
    ids = [answers[place].id for place in targets]
    rows = []
    for candidate, right in zip(tried, correct, strict=True):
        own = [bool(right[place]) for place in targets]
        change = _change(own, plain, ids)
        setting = candidate.steering.document() if candidate.steering else NO_STEERING
        rows.append(
            {
                **setting,
                "zone": candidate.zone,
                "experts": candidate.experts,
                "n": len(own),
                "correct": sum(own),
                "accuracy": sum(own) / len(own),
                **{key: value for key, value in asdict(change).items() if key != "n"},
                "anchor_n": len(english),
                "anchor_correct": sum(bool(right[place]) for place in english),
                "anchor_accuracy": sum(bool(right[place]) for place in english) / len(english)
                if english
                else None,
                "languages": _by_language(answers, right, targets),
            }
        )
    return rows


def _change(own: Sequence[bool], plain: Sequence[bool], ids: Sequence[str]) -> Difference:
    if len(set(ids)) == len(ids):
        return paired_proportions(own, plain)
    clusters: dict[str, list[float]] = {}
    for id_, after, before in zip(ids, own, plain, strict=True):
        clusters.setdefault(id_, []).append(float(after) - float(before))
    return clustered_difference(clusters)


def _by_language(
    answers: Sequence[Answer], right: Sequence[bool], targets: Sequence[int]
) -> list[dict[str, Any]]:
    found: dict[str, list[bool]] = {}
    for place in targets:
        found.setdefault(answers[place].language, []).append(bool(right[place]))
    return [
        {"language": language, "n": len(own), "correct": sum(own)} for language, own in sorted(found.items())
    ]


def best(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row with the highest accuracy on the target languages.

    Ties go to the gentlest setting: no steering, then the smaller |strength|, then hard. Remaining ties go to
    the setting with fewer experts.
    """

    def rank(row: Mapping[str, Any]) -> tuple[float, float, int]:
        force = {"none": 0.0, "hard": math.inf}.get(row["kind"])
        return -row["correct"], abs(row["strength"]) if force is None else force, row["experts"]

    return min(rows, key=rank)


JOB = Job(lambda: (DataOptions, OfflineOptions, SteerOptions), _read)

if __name__ == "__main__":
    run_job(main)
