"""The comparison as sections of tables, shown as comparison.html and as the Markdown document."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ramoe_megatron.artifacts.files import atomic_write_text, save_document
from ramoe_megatron.report.comparison.figures import CAPTIONS, marked
from ramoe_megatron.report.comparison.summary import comparison_findings
from ramoe_megatron.report.rendering import (
    Bullets,
    Code,
    Figure,
    Links,
    PageSection,
    Part,
    Table,
    html_page,
    markdown,
)
from ramoe_megatron.report.vocabulary import (
    NONE,
    UNTRAINED,
    Record,
    correlation,
    count,
    legend,
    mass_change,
    mass_text,
    number,
    p_value,
    percent,
    points,
    ratio,
    seeds_higher,
)

COMPARISON_LIMITS = (
    "p and its interval come from Student's t over pairs of base model and seed, by their spread within "
    "base models (degrees of freedom: pairs less base models). They cover new seeds for these base models "
    "and say nothing of a new base model: for that, read each base model's own difference.",
    "The interval over examples is clustered by example and covers new examples for these seeds and base "
    "models. Neither interval covers other data or other languages.",
    "A method that trains nothing (‡) has one outcome for a base model, which is paired with every seed of "
    "{reference}. The spread of its difference is that of {reference} alone, and its p tests whether "
    "{reference} scatters round that outcome.",
    "Three families are corrected, each by itself: the methods against {reference}, the claims, and all "
    "cells of method, task and language. A result that was sought elsewhere in this document is not "
    "corrected.",
    "An interval that holds zero shows no difference. It does not show that there is none: its width says "
    "how large a difference may be.",
    "This is RA-MoE as we read it (arXiv 2605.28306). The choices that the paper leaves open are settings "
    "of the recipe. What a small model shows need not hold for a large one, and nothing here reproduces, "
    "or fails to reproduce, the paper's numbers.",
    "The pairs of the transplant table and of the ci share have models and examples in common. They are "
    "fewer independent ones than they count, so their p-values and intervals are optimistic. Fisher's test "
    "asks whether the signs go together, not whether most are up.",
    "Times on a machine that does other work at once are rough. The time of an iteration is closer to what "
    "the method costs than the time of the stage.",
)


def write_document(comparison: Record, path: Path) -> None:
    """Write the Markdown document, and the comparison's data beside it with the suffix .json."""
    data = path.with_suffix(".json")
    save_document(data, "ramoe-comparison", comparison)
    atomic_write_text(path, comparison_markdown(comparison, data.name))


def comparison_markdown(c: Record, data: str) -> str:
    """The document as Markdown. `data` is the name of the file with the comparison's data."""
    found = PageSection("findings", "What came out", [Bullets(comparison_findings(c))])
    return markdown(comparison_title(c), [found, *comparison_sections(c, data)])


def comparison_page(c: Record, plots: Mapping[str, Path], reports: Mapping[str, str]) -> str:
    """The page as text. `reports` maps each base model to its report's address, relative to the page."""
    sections = comparison_sections(c, "comparison.json", plots, reports)
    return html_page(comparison_title(c), "comparison", comparison_findings(c), sections)


def comparison_title(c: Record) -> str:
    names = dict.fromkeys(base["recipe"] for base in c["bases"])
    return f"{c['main']} and its controls against {c['reference']}: {', '.join(names)}"


