"""The comparison as sections of sentences and tables of strings: what the page and the Markdown document both show."""

from ramoe_megatron.report.comparison import view_relations as relations
from ramoe_megatron.report.comparison.view_relations import by_method, note_untrained
from ramoe_megatron.report.comparison.words import Comparison, marked, ratio, setting
from ramoe_megatron.report.sections import Row, Section, Table, change, higher, p_cells, text
from ramoe_megatron.report.tables import NONE, interval, label


def sections(c: Comparison) -> list[Section]:
    """All sections, in reading order; one without figures says why it is empty."""
    other = label(c["reference"])
    return [
        Section("run", "What was run", setting(c), [_bases(c)], code=_commands(c)),
        Section("headline", f"All methods against {other}", (), [_headline(c)], ["forest"]),
        Section("claims", "Claims and their controls", (), [_claims(c)], absent="No control was run."),
        Section("bases", "Each base model", (), [_by_base(c)], absent=f"No other method was run beside {other}."),
        Section("cells", "Tasks and languages", (), [_cells(c)], ["cells"]),
        Section("english", f"Anchor language ({c['anchor']})", (), [_english(c)], absent="The anchor language was not evaluated."),
        Section(
            "transplant",
            "Transplant test against outcome",
            tables=[relations.hits(c)],
            absent=f"No prediction to set beside {label(c['main'])}.",
        ),
        Section("ci", "ci share against gain", (), [relations.ci(c)], ["ci"], absent="No ci share was measured."),
        Section("mass", "Routing mass on the task experts", (), [relations.mass(c)], absent="No routing mass was recorded."),
        Section("cost", "Time and memory", (), [relations.cost(c)], absent="No times were recorded."),
        Section("zero", "A coefficient of zero", (), [relations.zero(c)], absent="The control with a coefficient of zero was not run."),
        Section("ablation", "What else was tried", (), [_ablation(c)], absent="The recipes hold no further methods."),
    ]


def _commands(c: Comparison) -> list[str]:
    return list(dict.fromkeys(base["command"] for base in c["bases"] if base["command"]))


def _bases(c: Comparison) -> Table:
    rows = []
    for b in c["bases"]:
        model = NONE if b["layers"] is None else f"{b['layers']} MoE layers of {b['experts']} experts, top-{b['topk']}"
        zone = NONE if b["zone"] is None else f"{b['zone'][0]} to {b['zone'][1]}"
        seeds = ", ".join(map(str, b["seeds"])) or NONE
        before = " / ".join(NONE if right is None else f"{100 * right:.1f}" for right in (b["target_accuracy"], b["anchor_accuracy"]))
        told = (b["base"], b["recipe"], model, before, zone, seeds, b["steps"], b["batch"], b["target_examples"], b["anchor_examples"])
        hours = None if b["hours"] is None else f"{b['hours']:.2f}"
        rows.append([text(value) for value in (*told, hours, b["package_version"])])
    columns = ("base model", "recipe", "model", "right before, %", "zone", "seeds", "steps", "batch", "target examples", "anchor examples")
    note = (
        "Right before: in the target languages / the anchor. Zone: the aligned MoE layers, from 0. Examples: evaluated rows, each in one "
        "language. Hours: those in which a stage of the run was at work, from the data to the last evaluation."
    )
    return Table((*columns, "hours", "package"), rows, note, 5)


def _headline(c: Comparison) -> Table:
    english = {row["method"]: row for row in c["english"]}
    cost = {row["method"]: row for row in c["cost"]}
    rows = []
    for row in c["headline"]:
        found, method = row["against"], row["method"]
        time = cost.get(method, {}).get("iteration", {}).get("ratio") if method != c["reference"] else None
        own = [label(method), f"{row['outcomes']} on {row['bases']}", interval(row, "accuracy", "low", "high"), change(row["from_base"])]
        own += [_marked(row), change(found and found["by_example"]), *p_cells(found, "p", "p_holm", "p_bh"), higher(found)]
        rows.append([*own, interval(english.get(method, {}), "accuracy", "", ""), ratio(time)])
    columns = ("method", "runs on base models", "target, %", "change from base, points", "change, points", "over examples", "p", "p, Holm")
    note = (
        f"Change: against {label(c['reference'])}, mean over pairs of base model and seed with Student's 95 % interval by the spread "
        "within base models, which says nothing of a new base model; beside it the same over examples, clustered by example. p belongs "
        "to the first. Change from base: likewise against the model before fine-tuning. Holm's correction is the one to go by: it bounds "
        "the chance of any false finding, whatever the dependence, and these tests share their reference runs; BH (Benjamini-Hochberg) "
        "bounds the share of false ones. Target: mean, Wilson's interval at the effective examples of one run, the parallel rows of an "
        "example being a cluster (Kott and Carr 1997). Time: median iteration, ratio over paired seeds."
        f"{note_untrained(c, by_method(c).keys() - {'base'})}"
    )
    return Table((*columns, "p, BH", "seeds higher", "English, %", "time ratio"), rows, note)


