"""The loss that is attached at a router, and its gradient at the logits, against METHODS written out in
float64.

The reference below shares nothing with the package. For one aligned layer of Z, over the N samples of the
global batch (here one micro-batch on one rank):

    per-token loss off   coeff / Z * mean_i [i is aligned] D_i
    per-token loss on    coeff / Z * sum_i n_i [i is aligned] D_i

With `normalise ci` the first is the mean over the aligned samples, and the second is multiplied by sum n /
sum of the aligned n. The second is the sum that `finalize_model_grads` divides by sum_i n_i, the loss tokens
of the batch. Gradients are compared with central finite differences of the reference (step 1e-6 in float64,
its own error about 1e-9). Bound, for values and gradients: relative error (of the norm) below 1e-5, since the
losses at the routers are computed in float32 (found: 1e-6).

Not covered: several ranks or micro-batches, Megatron's own scale of the attached loss (the layout tests).
"""

import itertools
import types
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from ramoe_megatron.mcore.align.attach import Alignment
from ramoe_megatron.mcore.align.batch import routing_batch
from ramoe_megatron.mcore.align.metrics import COLUMNS, AlignmentMetrics
from ramoe_megatron.mcore.align.state import AlignmentState
from ramoe_megatron.mcore.arguments import RoutingAlignmentConfig
from ramoe_megatron.mcore.carrier import current

BOUND = 1e-5
COEFF, S, E, TASKS, LAYERS, ZONE, LAYER = 3.0, 7, 5, 3, 4, (1, 3), 2
PROMPT = np.array([2, 3, 0, 4, 1, 5])  # the third sample has no prompt,
LENGTH = np.array([5, 3, 4, 7, 6, 6])  # the second no response, the fourth no padding
TASK = np.array(
    [0, 1, 0, 1, 2, -1]
)  # task 2 has no expert in this layer; the last sample is of no known task
ALIGNED = np.array([True, True, True, True, True, False])
LOSS_TOKENS = np.array([3, 1, 4, 2, 5, 1])
RANDOM = np.random.default_rng(5)
LOGITS_SBE = (2 * RANDOM.standard_normal((S, len(PROMPT), E))).astype(np.float32).astype(np.float64)
MASK_GLE = RANDOM.random((TASKS, LAYERS, E)) < 0.5
MASK_GLE[:, LAYER] = [[True, True, False, False, False], [False, False, True, False, True], [False] * 5]
PATTERN_GLE = RANDOM.dirichlet(np.ones(E), (TASKS, LAYERS)).astype(np.float32)
TARGET_BZE = RANDOM.dirichlet(np.ones(E), (len(PROMPT), ZONE[1] - ZONE[0] + 1)).astype(np.float32)
TARGET_BZE[0, LAYER - ZONE[0], 0] = 0  # an expert that English never uses
TARGET_BZE[0] /= TARGET_BZE[0].sum(-1, keepdims=True)


def scores(logits: np.ndarray, function: str) -> np.ndarray:
    """Router distribution over all experts. Sigmoid and sqrt-softplus scores are divided by their sum."""
    raw = {
        "softmax": np.exp,
        "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
        "sqrtsoftplus": lambda z: np.sqrt(np.log1p(np.exp(z))),
    }
    value = raw[function](logits)
    return value / value.sum(-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / q), 0.0).sum(-1)


def reference_divergence(name: str, p: np.ndarray, q: np.ndarray, experts: np.ndarray) -> np.ndarray:
    """METHODS section 1, for distributions p [..., E] (English) and q [..., E]."""
    if name == "kl":
        return kl(p, q)
    if name == "js":
        return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2
    if not experts.any():
        return np.zeros(q.shape[:-1])  # one bin for all experts: nothing to align
    m_p, m_q = p[..., experts].sum(-1), q[..., experts].sum(-1)
    masses = m_p * np.log(m_p / m_q) + (1 - m_p) * np.log((1 - m_p) / (1 - m_q))
    if name == "mass":
        return masses
    return masses + m_p * kl(p[..., experts] / m_p[..., None], q[..., experts] / m_q[..., None])


def chosen(tokens: str, b: int) -> list[int]:
    """Rows of sample b whose routing is pooled."""
    rows = {
        "prompt": range(PROMPT[b]), "response": range(PROMPT[b], LENGTH[b]), "all": range(LENGTH[b]),
        "last": range(max(PROMPT[b] - 1, 0), PROMPT[b]),
    }  # fmt: skip
    return list(rows[tokens])


def reference(
    logits_NSBE: np.ndarray, function: str, per_token: bool, normalize: str, config: RoutingAlignmentConfig
) -> np.ndarray:
    """Each sample's part of the layer's loss, without coeff / Z, after `finalize_model_grads`. [N, B]"""
    total = np.zeros((len(logits_NSBE), len(PROMPT)))
    weight = LOSS_TOKENS if per_token else np.ones(len(PROMPT))
    for b in np.flatnonzero(ALIGNED):
        rows = chosen(config.tokens, b)
        if not rows:
            continue
        q_NTE = scores(logits_NSBE[:, rows, b], function)
        p_E = (
            PATTERN_GLE[TASK[b], LAYER] if config.target == "profile" else TARGET_BZE[b, LAYER - ZONE[0]]
        ).astype(np.float64)
        experts = MASK_GLE[TASK[b], LAYER]
        if config.pooling == "sequence":
            found_N = reference_divergence(config.divergence, p_E, q_NTE.mean(1), experts)
        else:
            found_N = reference_divergence(config.divergence, p_E, q_NTE, experts).mean(1)
        total[:, b] = weight[b] * found_N
    return total / weight[ALIGNED if normalize == "ci" else slice(None)].sum()


