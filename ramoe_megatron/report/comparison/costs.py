"""Costs of fine-tuning relative to the reference: time of the stage, time of an iteration, and memory."""

import datetime
import math
import re
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ramoe_megatron.report.comparison.study import Row, Study, Values, matched, spread
from ramoe_megatron.report.inputs import RunInputs

_ITERATION = re.compile(r"elapsed time per iteration \(ms\): ([0-9.]+)")
_RESIDENT = re.compile(r"ramoe: peak resident memory: ([0-9.]+) MiB")
_ALLOCATED = re.compile(r"\| max allocated: ([0-9.]+)")


def cost_rows(study: Study) -> list[Row]:
    """A row for each trained method: the median of each measure, and its ratio to the reference's.

    The ratio is over paired seeds. wall: seconds of the fine-tuning stage, with start-up and saving.
    iteration: milliseconds, the median of the logged iterations without the first. memory: peak in MiB, of
    rank 0 or of the largest device. A measure is None when it was not recorded.
    """
    measures = {
        name: _measured(study, of)
        for name, of in (("wall", _wall), ("iteration", _iteration), ("memory", _memory))
    }
    rows = []
    for method in [m for m in study.by_method if m != "base"]:
        row: Row = {"method": method}
        for name, values in measures.items():
            own, other = values[method], values.get(study.reference, {})
            row[name] = {
                "median": statistics.median(own.values()) if own else None,
                "ratio": _ratio(own, other),
            }
        if any(row[name]["median"] is not None for name in measures):
            rows.append(row)
    return rows


def _ratio(own: Values, other: Values) -> Row | None:
    """Ratio of geometric means, with Student's t on the logarithms of paired ratios, within base models."""
    pairs = matched(own, other)
    if not pairs:
        return None
    found = spread({base: [math.log(a / b) for a, b in own] for base, own in pairs.items()})
    ends: dict[str, Any] = {
        name: None if found[name] is None else math.exp(found[name]) for name in ("low", "high")
    }
    return {"ratio": math.exp(found["change"]), **ends, "p": found["p"], "n": found["n"]}


def _measured(study: Study, of: Callable[[RunInputs, str], float | None]) -> dict[str, Values]:
    found: dict[str, Values] = {}
    for method, evaluations in study.by_method.items():
        found[method] = {}
        for e in evaluations:
            value = of(study.runs[e.base], f"{method}-seed{e.seed}") if e.seed is not None else None
            if value:
                found[method][e.base, e.seed] = value
    return found


def hours(run: RunInputs) -> float | None:
    """Hours in which at least one stage ran. Breaks between calls do not count."""
    spans = sorted(span for name in _stages(run) if (span := _span(run, name)))
    if not spans:
        return None
    worked, until = datetime.timedelta(0), spans[0][0]
    for started, ended in spans:
        worked += max(datetime.timedelta(0), ended - max(started, until))
        until = max(until, ended)
    return worked.total_seconds() / 3600


def _stages(run: RunInputs) -> Mapping[str, Any]:
    return (run.manifest or {}).get("stages") or {}


def _span(run: RunInputs, name: str) -> tuple[datetime.datetime, datetime.datetime] | None:
    entry = _stages(run).get(name) or {}
    if entry.get("state") != "done" or not entry.get("started") or not entry.get("ended"):
        return None
    return datetime.datetime.fromisoformat(entry["started"]), datetime.datetime.fromisoformat(entry["ended"])


def _wall(run: RunInputs, name: str) -> float | None:
    span = _span(run, f"finetune/{name}")
    return (span[1] - span[0]).total_seconds() if span else None


def _log(run: RunInputs, name: str) -> str:
    path: Path = run.root / "logs" / f"finetune-{name}.log"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _iteration(run: RunInputs, name: str) -> float | None:
    # The first iteration includes the set-up.
    times = [float(value) for value in _ITERATION.findall(_log(run, name))][1:]
    return statistics.median(times) if times else None


def _memory(run: RunInputs, name: str) -> float | None:
    text = _log(run, name)
    peaks = [float(value) for value in _RESIDENT.findall(text)] or [
        float(value) for value in _ALLOCATED.findall(text)
    ]
    return max(peaks) if peaks else None
