"""A short list of findings, as sentences made from the tables of comparison.json."""

from collections.abc import Mapping
from typing import Any

from ramoe_megatron.report.comparison.study import ALPHA
from ramoe_megatron.report.vocabulary import (
    Record,
    compared,
    correlation,
    count,
    direction,
    listed,
    number,
    p_phrase,
    percent,
    points,
    ratio,
)

VERDICT_WORDS = {
    "supported": "{main} scored higher than {controls}",
    "supported before correction only": "{main} scored higher than {controls} before Holm's correction only",
    "not shown": "no difference from {controls} is shown",
    "contradicted before correction only": (
        "{main} scored lower than {controls} before Holm's correction only"
    ),
    "contradicted": "{main} scored lower than {controls}",
}


def comparison_findings(c: Record) -> list[str]:
    """Main contrast, reference and base model, other methods, controls, English, prediction, cost."""
    rows = {row["method"]: row for row in c["headline"]}
    found = [_main(c, rows), _reference(c, rows), _others(c, rows)]
    found += [make(c) for make in (_controls, _english, _transplant, _ci, _cost, _zero)]
    return [sentence for sentence in found if sentence]


def _main(c: Record, rows: Mapping[str, Any]) -> str:
    main, other = c["main"], c["reference"]
    against = (rows.get(main) or {}).get("against")
    if against is None:
        return f"{main} was not run beside {other}, so they cannot be compared."
    told = f"{compared(main, other, against)}, higher in {against['seeds_higher']} of "
    told += f"{count(against['n'], 'paired run')}."
    where, over_examples = direction(against), direction(against["by_example"])
    if where == "unknown":
        why = "no spread over seeds" if against["n"] > against["bases"] else "too few seeds"
        told += f" There is no interval: {why}."
    elif where == "holds zero":
        told += " The interval holds zero: no difference is shown."
    elif against["p_holm"] is not None and against["p_holm"] > ALPHA:
        family = sum(row["against"] is not None and row["against"]["p"] is not None for row in rows.values())
        told += f" The difference does not hold after Holm's correction for {count(family, 'comparison')}."
    if over_examples not in ("unknown", where):
        words = {"above": "lies above zero", "below": "lies below zero", "holds zero": "holds zero"}
        told += f" The interval over examples {words[over_examples]}: {points(against['by_example'])} points."
    return told


def _reference(c: Record, rows: Mapping[str, Any]) -> str:
    """The reference against the base model: where fine-tuning harms, a method may lead by changing less."""
    other, found = c["reference"], (rows.get(c["reference"]) or {}).get("from_base")
    if found is None or "base" not in rows:
        return ""
    helped, harmed = ([r for r in found["by_base"] if sign * r["change"] > 0] for sign in (1, -1))
    apart = ""
    if helped and harmed:  # two opposite cases, which a mean would hide
        up, down = (listed(f"{r['base']} ({points(r)} points)" for r in side) for side in (helped, harmed))
        apart = f"{other} helps {up} and harms {down}: read each base model before any mean."
    if found["change"] >= 0:
        return apart
    doubt = " The interval holds zero." if direction(found) == "holds zero" else ""
    others = [row for row in rows.values() if row["method"] not in ("base", other)]
    above = sum(row["from_base"] is not None and row["from_base"]["change"] > 0 for row in others)
    return (
        f"{compared(other, 'base', found)}.{doubt} base has {number(100 * rows['base']['accuracy'], '.1f')} "
        f"% right, so a method can beat {other} by changing less: {above} of "
        f"{count(len(others), 'other method')} {_score(above)} higher than base. {apart}"
    ).rstrip()


def _others(c: Record, rows: Mapping[str, Any]) -> str:
    """The other methods. One that trains nothing is left out, since its spread is only the reference's."""
    trained = [row for row in rows.values() if row["against"] is not None and row["seeds"] > 0]
    if len(trained) < 2:
        return ""
    tested = [row["against"] for row in trained if row["against"]["p_holm"] is not None]
    clear = [against["change"] for against in tested if against["p_holm"] <= ALPHA]
    higher, lower = sum(change > 0 for change in clear), sum(change < 0 for change in clear)
    best = max(row["accuracy"] for row in rows.values())
    names = listed(method for method, row in rows.items() if best - row["accuracy"] < 1e-9)
    methods = count(len(trained), "trained method")
    told = f"none of {methods} differs from {c['reference']}"
    if clear:
        told = f"{higher} of {methods} {_score(higher)} higher than {c['reference']}, "
        told += f"{lower} {_score(lower)} lower"
    return f"After Holm's correction, {told}. The highest target accuracy is {100 * best:.1f} % ({names})."


