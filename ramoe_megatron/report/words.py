"""The page's sentences: the summary computed from the numbers, how to read each figure, and the limits."""

from collections.abc import Mapping
from typing import Any

from ramoe_megatron.method.experts import rule_from
from ramoe_megatron.report.inputs import RunInputs
from ramoe_megatron.report.tables import correlation_text, interval, label

TITLES = {
    "accuracy": "Accuracy by language and method",
    "taxonomy": "Taxonomy: who answers what before training",
    "divergence": "Routing divergence from the anchor language",
    "experts": "Task experts",
    "mass_layers": "Routing mass on the task experts, by layer",
    "mass_languages": "Routing mass on the task experts, by language",
    "ci_gain": "ci share against gain",
    "transplant": "Transplant test against gain",
}
MADE_BY = {
    "accuracy": "evaluate",
    "taxonomy": "taxonomy",
    "divergence": "profile",
    "experts": "profile",
    "mass_layers": "evaluate",
    "mass_languages": "evaluate",
    "ci_gain": "taxonomy and evaluate, for base and at least one method",
    "transplant": "predict and evaluate, for SFT and at least one aligned method",
}
CAPTIONS = {
    "accuracy": (
        "Each mark is the share of right answers, mean over seeds; the bar is Wilson's 95 % interval at the "
        "number of examples of one seed. The anchor language comes first: it shows what training cost or gave "
        "there. Overlapping bars do not mean that two methods are alike: they answer the same examples, so the "
        "paired difference in the table above decides."
    ),
    "taxonomy": (
        "Each bar is a task and target language, scored with the base model on the {split} split. The hatched "
        "orange part is the ci share (number in the bar, in %): English right, target language wrong. Only these "
        "examples enter the alignment by default. Next to it, ic shows how often the opposite happens by chance "
        "or by unequal knowledge."
    ),
    "divergence": (
        "Entropy-normalised Jensen-Shannon divergence between the router's distributions on parallel text (arXiv "
        "2510.04694), mean over examples. A U over depth, lowest in the middle, is what large pretrained models "
        "show; {zone} {numbers}"
    ),
    "experts": (
        "Colour: how much more often an expert is in the top-k on English task data than on general English text,"
        " per token. Dots: the experts chosen by the rule {rule}. Dashed lines: the alignment zone. A task whose "
        "rows show no strong colour has no specialised experts, and then aligning their mass says little. "
        "{numbers}"
    ),
    "mass_layers": (
        "Share of the router's probability that goes to the task's experts at the last prompt token, mean over "
        "target languages and seeds. Alignment is to move the coloured lines from base towards the dashed English"
        " line inside the zone. A line that overshoots it, or moves outside the zone as well, is worth knowing. "
        "{numbers}"
    ),
    "mass_languages": (
        "The same, per language: mean over the layers {layers} and over tasks and seeds. The anchor language "
        "comes first; a method that moves it changes English routing as well."
    ),
    "ci_gain": (
        "Each point is a task and target language (named beside it, up to 30). The gain is accuracy after minus "
        "before, mean over seeds; intervals of r are Fisher's. Where the ci share is large there is also more "
        "room to gain, for any training: compare the panels. A method is only helped by its alignment where it "
        "beats SFT.{over_sft}"
    ),
    "transplant": (
        "Across: change of target accuracy when, without training, the base model's router probabilities in the "
        "zone are replaced by those of the parallel English prompt. Up: accuracy of the method minus SFT after "
        "training. If the test forecasts the gain, points lie to the upper right and to the lower left. In our own "
        "comparisons the two signs agreed no more often than the number of each sign alone would give."
    ),
}
LIMITS = (
    "This is RA-MoE as we read it (arXiv 2605.28306). The paper's stages, the taxonomy, the alignment on ci "
    "examples in the middle layers and its aim, to match both the total routing mass on the task experts and its "
    "relative allocation, are the paper's. Its exact divergence, target, token choice, pooling and coefficient "
    "are not known to us: each is an option of the recipe, shown under Settings. Nothing here reproduces, or "
    "fails to reproduce, the paper's numbers.",
    "The rule that picks the task experts is that of arXiv 2510.04694, equation 3; how the alignment zone is read"
    " off the divergence curve is our own rule.",
    "Intervals of differences are over examples, for the seeds that were run. They do not cover another base "
    "model, other data, or other languages, and with few seeds they say little about what another seed would do: "
    "see how many agree.",
    "Several methods and languages are compared without correction for the number of comparisons.",
    "A correlation between ci share and gain over a handful of task-language pairs is no slope, and part of it is"
    " headroom.",
)