def comparison_sections(
    c: Record,
    data: str = "comparison.json",
    plots: Mapping[str, Path] | None = None,
    reports: Mapping[str, str] | None = None,
) -> list[PageSection]:
    """All sections in reading order, from the contents of comparison.json alone; an empty one says why."""
    names = {"main": c["main"], "reference": c["reference"]}

    def figure(name: str) -> list[Part]:
        path = (plots or {}).get(name)
        return [Figure(CAPTIONS[name].format(**names), path)] if path else []

    commands = dict.fromkeys(base["command"] for base in c["bases"] if base["command"])
    made = (
        f"By ramoe-megatron {c['package_version']}, from the run folders "
        f"{_listed(base['base'] for base in c['bases'])}. Every number comes from {data}, which is made of "
        "the folders' evaluations, taxonomy, prediction, expert file, manifest and logs."
    )
    if "counts" in c:  # absent from a comparison of an earlier version
        made += (
            " The right answers by method, base model, seed, task and language are there under `counts`: "
            "the differences and their p-values can be computed again from them. "
            "The intervals over examples need the evaluations themselves."
        )
    return [
        PageSection(
            "run", "What was run", [*_setting(c), _bases_table(c), _before_table(c), Code([*commands])]
        ),
        PageSection(
            "headline", f"All methods against {c['reference']}", [*figure("forest"), _headline_table(c)]
        ),
        PageSection("tuning", "How each method's settings were chosen", [_tuning_table(c)]),
        PageSection("claims", "Claims and their controls", [_claims_table(c)]),
        PageSection("bases", "Each base model", [_by_base_table(c)]),
        PageSection("cells", "Tasks and languages", [*figure("cells"), _cells_table(c)]),
        PageSection("english", f"Anchor language ({c['anchor']})", [_english_table(c)]),
        PageSection("transplant", "Transplant test against outcome", [_hits_table(c)]),
        PageSection("ci", "ci share against gain", [*figure("ci"), _ci_table(c)]),
        PageSection("gap", "Divergence against the gap between languages", [*figure("gap"), _gap_table(c)]),
        PageSection("mass", "Routing mass on the task experts", [_mass_table(c)]),
        PageSection("cost", "Time and memory", [_cost_table(c)]),
        PageSection("zero", "A coefficient of zero", [_zero_table(c)]),
        PageSection("ablation", "What else was tried", [_ablation_table(c)]),
        PageSection("made", "How this was made", [made, Code([c["command"]] if c.get("command") else [])]),
        PageSection(
            "limits",
            "Limits",
            [
                Bullets([limit.format(**names) for limit in COMPARISON_LIMITS]),
                Links("Each base model's own report", reports or {}),
            ],
        ),
    ]


# --- what was run ---


def _listed(names: Any) -> str:
    return ", ".join(map(str, names))


def _setting(c: Record) -> list[str]:
    seeds = sorted({seed for base in c["bases"] for seed in base["seeds"]})
    uneven = len({len(base["seeds"]) for base in c["bases"]}) > 1
    weights = " The base models differ in their number of seeds: a mean over runs weighs more seeds more."
    return [
        f"{count(len(c['methods']), 'method')} ({_listed(c['methods'])}) on "
        f"{count(len(c['bases']), 'base model')} ({_listed(base['base'] for base in c['bases'])}), seeds "
        f"{_listed(seeds) or 'none'}; {count(len(c['tasks']), 'task')} ({_listed(c['tasks'])}) in "
        f"{count(len(c['languages']), 'target language')} ({_listed(c['languages'])}), anchor "
        f"{c['anchor']}, evaluated on the {c['split']} split.",
        _training(c),
        legend(c["methods"]) + (weights if uneven else ""),
    ]


def _training(c: Record) -> str:
    """Methods with other training flags than the reference: the method does not alone explain their
    difference."""
    if not c.get("training"):
        return f"Every trained method has the training flags of {c['reference']} (steps, learning rate, ...)."
    own: dict[str, list[str]] = {}
    for row in c["training"]:
        own.setdefault(row["method"], []).append(f"{row['flag']} {row['value']} ({row['reference']})")
    flags = "; ".join(f"{method} {_listed(flags)}" for method, flags in own.items())
    return (
        f"These methods have other training flags than {c['reference']} (its value in brackets), so their "
        f"difference from it is not the method's alone: {flags}."
    )


def _bases_table(c: Record) -> Table:
    rows = []
    for b in c["bases"]:
        model = f"{b['layers']} MoE layers of {b['experts']} experts, top-{b['topk']}"
        zone = None if b["zone"] is None else f"{b['zone'][0]} to {b['zone'][1]}"
        hours = number(b["hours"], ".2f")
        told = (b["base"], b["recipe"], model if b["layers"] else None, zone, _listed(b["seeds"]) or None)
        rows.append((*told, b["steps"], b["batch"], hours, b["package_version"]))
    heads = ("base model", "recipe", "model", "zone", "seeds", "steps", "batch", "hours", "package")
    note = (
        "Zone: the aligned MoE layers, counted from 0. Hours: those in which a stage of the run was at "
        "work, from the data to the last evaluation."
    )
    return Table(heads, rows, left=(0, 1, 2, 3, 4), note=note)


def _before_table(c: Record) -> Table:
    """What each base model knew before fine-tuning, and what was left to gain."""
    change = {row["base"]: row["transplant"] for row in c["transplant"].get("bases", [])}
    rows = []
    for b in c["bases"]:
        shares = (percent(b, key, "", "") for key in ("target_accuracy", "anchor_accuracy", "ci_share"))
        test = points({"change": change.get(b["base"])})
        rows.append((b["base"], *shares, test, b["target_examples"], b["anchor_examples"]))
    heads = ("base model", "target right, %", "anchor right, %", "ci share, %", "transplant test, points")
    note = "Before fine-tuning. Examples: evaluated rows, each in one language."
    return Table((*heads, "target examples", "anchor examples"), rows, note=note)


