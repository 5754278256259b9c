"""The search for a setting of steering: which ones to try, what each gave, and the best.

Shape suffixes: G tasks, L MoE layers, E routed experts.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.layers import parse_layers
from ramoe_megatron.method.steering import NO_STEERING, Kind, Steering
from ramoe_megatron.statistics import Difference, clustered_difference, paired_proportions


@dataclass(frozen=True, slots=True)
class Candidate:
    """A setting to try."""

    steering: Steering | None
    """None: no steering."""
    zone: str | None
    """The layers as they were asked for."""
    experts: int
    """Steered (task, layer, expert) triples of the tasks at hand."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One example that every setting answers."""

    id: str
    language: str


def parse_tau(text: str) -> float | None:
    """A value of ``--ramoe-taus``: a number, or ``file`` (None) for the experts that the expert file chose. Raises RamoeError."""
    if text == "file":
        return None
    try:
        tau = float(text)
    except ValueError:
        tau = math.nan
    if not -1 <= tau < 1:
        raise RamoeError(f"--ramoe-taus: found {text!r}, expected numbers in [-1, 1), or file (the experts that the expert file chose)")
    return tau


def candidates(
    file: ExpertFile,
    tasks: Collection[str],
    kinds: Sequence[Kind],
    taus: Sequence[float | None],
    strengths: Sequence[float],
    zones: Sequence[str],
) -> tuple[list[Candidate], list[str]]:
    """No steering, and then kind x layers x tau x strength; and in sentences what is left out and why.

    Left out are a tau that leaves the tasks no expert in the layers, and one that leaves the experts of an earlier one.

    Raises:
        RamoeError: for a bad value, tasks that the file does not have, or when nothing is left to try.
    """
    rows = [row for row, task in enumerate(file.tasks) if task in tasks]
    if not rows:
        raise RamoeError(f"{file.path}: profiled on {', '.join(file.tasks)}, none of which is in the data ({', '.join(sorted(tasks))})")
    chosen: dict[bytes, tuple[str, float | None, tuple[int, int], int]] = {}
    skipped: list[str] = []
    for zone in zones:
        layers = parse_layers(zone, file.shape.num_moe_layers, file.zone)
        for tau in taus:
            name = f"{'file' if tau is None else f'tau={tau:g}'} in MoE layers {layers[0]}-{layers[1]}"
            mask_GLE = Steering("hard", None, tau, layers).experts(file)[rows]
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
        raise RamoeError(f"{file.path}: nothing to try ({why}); give lower --ramoe-taus, file, or other --ramoe-zones")
    return found, skipped


def table(
    tried: Sequence[Candidate], answers: Sequence[Answer], correct: Sequence[Sequence[bool]], anchor: str
) -> list[dict[str, Any]]:
    """What each candidate gave on the target languages, and its change against the first, which is no steering.

    Args:
        correct: of each candidate, in the order of `answers`.
        anchor: its language is told beside the others, and counts for nothing.

    The interval is that of proportions on the same examples; where an id comes in several languages, it is clustered by id, since
    parallel rows are no independent draws.
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
                "anchor_accuracy": sum(bool(right[place]) for place in english) / len(english) if english else None,
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


def _by_language(answers: Sequence[Answer], right: Sequence[bool], targets: Sequence[int]) -> list[dict[str, Any]]:
    found: dict[str, list[bool]] = {}
    for place in targets:
        found.setdefault(answers[place].language, []).append(bool(right[place]))
    return [{"language": language, "n": len(own), "correct": sum(own)} for language, own in sorted(found.items())]


def best(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of the highest target accuracy; of equals the gentlest: none, then the smaller |strength|, hard last; then fewer experts."""

    def rank(row: Mapping[str, Any]) -> tuple[float, float, int]:
        force = {"none": 0.0, "hard": math.inf}.get(row["kind"])
        return -row["correct"], abs(row["strength"]) if force is None else force, row["experts"]

    return min(rows, key=rank)
