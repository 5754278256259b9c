"""Any artefact of a run as tables for the console: ``ramoe inspect FILE``.

Layers are shown by their 0-based place among the MoE layers, beside Megatron's 1-based ``layer_number``.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.files import check_document, read_json
from ramoe_megatron.artifacts.priors import Priors
from ramoe_megatron.artifacts.records import first_line, read_divergence, read_examples, read_taxonomy
from ramoe_megatron.artifacts.tensors import open_any
from ramoe_megatron.artifacts.usage import UsageFile
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.categories import summarise
from ramoe_megatron.method.divergence import DivergenceRow, Zone, mean_curve, zone_from_curve
from ramoe_megatron.method.experts import describe_empty, rule_from
from ramoe_megatron.report import artefact_tables as tables
from ramoe_megatron.report.comparison.document import comparison_sections
from ramoe_megatron.report.comparison.gain_map import map_sections
from ramoe_megatron.report.rendering import (
    CellValue,
    PageSection,
    Part,
    Table,
    console,
    console_sections,
    facts_table,
)
from ramoe_megatron.report.vocabulary import Record, number

LAYER_HEADS = ("MoE layer (from 0)", "layer_number")
"""Place among the MoE layers, and Megatron's own number (from 1)."""
SHOWN_EXPERTS = 8
"""Experts listed per layer: the chosen ones of largest delta, or those used most."""


def describe(path: str | os.PathLike[str]) -> RenderableType:
    """Readable tables of an artefact, chosen by its file name suffix and its format entry.

    Raises:
        RamoeError: the file is missing, malformed, or not an artefact of this project.
    """
    path = Path(path)
    if path.suffix == ".csv":
        return console(_divergence_parts(path))
    if path.suffix == ".jsonl":
        return console([_lines_table(path)])
    tensors = path.suffix == ".safetensors"
    binary = "ramoe-experts, ramoe-priors or ramoe-usage"
    document: Any = open_any(path, binary)[1] if tensors else read_json(path)
    name = document.get("format") if isinstance(document, dict) else None
    expected = (*_DESCRIBE, *_DOCUMENTS)
    if name not in expected:
        raise RamoeError(
            f"{path}: found format {name!r}, expected one of {', '.join(expected)}; give an artefact of a run"
        )
    check_document(path, document, name)
    try:
        if name in _DOCUMENTS:
            return console_sections(_DOCUMENTS[name](document))
        return console(_DESCRIBE[name](path, document))
    except (KeyError, TypeError, AttributeError) as error:
        raise RamoeError(
            f"{path}: {name} with a bad entry ({type(error).__name__}: {error}); write the file again"
        ) from error


def _head(
    path: Path,
    kind: str,
    entries: Mapping[str, CellValue],
    data: Iterable[Mapping[str, str]],
    version: str = "",
) -> Table:
    """The artefact's own entries, the files that it was made from, and the version that wrote it."""
    written = {"written by": f"ramoe-megatron {version}"} if version else {}
    return facts_table(f"{path}: {kind}", {**entries, "data": tables.data_text(data), **written})


# --- documents ---


def _taxonomy_parts(path: Path, document: Record) -> list[Part]:
    entries = {key: document[key] for key in ("anchor", "checkpoint")}
    if "anchors" in document:
        entries["anchors"] = ", ".join(document["anchors"])
    if "samples" in document:
        entries["samples"] = ", ".join(f"{each['language']}={each['path']}" for each in document["samples"])
    return [
        _head(path, "ramoe-taxonomy", entries, document["data"], document["package_version"]),
        tables.taxonomy_table("taxonomy by task, target language and split", document["pairs"]),
    ]


def _anchors_parts(path: Path, document: Record) -> list[Part]:
    entries = {"anchors": ", ".join(document["anchors"]), "taxonomy's anchor": document["anchor"]}
    entries["checkpoint"] = document["checkpoint"]
    head = _head(path, "ramoe-anchors", entries, document["data"], document["package_version"])
    return [head, tables.anchors_table(document)]