def _tuning_table(c: Record) -> Table:
    """All trials on the validation split."""
    tuning = c.get("tuning") or {"rows": [], "bases": [], "split": "", "seeds": [], "budget": 0}
    rows = []
    for row in tuning["rows"]:
        cells = [number(100 * row["by_base"][base], ".1f") for base in tuning["bases"]]
        mark = (
            "chosen, at the edge" if row["chosen"] and row["at_edge"] else "chosen" if row["chosen"] else ""
        )
        setting = (row["method"], number(row["lr"]), number(row["coeff"]))
        rows.append((*setting, *cells, number(100 * row["accuracy"], ".1f"), mark))
    heads = ("method", "lr", "coefficient", *(f"{base}, %" for base in tuning["bases"]), "mean, %", "")
    note = (
        f"Right answers in the target languages on the {tuning['split']} split, {tuning['budget']} trials a "
        f"method, seeds {_listed(tuning['seeds'])}. Neither these seeds nor, where the recipe trains them, "
        "these base models are compared. At the edge: a better setting may lie outside of what was tried."
    )
    absent = "Nothing was tuned: the settings are the recipe's."
    return Table(heads, rows, left=(0, len(heads) - 1), note=note, absent=absent)


# --- paired differences ---


def _headline_table(c: Record) -> Table:
    rows = []
    for row in c["headline"]:
        against = row["against"]
        runs = f"{row['outcomes']} on {row['bases']}"
        shown = (row["method"], runs, percent(row), points(row["from_base"]), marked(row, points(against)))
        tests = _tests(against, "p", "p_holm", "p_bh")
        rows.append((*shown, points(against and against["by_example"]), *tests, seeds_higher(against)))
    changes = (f"change from {name}, points" for name in ("base", c["reference"]))
    heads = ("method", "runs", "target, %", *changes, "over examples")
    heads += ("p", "p, Holm", "p, BH", "seeds higher")
    note = (
        f"Runs: evaluated checkpoints and base models. Change from {c['reference']}: mean over pairs of base "
        "model and seed with Student's 95 % interval by the spread within base models, which says nothing "
        "of a new base model. p belongs to it. Beside it the same difference over examples, clustered by "
        "example. Go by Holm's correction: it bounds the chance of any false finding, whatever the "
        "dependence, and these tests have their reference runs in common. BH (Benjamini-Hochberg) bounds "
        "the share of false findings. Target: mean, Wilson's interval at the effective examples of one run, "
        f"where the parallel rows of an example are a cluster (Kott and Carr 1997).{_untrained_note(c)}"
    )
    return Table(heads, rows, note=note)


def _tests(row: Record | None, *names: str) -> list[str]:
    """A cell for each of the named p-values."""
    return [NONE if row is None else p_value(row.get(name)) for name in names]


def _untrained_note(c: Record, shown: Collection[str] | None = None) -> str:
    """The meaning of the mark, if one of these methods (by default any) has it."""
    rows = {row["method"]: row for row in c["headline"] if row["method"] != "base"}
    if all(rows[method]["seeds"] for method in shown or rows):
        return ""
    other = c["reference"]
    return (
        f" {UNTRAINED}: trains nothing, so it has one outcome for a base model, paired with every seed of "
        f"{other}; the spread is that of {other} alone."
    )


def _claims_table(c: Record) -> Table:
    rows = [
        (
            *(row[key] for key in ("claim", "method", "control")),
            points(row),
            *_tests(row, "p", "p_holm"),
            seeds_higher(row),
            row["verdict"],
        )
        for row in c["claims"]
    ]
    heads = ("claim", "method", "control", "difference, points", "p", "p, Holm", "seeds higher", "verdict")
    note = (
        "Method minus control in the target languages, over pairs of base model and seed, by their spread "
        "within base models. Supported: the whole 95 % interval lies above zero and p after Holm's "
        "correction over the claims is at most 0.05. Before correction only: the interval alone. "
        "Contradicted: likewise below zero. Otherwise not shown."
    )
    return Table(heads, rows, left=(0, 1, 2, 7), note=note, absent="No control was run.")


def _by_base_table(c: Record) -> Table:
    names = [base["base"] for base in c["bases"]]
    rows = []
    for row in c["headline"]:
        found = (
            {b["base"]: b for b in (row[key] or {}).get("by_base", ())} for key in ("against", "from_base")
        )
        against, before = ([points(own.get(name)) for name in names] for own in found)
        if {*against, *before} != {NONE}:
            rows.append((row["method"], *(marked(row, change) for change in against), *before))
    heads = ("method", *(f"{name}, from {other}" for other in (c["reference"], "base") for name in names))
    note = (
        f"Change in the target languages, points, from {c['reference']} and from the model before "
        f"fine-tuning. Student's 95 % interval over the seeds of one base model.{_untrained_note(c)}"
    )
    return Table(heads, rows, note=note, absent=f"No other method was run beside {c['reference']}.")


