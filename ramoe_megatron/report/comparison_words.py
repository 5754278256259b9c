"""What came out, in sentences made from the figures of comparison.json alone, whatever they say."""

from collections.abc import Mapping
from typing import Any

from ramoe_megatron.report.contrasts import ALPHA, direction
from ramoe_megatron.report.tables import correlation_text, interval, label, number

Comparison = Mapping[str, Any]
OUTCOMES = {"above": "did better", "below": "did worse"}

LIMITS = (
    "p and its interval come from Student's t over pairs of base model and seed. That the base models are few is not in it: it speaks "
    "of new seeds for these base models, not of another base model. Read each base model's own difference.",
    "The interval over examples is clustered by example and speaks of new examples for these seeds and base models. Neither interval "
    "covers other data or other languages.",
    "A method that trains nothing has one outcome a base model, which is set beside every seed of {reference}: the spread of its "
    "difference is that of {reference} alone.",
    "Three families are corrected, each by itself: the methods against {reference}, the claims, and all cells of method, task and "
    "language. A result that was sought elsewhere in this document is not corrected.",
    "An interval that holds zero shows no difference; it does not show that there is none. Its width says how large one may be.",
    "This is RA-MoE as we read it (arXiv 2605.28306); the choices that the paper leaves open are settings of the recipe. What a "
    "small model shows need not hold for a large one, and nothing here reproduces, or fails to reproduce, the "
    "paper's numbers.",
    "The pairs of the transplant table and of the ci share share their models and examples: they are fewer independent ones than "
    "they count, so those p-values and intervals are optimistic.",
    "Times of a machine that does other work at once are rough; the iteration's is nearer to what the method costs than the stage's.",
)


def points(row: Mapping[str, Any] | None) -> str:
    """`+1.0 [+0.2, +1.8] points`."""
    return "no difference to tell" if row is None else f"{interval(row, 'change', 'low', 'high', signed=True)} points"


