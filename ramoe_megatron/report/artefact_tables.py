"""The tables of each artefact, shared by the console, `ramoe inspect` and the pages."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ramoe_megatron.artifacts.tensors import ModelShape
from ramoe_megatron.method.categories import CATEGORIES
from ramoe_megatron.method.divergence import NoZone, Zone
from ramoe_megatron.method.steering import Steering
from ramoe_megatron.report.rendering import Bullets, Part, Table
from ramoe_megatron.report.vocabulary import (
    NONE,
    Record,
    anchor_name,
    correlation,
    mass_text,
    number,
    p_phrase,
    p_value,
    percent,
    points,
    seeds_higher,
    share,
)

# --- results.json ---


def summary_table(results: Record) -> Table:
    """The table at the end of `ramoe run`; it fits eighty columns."""
    groups = {(row["method"], row["group"]): row for row in results["summary"]}
    shown = [row for row in differences(results) if (row["reference"], row["group"]) == ("sft", "target")]
    against = {row["method"]: row for row in shown}
    rows = []
    for method in results["methods"]:
        target, english = (groups.get((method, group), {}) for group in ("target", "english"))
        change = against.get(method)
        kept = points(None if method == "base" else english, "change_vs_base", "", "")
        retained = percent(english, low="", high="") + ("" if kept == NONE else f" ({kept})")
        rows.append((method, percent(target), points(change), seeds_higher(change), retained))
    anchor = anchor_name(results["anchor"])
    heads = ("method", "target, %", "against sft, points", "seeds", f"{anchor}, %")
    note = (
        "Target languages: [95 % interval]. Seeds: how many score higher than sft.\n"
        f"{anchor}: in brackets, the change from base in points."
    )
    seeds = ", ".join(map(str, results["seeds"])) or "none"
    title = f"{results['recipe']}: right answers, seeds {seeds}"
    return Table(heads, rows if groups else [], title, note=note)


def differences(results: Record) -> list[dict[str, Any]]:
    """Every paired difference in results.json in one form: method, reference, group, change, low, high, p,
    ..."""
    rows = []
    for row in results["summary"]:
        names = {"method": row["method"], "group": row["group"]}
        if row["method"] not in ("base", "sft") and row.get("change_vs_sft") is not None:
            ends = {"change": row["change_vs_sft"], "low": row["change_low"], "high": row["change_high"]}
            tested = {key: row[key] for key in ("p", "seeds_higher", "seeds_lower")}
            rows.append({**names, "reference": "sft", **ends, **tested, "n": row["seeds_paired"]})
        if row["method"] != "base" and row.get("change_vs_base") is not None:
            ends = {"low": row["change_vs_base_low"], "high": row["change_vs_base_high"]}
            rows.append({**names, "reference": "base", "change": row["change_vs_base"], **ends})
    for row in results.get("comparisons", []):
        rows.append({**row, "group": "target", "n": row["seeds_paired"]})
    return rows


def differences_table(results: Record) -> Table:
    """Methods against sft and against the base model, and the first method against its controls."""
    anchor, rows = anchor_name(results["anchor"]), []
    for row in differences(results):
        seeds = (seeds_higher(row), f"{row['seeds_lower']} of {row['n']}") if "n" in row else (None, None)
        names = (row["method"], row["reference"], anchor if row["group"] == "english" else row["group"])
        rows.append((*names, points(row), p_value(row.get("p")), *seeds))
    heads = ("method", "against", "languages", "difference, points", "p", "seeds higher", "seeds lower")
    note = (
        "Method minus the other, on the same examples with the same seed. Student's 95 % interval, "
        f"clustered by example: it covers new examples, for these seeds. {anchor} is the anchor language."
    )
    return Table(heads, rows, "Paired differences", (0, 1, 2), note, "There is nothing to compare yet.")


def languages_table(results: Record) -> Table:
    """Accuracy of each method in each language, for all tasks together and for each task."""
    found = {(row["method"], row["task"], row["language"]): row for row in results["by_pair"]}
    found |= {(row["method"], "all", row["language"]): row for row in results["by_language"]}
    cells = [("all", row["language"]) for row in results["by_language"]]
    cells += [(row["task"], row["language"]) for row in results["by_pair"]]
    rows = []
    for task, language in dict.fromkeys(cells):
        own = [found.get((method, task, language)) for method in results["methods"]]
        n = next(row["n"] // row["seeds"] for row in own if row)
        rows.append((task, language, n, *map(percent, own)))
    heads = ("task", "language", "examples", *(f"{method}, %" for method in results["methods"]))
    note = (
        "Mean over seeds. Wilson's 95 % interval at the effective number of examples of one seed: the rows "
        "of one example in several languages are a cluster."
    )
    return Table(heads, rows, "Each task and language", (0, 1), note, folded=True)


def correlations_table(results: Record) -> Table:
    """ci share against gain, over pairs of task and language."""
    found = [row for row in results["ci_gain"].get("correlations", []) if row["n"]]
    rows = [(row["method"], row["over"], correlation(row), p_value(row["p"])) for row in found]
    note = "Pearson's r over pairs of task and language, with Fisher's 95 % interval."
    heads, absent = ("method", "gain over", "r", "p"), "No ci share was measured."
    return Table(heads, rows, "ci share against gain", (0, 1), note, absent)


def runs_table(results: Record) -> Table:
    """Accuracy of each evaluated checkpoint."""
    keys = ("method", "seed", "task", "language", "n")
    rows = [(*(row[key] for key in keys), percent(row)) for row in results["rows"]]
    return Table((*keys, "right, %"), rows, "Each seed", (0, 2, 3), absent="Nothing has been evaluated yet.")


# --- evaluations ---


def evaluation_table(title: str, rows: Iterable[tuple[str, str, int, int]]) -> Table:
    """Accuracy from rows of task, language, number of right answers and number of examples."""
    shown = [(task, language, n, share(right, n)) for task, language, right, n in rows]
    return Table(("task", "language", "n", "right, %"), shown, title, (0, 1))


def mass_tables(entries: Sequence[Record], keys: tuple[str, ...]) -> list[Table]:
    """Routing mass by MoE layer, with one row for each entry; no table without entries."""
    if not entries:
        return []
    heads = (*keys, *(str(layer) for layer in range(len(entries[0]["mass"]))))
    rows = [(*(entry[key] for key in keys), *map(mass_text, entry["mass"])) for entry in entries]
    words = [place for place, key in enumerate(keys) if key != "seed"]
    title = "routing mass on the task experts, by MoE layer (from 0; layer_number is in the expert file)"
    return [Table(heads, rows, title, words)]


# --- taxonomy, prediction, steering ---


def taxonomy_table(title: str, pairs: Iterable[Record]) -> Table:
    """Counts and ci share of each task, target language and split."""
    keys = ("task", "language", "split", "n", *CATEGORIES)
    rows = [(*(pair[key] for key in keys), percent(pair, "ci_share", "ci_low", "ci_high")) for pair in pairs]
    return Table((*keys, "ci share, %"), rows, title, (0, 1, 2))


def anchors_table(document: Record) -> Table:
    """The anchor language of the examples of each task, and the gain from using several anchors."""
    names, keys = document["anchors"], ("none_right", "ci_first", "ci", "ci_gained")
    rows = [
        (row["task"], row["examples"], *(row["chosen"][name] for name in names), *(row[key] for key in keys))
        for row in document["tasks"]
    ]
    heads = ("task", "examples", *names, "none right", f"ci with {names[0]} alone", "ci", "ci gained")
    title = "examples by the anchor they are pulled to (the first where none is right), and ci rows"
    return Table(heads, rows, title)


def prediction_parts(document: Record) -> list[Part]:
    """What was measured in sentences, the table with a last row for all pairs, and the limits."""
    verdict, change = document["verdict"], ("transplant_change", "transplant_low", "transplant_high")
    sentences = [verdict[key] for key in ("reading", "record") if key in verdict]
    if verdict.get("tasks"):
        tasks = (f"{task} {points(found)}" for task, found in verdict["tasks"].items())
        sentences.append(f"By task, in points: {', '.join(tasks)}.")
    sentences += [verdict[key] for key in ("pairs", "ci_share", "paper") if key in verdict]
    rows = [
        (
            *(row[key] for key in ("task", "language", "n")),
            percent(row, "ci_share", "ci_low", "ci_high"),
            number(row["divergence"], ".3f"),
            percent(row, "target_accuracy"),
            percent(row, "transplant_accuracy"),
            points(row, *change),
        )
        for row in document["rows"]
    ]
    note = "95 % intervals in brackets."
    if found := verdict.get("transplant"):
        names = ("accuracy", "accuracy_with_english_routing")
        accuracies = (percent(found, name, "", "") for name in names)
        rows.append(("all", "all", found["examples"], NONE, NONE, *accuracies, points(found)))
        told = f", {p_phrase(found['p'])}" if found.get("p") is not None else ""
        note += f" Last row: {found['examples']} rows of {found['ids']} examples, clustered by example{told}."
    heads = ["task", "language", "n", "ci share, %", "divergence in the zone", "target, %"]
    heads += ["with English routing, %", "change, points"]
    title = "ci share, divergence and transplant test"
    table = Table(heads, rows, title, (0, 1), note, "Nothing is predicted.")
    return [*sentences, table, Bullets(document["limits"])]


def steering_table(path: Path, document: Record) -> Table:
    """The steering settings that a search tried."""
    rows = [
        (
            steering_setting(path, row),
            row["experts"],
            row["n"],
            share(row["correct"], row["n"]),
            points(row),
            p_value(row["p"]),
            share(row["anchor_correct"], row["anchor_n"]),
        )
        for row in document["settings"]
    ]
    heads = ("setting", "experts", "n", "right, %", "change, points", "p", f"{document['anchor']}, %")
    return Table(heads, rows, "settings tried, on the target languages")


def steering_setting(path: Path, entry: Record) -> str:
    """A steering setting on one line."""
    found = Steering.from_document(entry, path)
    return str(found) if found else "no steering"


# --- what several artefacts record ---


def shape_text(shape: ModelShape) -> str:
    """The model's shape on one line."""
    return (
        f"{shape.num_moe_layers} MoE layers, {shape.num_experts} experts, top-{shape.topk}, "
        f"{shape.score_function} scores, hidden size {shape.hidden_size}"
    )


def zone_text(zone: Zone | NoZone, layer_numbers: Sequence[int]) -> str:
    """The zone in both layer numberings, or why there is none."""
    if isinstance(zone, NoZone):
        return f"none ({zone.reason})"
    return (
        f"MoE layers {zone.first} to {zone.last} (layer_number {layer_numbers[zone.first]} to "
        f"{layer_numbers[zone.last]}), {zone.how}: {zone.reason}"
    )


def data_text(entries: Iterable[Mapping[str, str]]) -> str:
    """The files that were read, with the start of their digests."""
    return "\n".join(f"{entry['path']} (sha256 {entry['sha256'][:12]}...)" for entry in entries) or NONE


def flat_text(entries: Record) -> str:
    """``a 1, b (c 2)``."""
    parts = []
    for name, value in entries.items():
        if isinstance(value, Mapping):
            parts.append(f"{name} ({flat_text(value)})")
        else:
            parts.append(f"{name.replace('_', ' ')} {number(value) if isinstance(value, float) else value}")
    return ", ".join(parts) or NONE
