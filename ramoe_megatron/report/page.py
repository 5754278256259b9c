"""report.html: the tables and figures of one run on one self-contained page."""

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ramoe_megatron.artifacts.files import atomic_write_text, package_version
from ramoe_megatron.method.experts import rule_from
from ramoe_megatron.report import artefact_tables as tables
from ramoe_megatron.report.inputs import RunInputs, load_run
from ramoe_megatron.report.plots import FIGURES, plot_all, shown_pairs
from ramoe_megatron.report.rendering import Bullets, Code, Figure, PageSection, Part, Table, html_page
from ramoe_megatron.report.run_results import results_of
from ramoe_megatron.report.vocabulary import (
    Record,
    anchor_name,
    compared,
    correlation,
    count,
    direction,
    legend,
    percent,
    points,
)
from ramoe_megatron.statistics import wilson

PACKAGES = ("megatron-core", "torch", "transformer-engine", "datasets", "sentencepiece", "numpy", "babel")
BEFORE = ("taxonomy", "divergence", "gap", "experts")
"""Figures of the model before training."""
FIGURE_TEXTS = {
    "accuracy": (
        "Accuracy by language and method",
        "the evaluate stage makes it",
        "Each mark is the share of right answers, mean over seeds. The bar is Wilson's 95 % interval at "
        "the number of examples of one seed. The anchor language comes first. Bars that overlap do not "
        "mean that two methods are alike: they answer the same examples, so read the paired differences "
        "above.",
    ),
    "mass_layers": (
        "Routing mass on the task experts, by layer",
        "the evaluate stage makes it",
        "Share of the router's probability on the task's experts at the last prompt token, mean over "
        "target languages and seeds. Alignment should move the coloured lines from base towards the dashed "
        "English line inside the zone. Look for lines that overshoot it, or that also move outside the "
        "zone. {numbers}",
    ),
    "mass_languages": (
        "Routing mass on the task experts, by language",
        "the evaluate stage makes it",
        "The same, by language: mean over the layers {layers}, tasks and seeds. The anchor language comes "
        "first: a method that moves it changes English routing as well.",
    ),
    "ci_gain": (
        "ci share against gain",
        "the taxonomy and evaluate stages make it, for base and at least one method",
        "Each point is a task and target language, named beside it where there are at most 30. The gain is "
        "accuracy after minus before, mean over seeds. The interval of r is Fisher's. A large ci share "
        "leaves more room to gain for any training, so compare the panels: alignment helps only where a "
        "method beats sft.{over_sft}",
    ),
    "transplant": (
        "Transplant test against gain",
        "the predict and evaluate stages make it, for sft and at least one aligned method",
        "Across: change of the base model's target accuracy, without training, when its router "
        "probabilities in the zone are replaced by those of the parallel English prompt. Up: accuracy of "
        "the method minus sft after training. If routing is the bottleneck, points lie to the upper right.",
    ),
    "taxonomy": (
        "Taxonomy: right and wrong answers before training",
        "the taxonomy stage makes it",
        "Each bar is a task and target language, scored with the base model on the {split} split. The "
        "hatched orange part is the ci share (number in the bar, in %): English right, target language "
        "wrong. By default, alignment uses these examples only. ic, the opposite, shows how often that "
        "happens by chance or by unequal knowledge.",
    ),
    "divergence": (
        "Routing divergence from the anchor language",
        "the profile stage makes it",
        "Entropy-normalised Jensen-Shannon divergence between the router's distributions on parallel text "
        "(arXiv 2510.04694), mean over examples. Large pretrained models show a U over depth, lowest in "
        "the middle. {zone} {numbers}",
    ),
    "gap": (
        "Does divergence predict the gap?",
        "the profile and evaluate stages make it, for at least three target languages",
        "For each layer, Pearson's r over the target languages of the divergence above and the base model's "
        "gap: accuracy in the anchor language minus accuracy in the language. The second curve is over the "
        "tasks of each language, set off from the language's mean. Band: Fisher's 95 % interval. By the "
        "paper's claim r is high inside the zone. {zone}",
    ),
    "experts": (
        "Task experts",
        "the profile stage makes it",
        "Colour: how much more often an expert is in the top-k on English task data than on general "
        "English text, per token. Dots: the task experts, chosen by the rule {rule}. Dashed lines: the "
        "alignment zone. A task without strong colours has no specialised experts, and aligning their mass "
        "then says little. {numbers}",
    ),
}
"""Title, what makes it, and caption of each figure."""
REPORT_LIMITS = (
    "This is RA-MoE as we read it (arXiv 2605.28306). The stages, the taxonomy, the alignment of ci "
    "examples in the middle layers, and the aim to match both the total routing mass on the task experts "
    "and its relative allocation are the paper's. We do not know its exact divergence, target, token "
    "choice, pooling and coefficient: each is an option of the recipe, shown under Settings. Nothing here "
    "reproduces, or fails to reproduce, the paper's numbers.",
    "The rule that picks the task experts is that of arXiv 2510.04694, equation 3. The rule that reads the "
    "alignment zone off the divergence curve is our own.",
    "Intervals of differences are over examples, for the seeds that were run. They do not cover another "
    "base model, other data or other languages. With few seeds they say little about another seed: see how "
    "many agree.",
    "Several methods and languages are compared without correction for the number of comparisons.",
    "A correlation between ci share and gain over a handful of task-language pairs gives no slope, and "
    "part of it is headroom.",
)