def _score(methods: int) -> str:
    return "scores" if methods == 1 else "score"


def _controls(c: Record) -> str:
    groups: dict[str, list[str]] = {}
    for row in c["claims"]:
        groups.setdefault(row["verdict"], []).append(f"{row['control']} ({points(row)})")
    told = [
        words.format(main=c["main"], controls=listed(groups[verdict]))
        for verdict, words in VERDICT_WORDS.items()
        if verdict in groups
    ]
    return f"Controls, difference in points: {'; '.join(told)}." if told else ""


def _english(c: Record) -> str:
    rows = {row["method"]: row for row in c["english"]}
    methods = [m for m in (c["reference"], c["main"]) if m in rows and rows[m]["from_base"]]
    if not methods:
        return ""
    told = f"Anchor language ({c['anchor']}), change from base in points: "
    told += ", ".join(f"{method} {points(rows[method]['from_base'])}" for method in methods)
    against = rows.get(c["main"], {}).get("against")
    return told + (f"; {c['main']} minus {c['reference']} {points(against)}." if against else ".")


def _transplant(c: Record) -> str:
    row = next((r for r in c["transplant"]["hits"] if (r["level"], r["base"]) == ("pairs", None)), None)
    if row is None or not row["n"]:
        return ""
    test = "no test: one side has a single sign"
    if row["p"] is not None:
        test = f"Fisher's exact test, {p_phrase(row['p'])}"
    return (
        f"The transplant test gave the sign of {c['main']} minus {c['reference']} in {row['hits']} of "
        f"{count(row['n'], 'pair')} of task and language, {percent(row, 'rate')} %; two unrelated columns "
        f"with as many ups would agree in {100 * row['expected']:.0f} % ({test})."
    )


def _ci(c: Record) -> str:
    found = {(row["method"], row["over"]): row for row in c["ci_gain"]["correlations"] if row["base"] is None}
    main, other = (found.get((method, "base"), {}) for method in (c["main"], c["reference"]))
    if main.get("r") is None or not other:
        return ""
    over = correlation(found.get((c["main"], "reference"), {}))
    return (
        f"ci share against gain over base: {c['main']} {correlation(main)}; {c['reference']}, which aligns "
        f"nothing, {correlation(other)}: that much is headroom. Against the gain of {c['main']} over "
        f"{c['reference']}: {over}."
    )


def _cost(c: Record) -> str:
    row: Record = next((row for row in c["cost"] if row["method"] == c["main"]), {})
    names = {"iteration": "time of an iteration", "wall": "time of the whole stage", "memory": "peak memory"}
    found = {words: row[name]["ratio"] for name, words in names.items() if row}
    told = [f"{words} {ratio(value)}" for words, value in found.items() if value]
    return f"Cost of {c['main']} as a multiple of {c['reference']}: {', '.join(told)}." if told else ""


def _zero(c: Record) -> str:
    rows = c.get("coefficient_zero")
    if not rows:
        return ""
    wrong = [row for row in rows if not row["outcomes_equal"] or row["weights_equal"] is False]
    if wrong:
        told = listed(
            f"{row['base']} seed {row['seed']}: {count(row['differing'], 'answer')}"
            f"{' and the weights' if row['weights_equal'] is False else ''}"
            for row in wrong
        )
        return (
            f"A coefficient of zero did NOT leave training as it was ({told}): explain that before trusting "
            "any other number here."
        )
    weighed = sum(row["weights_equal"] is True for row in rows)
    weights = f"the same weights in {weighed} of them" if weighed else "no digest of the weights was recorded"
    runs = count(len(rows), "run")
    return f"A coefficient of zero gave the answers of {c['reference']} in all {runs}; {weights}."
