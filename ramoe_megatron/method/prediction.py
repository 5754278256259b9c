"""What can be measured before any training: ci share, divergence, and the transplant test.

The transplant test is our own, in no paper. Without training, the model answers the target-language prompt
with the router probabilities that it had on the parallel English prompt. The hypothesis: if English routing
improves the target answers, routing is a bottleneck that alignment can widen. Our comparisons do not confirm
the hypothesis, so `RECORD` stands beside its number.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.categories import TaxonomyPair
from ramoe_megatron.method.divergence import DivergenceRow
from ramoe_megatron.statistics import Difference, clustered_difference, paired_proportions

PAPER_R = 0.70
"""Pearson correlation of ci share and gain over task-language pairs (arXiv 2605.28306, with p = 0.001)."""

PAPER_N = 18
"""Number of task-language pairs behind `PAPER_R`: 3 tasks x 6 languages, which fits r and p. The paper does
not state the number; we infer it."""


@dataclass(frozen=True, slots=True)
class TransplantOutcome:
    """One target-language example, answered twice by one checkpoint: with its own and English routing."""

    id: str
    task: str
    language: str
    plain: bool
    """Whether the answer is correct with the example's own routing."""
    transplanted: bool
    """Whether the answer is correct with the routing of the parallel English prompt."""


@dataclass(frozen=True, slots=True)
class PredictionRow:
    """One task and target language. Shares and accuracies are in [0, 1]; None means not measured."""

    task: str
    language: str
    n: int
    """Examples in the taxonomy."""
    ci_share: float
    """Share of ci examples. Also the largest possible gain: the gain if every ci example became cc."""
    ci_low: float
    ci_high: float
    divergence: float | None
    """Mean divergence of the language over the layers of the zone, over all tasks together."""
    target_accuracy: float | None
    """Accuracy with the examples' own routing, over the examples of the transplant test."""
    transplant_accuracy: float | None
    """Accuracy with English routing, over the same examples."""
    transplant_change: float | None
    """transplant_accuracy - target_accuracy."""
    transplant_low: float | None
    """Lower end of the 95 % interval of the paired difference."""
    transplant_high: float | None
    """Upper end of the 95 % interval of the paired difference."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """``predict.json``: the table, what it says, and the limits of both."""

    rows: tuple[PredictionRow, ...]
    verdict: dict[str, Any]
    """``reading`` (the transplant test in words), its ``record``, and the numbers behind them."""
    limits: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """The body for ``save_document(path, "ramoe-prediction", ...)``."""
        rows = [asdict(row) for row in self.rows]
        return {"rows": rows, "verdict": self.verdict, "limits": list(self.limits)}


def predict(
    pairs: Iterable[TaxonomyPair],
    divergence: Sequence[DivergenceRow],
    zone: tuple[int, int],
    outcomes: Sequence[TransplantOutcome],
    split: str,
) -> Prediction:
    """ci share, divergence and transplant test of each task and language.

    Args:
        pairs: the counts of the taxonomy.
        divergence: the divergence curve of each language.
        zone: first and last MoE layer to align, 0-based, inclusive.
        outcomes: the transplant test in the layers of the zone. May be empty.
        split: the split of the taxonomy to show.

    Raises:
        RamoeError: the taxonomy has no rows of this split.
    """
    pairs = list(pairs)
    chosen = sorted((p for p in pairs if p.split == split), key=lambda p: (p.task, p.language))
    if not chosen:
        found = ", ".join(sorted({p.split for p in pairs})) or "none"
        raise RamoeError(
            f"taxonomy: no pairs of split {split!r}, found {found}; score that split, or predict on another"
        )
    rows = tuple(_row(pair, divergence, zone, outcomes) for pair in chosen)
    return Prediction(rows, _verdict(rows, outcomes), LIMITS)


def zone_divergence(
    divergence: Iterable[DivergenceRow], language: str, zone: tuple[int, int]
) -> float | None:
    """Mean of a language's defined divergences over the layers of the zone; None without any."""
    values = [
        row.divergence
        for row in divergence
        if row.language == language and zone[0] <= row.moe_layer <= zone[1] and row.divergence is not None
    ]
    return math.fsum(values) / len(values) if values else None


def _row(
    pair: TaxonomyPair,
    divergence: Sequence[DivergenceRow],
    zone: tuple[int, int],
    outcomes: Sequence[TransplantOutcome],
) -> PredictionRow:
    own = [o for o in outcomes if (o.task, o.language) == (pair.task, pair.language)]
    plain, transplanted = [o.plain for o in own], [o.transplanted for o in own]
    change = paired_proportions(transplanted, plain) if own else None
    return PredictionRow(
        task=pair.task,
        language=pair.language,
        n=pair.n,
        ci_share=pair.ci_share,
        ci_low=pair.ci_low,
        ci_high=pair.ci_high,
        divergence=zone_divergence(divergence, pair.language, zone),
        target_accuracy=sum(plain) / len(own) if own else None,
        transplant_accuracy=sum(transplanted) / len(own) if own else None,
        transplant_change=change.change if change else None,
        transplant_low=change.low if change else None,
        transplant_high=change.high if change else None,
    )


