"""The comparison as sections of sentences and tables of strings: what the page and the Markdown document both show."""

from ramoe_megatron.report import comparison_words as words
from ramoe_megatron.report.comparison_words import Comparison, p_text, ratio
from ramoe_megatron.report.sections import Row, Section, Table, change, higher, mass_change, p_cells, text
from ramoe_megatron.report.tables import NONE, correlation_text, interval, label


def sections(c: Comparison) -> list[Section]:
    """All sections, in reading order; one without figures says why it is empty."""
    other = label(c["reference"])
    return [
        Section("run", "What was run", words.setting(c), [_bases(c)], code=_commands(c)),
        Section("headline", f"All methods against {other}", (), [_headline(c)], ["forest"]),
        Section("claims", "Claims and their controls", (), [_claims(c)], absent="No control was run."),
        Section("bases", "Each base model", (), [_by_base(c)], absent=f"No other method was run beside {other}."),
        Section("cells", "Tasks and languages", (), [_cells(c)], ["cells"]),
        Section("english", f"Anchor language ({c['anchor']})", (), [_english(c)], absent="The anchor language was not evaluated."),
        Section("transplant", "Transplant test against outcome", (), [_hits(c)], absent=f"No prediction to set beside {label(c['main'])}."),
        Section("ci", "ci share against gain", (), [_ci(c)], ["ci"], absent="No ci share was measured."),
        Section("mass", "Routing mass on the task experts", (), [_mass(c)], absent="No routing mass was recorded."),
        Section("cost", "Time and memory", (), [_cost(c)], absent="No times were recorded."),
        Section("zero", "A coefficient of zero", (), [_zero(c)], absent="The control with a coefficient of zero was not run."),
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
        told = (b["base"], b["recipe"], model, zone, seeds, b["steps"], b["batch"], b["target_examples"], b["anchor_examples"])
        hours = None if b["hours"] is None else f"{b['hours']:.2f}"
        rows.append([text(value) for value in (*told, hours, b["package_version"])])
    columns = ("base model", "recipe", "model", "zone", "seeds", "steps", "batch", "target examples", "anchor examples", "hours", "package")
    note = (
        "Zone: the aligned MoE layers, from 0. Examples: evaluated rows, each in one language. Hours: those in which a stage of the run "
        "was at work, from the data to the last evaluation."
    )
    return Table(columns, rows, note, 4)


def _headline(c: Comparison) -> Table:
    english = {row["method"]: row for row in c["english"]}
    cost = {row["method"]: row for row in c["cost"]}
    rows = []
    for row in c["headline"]:
        found, method = row["against"], row["method"]
        time = cost.get(method, {}).get("iteration", {}).get("ratio") if method != c["reference"] else None
        own = [label(method), f"{row['outcomes']} on {row['bases']}", interval(row, "accuracy", "low", "high"), change(found)]
        own += [change(found and found["by_example"]), *p_cells(found, "p", "p_holm", "p_bh"), higher(found)]
        rows.append([*own, interval(english.get(method, {}), "accuracy", "", ""), ratio(time)])
    columns = ("method", "runs on base models", "target, %", "change, points", "over examples", "p", "p, Holm", "p, BH")
    note = (
        f"Change: against {label(c['reference'])}, mean over pairs of base model and seed with Student's 95 % interval; beside it the "
        "same over examples, clustered by example. p belongs to the first. Holm's correction is the one to go by: it bounds the "
        "chance of any false finding, whatever the dependence, and these tests share their reference runs; BH (Benjamini-Hochberg) "
        "bounds the share of false ones. Target: mean, Wilson's interval at the examples of one run. Time: median iteration, ratio "
        "over paired seeds."
    )
    return Table((*columns, "seeds higher", "English, %", "time ratio"), rows, note)


def _claims(c: Comparison) -> Table:
    rows = []
    for row in c["claims"]:
        names = [row["claim"], label(row["method"]), label(row["control"])]
        rows.append([*names, change(row), *p_cells(row, "p", "p_holm"), str(row["n"]), higher(row), row["verdict"]])
    columns = ("claim", "method", "control", "difference, points", "p", "p, Holm", "n", "seeds higher", "verdict")
    note = (
        "Method minus control in target languages, over pairs of base model and seed. Supported: the whole 95 % interval lies above zero; "
        "contradicted: below; else not shown. Holm's correction is over the claims."
    )
    return Table(columns, rows, note, 3)


def _by_base(c: Comparison) -> Table:
    names = [base["base"] for base in c["bases"]]
    rows = []
    for row in c["headline"]:
        if row["against"] is not None:
            own = {base["base"]: base for base in row["against"]["by_base"]}
            rows.append([label(row["method"]), *(change(own.get(name)) for name in names)])
    note = f"Change against {label(c['reference'])} in target languages, points, Student's interval over its seeds."
    return Table(("method", *names), rows, note)


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
    rows = [
        [label(r["method"]), interval(r, "accuracy", "low", "high"), change(r["from_base"]), change(r["against"])] for r in c["english"]
    ]
    return Table(("method", "right, %", "change from base, points", f"change against {label(c['reference'])}, points"), rows)


def _hits(c: Comparison) -> Table:
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
        "A unit is a pair of task and language, a task, or a base model. Ties, where either is zero, are left out. p: binomial, "
        "against one half; by margins: the rate of two unrelated columns with as many ups."
    )
    return Table(columns, rows, note, 3)


