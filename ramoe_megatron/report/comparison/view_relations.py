"""The tables of what goes with the outcome: the prediction, the ci share, routing mass, cost, and the check of zero."""

from collections.abc import Collection

from ramoe_megatron.report.comparison.words import UNTRAINED, Comparison, marked, ratio
from ramoe_megatron.report.sections import Row, Table, mass_change, text
from ramoe_megatron.report.tables import NONE, correlation_text, interval, label, p_text


def by_method(c: Comparison) -> dict[str, Row]:
    return {row["method"]: row for row in c["headline"]}


def note_untrained(c: Comparison, shown: Collection[str]) -> str:
    """What the mark means, where one of these methods bears it."""
    rows, other = by_method(c), label(c["reference"])
    if all(rows[method]["seeds"] for method in shown):
        return ""
    told = f"trains nothing, so it has one outcome a base model beside every seed of {other}, and the spread is {other}'s alone"
    return f" {UNTRAINED}: {told}."


def hits(c: Comparison) -> Table:
    rows = []
    for row in c["transplant"]["hits"]:
        counts = [str(row[name]) for name in ("up_up", "up_down", "down_up", "down_down", "ties")]
        rate = [interval(row, "rate", "low", "high"), p_text(row["p"]), interval(row, "expected", "", "")]
        rows.append([row["level"], row["base"] or "all", row["task"] or "all", *counts, f"{row['hits']} of {row['n']}", *rate])
    columns = (
        "unit",
        "base model",
        "task",
        "up/up",
        "up/down",
        "down/up",
        "down/down",
        "ties",
        "hits",
        "hit rate, %",
        "p",
        "by margins, %",
    )
    note = (
        "Sign of the change by transplanted anchor routing, before any training / sign of "
        f"{label(c['main'])} minus {label(c['reference'])} after it. "
        "A unit is a pair of task and language, a task, or a base model. Ties, where either is zero, are left out. p: Fisher's exact test, "
        "two-sided, that the two signs go together; none where one side has a single sign. By margins: the rate of two unrelated columns "
        "with as many ups."
    )
    return Table(columns, rows, note, 3)


def ci(c: Comparison) -> Table:
    several = len(c["bases"]) > 1
    names = [None, *(base["base"] for base in c["bases"])] if several else [None]
    found = {(row["method"], row["over"], row["base"]): row for row in c["ci_gain"]["correlations"]}
    keys = [key for key in dict.fromkeys((m, over) for m, over, _ in found) if any(found[(*key, name)]["n"] for name in names)]
    over = {"base": "the base model", "reference": label(c["reference"])}
    rows = [[label(method), over[o], *(_r(found[method, o, name]) for name in names)] for method, o in keys]
    note = (
        f"Pearson's r over pairs of task and language, Fisher's 95 % interval. {label(c['reference'])}'s own row is the headroom that any "
        f"training fills.{' Within base models: points are set off from the mean of their base model.' if several else ''}"
    )
    return Table(("method", "gain over", "within base models" if several else "r", *(name for name in names if name)), rows, note, 2)


def _r(row: Row) -> str:
    return correlation_text(row) if row["n"] else NONE


def mass(c: Comparison) -> Table:
    rows = []
    for row in c["mass"]:
        anchor = NONE if row["anchor"] is None else f"{row['anchor']:.3f}"
        rows.append([label(row["method"]), f"{row['mass']:.3f}", anchor, _beside(c, row)])
    uniform = {b["base"]: f"{b['uniform_mass']:.3f}" for b in c["bases"] if b["uniform_mass"] is not None}
    told = next(iter(uniform.values())) if len({*uniform.values()}) == 1 else ", ".join(f"{v} ({b})" for b, v in uniform.items())
    note = (
        "On the profile's own task experts, whatever a method aligns by, at the last prompt token; mean over the zone (all MoE layers "
        "where there is none), tasks, target languages, base models and seeds."
        f"{f' Uniform routing would give {told}: the share of the experts that are task experts.' if told else ''}"
        f"{note_untrained(c, [row['method'] for row in c['mass'] if row['against'] is not None])}"
    )
    return Table(("method", "mass, target languages", "mass, anchor", f"change against {label(c['reference'])}"), rows, note)


def _beside(c: Comparison, row: Row) -> str:
    return NONE if row["against"] is None else marked(by_method(c)[row["method"]], mass_change(row["against"]))


def cost(c: Comparison) -> Table:
    rows = []
    for row in c["cost"]:
        cells = []
        for name in ("iteration", "wall", "memory"):
            median = row[name]["median"]
            cells += [NONE if median is None else f"{median:,.0f}", NONE if row["method"] == c["reference"] else ratio(row[name]["ratio"])]
        rows.append([label(row["method"]), *cells])
    columns = ("method", "iteration, ms", "ratio", "stage, s", "ratio", "peak memory, MiB", "ratio")
    note = (
        f"Medians over runs; ratio to {label(c['reference'])}: geometric means over pairs of base model and seed, Student's interval on "
        "the logarithms by their spread within base models. "
        "Iteration: median of the logged ones without the first. Stage: wall time of the fine-tuning stage with start-up and saving."
    )
    return Table(columns, rows, note)


def zero(c: Comparison) -> Table:
    words_for = {True: "equal", False: "differ", None: "not recorded"}
    rows = [
        [r["base"], text(r["seed"]), words_for[r["outcomes_equal"]], str(r["differing"]), words_for[r["weights_equal"]]]
        for r in c["coefficient_zero"]
    ]
    note = f"Against {label(c['reference'])} of the same base model and seed; answers and weights must both be equal."
    return Table(("base model", "seed", "answers", "differing", "weights"), rows, note)
