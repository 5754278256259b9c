"""Weights of the aligned layers by the divergence curve: a zone without hard edges (our reading; no paper has it).

L MoE layers. Layers are 0-based places among the MoE layers.
"""

from collections.abc import Sequence

from torch import Tensor

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.divergence import MIN_DEPTH


def divergence_weights(curve_L: Tensor, layers: Sequence[int]) -> Tensor:
    """How much each aligned layer counts: ``w_l`` proportional to ``(D_max - D_l) / (D_max - D_min)``, with mean 1.

    The lowest and highest divergence are taken over all layers: the floor of the U counts most, the highest layer nothing. A mean of
    1 keeps the coefficient's meaning. Scaling or shifting the curve changes nothing.

    Args:
        curve_L: divergence by MoE layer (`divergence.mean_curve`). [L]
        layers: the aligned MoE layers, each once.

    Returns:
        float64 [len(layers)], in the order of ``layers``.

    Raises:
        RamoeError: a layer without a defined divergence, a flat curve (lowest and highest layer within 20 % of the highest, `MIN_DEPTH`),
            layers that repeat, are none or stand outside the curve, or that all weigh nothing.
    """
    curve = curve_L.double()
    missing = (~curve.isfinite()).nonzero().flatten().tolist()
    if missing:
        raise RamoeError(
            f"layer weights: no defined divergence at MoE layer {', '.join(map(str, missing))}; profile more data, or weigh layers equally"
        )
    if not layers or len(set(layers)) != len(layers) or not all(0 <= layer < len(curve) for layer in layers):
        raise RamoeError(
            f"layer weights: found layers {list(layers)}, expected some of 0 to {len(curve) - 1}, each once"
        )
    low, high = float(curve.min()), float(curve.max())
    if high - low <= MIN_DEPTH * high:
        raise RamoeError(
            f"layer weights: the divergence curve is flat ({low:.4f} to {high:.4f} over depth): it has no shape to weigh by; "
            "weigh layers equally"
        )
    weights = (high - curve[list(layers)]) / (high - low)
    if not bool(weights.any()):
        raise RamoeError(
            f"layer weights: layers {', '.join(map(str, layers))} are the highest of the divergence curve ({high:.4f}) and would all "
            "weigh 0; align others, or weigh layers equally"
        )
    return weights / weights.mean()
