"""What the figures share. Colours are Okabe and Ito's; a marker, line style or hatch tells apart what a colour does."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ramoe_megatron.report.inputs import RunInputs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A8A00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
LAYER_AXIS = "MoE layer (0-based)"
METHOD_STYLE = {
    "base": ("#555555", "o"),
    "sft": ("#0072B2", "s"),
    "ra-moe": ("#D55E00", "^"),
    "ra-moe-shuffled": ("#009E73", "D"),
}


@contextmanager
def pyplot() -> Iterator[None]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 10, "axes.axisbelow": True, "hatch.linewidth": 0.5}
    plain_frame: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    with plt.rc_context(settings | plain_frame):
        yield
    plt.close("all")


def panels(count: int, width: float, height: float, **options: Any) -> "tuple[Figure, list[Axes]]":
    """A grid of `count` panels of that size in inches, two in a row (three when there are three)."""
    import matplotlib.pyplot as plt

    columns = 3 if count == 3 else min(2, count)
    rows = -(-count // columns)
    size = (min(width * columns, 10.5), height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
    figure.get_layout_engine().set(h_pad=0.09, hspace=0.04)  # type: ignore[union-attr]
    flat = list(axes.flat)
    for spare in flat[count:]:
        spare.set_visible(False)
    for axis in flat[:count]:
        axis.tick_params(labelbottom=True, labelleft=True)  # panels that share an axis are read on their own as well
    return figure, flat[:count]


def plain(text: str) -> str:
    """matplotlib reads text between dollar signs as mathematics; names from data are shown as they are."""
    return str(text).replace("$", r"\$")


def method_style(method: str, place: int) -> tuple[str, str]:
    return METHOD_STYLE.get(method, (COLOURS[(place + 3) % len(COLOURS)], MARKERS[(place + 3) % len(MARKERS)]))


def shade_zone(axis: "Axes", run: RunInputs) -> None:
    if run.zone is not None:
        axis.axvspan(
            run.zone.first - 0.5,
            run.zone.last + 0.5,
            color="#F0E442",
            alpha=0.35,
            lw=0,
            zorder=0,
            label="alignment zone",
        )


def from_zero(axes: "Sequence[Axes]") -> None:
    """Axes that share their scale, from zero to a little above the highest line: called once all lines are drawn, since a limit set
    earlier would cut off what comes after."""
    heights = [np.asarray(line.get_ydata(), dtype=float) for axis in axes for line in axis.get_lines()]
    highest = max((float(height.max()) for height in heights if height.size), default=1.0)
    axes[0].set_ylim(0, 1.08 * highest)


def whole_layers(axis: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set_xlabel(LAYER_AXIS)


def unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def order(run: RunInputs, languages: Iterable[str]) -> list[str]:
    """The anchor first, then as in the data."""
    return sorted(unique(languages), key=lambda language: language != run.anchor)


def offset(place: int, count: int) -> float:
    return (place - (count - 1) / 2) * 0.7 / max(count, 1)


def language_axis(axis: "Axes", languages: Sequence[str]) -> None:
    names = [plain(name) for name in languages]
    axis.set_xticks(range(len(names)), names, rotation=90 if sum(map(len, names)) > 50 else 0)
    axis.set_xlim(-0.6, len(names) - 0.4)


def legend_below(figure: "Figure", axes: "Sequence[Axes]") -> None:
    handles = {name: handle for axis in axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=min(4, len(handles)), fontsize=8
    )