def write_report(run_dir: Path) -> Path:
    """Write plots/*.png and report.html to `run_dir`. Returns the page's path.

    The results are made of the folder's files again. results.json is the results stage's and stays as it is.

    Raises:
        RamoeError: the folder does not exist, or a file in it is malformed.
    """
    run = load_run(run_dir)
    results = results_of(run)
    page = run.root / "report.html"
    sections = report_sections(run, results, plot_all(run, results))
    atomic_write_text(page, html_page(run.name, "report", run_findings(run, results), sections))
    return page


def report_sections(
    run: RunInputs, results: Mapping[str, Any], plots: Mapping[str, Path]
) -> list[PageSection]:
    """The sections of the page. A part whose inputs are missing names the stage that writes them."""
    figures = {name: _figure(name, run, results, plots.get(name)) for name in FIGURES}
    stages = (run.manifest or {}).get("stages", {})
    missing = "Not there yet: the {} stage makes it."
    shown: list[Part] = [missing.format("evaluate")]
    if results["summary"]:
        shown = [legend(results["methods"])]
        makers = (tables.summary_table, tables.differences_table, tables.languages_table)
        shown += [make(results) for make in makers]
    after = [figure for name, figure in figures.items() if name not in BEFORE]
    settings = Code(run.recipe_text.splitlines()) if run.recipe_text else missing.format("first")
    files = Table((), sorted(_files(stages).items()), "Files", (0, 1), folded=True)
    return [
        PageSection("results", "Results", [*shown, *after]),
        PageSection("before", "Before training", [figures[name] for name in BEFORE]),
        PageSection(
            "prediction",
            "Measured before training: can alignment help?",
            tables.prediction_parts(run.prediction) if run.prediction else [missing.format("predict")],
        ),
        PageSection("limits", "Limits", [Bullets(REPORT_LIMITS)]),
        PageSection(
            "settings", "Settings", [settings, Table((), list(_versions().items()), "Versions", (0, 1))]
        ),
        PageSection("files", "Stages and files", [_stages_table(stages), files]),
    ]


def figure_caption(name: str, run: RunInputs, results: Mapping[str, Any]) -> str:
    """How to read one figure, with this run's zone, rule and layer numbers."""
    zone = "No zone is shaded: none was found, or no profile was made."
    rule, layers, numbers = "", "of the model", ""
    if run.experts is not None:
        rule = str(rule_from(run.experts.rule)).replace("=", " = ")
        numbers = _layer_numbers([int(layer_number) for layer_number in run.experts.layer_number])
        zone = f"No alignment zone: {run.experts.zone.reason}."
    if run.zone is not None:
        first, last = run.zone.first, run.zone.last
        why = f"{run.zone.how}: {run.zone.reason}"
        zone = f"Shaded: the alignment zone, MoE layers {first} to {last} ({why})."
        layers = f"{first} to {last} of the zone"
    over = "; ".join(_correlations(results, "sft"))
    pairs = shown_pairs(run)
    return FIGURE_TEXTS[name][2].format(
        zone=zone,
        rule=rule,
        layers=layers,
        numbers=numbers,
        split=pairs[0]["split"] if pairs else "",
        over_sft=f" Against the gain over sft: {over}." if over else "",
    )


def _figure(name: str, run: RunInputs, results: Mapping[str, Any], path: Path | None) -> Figure:
    title, made_by, _ = FIGURE_TEXTS[name]
    return Figure(figure_caption(name, run, results), path, title, f"Not there yet: {made_by}.")


