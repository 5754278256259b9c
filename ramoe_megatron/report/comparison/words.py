"""What was run and what the figures cannot say, in sentences; and how a figure is written in one."""

from collections.abc import Mapping
from typing import Any

from ramoe_megatron.report.tables import interval, label, number

Comparison = Mapping[str, Any]
UNTRAINED = "‡"
"""Set beside a difference of a method that trains nothing from one that is trained."""

LIMITS = (
    "p and its interval come from Student's t over pairs of base model and seed, by their spread within base models (degrees of "
    "freedom: pairs less base models). They speak of new seeds for these base models and say nothing of a new base model: for that, "
    "read each base model's own difference.",
    "The interval over examples is clustered by example and speaks of new examples for these seeds and base models. Neither interval "
    "covers other data or other languages.",
    "A method that trains nothing (‡) has one outcome a base model, which is set beside every seed of {reference}: the spread of its "
    "difference is that of {reference} alone, and its p tests whether {reference} scatters round that outcome.",
    "Three families are corrected, each by itself: the methods against {reference}, the claims, and all cells of method, task and "
    "language. A result that was sought elsewhere in this document is not corrected.",
    "An interval that holds zero shows no difference; it does not show that there is none. Its width says how large one may be.",
    "This is RA-MoE as we read it (arXiv 2605.28306); the choices that the paper leaves open are settings of the recipe. What a "
    "small model shows need not hold for a large one, and nothing here reproduces, or fails to reproduce, the "
    "paper's numbers.",
    "The pairs of the transplant table and of the ci share share their models and examples: they are fewer independent ones than "
    "they count, so those p-values and intervals are optimistic. Fisher's test speaks of whether the signs go together, not of whether "
    "most are up.",
    "Times of a machine that does other work at once are rough; the iteration's is nearer to what the method costs than the stage's.",
)


def points(row: Mapping[str, Any] | None) -> str:
    """`+1.0 [+0.2, +1.8] points`."""
    return "no difference to tell" if row is None else f"{interval(row, 'change', 'low', 'high', signed=True)} points"


def is_(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def setting(c: Comparison) -> list[str]:
    seeds = sorted({seed for base in c["bases"] for seed in base["seeds"]})
    told = (
        f"{count(len(c['methods']), 'method')} ({', '.join(c['methods'])}) on {count(len(c['bases']), 'base model')} "
        f"({', '.join(base['base'] for base in c['bases'])}), seeds {', '.join(map(str, seeds)) or 'none'}; "
        f"{count(len(c['tasks']), 'task')} ({', '.join(c['tasks'])}) in {count(len(c['languages']), 'target language')} "
        f"({', '.join(c['languages'])}), anchor {c['anchor']}, evaluated on the {c['split']} split."
    )
    uneven = len({len(base["seeds"]) for base in c["bases"]}) > 1
    weigh = "The base models have unequal numbers of seeds, and a mean over runs weighs the one with more seeds more." if uneven else ""
    return [told, _training(c), f"{label('ra-moe')} is the method ra-moe; base is the model before fine-tuning. {weigh}".rstrip()]


def _training(c: Comparison) -> str:
    """Which methods had other training flags than the reference: a difference to it is then not the method's alone."""
    other = label(c["reference"])
    if not c["training"]:
        return f"Every trained method has the training flags of {other}: steps, batch, learning rate and the others."
    own: dict[str, list[str]] = {}
    for row in c["training"]:
        own.setdefault(row["method"], []).append(f"{row['flag']} {row['value']} ({row['reference']})")
    told = "; ".join(f"{label(method)} {', '.join(flags)}" for method, flags in own.items())
    return f"Not trained by the flags of {other} (its own in brackets), so that a difference to it is not the method's alone: {told}."


def marked(row: Mapping[str, Any], text: str) -> str:
    """A difference from the reference as text, with a mark where the method of this row of the headline trains nothing."""
    return f"{text} {UNTRAINED}" if row["seeds"] == 0 else text


def ratio(found: Mapping[str, Any] | None) -> str:
    """`1.05 [0.98, 1.12]`"""
    if found is None:
        return "–"
    ends = "" if found["low"] is None or found["high"] is None else f" [{number(found['low'], '.2f')}, {number(found['high'], '.2f')}]"
    return f"{number(found['ratio'], '.2f')}{ends}"