def attached(
    function: str, per_token: bool, normalize: str, config: RoutingAlignmentConfig
) -> tuple[float, np.ndarray]:
    """From the code: the logged loss of the layer, and the gradient at the logits."""
    metrics = AlignmentMetrics(range(1, LAYERS + 1), "cpu")
    mask, pattern = torch.tensor(MASK_GLE), torch.tensor(PATTERN_GLE)
    chunk = torch.nn.Module()
    zone = tuple(range(ZONE[0], ZONE[1] + 1))
    equal = dict.fromkeys(zone, 1.0)
    chunk.ramoe_alignment = Alignment(
        config, ("a", "b", "c"), zone, mask, pattern, equal, metrics, AlignmentState(config, "cpu")
    )
    chunk.ramoe_layers = {LAYER}
    router = types.SimpleNamespace(
        tp_group=None, cp_group=None, tp_cp_group=None, config=types.SimpleNamespace(sequence_parallel=False),
        score_function=function, ramoe_layer=LAYER, training=True, calculate_per_token_loss=per_token,
    )  # fmt: skip
    unit = LOSS_TOKENS if per_token else np.ones(len(PROMPT))
    share = unit[ALIGNED].sum() / unit.sum() if normalize == "ci" else 1.0
    loss_mask = torch.tensor(np.arange(S)[None] < LOSS_TOKENS[:, None]).float()
    batch = {
        "prompt_length": torch.tensor(PROMPT), "length": torch.tensor(LENGTH), "loss_mask": loss_mask,
        "ramoe_weight": torch.tensor(ALIGNED / share, dtype=torch.float32), "ramoe_task": torch.tensor(TASK),
        "ramoe_target": torch.tensor(TARGET_BZE),
    }  # fmt: skip
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    logits = torch.tensor(LOGITS_SBE, dtype=torch.float32, requires_grad=True)
    with routing_batch(chunk, batch):
        context = current()
        assert context is not None
        probs = context.on_routing(router, logits, logits.view(-1, E).softmax(-1), torch.empty(0))
    (probs.sum() * 0).backward()
    sums = dict(zip(COLUMNS, metrics.sums_LM[LAYER].tolist(), strict=True))
    assert not metrics.sums_LM[[layer for layer in range(LAYERS) if layer != LAYER]].any()
    assert logits.grad is not None
    return sums["loss"] / sums["unit"], logits.grad.double().numpy()


def finite_differences(
    function: str, per_token: bool, normalize: str, config: RoutingAlignmentConfig
) -> np.ndarray:
    """Gradient of the reference's sum. [S, B, E]

    A sample's part depends only on its own logits, so all samples are moved at once.
    """
    step = 1e-6
    moved = step * np.eye(S * E).reshape(-1, S, 1, E)
    up, down = (
        reference(LOGITS_SBE + sign * moved, function, per_token, normalize, config) for sign in (1, -1)
    )
    return ((up - down) / (2 * step)).reshape(S, E, -1).transpose(0, 2, 1)


def check(function: str, per_token: bool, normalize: str, **choices: Any) -> None:
    # The taxonomy and the files are read elsewhere; here they only have to be named.
    config = RoutingAlignmentConfig(
        coeff=COEFF, experts="e", taxonomy="t", priors="p", normalize=normalize, **choices
    )
    loss, gradient = attached(function, per_token, normalize, config)
    expected = reference(LOGITS_SBE[None], function, per_token, normalize, config).sum()
    assert expected > 1e-3
    assert loss == pytest.approx(expected, rel=BOUND)
    # Megatron divides by the loss tokens of the batch after the backward pass.
    scale = COEFF / (ZONE[1] - ZONE[0] + 1) * (LOSS_TOKENS.sum() if per_token else 1)
    wanted = scale * finite_differences(function, per_token, normalize, config)
    assert np.linalg.norm(gradient - wanted) / np.linalg.norm(wanted) < BOUND
    # padding, other tokens, samples that are not aligned: nothing at all
    for b, aligned in enumerate(ALIGNED):
        others = np.setdiff1d(np.arange(S), chosen(config.tokens, b) if aligned else [])
        assert not gradient[others, b].any()


NORMALISERS = list(itertools.product((False, True), ("samples", "ci")))


@pytest.mark.parametrize("pooling", ["sequence", "token"])
@pytest.mark.parametrize("tokens", ["prompt", "response", "all", "last"])
@pytest.mark.parametrize("target", ["profile", "example"])
@pytest.mark.parametrize("divergence", ["lumped-kl", "mass", "kl", "js"])
def test_loss_and_gradient_are_those_of_the_float64_reference(
    divergence: str, target: str, tokens: str, pooling: str
) -> None:
    for per_token, normalize in NORMALISERS:
        check(
            "softmax",
            per_token,
            normalize,
            divergence=divergence,
            target=target,
            tokens=tokens,
            pooling=pooling,
        )


@pytest.mark.parametrize("function", ["sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("divergence", ["lumped-kl", "mass", "kl", "js"])
def test_scores_that_are_no_softmax_are_divided_by_their_sum(divergence: str, function: str) -> None:
    check(
        function, False, "samples", divergence=divergence, target="example", tokens="all", pooling="sequence"
    )