def _layer_numbers(numbers: list[int]) -> str:
    first = numbers[0]
    if numbers == list(range(first, first + len(numbers))):
        told = f"MoE layer 0 is {first}, and so on upward"
    else:
        told = ", ".join(f"{place} is {layer_number}" for place, layer_number in enumerate(numbers))
    return f"Layers are counted from 0 among the MoE layers; as Megatron's layer_number: {told}."


def _versions() -> dict[str, str]:
    """Installed versions. `ramoe run` makes the report with the Python of the stages."""
    versions = {"ramoe-megatron": package_version(), "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _stages_table(stages: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [(name, s.get("state"), s.get("ranks") or 1, s.get("ended") or None) for name, s in stages.items()]
    absent = "Not there yet: ramoe run keeps manifest.json."
    return Table(("stage", "state", "ranks", "ended"), rows, left=(0, 1, 3), absent=absent)


def _files(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Each file that a stage read or wrote, with its digest: the one at writing, or else at reading."""
    read = {path: digest for s in stages.values() for path, digest in s.get("inputs", {}).items() if digest}
    return read | {path: digest for s in stages.values() for path, digest in s.get("outputs", {}).items()}


# --- findings ---


def run_findings(run: RunInputs, results: Mapping[str, Any]) -> list[str]:
    """The results in a few sentences, made from the tables."""
    if not results["summary"]:
        return ["Nothing has been evaluated in this run folder yet, so there are no results to sum up."]
    found = tables.differences(results)
    target = [row for row in found if row["group"] == "target" and row["reference"] != "base"]
    sentences = [_run_setting(run, results), *map(_run_difference, target)]
    sentences += _at_chance(run)
    if "sft" not in results["methods"]:
        sentences.append("There is no sft run to compare with.")
    base = {(row["method"], row["group"]): row for row in found if row["reference"] == "base"}
    if trained := base.get(("sft", "target")):
        sentences.append(f"{compared('sft', 'base', trained)}.")
    kept = [f"{method} {points(row)}" for (method, group), row in base.items() if group == "english"]
    if kept:
        before = next(r for r in results["summary"] if (r["method"], r["group"]) == ("base", "english"))
        sentences.append(
            f"{anchor_name(run.anchor)}: base has {percent(before)} % right; change in points: "
            f"{', '.join(kept)}."
        )
    if told := "; ".join(_correlations(results, "base")):
        sentences.append(f"ci share against gain over base, across pairs of task and language: {told}.")
    return sentences


def _at_chance(run: RunInputs) -> list[str]:
    """The sentence that the base model guesses in the target languages, if its interval reaches chance."""
    base = next((found for found in run.evaluations if found.method == "base"), None)
    rows = [row for row in base.rows if row["language"] != run.anchor and "chance" in row] if base else []
    total, right = sum(row["n"] for row in rows), sum(row["correct"] for row in rows)
    guessed = sum(row["n"] * row["chance"] for row in rows)
    if not total or wilson(right, total)[0] > guessed / total:
        return []
    return [
        f"In the target languages the base model is at chance: {right} of {total} answers are right, and "
        f"guessing gives {guessed:.1f}. So differences between methods say nothing about the methods."
    ]


def _correlations(results: Mapping[str, Any], over: str) -> list[str]:
    """Correlation of ci share with the gain over this method, for each method where it is defined."""
    found = [row for row in results["ci_gain"]["correlations"] if row["over"] == over]
    return [f"{row['method']} {correlation(row)}" for row in found if row["r"] is not None]


def _run_setting(run: RunInputs, results: Mapping[str, Any]) -> str:
    languages = [row["language"] for row in results["by_language"] if row["method"] == results["methods"][0]]
    targets = [language for language in languages if language != run.anchor]
    tasks = dict.fromkeys(row["task"] for row in results["by_pair"])
    model = ""
    if run.experts is not None:
        shape = run.experts.shape
        model = f" Model: {shape.num_moe_layers} MoE layers of {shape.num_experts} experts, top-{shape.topk}."
    where = f"{count(len(tasks), 'task')} in {count(len(targets), 'target language')} ({', '.join(targets)})"
    return (
        f"{where}, evaluated on the {results['split']} split, {count(len(results['seeds']), 'seed')} for "
        f"each method.{model}"
    )


def _run_difference(row: Record) -> str:
    """One paired difference, with the number of seeds that agree and a reading of the interval."""
    told = (
        f"{compared(row['method'], row['reference'], row)}, "
        f"higher with {row['seeds_higher']} of {count(row['n'], 'seed')}."
    )
    doubt = {
        "holds zero": " The interval includes zero: this run shows no difference.",
        "unknown": " There is too little data for an interval.",
    }
    return told + doubt.get(direction(row), "")
