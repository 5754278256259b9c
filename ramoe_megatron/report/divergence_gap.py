"""The claim that routing divergence in the middle layers predicts the gap between languages, layer by layer.

The claim is in the abstract of RA-MoE (arXiv 2605.28306). Our reading: over languages, the divergence from
the anchor's routing goes with how much less accurate the base model is than in the anchor language.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ramoe_megatron.report.inputs import RunInputs
from ramoe_megatron.report.pairing import pooled
from ramoe_megatron.statistics import pearson


def gap_points(run: RunInputs) -> list[dict[str, Any]]:
    """{"layer", "language", "divergence", "gap"} of each MoE layer and target language.

    The gap is the base model's accuracy in the anchor language minus that in the language, on the evaluated
    split. Empty without a divergence curve or an evaluation of the base model.
    """
    base = [found for found in run.evaluations if found.method == "base"]
    languages = {row["language"] for found in base for row in found.rows}
    accuracy = {name: found["accuracy"] for name in languages if (found := pooled(base, name))}
    if run.anchor not in accuracy:
        return []
    return [
        {
            "layer": row.moe_layer,
            "language": row.language,
            "divergence": row.divergence,
            "gap": accuracy[run.anchor] - accuracy[row.language],
        }
        for row in run.divergence or ()
        if row.divergence is not None and row.language in accuracy and row.language != run.anchor
    ]


def gap_correlations(
    points: Sequence[dict[str, Any]], groups: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Pearson's r of divergence and gap over the languages, for each layer.

    Args:
        groups: the base model of each point; r is then within base models.

    Returns:
        Rows with `layer`, `n`, and `r`, `low`, `high`, `p`, which are None with fewer than three languages or
        where one side is constant.
    """
    rows = []
    for layer in sorted({point["layer"] for point in points}):
        own = [place for place, point in enumerate(points) if point["layer"] == layer]
        x, y = ([points[place][side] for place in own] for side in ("divergence", "gap"))
        found = pearson(x, y, None if groups is None else [groups[place] for place in own])
        empty: dict[str, Any] = dict.fromkeys(("r", "low", "high", "p"))
        rows.append({"layer": layer, "n": len(own), **(dataclasses.asdict(found) if found else empty)})
    return rows