def _cells_table(c: Record) -> Table:
    found = {(row["method"], row["task"], row["language"]): row for row in c["cells"]}
    shown = ("base", c["reference"], c["main"])
    rows = []
    for task, language in dict.fromkeys((row["task"], row["language"]) for row in c["cells"]):
        own = [found.get((method, task, language)) for method in shown]
        against = (own[-1] or {}).get("against")
        tested = (points(against), *_tests(against, "p", "p_holm"), seeds_higher(against))
        rows.append((task, language, *map(percent, own), *tested))
    heads = ("task", "language", *(f"{method}, %" for method in shown))
    heads += ("change, points", "p", "p, Holm", "seeds higher")
    family = sum(row["against"] is not None and row["against"]["p"] is not None for row in c["cells"])
    note = (
        f"Change: {c['main']} minus {c['reference']}. Holm's correction is over all {family} tested cells of "
        "method, task and language."
    )
    return Table(heads, rows, left=(0, 1), note=note)


def _english_table(c: Record) -> Table:
    found = {row["method"]: row for row in c["headline"]}
    rows = []
    for row in c["english"]:
        against = marked(found[row["method"]], points(row["against"]))
        rows.append((row["method"], percent(row), points(row["from_base"]), against))
    heads = ("method", "right, %", "change from base, points", f"change from {c['reference']}, points")
    absent = "The anchor language was not evaluated."
    return Table(heads, rows, note=_untrained_note(c).strip(), absent=absent)


# --- what goes with the outcome ---


def _hits_table(c: Record) -> Table:
    counts = ("up_up", "up_down", "down_up", "down_down", "ties")
    rows = [
        (
            row["level"],
            row["base"] or "all",
            row["task"] or "all",
            *(row[name] for name in counts),
            f"{row['hits']} of {row['n']}",
            percent(row, "rate"),
            p_value(row["p"]),
            percent(row, "expected", "", ""),
        )
        for row in c["transplant"]["hits"]
    ]
    heads = ("unit", "base model", "task", *(name.replace("_", "/") for name in counts))
    heads += ("hits", "hit rate, %", "p", "by margins, %")
    note = (
        f"Sign of the change by transplanted anchor routing, before any training / sign of {c['main']} minus "
        f"{c['reference']} after it. A unit is a pair of task and language, a task, or a base model. Ties, "
        "where either is zero, are left out. p: Fisher's exact test, two-sided, that the two signs go "
        "together; none where one side has a single sign. By margins: the rate of two unrelated columns "
        "with as many ups."
    )
    absent = f"No prediction to set beside {c['main']}."
    return Table(heads, rows, left=(0, 1, 2), note=note, absent=absent)


def _ci_table(c: Record) -> Table:
    several = len(c["bases"]) > 1
    names = [None, *(base["base"] for base in c["bases"])] if several else [None]
    found = {(row["method"], row["over"], row["base"]): row for row in c["ci_gain"]["correlations"]}
    over = {"base": "base", "reference": c["reference"]}
    rows = []
    for method, other in dict.fromkeys((method, other) for method, other, _ in found):
        own = [found[method, other, name] for name in names]
        if any(row["n"] for row in own):
            rows.append((method, over[other], *(correlation(row) if row["n"] else NONE for row in own)))
    heads = ("method", "gain over", "within base models" if several else "r", *filter(None, names))
    within = " Within base models: points are set off from the mean of their base model." if several else ""
    note = (
        "Pearson's r over pairs of task and language, with Fisher's 95 % interval. The row of "
        f"{c['reference']} is the headroom that any training fills.{within}"
    )
    return Table(heads, rows, left=(0, 1), note=note, absent="No ci share was measured.")


