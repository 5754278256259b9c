"""comparison.html: the sections of the comparison on one self-contained page, in the style of report.html."""

from collections.abc import Mapping
from pathlib import Path

from ramoe_megatron.report.comparison.document import title
from ramoe_megatron.report.comparison.findings import findings
from ramoe_megatron.report.comparison.plots import CAPTIONS
from ramoe_megatron.report.comparison.view import sections
from ramoe_megatron.report.comparison.words import LIMITS, Comparison
from ramoe_megatron.report.html import embedded, fill
from ramoe_megatron.report.tables import label


def render(comparison: Comparison, plots: Mapping[str, Path], reports: Mapping[str, str]) -> str:
    """The page as text, figures embedded. `reports`: base model -> where its own report lies, from the page."""
    shown = sections(comparison)
    names = {"main": label(comparison["main"]), "reference": label(comparison["reference"])}
    return fill(
        "comparison.html",
        name=title(comparison),
        contents=[*((section.name, section.title) for section in shown), ("limits", "Limits")],
        summary=findings(comparison),
        sections=shown,
        figures={name: {"caption": CAPTIONS[name].format(**names), **embedded(path)} for name, path in plots.items()},
        limits=[limit.format(**names) for limit in LIMITS],
        command=comparison["command"],
        reports=reports,
    )