def _claims(c: Comparison) -> Table:
    rows = []
    for row in c["claims"]:
        names = [row["claim"], label(row["method"]), label(row["control"])]
        rows.append([*names, change(row), *p_cells(row, "p", "p_holm"), str(row["n"]), higher(row), row["verdict"]])
    columns = ("claim", "method", "control", "difference, points", "p", "p, Holm", "n", "seeds higher", "verdict")
    note = (
        "Method minus control in target languages, over pairs of base model and seed, by their spread within base models. Supported: the "
        "whole 95 % interval lies above zero and p after Holm's correction over the claims is at most 0.05; before correction only: the "
        "interval alone; contradicted: likewise below; else not shown."
    )
    return Table(columns, rows, note, 3)


def _by_base(c: Comparison) -> Table:
    names = [base["base"] for base in c["bases"]]
    rows = []
    for row in c["headline"]:
        against, before = ({b["base"]: b for b in (row[key] or {}).get("by_base", ())} for key in ("against", "from_base"))
        if against or before:
            beside = [change(against.get(name)) for name in names]
            marks = [cell if cell == NONE else marked(row, cell) for cell in beside]
            rows.append([label(row["method"]), *marks, *(change(before.get(name)) for name in names)])
    note = (
        f"Change in target languages, points, against {label(c['reference'])} and from the model before fine-tuning, Student's interval "
        f"over the seeds of one base model.{note_untrained(c, by_method(c).keys() - {'base'})}"
    )
    return Table(("method", *names, *(f"{name}, from base" for name in names)), rows, note)


def _cells(c: Comparison) -> Table:
    found = {(row["method"], row["task"], row["language"]): row for row in c["cells"]}
    rows = []
    for task, language in dict.fromkeys((row["task"], row["language"]) for row in c["cells"]):
        base, reference, main = (found.get((m, task, language), {}) for m in ("base", c["reference"], c["main"]))
        accuracy = [interval(row, "accuracy", "low", "high") for row in (base, reference, main)]
        against = main.get("against")
        rows.append([task, language, *accuracy, change(against), *p_cells(against, "p", "p_holm"), higher(against)])
    right = [f"{label(method)}, %" for method in ("base", c["reference"], c["main"])]
    columns = ("task", "language", *right, "change, points", "p", "p, Holm", "seeds higher")
    family = sum(row["against"] is not None and row["against"]["p"] is not None for row in c["cells"])
    note = (
        f"Change: {label(c['main'])} minus {label(c['reference'])}. Holm's correction is over all {family} tested cells of method, "
        "task and language; the other methods' are in comparison.json."
    )
    return Table(columns, rows, note, 2)


def _english(c: Comparison) -> Table:
    found = by_method(c)
    rows = []
    for r in c["english"]:
        against = _marked({**found[r["method"]], "against": r["against"]})
        rows.append([label(r["method"]), interval(r, "accuracy", "low", "high"), change(r["from_base"]), against])
    columns = ("method", "right, %", "change from base, points", f"change against {label(c['reference'])}, points")
    return Table(columns, rows, note_untrained(c, found.keys() - {"base"}).strip())


def _ablation(c: Comparison) -> Table:
    shown = []
    for row in c["ablation"]:
        found, beside = row["against"], row["beside"]
        without = f"{change(row['without'])} ({label(beside)})" if row["without"] else NONE
        settings = "; ".join(row["settings"]) or NONE
        tested = [_marked({**by_method(c)[row["method"]], "against": found}), *p_cells(found, "p", "p_holm"), higher(found)]
        shown.append([row["method"], settings, *tested, without, change(row["from_base"])])
    columns = ("method", "what it changes", "change, points", "p", "p, Holm", "seeds higher", "what alignment adds", "change from base")
    note = (
        "Target languages; p as in the first table. What alignment adds: against the method in brackets, which trains the same weights by "
        "the same flags and aligns nothing."
        f"{note_untrained(c, [row['method'] for row in c['ablation']])}"
    )
    return Table(columns, shown, note, 2)


def _marked(row: Row) -> str:
    """A method's change against the reference, marked where it trains nothing."""
    return NONE if row["against"] is None else marked(row, change(row["against"]))
