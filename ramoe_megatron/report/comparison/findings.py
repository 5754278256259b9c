"""What came out, in sentences made from the figures of comparison.json alone, whatever they say."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ramoe_megatron.report.comparison.contrasts import ALPHA, direction, unknown
from ramoe_megatron.report.comparison.words import UNTRAINED, Comparison, count, is_, marked, points, ratio
from ramoe_megatron.report.tables import correlation_text, interval, label, number

ALIKE = 0.01
"""Two methods did as well as each other where the whole interval of their difference lies within this much of zero: a point."""


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
        tests += f" (p {is_(found['p'])}, after Holm's correction p {is_(found['p_holm'])})"
    tests += f", higher in {found['seeds_higher']} and lower in {found['seeds_lower']} of {found['n']}"
    told = [
        {
            "above": f"{main} beat {other}: {tests}.",
            "below": f"{main} did worse than {other}: {tests}.",
            "holds zero": f"{main} did not beat {other}, as far as this comparison can tell: {tests}; the interval holds zero.",
            "unknown": f"{main} against {other}: {tests}; {unknown(found)}.",
        }[where]
    ]
    if where in ("above", "below") and found["p_holm"] is not None and found["p_holm"] > ALPHA:
        told.append(f"That does not stand after Holm's correction for {_family(c)} comparisons: adjusted p {is_(found['p_holm'])}.")
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
    """What a base model left to gain: its ci share, and the change by the transplant test."""
    share = next((row["ci_share"] for row in c["bases"] if row["base"] == base), None)
    test = next((row["transplant"] for row in c["transplant"]["bases"] if row["base"] == base), None)
    told = [] if share is None else [f"ci share {number(100 * share, '.1f')} %"]
    told += [] if test is None else [f"transplant test {number(100 * test, '+.1f')} points"]
    return f" ({', '.join(told)})" if told else ""


def _family(c: Comparison) -> int:
    return sum(row["against"] is not None and row["against"]["p"] is not None for row in c["headline"])


def _others(c: Comparison, rows: Mapping[str, Any]) -> list[str]:
    compared = [row for row in rows.values() if row["against"] is not None]
    if len(compared) < 2:
        return []
    trained, untrained = ([row for row in compared if (row["seeds"] > 0) == wanted] for wanted in (True, False))
    other = label(c["reference"])
    told = [f"Of {count(len(trained), 'trained method')} compared with {other}, {_differing(trained)}."] if trained else []
    if untrained:
        told.append(
            f"Of {count(len(untrained), 'method')} that train{'s' if len(untrained) == 1 else ''} nothing ({UNTRAINED}), "
            f"{_differing(untrained)}; but the spread there is that of {other} alone."
        )
    highest = max(row["accuracy"] for row in rows.values())
    best = [row for row in rows.values() if math.isclose(row["accuracy"], highest, rel_tol=1e-9)]
    names = " and ".join(f"{label(row['method'])}, {interval(row, 'accuracy', 'low', 'high')} %," for row in best)
    return [*told, f"The highest target accuracy {'is' if len(best) == 1 else 'is shared: it is'} that of {names.removesuffix(',')}."]


def _differing(rows: Sequence[Mapping[str, Any]]) -> str:
    stands = [row for row in rows if row["against"]["p_holm"] is not None and row["against"]["p_holm"] <= ALPHA]
    told = "; ".join(f"{label(row['method'])} {marked(row, points(row['against']))}" for row in stands)
    return f"{len(stands)} differ{'s' if len(stands) == 1 else ''} from it after Holm's correction{': ' + told if told else ''}"


def _base(c: Comparison, rows: Mapping[str, Any]) -> list[str]:
    """Where fine-tuning itself harms, a lead over the reference may be nothing but restraint: that has to be said."""
    base, found = rows.get("base"), (rows.get(c["reference"]) or {}).get("from_base")
    if base is None or found is None:
        return []
    apart = _apart(c, found["by_base"])
    if found["change"] >= 0:
        return apart
    turned = {"change": found["change"], "low": found["high"], "high": found["low"]}
    below = {name: None if value is None else -value for name, value in turned.items()}
    where = direction(found)
    doubt = {"holds zero": ", though the interval holds zero", "unknown": f" ({unknown(found)})"}.get(where, "")
    forgets = "it may forget" if where == "holds zero" else "it forgets"
    others = [row for row in rows.values() if row["method"] not in ("base", c["reference"])]
    above = [row for row in others if row["from_base"] is not None and row["from_base"]["change"] > 0]
    named = "; ".join(f"{label(row['method'])} {points(row['from_base'])}" for row in above)
    return [
        f"{label(c['reference'])} stands {interval(below, 'change', 'low', 'high')} points below the model before fine-tuning "
        f"({number(100 * base['accuracy'], '.1f')} %){doubt}: {forgets} more than it learns here, so a method may lead it by changing "
        f"less. {len(above)} of {count(len(others), 'method')} {'stands' if len(above) == 1 else 'stand'} above that "
        f"model{named and ': ' + named}.",
        *apart,
    ]


def _apart(c: Comparison, bases: Sequence[Mapping[str, Any]]) -> list[str]:
    """Base models that fine-tuning helps and others that it harms are two cases, of which a mean shows neither."""
    if len({row["change"] > 0 for row in bases if row["change"]}) < 2:
        return []
    each = "; ".join(f"{row['base']} {points(row)}" for row in bases)
    return [f"{label(c['reference'])} helps one base model and harms another: {each}. Read the rows of each base model before any mean."]


def claim(row: Mapping[str, Any]) -> str:
    """A sentence for one control."""
    main, control, found = label(row["method"]), label(row["control"]), points(row)
    start = f"“{row['claim'][0].upper()}{row['claim'][1:]}” is {row['verdict']}:"
    where = direction(row)
    corrected = f" (p {is_(row['p_holm'])} after Holm's correction over the claims)" if row["p_holm"] is not None else ""
    if where == "above":
        return f"{start} {main} did better than {control}, by {found}{corrected}."
    if where == "below":
        return f"{start} {control} did better than {main}; {main} minus {control} is {found}{corrected}."
    if where == "unknown":
        return f"{start} {unknown(row)}; {main} minus {control} is {found}."
    if max(abs(row["low"]), abs(row["high"])) <= ALIKE:
        return f"{start} {control} did as well as {main}, within {100 * ALIKE:g} point: the difference is {found}."
    return f"{start} {control} is not told apart from {main}: the difference is {found}."


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
        test = "no test, since one side has a single sign" if row["p"] is None else f"Fisher's exact test p {is_(row['p'])}"
        told.append(
            f"The sign of the transplant test agreed with the sign of {label(c['main'])} minus {label(c['reference'])} in {row['hits']} of "
            f"{row['n']} {what} ({rate} %, {row['ties']} ties left out; {100 * row['expected']:.0f} % by the margins alone; {test})."
        )
    return told


def _ci(c: Comparison) -> list[str]:
    found = {(row["method"], row["over"]): row for row in c["ci_gain"]["correlations"] if row["base"] is None}
    main, other = found.get((c["main"], "base")), found.get((c["reference"], "base"))
    if main is None or main["r"] is None or other is None:
        return []
    within = ", within base models" if len(c["bases"]) > 1 else ""
    over = correlation_text(found.get((c["main"], "reference"), {}))
    return [
        f"ci share against gain over the base model{within}: {label(c['main'])} {correlation_text(main)}; {label(c['reference'])}, which "
        f"aligns nothing, {correlation_text(other)}: that much is headroom. Against {label(c['main'])}'s gain over "
        f"{label(c['reference'])}: {over}."
    ]


def _cost(c: Comparison) -> list[str]:
    row = next((row for row in c["cost"] if row["method"] == c["main"]), None)
    names = {"iteration": "time of an iteration", "wall": "time of the whole stage", "memory": "peak memory"}
    told = [f"{what} {ratio(row[name]['ratio'])}" for name, what in names.items() if row and row[name]["ratio"]]
    return [f"{label(c['main'])} against {label(c['reference'])}, ratio: {', '.join(told)}."] if told else []


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