def _evaluation_parts(path: Path, document: Record) -> list[Part]:
    entries = {key: document[key] for key in ("method", "seed", "checkpoint", "split", "examples")}
    if "steering" in document:
        entries["steering"] = tables.steering_setting(path, document["steering"])
    rows = ((row["task"], row["language"], row["correct"], row["n"]) for row in document["rows"])
    return [
        _head(path, "ramoe-evaluation", entries, document["data"]),
        tables.evaluation_table("right answers", rows),
        *tables.mass_tables(document["mass"], ("task", "language")),
    ]


def _prediction_parts(path: Path, document: Record) -> list[Part]:
    return [f"{path}: ramoe-prediction", *tables.prediction_parts(document)]


def _steering_parts(path: Path, document: Record) -> list[Part]:
    entries = {key: document[key] for key in ("anchor", "checkpoint", "split")}
    entries["experts"] = tables.data_text(document["experts"])
    entries["left out"] = "\n".join(document["skipped"]) or None
    entries["best"] = tables.steering_setting(path, document["best"])
    head = _head(path, "ramoe-steering", entries, document["data"], document["package_version"])
    return [head, tables.steering_table(path, document)]


def _results_parts(path: Path, document: Record) -> list[Part]:
    entries = {"recipe": document["recipe"], "anchor": document["anchor"]}
    entries |= {key: ", ".join(map(str, document[key])) for key in ("methods", "seeds")}
    return [
        facts_table(f"{path}: ramoe-results", entries),
        tables.summary_table(document),
        tables.differences_table(document),
        tables.languages_table(document),
        tables.correlations_table(document),
        tables.runs_table(document),
        *tables.mass_tables(document["mass"], ("method", "seed", "task", "language")),
    ]


# --- safetensors ---


def _experts_parts(path: Path, _document: Record) -> list[Part]:
    experts = ExpertFile.load(path)
    rule = rule_from(experts.rule)
    of = "" if experts.select_tokens == "all" else f" over the tokens {experts.select_tokens!r}"
    entries = {
        "model": tables.shape_text(experts.shape),
        "checkpoint": experts.checkpoint,
        "rule": f"{rule} on delta = task frequency{of} - general frequency",
        "zone": tables.zone_text(experts.zone, experts.layer_number.tolist()),
        "anchor": experts.anchor or "not recorded",
        "English patterns": ", ".join(experts.english_pattern) or "none",
        "sequences": tables.flat_text(experts.sequences),
    }
    parts: list[Part] = [_head(path, "ramoe-experts", entries, experts.data, experts.package_version)]
    for task, mask, delta in zip(experts.tasks, experts.expert_mask, experts.delta, strict=True):
        rows = []
        for layer, layer_number in enumerate(experts.layer_number.tolist()):
            inside = isinstance(experts.zone, Zone) and experts.zone.first <= layer <= experts.zone.last
            order = delta[layer].argsort(descending=True, stable=True).tolist()
            chosen = [f"{e} ({number(float(delta[layer, e]), '+.2f')})" for e in order if mask[layer, e]]
            largest = number(float(delta[layer].max()), "+.2f")
            rows.append((layer, layer_number, "yes" if inside else "", len(chosen), largest, _first(chosen)))
        heads = (*LAYER_HEADS, "in zone", "chosen", "largest delta", "expert (delta)")
        parts.append(Table(heads, rows, f"task experts: {task}", (5,)))
    return [*parts, *describe_empty(experts.expert_mask, experts.tasks, rule)]


def _first(experts: list[str]) -> str:
    return ", ".join(experts[:SHOWN_EXPERTS]) + (", ..." if len(experts) > SHOWN_EXPERTS else "")


def _priors_parts(path: Path, _document: Record) -> list[Part]:
    priors = Priors.load(path)
    entries = {
        "model": tables.shape_text(priors.shape),
        "checkpoint": priors.checkpoint,
        "examples": f"{len(priors.ids)}, first {', '.join(priors.ids[:5])}",
        "tokens": priors.tokens,
    }
    return [_head(path, "ramoe-priors", entries, priors.data, priors.package_version)]


