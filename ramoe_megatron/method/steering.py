"""Routing steering at inference: raise the router logits of the task experts (arXiv 2510.04694, eq. 4-5).

Shape suffixes: G tasks, L MoE layers, E routed experts. MoE layers are numbered from 0.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.experts import Tau

Kind = Literal["soft", "hard"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NOISE_VARIANCE = 1e-6
"""Variance of ``eps ~ N(0, 1e-6)`` in hard steering. The paper does not say whether 1e-6 is the variance or
the standard deviation; the variance is our reading."""
LEAST_RISE = 2.0**-19
"""Least rise in hard steering: the smallest rise that float32 scores can resolve. The value is for logits of
size up to 1; for larger logits the least rise is proportional to the largest logit."""
NO_STEERING = {"kind": "none", "strength": None, "tau": None, "layers": None}
"""The entry of the files for a run without steering."""


def steer(kind: Kind, logits: Tensor, expert_mask: Tensor, strength: float, noise: Tensor) -> Tensor:
    """Router logits before the softmax, raised for the steered experts (arXiv 2510.04694, eq. 4-5).

    soft: ``z_k += strength * std_E(z)``. ``std_E`` is the standard deviation of the token's logits over all E
    experts, as of a population (our reading: the paper does not say population or sample). A negative
    strength lowers the logits.

    hard: ``z_k = max(z) + |eps|``. The absolute value is our reading: with a random sign, half of the steered
    experts would fall below ``max(z)``. The rise is at least ``LEAST_RISE`` and at least one step of the
    logits' dtype. So each steered expert ranks above every other expert, also after a softmax in float32, or
    after a sqrt(softplus) that does not underflow (``max(z)`` above -87). For other routers see
    `mcore.refusals.refuse_hard_steering`.

    Args:
        logits: [..., E]
        expert_mask: the steered experts; bool, broadcast to the logits.
        strength: strength of soft steering; hard steering ignores it.
        noise: eps of hard steering, broadcast to the logits; soft steering ignores it.

    Returns:
        Logits of the same shape and dtype, computed in float32 or wider. Logits outside the mask, and all
        logits with soft steering of strength 0, keep their bits.
    """
    if kind == "soft" and strength == 0:
        return logits
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if kind == "soft":
        raised = (z + strength * z.std(dim=-1, keepdim=True, correction=0)).to(logits.dtype)
    else:
        largest = z.amax(dim=-1, keepdim=True)
        above = torch.nextafter(
            largest.to(logits.dtype), torch.full_like(largest, math.inf, dtype=logits.dtype)
        )
        rise = torch.maximum(noise.abs().to(z.dtype), LEAST_RISE * largest.abs().clamp(min=1))
        raised = torch.maximum((largest + rise).to(logits.dtype), above)
    return torch.where(expert_mask, raised, logits)


def steering_noise(num_moe_layers: int, num_experts: int) -> Tensor:
    """eps of hard steering: one draw per layer and expert, the same in any layout. float32 [L, E]"""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_moe_layers, num_experts, generator=generator) * math.sqrt(NOISE_VARIANCE)


@dataclass(frozen=True, slots=True)
class Steering:
    """One setting of steering."""

    kind: Kind
    strength: float | None
    """Strength of soft steering, in standard deviations of the token's logits; None for hard steering. In
    arXiv 2510.04694, 0.5 is used, and values up to 1 work best."""
    tau: float | None
    """Steer the experts whose delta is above tau (arXiv 2510.04694: 0.25 to 0.5). None steers the experts
    chosen in the expert file."""
    layers: tuple[int, int]
    """First and last steered MoE layer, 0-based, inclusive."""

    def __post_init__(self) -> None:
        """Raises RamoeError for an invalid value."""
        if self.kind not in KINDS:
            raise RamoeError(f"steering: found kind {self.kind!r}, expected {' or '.join(KINDS)}")
        if self.kind == "soft" and (self.strength is None or not math.isfinite(self.strength)):
            raise RamoeError(
                f"steering: found strength {self.strength!r}, expected a finite number (the paper: 0.5)"
            )
        if self.kind == "hard" and self.strength is not None:
            raise RamoeError(
                f"steering: found strength {self.strength} for hard, which takes none; "
                "leave the strength out, or use soft"
            )
        if self.tau is not None and not -1 <= self.tau < 1:
            raise RamoeError(
                f"steering: found tau {self.tau}, expected a number in [-1, 1) (the paper: 0.25 to 0.5)"
            )

    def experts(self, chosen: Tensor, delta: Tensor) -> Tensor:
        """The steered experts of each task. bool [G, L, E]

        Args:
            chosen: the task experts of the expert file, used by a setting without tau; bool [G, L, E].
            delta: the difference in frequency of each expert, compared with tau; [G, L, E].

        Raises:
            RamoeError: the steered layers are outside the layers of the tensors.
        """
        first, last = self.layers
        layers = chosen.shape[1]
        if not 0 <= first <= last < layers:
            raise RamoeError(f"steering in MoE layers {first} to {last}, but the model has 0 to {layers - 1}")
        chosen_GLE = chosen if self.tau is None else Tau(self.tau).choose(delta)
        inside_L = torch.zeros(layers, dtype=torch.bool)
        inside_L[first : last + 1] = True
        return chosen_GLE & inside_L[:, None]

    def document(self) -> dict[str, Any]:
        """The setting as an entry of the JSON files."""
        return asdict(self) | {"layers": list(self.layers)}

    @classmethod
    def from_document(cls, entry: Mapping[str, Any], path: str | os.PathLike[str]) -> Self | None:
        """The setting of an entry from `document`; None for `NO_STEERING`.

        Raises:
            RamoeError: the entry is invalid. The message names the file ``path``.
        """
        try:
            if entry["kind"] == "none":
                return None
            first, last = (int(layer) for layer in entry["layers"])
            strength, tau = (None if entry[key] is None else float(entry[key]) for key in ("strength", "tau"))
            return cls(entry["kind"], strength, tau, (first, last))
        except (KeyError, TypeError, ValueError) as error:  # a RamoeError is a ValueError
            raise RamoeError(
                f"{path}: bad setting of steering ({type(error).__name__}: {error}); write the file again"
            ) from error

    def __str__(self) -> str:
        strength = "" if self.strength is None else f" {self.strength:g}"
        experts = "the file's experts" if self.tau is None else f"tau={self.tau:g}"
        return f"{self.kind}{strength}, {experts}, MoE layers {self.layers[0]}-{self.layers[1]}"