def summary(run: RunInputs, results: Mapping[str, Any]) -> list[str]:
    """One sentence or two for each finding, from `results` alone; says so when an interval includes zero."""
    if not results["summary"]:
        return ["Nothing has been evaluated in this run folder yet, so there are no results to sum up."]
    rows = {(row["method"], row["group"]): row for row in results["summary"]}
    sentences = [_setting(run, results)]
    for method in [m for m in results["methods"] if m not in ("base", "sft")]:
        if (row := rows.get((method, "target"))) is not None:
            sentences.append(_against_sft(method, row, rows.get(("sft", "target"))))
    for row in results["comparisons"]:
        change = interval(row, "change", "low", "high", signed=True)
        told = f"{label(row['method'])} against {label(row['reference'])}: {change} points"
        unclear = row["low"] is None or row["low"] <= 0 <= row["high"]
        sentences.append(f"{told}; {'this run does not tell them apart' if unclear else 'the interval excludes zero'}.")
    if (sft := rows.get(("sft", "target"))) is not None and sft["change_vs_base"] is not None:
        change = interval(sft, "change_vs_base", "change_vs_base_low", "change_vs_base_high", signed=True)
        sentences.append(f"Fine-tuning without alignment (SFT) changed target accuracy by {change} points from base.")
    kept = [
        f"{label(method)} {interval(row, 'change_vs_base', 'change_vs_base_low', 'change_vs_base_high', signed=True)}"
        for (method, group), row in rows.items()
        if group == "english" and method != "base" and row["change_vs_base"] is not None
    ]
    if kept:
        before = interval(rows["base", "english"], "accuracy", "low", "high")
        sentences.append(
            f"English ({run.anchor}) stood at {before} % before training; change in points: {', '.join(kept)}."
        )
    found = [c for c in results["ci_gain"]["correlations"] if c["over"] == "base" and c["r"] is not None]
    if found:
        told = "; ".join(f"{label(c['method'])} {correlation_text(c)}" for c in found)
        sentences.append(f"ci share against gain over base, across task-language pairs: {told}.")
    return sentences


def _setting(run: RunInputs, results: Mapping[str, Any]) -> str:
    languages = [row["language"] for row in results["by_language"] if row["method"] == results["methods"][0]]
    targets = [language for language in languages if language != run.anchor]
    tasks = dict.fromkeys(row["task"] for row in results["by_pair"])
    seeds = len(results["seeds"])
    model = ""
    if run.experts is not None:
        shape = run.experts.shape
        model = f" The model has {shape.num_moe_layers} MoE layers of {shape.num_experts} experts, top-{shape.topk}."
    where = f"{_count(len(tasks), 'task')} in {_count(len(targets), 'target language')} ({', '.join(targets)})"
    return f"{where}, evaluated on the {results['split']} split, {_count(seeds, 'seed')} per method.{model}"


def _against_sft(method: str, row: Mapping[str, Any], sft: Mapping[str, Any] | None) -> str:
    own = f"{label(method)} answers {interval(row, 'accuracy', 'low', 'high')} % of the target-language examples"
    if sft is None or row["change_vs_sft"] is None:
        return f"{own}. There is no SFT run to compare it with."
    change = interval(row, "change_vs_sft", "change_low", "change_high", signed=True)
    told = f"{own}, SFT {interval(sft, 'accuracy', 'low', 'high')} %: a paired difference of {change} points"
    if row["p"] is not None:
        told += f" (p {'< 0.001' if row['p'] < 0.001 else f'= {row["p"]:.3f}'})"
    told += f", higher in {row['seeds_higher']} of {_count(row['seeds_paired'], 'seed')}. "
    if row["change_low"] is None or row["change_high"] is None:
        return told + "There is too little data for an interval."
    if row["change_low"] <= 0 <= row["change_high"]:
        return told + "The interval includes zero: this run shows no difference between the two."
    return told + f"The interval excludes zero: {label(method)} did {'better' if row['change_low'] > 0 else 'worse'}."


def caption(name: str, run: RunInputs, results: Mapping[str, Any], split: str) -> str:
    """How to read one figure, with this run's zone, rule and layer numbers filled in."""
    zone, rule, layers = "No zone is shaded: none was found, or no profile was made.", "", "of the model"
    numbers = ""
    if run.experts is not None:
        rule = str(rule_from(run.experts.rule)).replace("=", " = ")
        numbers = _layer_numbers([int(number) for number in run.experts.layer_number])
        zone = f"No alignment zone: {run.experts.zone.reason}."
    if run.zone is not None:
        first, last = run.zone.first, run.zone.last
        zone = f"shaded is the alignment zone, MoE layers {first} to {last} ({run.zone.how}: {run.zone.reason})."
        layers = f"{first} to {last} of the zone"
    over = [c for c in results["ci_gain"]["correlations"] if c["over"] == "sft" and c["r"] is not None]
    over_sft = (
        " Against the gain over SFT: " + "; ".join(f"{label(c['method'])} {correlation_text(c)}" for c in over)
        if over
        else ""
    )
    return CAPTIONS[name].format(
        zone=zone, rule=rule, layers=layers, numbers=numbers, split=split, over_sft=over_sft and over_sft + "."
    )


def _layer_numbers(numbers: list[int]) -> str:
    first = numbers[0]
    if numbers == list(range(first, first + len(numbers))):
        told = f"MoE layer 0 is {first}, and so on upward"
    else:
        told = ", ".join(f"{place} is {number}" for place, number in enumerate(numbers))
    return f"Layers are counted from 0 among the MoE layers; as Megatron's layer_number: {told}."


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def verdict(found: Mapping[str, Any]) -> list[str]:
    """predict.json's verdict as sentences: its word and reading first, then by task, then what ci share adds."""
    if not found:
        return []
    lines = [f"{str(found['word']).capitalize()}. {found['reading']}"]
    if found.get("tasks"):
        lines.append("By task: " + ", ".join(f"{task} {word}" for task, word in found["tasks"].items()) + ".")
    return lines + [str(found[key]) for key in ("pairs", "ci_share", "paper") if key in found]