def _ci(c: Comparison) -> Table:
    names = [None, *(base["base"] for base in c["bases"])] if len(c["bases"]) > 1 else [None]
    found = {(row["method"], row["over"], row["base"]): row for row in c["ci_gain"]["correlations"]}
    keys = [key for key in dict.fromkeys((m, over) for m, over, _ in found) if any(found[(*key, name)]["n"] for name in names)]
    over = {"base": "the base model", "reference": label(c["reference"])}
    rows = [[label(method), over[o], *(_r(found[method, o, name]) for name in names)] for method, o in keys]
    note = (
        f"Pearson's r over pairs of task and language, Fisher's 95 % interval. {label(c['reference'])}'s own row is the headroom that any "
        "training fills."
    )
    return Table(("method", "gain over", "all", *(name for name in names if name)), rows, note, 2)


def _r(row: Row) -> str:
    return correlation_text(row) if row["n"] else NONE


def _mass(c: Comparison) -> Table:
    rows = []
    for row in c["mass"]:
        anchor = NONE if row["anchor"] is None else f"{row['anchor']:.3f}"
        rows.append([label(row["method"]), f"{row['mass']:.3f}", anchor, mass_change(row["against"])])
    note = (
        "At the last prompt token, mean over the zone (all MoE layers where there is none), tasks, target languages, base models and seeds."
    )
    return Table(("method", "mass, target languages", "mass, anchor", f"change against {label(c['reference'])}"), rows, note)


def _cost(c: Comparison) -> Table:
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
        "the logarithms. "
        "Iteration: median of the logged ones without the first. Stage: wall time of the fine-tuning stage with start-up and saving."
    )
    return Table(columns, rows, note)


def _zero(c: Comparison) -> Table:
    words_for = {True: "equal", False: "differ", None: "not recorded"}
    rows = [
        [r["base"], text(r["seed"]), words_for[r["outcomes_equal"]], str(r["differing"]), words_for[r["weights_equal"]]]
        for r in c["coefficient_zero"]
    ]
    note = f"Against {label(c['reference'])} of the same base model and seed; answers and weights must both be equal."
    return Table(("base model", "seed", "answers", "differing", "weights"), rows, note)


def _ablation(c: Comparison) -> Table:
    shown = []
    for row in c["ablation"]:
        found, beside = row["against"], row["beside"]
        without = f"{change(row['without'])} ({label(beside)})" if row["without"] else NONE
        settings = "; ".join(row["settings"]) or NONE
        tested = [change(found), *p_cells(found, "p", "p_holm"), higher(found)]
        shown.append([row["method"], settings, *tested, without, change(row["from_base"])])
    columns = ("method", "what it changes", "change, points", "p", "p, Holm", "seeds higher", "what alignment adds", "change from base")
    note = (
        "Target languages; p as in the first table. What alignment adds: against the method in brackets, which trains the same weights by "
        "the same flags and aligns nothing."
    )
    return Table(columns, shown, note, 2)
