"""The value of ``--ramoe-layers``: which MoE layers are aligned. MoE layers are numbered from 0."""

import math
import re
from collections.abc import Sequence
from fractions import Fraction

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.divergence import NoZone, Zone


def chosen_layers(text: str, num_moe_layers: int, auto_zone: Zone | NoZone | None = None) -> tuple[int, ...]:
    """The MoE layers (0-based, ascending) of a ``--ramoe-layers`` value.

    The value is ``all``, a range as in `parse_layers`, or ``outside:RANGE`` for all layers that are not in
    the range.

    Raises:
        RamoeError: as `parse_layers`, or when ``outside:RANGE`` leaves no layer.
    """
    everything, wanted = range(num_moe_layers), text.strip()
    if wanted == "all":
        return tuple(everything)
    first, last = parse_layers(wanted.removeprefix("outside:"), num_moe_layers, auto_zone)
    if not wanted.startswith("outside:"):
        return tuple(everything[first : last + 1])
    layers = tuple(layer for layer in everything if not first <= layer <= last)
    if not layers:
        raise RamoeError(
            f"layers: {text!r} leaves none of the {num_moe_layers} MoE layers; give a smaller range"
        )
    return layers


def span(layers: Sequence[int], most: int | None = None) -> str:
    """Layers as text: "7-9" for consecutive layers, otherwise the first ``most`` as "2, 4, 6"."""
    if len(layers) > 1 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ", ".join(map(str, layers[:most])) + (", ..." if most is not None and len(layers) > most else "")


_RANGE = re.compile(r"\s*(\d+|\d*\.\d+)\s*-\s*(\d+|\d*\.\d+)\s*")


def parse_layers(text: str, num_moe_layers: int, auto_zone: Zone | NoZone | None = None) -> tuple[int, int]:
    """First and last MoE layer (0-based, inclusive) of a ``--ramoe-layers`` value.

    - ``auto`` is ``auto_zone``.
    - Two integers ("8-35") are numbers of MoE layers. "0-1" has integers: the first two layers.
    - Two decimals ("0.25-0.75") are depths in [0, 1], ends included. Layer l of L has depth (l + 1/2) / L. So
      "0.0-1.0" is every layer, and "0.25-0.75" of 24 layers is 6-17.

    Raises:
        RamoeError: the value has another form, the range is reversed, empty or outside the model, or ``auto``
            has no zone.
    """
    wanted = (
        "expected auto, FIRST-LAST (0-based MoE layers, as in 8-35) or a range of depths (as in 0.25-0.75)"
    )
    if text.strip() == "auto":
        if isinstance(auto_zone, Zone):
            return _inside(text, auto_zone.first, auto_zone.last, num_moe_layers)
        reason = auto_zone.reason if isinstance(auto_zone, NoZone) else "no divergence curve was measured"
        raise RamoeError(f"layers: auto finds no zone ({reason}); give the range yourself, {wanted}")
    match = _RANGE.fullmatch(text)
    if match is None or ("." in match[1]) != ("." in match[2]):
        raise RamoeError(f"layers: found {text!r}, {wanted}")
    if "." not in match[1]:
        return _inside(text, int(match[1]), int(match[2]), num_moe_layers)
    low, high = Fraction(match[1]), Fraction(match[2])
    if not 0 <= low < high <= 1:
        raise RamoeError(f"layers: found {text!r}, expected two rising depths between 0.0 and 1.0")
    half = Fraction(1, 2)
    first, last = math.ceil(low * num_moe_layers - half), math.floor(high * num_moe_layers - half)
    first, last = max(first, 0), min(last, num_moe_layers - 1)
    if first > last:
        raise RamoeError(
            f"layers: {text!r} contains the middle of none of the {num_moe_layers} MoE layers; "
            "give a wider range"
        )
    return first, last


def _inside(text: str, first: int, last: int, num_moe_layers: int) -> tuple[int, int]:
    if not 0 <= first <= last < num_moe_layers:
        raise RamoeError(
            f"layers: {text!r} means MoE layers {first} to {last}, expected a rising range within 0 to "
            f"{num_moe_layers - 1} (this model has {num_moe_layers} MoE layers, numbered from 0)"
        )
    return first, last
