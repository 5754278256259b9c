"""Weights of the aligned layers, taken from the divergence curve: a zone without hard edges.

Our own extension, in no paper. Shapes: L MoE layers. MoE layers are numbered from 0.
"""

from collections.abc import Sequence

from torch import Tensor

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.divergence import MIN_DEPTH


def divergence_weights(curve_L: Tensor, layers: Sequence[int]) -> Tensor:
    """Weight of each aligned layer: ``w_l`` proportional to ``(D_max - D_l) / (D_max - D_min)``, with mean 1.

    ``D_min`` and ``D_max`` are taken over all layers. The floor of the U has the largest weight; the layer
    with the highest divergence has weight 0. The mean of 1 keeps the scale of the alignment coefficient. The
    weights do not change when the curve is scaled or shifted.

    Args:
        curve_L: divergence by MoE layer (`divergence.mean_curve`). [L]
        layers: the aligned MoE layers, each once.

    Returns:
        float64 [len(layers)], in the order of ``layers``.

    Raises:
        RamoeError: a layer has no defined divergence; the curve is flat (its lowest value is within 20 % of
            its highest, `MIN_DEPTH`); ``layers`` is empty, has repeats or is outside the curve; or all
            weights are 0.
    """
    curve = curve_L.double()
    missing = (~curve.isfinite()).nonzero().flatten().tolist()
    if missing:
        raise RamoeError(
            f"layer weights: no defined divergence at MoE layer {', '.join(map(str, missing))}; "
            "profile more data, or weigh layers equally"
        )
    if not layers or len(set(layers)) != len(layers) or not all(0 <= layer < len(curve) for layer in layers):
        raise RamoeError(
            f"layer weights: found layers {list(layers)}, expected some of 0 to {len(curve) - 1}, each once"
        )
    low, high = float(curve.min()), float(curve.max())
    if high - low <= MIN_DEPTH * high:
        raise RamoeError(
            f"layer weights: the divergence curve is flat ({low:.4f} to {high:.4f} over depth), "
            "so its layers do not differ enough for weights; weigh layers equally"
        )
    weights = (high - curve[list(layers)]) / (high - low)
    if not bool(weights.any()):
        raise RamoeError(
            f"layer weights: layers {', '.join(map(str, layers))} have the highest divergence of the curve "
            f"({high:.4f}), so all their weights would be 0; align other layers, or weigh layers equally"
        )
    return weights / weights.mean()