def p_text(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


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
    return [told, f"{label('ra-moe')} is the method ra-moe; base is the model before fine-tuning. {weigh}".rstrip()]


def findings(c: Comparison) -> list[str]:
    """The main method first, then the other methods, claims, English, prediction, ci share, cost and the check of zero."""
    rows = {row["method"]: row for row in c["headline"]}
    told = [*_main(c, rows), *_others(c, rows), *_base(c, rows), *map(claim, c["claims"])]
    return [*told, *_english(c), *_hits(c), *_ci(c), *_cost(c), *_zero(c)]


def _main(c: Comparison, rows: Mapping[str, Any]) -> list[str]:
    main, other = label(c["main"]), label(c["reference"])
    found = (rows.get(c["main"]) or {}).get("against")
    if found is None:
        return [f"{main} was not run beside {other}, so it cannot be compared with it."]
    where = direction(found)
    tests = f"{points(found)} in target languages over {count(found['n'], 'paired seed')}"
    if found["p"] is not None:
        tests += f" (p {_is(found['p'])}, after Holm's correction p {_is(found['p_holm'])})"
    tests += f", higher in {found['seeds_higher']} and lower in {found['seeds_lower']} of {found['n']}"
    told = [
        {
            "above": f"{main} beat {other}: {tests}.",
            "below": f"{main} did worse than {other}: {tests}.",
            "holds zero": f"{main} did not beat {other}, as far as this comparison can tell: {tests}; the interval holds zero.",
            "unknown": f"{main} against {other}: {tests}; too few seeds for an interval.",
        }[where]
    ]
    if where in OUTCOMES and found["p_holm"] is not None and found["p_holm"] > ALPHA:
        told.append(f"That does not stand after Holm's correction for {_family(c)} comparisons: adjusted p {_is(found['p_holm'])}.")
    examples = direction(found["by_example"])
    if examples != where:
        shown = interval(found["by_example"], "change", "low", "high", signed=True)
        word = {"above": "lies above zero", "below": "lies below zero", "holds zero": "holds zero", "unknown": "cannot be given"}[examples]
        told.append(f"The interval over examples, for the seeds that were run, {word}: {shown} points.")
    if len(found["by_base"]) > 1:
        own = "; ".join(f"{row['base']} {points(row)}, {count(row['n'], 'seed')}{_room(c, row['base'])}" for row in found["by_base"])
        told.append(f"By base model: {own}.")
    return told


def _room(c: Comparison, base: str) -> str:
    """What a base model left to gain: its ci share, and what the transplant test promised."""
    share = next((row["ci_share"] for row in c["bases"] if row["base"] == base), None)
    test = next((row["transplant"] for row in c["transplant"]["bases"] if row["base"] == base), None)
    told = [] if share is None else [f"ci share {number(100 * share, '.1f')} %"]
    told += [] if test is None else [f"transplant test {number(100 * test, '+.1f')} points"]
    return f" ({', '.join(told)})" if told else ""


def _family(c: Comparison) -> int:
    return sum(row["against"] is not None and row["against"]["p"] is not None for row in c["headline"])


def _is(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def _others(c: Comparison, rows: Mapping[str, Any]) -> list[str]:
    compared = [row for row in rows.values() if row["against"] is not None]
    if len(compared) < 2:
        return []
    stands = [row for row in compared if row["against"]["p_holm"] is not None and row["against"]["p_holm"] <= ALPHA]
    told = "; ".join(f"{label(row['method'])} {points(row['against'])}" for row in stands)
    family = f"Of {len(compared)} methods compared with {label(c['reference'])}, {len(stands)} differ{'s' if len(stands) == 1 else ''}"
    best = max(rows.values(), key=lambda row: row["accuracy"])
    highest = f"{label(best['method'])} has the highest target accuracy, {interval(best, 'accuracy', 'low', 'high')} %."
    return [f"{family} from it after Holm's correction{': ' + told if told else ''}.", highest]


def _base(c: Comparison, rows: Mapping[str, Any]) -> list[str]:
    """Where fine-tuning itself harms, a lead over the reference may be nothing but restraint: that has to be said."""
    base, reference = rows.get("base"), rows.get(c["reference"])
    if base is None or reference is None or reference["accuracy"] >= base["accuracy"]:
        return []
    others = [row for row in rows.values() if row["method"] not in ("base", c["reference"])]
    above = [label(row["method"]) for row in others if row["accuracy"] > base["accuracy"]]
    lost = number(100 * (base["accuracy"] - reference["accuracy"]), ".1f")
    named = f": {', '.join(above)}" if above else ""
    return [
        f"{label(c['reference'])} stands {lost} points below the model before fine-tuning ({number(100 * base['accuracy'], '.1f')} %): it "
        f"forgets more than it learns here, so a method may lead it by changing less. {len(above)} of {count(len(others), 'method')} "
        f"{'stands' if len(above) == 1 else 'stand'} above that model{named}."
    ]


def claim(row: Mapping[str, Any]) -> str:
    """A sentence for one control."""
    main, control, found = label(row["method"]), label(row["control"]), points(row)
    start = f"“{row['claim'][0].upper()}{row['claim'][1:]}” is {row['verdict']}:"
    where = direction(row)
    if where == "above":
        kept = row["p_holm"] is not None and row["p_holm"] <= ALPHA
        doubt = "" if kept else f", though not after Holm's correction over the claims (p {_is(row['p_holm'])})"
        return f"{start} {main} did better than {control}, by {found}{doubt}."
    if where == "below":
        return f"{start} {control} did better than {main}; {main} minus {control} is {found}."
    if where == "unknown":
        return f"{start} too few seeds for an interval; {main} minus {control} is {found}."
    return f"{start} {control} did as well as {main}, as far as this comparison can tell: the difference is {found}."


def _english(c: Comparison) -> list[str]:
    rows = {row["method"]: row for row in c["english"]}
    kept = [f"{label(m)} {points(rows[m]['from_base'])}" for m in (c["reference"], c["main"]) if m in rows and rows[m]["from_base"]]
    if not kept:
        return []
    against = rows.get(c["main"], {}).get("against")
    beside = f"; {label(c['main'])} minus {label(c['reference'])} {points(against)}" if against else ""
    return [f"The anchor language ({c['anchor']}), change from the base model: {', '.join(kept)}{beside}."]


def _hits(c: Comparison) -> list[str]:
    told = []
    for level, what in (("pairs", "pairs of task and language"), ("tasks", "tasks")):
        row = next((r for r in c["transplant"]["hits"] if (r["level"], r["base"]) == (level, None)), None)
        if row is None or not row["n"]:
            continue
        rate = interval(row, "rate", "low", "high")
        told.append(
            f"The sign of the transplant test agreed with the sign of {label(c['main'])} minus {label(c['reference'])} in {row['hits']} of "
            f"{row['n']} {what} ({rate} %, {row['ties']} ties left out; p {_is(row['p'])} against one half; "
            f"{100 * row['expected']:.0f} % by the margins alone)."
        )
    return told


def _ci(c: Comparison) -> list[str]:
    found = {(row["method"], row["over"]): row for row in c["ci_gain"]["correlations"] if row["base"] is None}
    main, other = found.get((c["main"], "base")), found.get((c["reference"], "base"))
    if main is None or main["r"] is None or other is None:
        return []
    over = correlation_text(found.get((c["main"], "reference"), {}))
    return [
        f"ci share against gain over the base model: {label(c['main'])} {correlation_text(main)}; {label(c['reference'])}, which "
        f"aligns nothing, {correlation_text(other)}: that much is headroom. Against {label(c['main'])}'s gain over "
        f"{label(c['reference'])}: {over}."
    ]


def _cost(c: Comparison) -> list[str]:
    row = next((row for row in c["cost"] if row["method"] == c["main"]), None)
    names = {"iteration": "time of an iteration", "wall": "time of the whole stage", "memory": "peak memory"}
    told = [f"{what} {ratio(row[name]['ratio'])}" for name, what in names.items() if row and row[name]["ratio"]]
    return [f"{label(c['main'])} against {label(c['reference'])}, ratio: {', '.join(told)}."] if told else []


def ratio(found: Mapping[str, Any] | None) -> str:
    """`1.05 [0.98, 1.12]`"""
    if found is None:
        return "–"
    ends = "" if found["low"] is None or found["high"] is None else f" [{number(found['low'], '.2f')}, {number(found['high'], '.2f')}]"
    return f"{number(found['ratio'], '.2f')}{ends}"


def _zero(c: Comparison) -> list[str]:
    rows = c["coefficient_zero"]
    if not rows:
        return []
    wrong = [row for row in rows if not row["outcomes_equal"] or row["weights_equal"] is False]
    if wrong:
        told = "; ".join(
            f"{row['base']} seed {row['seed']}, {count(row['differing'], 'answer')}{' and the weights' * (row['weights_equal'] is False)}"
            for row in wrong
        )
        return [f"A coefficient of zero did NOT leave training as it was ({told}): explain that before trusting any other figure here."]
    weighed = sum(row["weights_equal"] is True for row in rows)
    weights = f"the same weights in {weighed} of them" if weighed else "no digest of the weights was recorded"
    return [f"A coefficient of zero gave the answers of {label(c['reference'])} in all {count(len(rows), 'run')}; {weights}."]
