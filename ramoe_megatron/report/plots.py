"""The report's figures, each a PNG under RUN/plots/."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ramoe_megatron.artifacts.files import atomic_write
from ramoe_megatron.report import outcome_plots, profile_plots
from ramoe_megatron.report.inputs import RunInputs
from ramoe_megatron.report.style import pyplot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES: "dict[str, Callable[[RunInputs, Mapping[str, Any]], Figure | None]]" = {
    "accuracy": outcome_plots.accuracy,
    "taxonomy": profile_plots.taxonomy,
    "divergence": profile_plots.divergence,
    "experts": profile_plots.experts,
    "mass_layers": outcome_plots.mass_layers,
    "mass_languages": outcome_plots.mass_languages,
    "ci_gain": outcome_plots.ci_gain,
    "transplant": outcome_plots.transplant,
}


def plot_all(run: RunInputs, results: Mapping[str, Any]) -> dict[str, Path]:
    """Draw every figure whose inputs are there: name -> PNG. An older PNG of a figure without inputs is removed."""
    return save_all(run.root / "plots", {name: functools.partial(draw, run, results) for name, draw in FIGURES.items()})


def save_all(folder: Path, figures: "Mapping[str, Callable[[], Figure | None]]") -> dict[str, Path]:
    """Draw and write each: name -> PNG. An older PNG of a figure that has nothing to show is removed."""
    drawn: dict[str, Path] = {}
    for name, draw in figures.items():
        path = folder / f"{name}.png"
        with pyplot():
            figure = draw()
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            with atomic_write(path) as temporary:
                # The format is named because the temporary file's ending is not .png.
                figure.savefig(temporary, format="png", dpi=144, bbox_inches="tight", metadata={"Software": None})
            drawn[name] = path
    return drawn
