"""Any artefact of a run as tables for the console: ``ramoe inspect FILE``.

Layers are shown by their 0-based place among the MoE layers, with Megatron's own 1-based ``layer_number`` beside it.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.files import check_document, read_json
from ramoe_megatron.artifacts.priors import Priors
from ramoe_megatron.artifacts.records import first_line, read_divergence, read_examples, read_taxonomy
from ramoe_megatron.artifacts.tensors import open_any
from ramoe_megatron.artifacts.usage import UsageFile
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.divergence import Zone, mean_curve, zone_from_curve
from ramoe_megatron.method.experts import describe_empty, rule_from
from ramoe_megatron.method.taxonomy import summarise
from ramoe_megatron.report.documents import anchors, comparison, evaluation, prediction, results, steering, taxonomy, taxonomy_pairs
from ramoe_megatron.report.rendering import (
    LAYER_HEADS,
    data,
    facts,
    flat,
    shape,
    share,
    table,
    zone,
)

SHOWN_EXPERTS = 8
"""Experts listed per layer: the chosen ones of largest delta, or those used most."""


def describe(path: str | os.PathLike[str]) -> RenderableType:
    """Readable tables of an artefact, chosen by its ending and by the format that it names.

    Raises:
        RamoeError: when the file is missing, malformed, or no artefact of this project.
    """
    path = Path(path)
    if path.suffix == ".csv":
        return _divergence(path)
    if path.suffix == ".jsonl":
        return _lines(path)
    tensors = path.suffix == ".safetensors"
    document: Any = open_any(path, "ramoe-experts, ramoe-priors or ramoe-usage")[1] if tensors else read_json(path)
    name = document.get("format") if isinstance(document, dict) else None
    if name not in _DESCRIBE:
        raise RamoeError(f"{path}: found format {name!r}, expected one of {', '.join(_DESCRIBE)}; give an artefact of a run")
    check_document(path, document, name)
    try:
        return _DESCRIBE[name](path, document)
    except (KeyError, TypeError, AttributeError) as error:
        raise RamoeError(f"{path}: {name} with a bad entry ({type(error).__name__}: {error}); write the file again") from error


# --- safetensors ---


def _experts(path: Path, _document: Mapping[str, Any]) -> RenderableType:
    experts = ExpertFile.load(path)
    rule = rule_from(experts.rule)
    of = "" if experts.select_tokens == "all" else f" over the tokens {experts.select_tokens!r}"
    parts: list[RenderableType] = [
        facts(
            path,
            "ramoe-experts",
            {
                "model": shape(experts.shape),
                "checkpoint": experts.checkpoint,
                "rule": f"{rule} on delta = task frequency{of} - general frequency",
                "zone": zone(experts.zone, experts.layer_number.tolist()),
                "anchor": experts.anchor or "not recorded",
                "English patterns": ", ".join(experts.english_pattern) or "none",
                "sequences": flat(experts.sequences),
                "data": data(experts.data),
                "written by": f"ramoe-megatron {experts.package_version}",
            },
        )
    ]
    for task, mask, delta in zip(experts.tasks, experts.expert_mask, experts.delta, strict=True):
        rows = []
        for layer, layer_number in enumerate(experts.layer_number.tolist()):
            inside = isinstance(experts.zone, Zone) and experts.zone.first <= layer <= experts.zone.last
            order = delta[layer].argsort(descending=True, stable=True).tolist()
            chosen = [f"{e} ({delta[layer, e]:+.2f})" for e in order if mask[layer, e]]
            listed = ", ".join(chosen[:SHOWN_EXPERTS]) + (", ..." if len(chosen) > SHOWN_EXPERTS else "")
            rows.append([layer, layer_number, "yes" if inside else "", len(chosen), f"{delta[layer].max():+.2f}", listed])
        heads = (*LAYER_HEADS, "in zone", "chosen", "largest delta", "expert (delta)")
        parts.append(table(f"task experts: {task}", heads, rows, left=("expert (delta)",)))
    parts += [Text(sentence) for sentence in describe_empty(experts.expert_mask, experts.tasks, rule)]
    return Group(*parts)


def _priors(path: Path, _document: Mapping[str, Any]) -> RenderableType:
    priors = Priors.load(path)
    told = {
        "model": shape(priors.shape),
        "checkpoint": priors.checkpoint,
        "examples": f"{len(priors.ids)}, first {', '.join(priors.ids[:5])}",
        "tokens": priors.tokens,
        "data": data(priors.data),
        "written by": f"ramoe-megatron {priors.package_version}",
    }
    return facts(path, "ramoe-priors", told)


def _usage(path: Path, _document: Mapping[str, Any]) -> RenderableType:
    usage = UsageFile.load(path)
    told = {
        "model": shape(usage.shape),
        "checkpoint": usage.checkpoint,
        "tokens": flat(dict(zip(usage.languages, usage.tokens.tolist(), strict=True))),
        "data": data(usage.data),
        "written by": f"ramoe-megatron {usage.package_version}",
    }
    parts: list[RenderableType] = [facts(path, "ramoe-usage", told)]
    for language, frequency, gate in zip(usage.languages, usage.frequency, usage.gate, strict=True):
        rows = []
        for layer, layer_number in enumerate(usage.layer_number.tolist()):
            order = frequency[layer].argsort(descending=True, stable=True).tolist()
            listed = ", ".join(f"{e} ({frequency[layer, e]:.2f}, {gate[layer, e]:.2f})" for e in order[:SHOWN_EXPERTS])
            unused = int((frequency[layer] == 0).sum())
            rows.append([layer, layer_number, unused, listed + (", ..." if len(order) > SHOWN_EXPERTS else "")])
        heads = (*LAYER_HEADS, "unused", "expert (top-k frequency, gate weight)")
        parts.append(table(f"experts used most: {language}", heads, rows, left=heads[-1:]))
    return Group(*parts)


# --- tables of lines ---


def _lines(path: Path) -> RenderableType:
    if '"correct"' not in first_line(path):
        pairs = [asdict(pair) for pair in summarise(read_taxonomy(path))]
        return taxonomy_pairs(f"{path}: taxonomy by task, target language and split", pairs)
    groups: dict[tuple[str, str], list[bool]] = {}
    for row in read_examples(path):
        groups.setdefault((row["task"], row["language"]), []).append(row["correct"])
    rows = [[*key, len(found), share(sum(found), len(found))] for key, found in sorted(groups.items())]
    return table(f"{path}: answers", ("task", "language", "n", "correct, %"), rows, left=("task", "language"))


def _divergence(path: Path) -> RenderableType:
    rows = read_divergence(path)
    languages = list(dict.fromkeys(row.language for row in rows))
    curve = mean_curve(rows)
    by_layer: dict[int, list[str]] = {}
    numbers: dict[int, int] = {}
    undefined: dict[int, int] = {}
    for row in rows:
        by_layer.setdefault(row.moe_layer, []).append("-" if row.divergence is None else f"{row.divergence:.4f}")
        numbers[row.moe_layer] = row.layer_number
        undefined[row.moe_layer] = undefined.get(row.moe_layer, 0) + row.undefined_pairs
    cells_by_layer = [[n, numbers[n], *cells, f"{curve[n]:.4f}", undefined[n]] for n, cells in sorted(by_layer.items())]
    found = zone_from_curve(curve)
    heads = (*LAYER_HEADS, *languages, "mean", "undefined pairs")
    return Group(
        table(f"{path}: entropy-normalised JS divergence from the anchor language, in [0, 1]", heads, cells_by_layer),
        Text(f"zone by the curve: {zone(found, [numbers[n] for n in sorted(numbers)])}"),
    )


_DESCRIBE: dict[str, Callable[[Path, Mapping[str, Any]], RenderableType]] = {
    "ramoe-taxonomy": taxonomy,
    "ramoe-anchors": anchors,
    "ramoe-evaluation": evaluation,
    "ramoe-prediction": prediction,
    "ramoe-steering": steering,
    "ramoe-results": results,
    "ramoe-comparison": comparison,
    "ramoe-experts": _experts,
    "ramoe-priors": _priors,
    "ramoe-usage": _usage,
}
