"""The claim that routing divergence in the middle layers predicts the gap between languages, layer by layer.

The claim is in the abstract of RA-MoE (arXiv 2605.28306). Our reading: over languages, the divergence from
the anchor's routing goes with how much less accurate the base model is than in the anchor language. Within a
language, the same is asked over its tasks.
"""

import functools
from collections.abc import Sequence
from typing import Any

from ramoe_megatron.report.inputs import RunInputs
from ramoe_megatron.report.pairing import pooled
from ramoe_megatron.statistics import correlation_entries


def gap_points(run: RunInputs) -> list[dict[str, Any]]:
    """{"layer", "task", "language", "divergence", "gap"} of each MoE layer and target language.

    Points of a language over all tasks (task None) come first, then those of each task in it. The gap is the
    base model's accuracy in the anchor language minus that in the language, on the evaluated split. Empty
    without a divergence curve or an evaluation of the base model.
    """
    base = [found for found in run.evaluations if found.method == "base"]

    @functools.cache
    def accuracy(language: str, task: str | None) -> float | None:
        found = pooled(base, language, task)
        return None if found is None else found["accuracy"]

    points = []
    for row in [*(run.divergence or ()), *run.task_divergence]:
        anchor, own = accuracy(run.anchor, row.task), accuracy(row.language, row.task)
        if row.divergence is None or anchor is None or own is None or row.language == run.anchor:
            continue
        place = {"layer": row.moe_layer, "task": row.task, "language": row.language}
        points.append({**place, "divergence": row.divergence, "gap": anchor - own})
    return points


def gap_correlations(
    points: Sequence[dict[str, Any]], groups: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Pearson's r of divergence and gap over the points, for each layer.

    Args:
        groups: the group of each point, such as its base model; r is then within groups.

    Returns:
        Rows with `layer`, `n`, and `r`, `low`, `high`, `p`, which are None with too few points or where one
        side is constant.
    """
    rows = []
    for layer in sorted({point["layer"] for point in points}):
        own = [place for place, point in enumerate(points) if point["layer"] == layer]
        x, y = ([points[place][side] for place in own] for side in ("divergence", "gap"))
        own_groups = None if groups is None else [groups[place] for place in own]
        rows.append({"layer": layer, "n": len(own), **correlation_entries(x, y, own_groups)})
    return rows


def split_by_unit(points: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The points of languages over all tasks, and those of pairs of task and language."""
    return [p for p in points if p["task"] is None], [p for p in points if p["task"] is not None]