def _usage_parts(path: Path, _document: Record) -> list[Part]:
    usage = UsageFile.load(path)
    entries = {
        "model": tables.shape_text(usage.shape),
        "checkpoint": usage.checkpoint,
        "tokens": tables.flat_text(dict(zip(usage.languages, usage.tokens.tolist(), strict=True))),
    }
    parts: list[Part] = [_head(path, "ramoe-usage", entries, usage.data, usage.package_version)]
    for language, frequency, gate in zip(usage.languages, usage.frequency, usage.gate, strict=True):
        rows = []
        for layer, layer_number in enumerate(usage.layer_number.tolist()):
            order = frequency[layer].argsort(descending=True, stable=True).tolist()
            used = [f"{e} ({frequency[layer, e]:.2f}, {gate[layer, e]:.2f})" for e in order]
            unused = int((frequency[layer] == 0).sum())
            rows.append((layer, layer_number, unused, _first(used)))
        heads = (*LAYER_HEADS, "unused", "expert (top-k frequency, gate weight)")
        parts.append(Table(heads, rows, f"experts used most: {language}", (3,)))
    return parts


# --- tables of lines ---


def _lines_table(path: Path) -> Table:
    if '"correct"' not in first_line(path):
        pairs = [asdict(pair) for pair in summarise(read_taxonomy(path))]
        return tables.taxonomy_table(f"{path}: taxonomy by task, target language and split", pairs)
    groups: dict[tuple[str, str], list[bool]] = {}
    for row in read_examples(path):
        groups.setdefault((row["task"], row["language"]), []).append(row["correct"])
    rows = ((*key, sum(found), len(found)) for key, found in sorted(groups.items()))
    return tables.evaluation_table(f"{path}: right answers", rows)


def _divergence_parts(path: Path) -> list[Part]:
    by_task: dict[str | None, list[DivergenceRow]] = {}
    for row in read_divergence(path):
        by_task.setdefault(row.task, []).append(row)
    return [
        part
        for task, rows in by_task.items()
        for part in _curve_parts(f"{path}{f', {task}' if task else ''}", rows)
    ]


def _curve_parts(name: str, rows: Sequence[DivergenceRow]) -> list[Part]:
    curve = mean_curve(rows)
    shown: list[list[CellValue]] = []
    numbers = []
    for layer in sorted({row.moe_layer for row in rows}):
        own = [row for row in rows if row.moe_layer == layer]
        numbers.append(own[0].layer_number)
        values = [*(row.divergence for row in own), float(curve[layer])]
        cells = [number(value, ".4f") for value in values]
        shown.append([layer, numbers[-1], *cells, sum(row.undefined_pairs for row in own)])
    heads = (*LAYER_HEADS, *dict.fromkeys(row.language for row in rows), "mean", "undefined pairs")
    title = f"{name}: entropy-normalised JS divergence from the anchor language, in [0, 1]"
    zone = tables.zone_text(zone_from_curve(curve), numbers)
    return [Table(heads, shown, title, ()), f"zone by the curve: {zone}"]


_DESCRIBE: dict[str, Callable[[Path, Record], list[Part]]] = {
    "ramoe-taxonomy": _taxonomy_parts,
    "ramoe-anchors": _anchors_parts,
    "ramoe-evaluation": _evaluation_parts,
    "ramoe-prediction": _prediction_parts,
    "ramoe-steering": _steering_parts,
    "ramoe-results": _results_parts,
    "ramoe-experts": _experts_parts,
    "ramoe-priors": _priors_parts,
    "ramoe-usage": _usage_parts,
}
_DOCUMENTS: dict[str, Callable[[Record], list[PageSection]]] = {
    "ramoe-comparison": comparison_sections,
    "ramoe-map": map_sections,
}
