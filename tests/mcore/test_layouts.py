"""One coefficient means the same in every layout: router gradients and logged figures on real Megatron, over
gloo ranks.

The scale chain that the gradient laws check. A rank attaches coeff / Z * sum_i w_i u_i D_i to each of the Z
aligned layers of a micro-batch of B samples, with u_i = 1 / B, or the sample's loss tokens n_i under
per-token loss.
1. `MoEAuxLossAutoScaler` multiplies its gradient by grad_scale * cp / micro-batches (per-token: grad_scale),
   where grad_scale is float16's loss scale.
2. `sum_over_sequence` sums the pooled routing over the ranks with pieces of a sequence; its backward pass is
   the identity, so each rank's gradient is that of its own rows, and Megatron sums those over TP (the weight
   is marked `sequence_parallel`).
3. Gradients of micro-batches add up. Pipeline stages, virtual ones too, each hold other layers: nothing to
   scale.
4. DDP averages over DP x CP (per-token: sums). The distributed optimizer reduces the same to one piece a
   rank.
5. `finalize_model_grads` divides by the loss tokens of the global batch under per-token loss. Expert
   parallelism moves tokens after the routers; ETP splits the experts alone.
In a pack u_i is packs / samples of its global batch, and a micro-batch is one pack. What is left is coeff / Z
/ N * sum over the N samples of the global batch, or the same weighted by n_i / sum n. Megatron's own losses
at the routers add to it. What is logged are ratios of sums in which each sample stands tp * cp times.

The rows stand in `layout_rows`. A gradient is read after `finalize_model_grads` and before clipping: one read
earlier cannot see a wrong scale. With the language-model loss times 0 and no loss of Megatron's ("alone") it
is the alignment's and nothing else.

Not covered here: transformer-engine's modules, so no fp8 and no selective recomputation of layernorm (0.19
asks transformer-engine whether fp8 is on), moe_act (grouped GEMM only), mla_up_proj and gdn_norm_out (other
attention); CUDA's kernels and reductions; more than four ranks. Packed samples: `test_layouts_packed.py`.
HybridModel: `test_hybrid.py`. The formulas: `test_losses.py`, `test_layouts_formula.py`,
`test_alignment_reference.py`.
"""

from pathlib import Path

import pytest
from layout_laws import assert_same
from layout_rows import KINDS, LAYOUTS, ROWS, SAME_AS, WITH_MEGATRONS_LOSSES
from small_run import gradients


@pytest.mark.parametrize("name", SAME_AS)
def test_one_coefficient_means_the_same_in_every_layout(layouts: Path, name: str) -> None:
    assert_same(layouts, name, SAME_AS[name])


def test_every_layout_is_compared() -> None:
    """The table covers each layout, with per-token loss off and on; each kind of parallelism beside
    Megatron's losses too."""
    for layout in LAYOUTS:
        kinds = ("alone", "alone-tokens") + ("whole", "whole-tokens") * (layout in WITH_MEGATRONS_LOSSES)
        assert {f"{layout}-{kind}" for kind in kinds} <= SAME_AS.keys()
    assert {ROWS[name].ranks for name in SAME_AS} == {1, 2, 4}
    assert {f"one-{kind}" for kind in KINDS} <= set(SAME_AS.values())


def test_the_alignment_alone_reaches_its_layers_and_those_before_them(layouts: Path) -> None:
    """The comparison would be empty if the loss did not reach the routers, or reached others. MoE layers 1
    and 2 (Megatron's 2 and 3) are aligned; what lies before them gets a gradient through them, what lies
    behind none at all."""
    for kind in ("alone", "alone-tokens"):
        found = gradients(layouts, f"one-{kind}")
        assert all(found[layer].norm() > 1e-2 for layer in (1, 2, 3)), {
            layer: float(g.norm()) for layer, g in found.items()
        }
        assert not found[4].any()


def test_per_token_loss_weighs_the_samples(layouts: Path) -> None:
    """So the rows with it are other rows: the samples' loss tokens differ."""
    one, tokens = gradients(layouts, "one-alone"), gradients(layouts, "one-alone-tokens")
    assert all((tokens[layer] - one[layer]).norm() > 0.1 * one[layer].norm() for layer in (2, 3))