def _pooled(outcomes: Sequence[TransplantOutcome]) -> Difference | None:
    """The change over all languages, clustered by id: parallel rows of one example are not independent."""
    clusters: dict[str, list[float]] = {}
    for outcome in outcomes:
        clusters.setdefault(outcome.id, []).append(float(outcome.transplanted) - float(outcome.plain))
    return clustered_difference(clusters) if clusters else None


def _verdict(rows: Sequence[PredictionRow], outcomes: Sequence[TransplantOutcome]) -> dict[str, Any]:
    change = _pooled(outcomes)
    verdict: dict[str, Any] = {"reading": _reading(change)}
    if change is not None:
        verdict["record"] = RECORD
        verdict["transplant"] = {
            "examples": change.n,
            "ids": len({o.id for o in outcomes}),
            "accuracy": sum(o.plain for o in outcomes) / len(outcomes),
            "accuracy_with_english_routing": sum(o.transplanted for o in outcomes) / len(outcomes),
            **{key: value for key, value in asdict(change).items() if key != "n" and value is not None},
        }
        tasks = sorted({o.task for o in outcomes})
        verdict["tasks"] = {
            task: _interval(_pooled([o for o in outcomes if o.task == task])) for task in tasks
        }
        verdict["pairs"] = _pairs_sentence(rows)
    verdict["ci_share"] = _ci_sentence(rows)
    verdict["paper"] = _paper_sentence()
    return verdict


def _interval(change: Difference | None) -> dict[str, float | None]:
    return {key: getattr(change, key, None) for key in ("change", "low", "high")}


def _reading(change: Difference | None) -> str:
    if change is None:
        return "The transplant test was not run."
    points = f"English routing changes target accuracy by {100 * change.change:+.1f} points"
    if change.low is None or change.high is None:
        return f"{points}; too few examples, or too alike, for an interval. Score more examples."
    points += f" (95 % interval {100 * change.low:+.1f} to {100 * change.high:+.1f}), without any training"
    return f"{points}. The interval holds zero." if change.low <= 0 <= change.high else f"{points}."


def _pairs_sentence(rows: Sequence[PredictionRow]) -> str:
    tested = [row for row in rows if row.transplant_low is not None and row.transplant_high is not None]
    up = sum(row.transplant_low > 0 for row in tested if row.transplant_low is not None)
    down = sum(row.transplant_high < 0 for row in tested if row.transplant_high is not None)
    return (
        f"Of {len(tested)} task-language pairs, {up} rise and {down} fall beyond their own interval; about "
        f"{0.05 * len(tested):.1f} would by chance alone."
    )


def _ci_sentence(rows: Sequence[PredictionRow]) -> str:
    ranked = sorted(rows, key=lambda row: -row.ci_share)
    most, least = ranked[0], ranked[-1]
    return (
        f"Largest ci share: {most.task} in {most.language} ({100 * most.ci_share:.0f} %), smallest: "
        f"{least.task} in {least.language} ({100 * least.ci_share:.0f} %). "
        "By the paper's correlation the former tend to gain more."
    )


def _paper_sentence() -> str:
    half = 1.959964 / math.sqrt(PAPER_N - 3)
    low, high = (math.tanh(math.atanh(PAPER_R) + sign * half) for sign in (-1, 1))
    return (
        f"RA-MoE reports r = {PAPER_R:.2f} (p = 0.001) between ci share and gain over task-language pairs. "
        f"With n = {PAPER_N}, which we infer, the 95 % interval is {low:.2f} to {high:.2f}: "
        f"ci share explains about half of the variance (r squared {PAPER_R**2:.2f}). It orders pairs; "
        "it gives no slope, so no gain in points."
    )


RECORD = (
    "The number is no forecast. In our comparisons (docs/results) its sign agreed with the sign of the gain "
    "over SFT in 25 of 37, 21 of 30 and 25 of 48 pairs of task and language: 68, 70 and 52 %. The margins "
    "alone, which are how often each sign occurs, give 66, 60 and 60 %; no difference is beyond chance "
    "(Fisher's exact test, p = 0.65, 0.13 and 0.14). The test has not been tried on a large model."
)
"""How often the sign of the transplant test was that of the gain, in all comparisons so far."""

LIMITS = (
    "A correlation over task-language pairs of the paper's models says nothing sure about one pair, "
    "or another model.",
    "Part of that correlation is headroom: where the target language fails more there is more to gain by "
    "any means. In some of our small worlds ci share predicted the gain of plain SFT too (r = 0.4 to 0.7).",
    "The ci share bounds what repairing ci examples can add to accuracy; "
    "it does not say how much of it is repaired.",
    "Divergence is a mean over the zone and all tasks of a language. "
    "Lower divergence went with higher accuracy across languages in other models (arXiv 2510.04694); "
    "that is no estimate of a gain from lowering it.",
    "The intervals speak of new examples for this checkpoint, not of new checkpoints or training seeds.",
)
