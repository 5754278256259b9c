"""Figures of what was there before training: divergence curve, taxonomy, task experts."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ramoe_megatron.report.inputs import RunInputs
from ramoe_megatron.report.style import (
    COLOURS,
    LAYER_AXIS,
    LINES,
    MARKERS,
    from_zero,
    panels,
    plain,
    shade_zone,
    unique,
    whole_layers,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CATEGORIES = {
    "cc": ("both right (cc)", "#0072B2", ""),
    "ci": ("English right, target wrong (ci)", "#E69F00", "//"),
    "ic": ("target right, English wrong (ic)", "#56B4E9", ".."),
    "ii": ("both wrong (ii)", "#BBBBBB", ""),
}


def divergence(run: RunInputs, results: Mapping[str, Any]) -> "Figure | None":
    if not run.divergence:
        return None
    figure, (axis,) = panels(1, 7.5, 3.6)
    shade_zone(axis, run)
    for place, language in enumerate(unique(row.language for row in run.divergence)):
        rows = [row for row in run.divergence if row.language == language and row.divergence is not None]
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4, "label": plain(language)}
        line = LINES[place // len(COLOURS) % len(LINES)]
        axis.plot([row.moe_layer for row in rows], [row.divergence or 0.0 for row in rows], line, **style)
    whole_layers(axis)
    axis.set_ylabel(f"divergence from {plain(run.anchor)} routing\n(0 = alike, 1 = as far as can be)")
    from_zero([axis])
    axis.grid(axis="y", alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def taxonomy(run: RunInputs, results: Mapping[str, Any]) -> "Figure | None":
    pairs = shown_pairs(run)
    if not pairs:
        return None
    tasks = unique(pair["task"] for pair in pairs)
    tallest = max(sum(pair["task"] == task for pair in pairs) for task in tasks)
    figure, axes = panels(len(tasks), 4.6, 0.8 + 0.27 * tallest)
    for axis, task in zip(axes, tasks, strict=True):
        own = [pair for pair in pairs if pair["task"] == task]
        left = [0.0] * len(own)
        for name, (meaning, colour, hatch) in CATEGORIES.items():
            shares = [100 * pair[name] / pair["n"] for pair in own]
            style: dict[str, Any] = {
                "color": colour,
                "hatch": hatch,
                "edgecolor": "white",
                "linewidth": 0.6,
                "height": 0.8,
            }
            axis.barh(range(len(own)), shares, left=left, label=meaning, **style)
            if name == "ci":
                box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
                for place, (start, share) in enumerate(zip(left, shares, strict=True)):
                    if share >= 8:
                        axis.text(
                            start + share / 2, place, f"{share:.0f}", ha="center", va="center", fontsize=7.5, bbox=box
                        )
            left = [a + b for a, b in zip(left, shares, strict=True)]
        axis.set_yticks(range(len(own)), [f"{plain(pair['language'])}  n={pair['n']}" for pair in own])
        axis.invert_yaxis()
        axis.set_xlim(0, 100)
        axis.set_title(plain(task))
        axis.set_xlabel("share of examples, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def shown_pairs(run: RunInputs) -> list[dict[str, Any]]:
    """The taxonomy of the evaluated split; of the first split when that one was not scored."""
    pairs = [pair for pair in (run.taxonomy or {}).get("pairs", []) if pair["language"] != run.anchor and pair["n"]]
    split = run.evaluated_split()
    if pairs and split not in {pair["split"] for pair in pairs}:
        split = pairs[0]["split"]
    return [pair for pair in pairs if pair["split"] == split]


def experts(run: RunInputs, results: Mapping[str, Any]) -> "Figure | None":
    if run.experts is None:
        return None
    delta, chosen = run.experts.delta.float().numpy(), run.experts.expert_mask.bool().numpy()
    _, layers, count = delta.shape
    figure, axes = panels(len(run.experts.tasks), min(7.0, 2.2 + 0.14 * count), min(6.0, 1.5 + 0.2 * layers))
    limit = max(float(abs(delta).max()), 1e-6)
    for task, axis in enumerate(axes):
        image = axis.imshow(delta[task], cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        places = chosen[task].nonzero()
        axis.scatter(
            places[1],
            places[0],
            s=max(4.0, 900 / max(count, 4 * layers)),
            marker="o",
            color="black",
            edgecolor="white",
            lw=0.6,
        )
        if run.zone is not None:
            for edge in (run.zone.first - 0.5, run.zone.last + 0.5):
                axis.axhline(edge, color="black", lw=1, ls="--")
        axis.set_title(f"{plain(run.experts.tasks[task])}: {int(chosen[task].sum())} chosen")
        axis.set_xlabel("expert (0-based)")
        axis.set_ylabel(LAYER_AXIS)
        axis.locator_params(axis="y", integer=True)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("delta: top-k frequency on the task\nminus general English, per token")
    return figure