def _gap_table(c: Record) -> Table:
    several = len(c["bases"]) > 1
    names = [None, *(base["base"] for base in c["bases"])] if several else [None]
    correlations = c.get("divergence_gap", {}).get("correlations", [])
    found = {(row.get("unit", "languages"), row["layer"], row["base"]): row for row in correlations}
    columns = [("languages", name) for name in names]
    columns += [("pairs", None)] * any(row.get("unit") == "pairs" for row in correlations)
    rows = []
    for layer in dict.fromkeys(layer for _, layer, _ in found):
        own = [found.get((unit, layer, name)) for unit, name in columns]
        rows.append((layer, *(correlation(row) if row and row["n"] else NONE for row in own)))
    heads = ("MoE layer", "within base models" if several else "r", *filter(None, names))
    heads += ("tasks within languages",) * (len(columns) - len(names))
    note = (
        "Pearson's r over target languages of the profile's routing divergence and the gap, with Fisher's "
        "95 % interval. Gap: the base model's accuracy in the anchor language minus that in the language. "
        "Tasks within languages: r over pairs of task and language, set off from the mean of their language "
        "and base model. By the claim that divergence in the middle layers predicts the gap (arXiv "
        "2605.28306, abstract), r is above zero inside the zone, and higher than outside."
    )
    return Table(heads, rows, left=(), note=note, absent="No divergence was measured.")


def _mass_table(c: Record) -> Table:
    methods = {row["method"]: row for row in c["headline"]}
    rows = []
    for row in c["mass"]:
        against = marked(methods[row["method"]], mass_change(row["against"]))
        rows.append((row["method"], mass_text(row["mass"]), mass_text(row["anchor"]), against))
    uniform = {b["base"]: mass_text(b["uniform_mass"]) for b in c["bases"] if b["uniform_mass"] is not None}
    given = _listed(f"{value} ({base})" for base, value in uniform.items())
    if len({*uniform.values()}) == 1:
        given = next(iter(uniform.values()))
    expected = f" Uniform routing would give {given}: the share of the experts that are task experts."
    compared = [row["method"] for row in c["mass"] if row["against"] is not None and row["method"] != "base"]
    note = (
        "On the profile's own task experts, whatever a method aligns by, at the last prompt token: mean "
        "over the zone (all MoE layers without a zone), tasks, target languages, base models and "
        f"seeds.{expected if given else ''}{_untrained_note(c, compared)}"
    )
    heads = ("method", "mass, target languages", "mass, anchor", f"change from {c['reference']}")
    return Table(heads, rows, note=note, absent="No routing mass was recorded.")


def _cost_table(c: Record) -> Table:
    rows = []
    for row in c["cost"]:
        cells = []
        for name in ("iteration", "wall", "memory"):
            own = row["method"] == c["reference"]
            cells += [number(row[name]["median"], ",.0f"), NONE if own else ratio(row[name]["ratio"])]
        rows.append((row["method"], *cells))
    heads = ("method", "iteration, ms", "ratio", "stage, s", "ratio", "peak memory, MiB", "ratio")
    note = (
        f"Medians over runs. Ratio to {c['reference']}: geometric mean over pairs of base model and seed, "
        "Student's 95 % interval on the logarithms by their spread within base models. Iteration: median of "
        "the logged ones without the first. Stage: wall time of the fine-tuning stage with start-up and "
        "saving."
    )
    return Table(heads, rows, note=note, absent="No times were recorded.")


def _zero_table(c: Record) -> Table:
    words = {True: "equal", False: "differ", None: "not recorded"}
    rows = [
        (r["base"], r["seed"], words[r["outcomes_equal"]], r["differing"], words[r["weights_equal"]])
        for r in c.get("coefficient_zero", [])
    ]
    note = f"Against {c['reference']} of the same base model and seed: answers and weights must be equal."
    absent = "The control with a coefficient of zero was not run."
    heads = ("base model", "seed", "answers", "differing", "weights")
    return Table(heads, rows, left=(0, 2, 4), note=note, absent=absent)


def _ablation_table(c: Record) -> Table:
    methods = {row["method"]: row for row in c["headline"]}
    rows = []
    for row in c.get("ablation", []):
        against = row["against"]
        without = f"{points(row['without'])} ({row['beside']})" if row["without"] else None
        change = marked(methods[row["method"]], points(against))
        tests = (change, *_tests(against, "p", "p_holm"), seeds_higher(against))
        settings = "; ".join(row["settings"]) or None
        rows.append((row["method"], settings, *tests, without, points(row["from_base"])))
    heads = ["method", "what it changes", "change, points", "p", "p, Holm", "seeds higher"]
    heads += ["what alignment adds", "change from base"]
    untrained = _untrained_note(c, [row["method"] for row in c.get("ablation", [])])
    note = (
        "Target languages; p as in the table of all methods. What alignment adds: difference from the "
        "method in brackets, which trains the same weights on the same samples and aligns nothing. Its "
        f"training flags are the same, but for the learning rate where each method has its own.{untrained}"
    )
    return Table(heads, rows, left=(0, 1), note=note, absent="The recipes hold no further methods.")
