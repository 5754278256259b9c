"""What a router sees of a micro-batch: the router distribution, and its mean over the chosen tokens of each sequence.

Shape suffixes: S tokens of a sequence on this rank, B sequences, E routed experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.losses import pool

TOKEN_CHOICES = ("prompt", "response", "all", "last")


def router_distribution(logits_SBE: Tensor, score_function: str) -> Tensor:
    """Router probabilities over all experts, before top-k, in float32 (arXiv 2605.28306; the precision is our reading).

    For a router of sigmoid or sqrt-softplus scores no paper says what to align: the scores divided by their sum (our reading).

    Raises:
        RamoeError: another score function than Megatron 0.19 has.
    """
    logits_SBE = logits_SBE.float()
    if score_function == "softmax":
        return logits_SBE.softmax(dim=-1)
    if score_function == "sigmoid":
        scores_SBE = logits_SBE.sigmoid()
    elif score_function == "sqrtsoftplus":
        scores_SBE = torch.nn.functional.softplus(logits_SBE).sqrt()
    else:
        raise RamoeError(f"--moe-router-score-function {score_function}: expected softmax, sigmoid or sqrtsoftplus")
    return scores_SBE / scores_SBE.sum(dim=-1, keepdim=True)


@dataclass(frozen=True)
class TokenSelection:
    """Which tokens of a micro-batch belong to the prompt and the response, wherever the rows of a sequence lie.

    Lengths count input tokens: a sequence of prompt, response and end token has `length` = its tokens less one.
    """

    prompt_length_B: Tensor
    length_B: Tensor

    def count(self, choice: str) -> Tensor:
        """Number of chosen tokens of each whole sequence, over all ranks. [B], float32"""
        counts = {
            "prompt": self.prompt_length_B,
            "response": self.length_B - self.prompt_length_B,
            "all": self.length_B,
            "last": self.prompt_length_B.clamp(max=1),
        }
        return counts[choice].float()

    def mask(self, choice: str, positions_S: Tensor) -> Tensor:
        """True at the chosen tokens. `positions_S`: place in the whole sequence of each row on this rank. [S, B]"""
        position_S1, prompt_1B, length_1B = positions_S[:, None], self.prompt_length_B[None], self.length_B[None]
        if choice == "prompt":
            return position_S1 < prompt_1B
        if choice == "response":
            return (position_S1 >= prompt_1B) & (position_S1 < length_1B)
        if choice == "all":
            return position_S1 < length_1B
        return position_S1 == prompt_1B - 1


def local_positions(router: Any, rows: int, device: torch.device) -> Tensor:
    """Place in the whole sequence of each of this rank's rows: context-parallel zigzag, then sequence-parallel piece. [S]"""
    tp, tp_rank = _size_and_rank(router.tp_group) if router.config.sequence_parallel else (1, 0)
    cp, cp_rank = _size_and_rank(router.cp_group)
    positions = torch.arange(rows * tp * cp, device=device)
    if cp > 1:
        pieces = positions.view(2 * cp, -1)  # two slices: a list as index would be copied to the device, and waited for
        positions = torch.cat([pieces[cp_rank], pieces[2 * cp - 1 - cp_rank]])
    return positions[tp_rank * rows : (tp_rank + 1) * rows]


def sum_over_sequence(router: Any, partial: Tensor) -> Tensor:
    """Sum over the ranks that hold pieces of the same sequences.

    The backward pass is the identity: each rank's gradient is that of its own rows, and Megatron sums the router weight's
    gradient over those ranks (over tensor-parallel ranks because the weight is marked `sequence_parallel`, over context-parallel
    ranks in DDP).
    """
    from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region

    group = router.tp_cp_group if router.config.sequence_parallel else router.cp_group
    if group is None or group.size() == 1:
        return partial
    return reduce_from_tensor_model_parallel_region(partial, group=group)


def pooled_distribution(router: Any, p_SBE: Tensor, selection: TokenSelection, choice: str) -> Tensor:
    """Mean router distribution over the chosen tokens of each whole sequence. [B, E]

    A sequence without chosen tokens gets zeros (it must carry no weight).
    """
    positions_S = local_positions(router, p_SBE.shape[0], p_SBE.device)
    numerator_BE, _ = pool(p_SBE, selection.mask(choice, positions_S))
    return sum_over_sequence(router, numerator_BE) / selection.count(choice).clamp(min=1)[:, None]


def _size_and_rank(group: Any) -> tuple[int, int]:
    return (1, 0) if group is None else (group.size(), group.rank())
