"""Laws of alignment at one router that need no ranks, and the configurations that it refuses."""

import contextlib
import dataclasses
import os
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from artefact_files import expert_file
from megatron.core.transformer.enums import CudaGraphModule
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from router_chunk import Chunk, E, alignment, batch

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.align.batch import routing_batch
from ramoe_megatron.mcore.align.metrics import COLUMNS
from ramoe_megatron.mcore.align.refusals import refuse_foreign_routers, refuse_unsupported
from ramoe_megatron.mcore.align.resolve import resolve
from ramoe_megatron.mcore.arguments import RoutingAlignmentConfig
from ramoe_megatron.mcore.observe import TokenSelection, router_distribution
from ramoe_megatron.mcore.placement import local_rows
from ramoe_megatron.method.divergence import NoZone


def test_only_chosen_tokens_of_aligned_samples_get_a_gradient() -> None:
    grad = Chunk().run(batch([2, 3, 4], [1, 0, 1]))
    touched = {(int(s), int(b)) for s, b in grad.abs().sum(-1).nonzero()}
    assert touched == {(1, 0), (3, 2)}


@pytest.mark.parametrize("tokens", ["prompt", "last"])
@pytest.mark.parametrize("pooling", ["sequence", "token"])
def test_a_sample_without_chosen_tokens_counts_for_nothing(tokens: str, pooling: str) -> None:
    chunk, other = (Chunk(tokens=tokens, pooling=pooling) for _ in range(2))
    grad = chunk.run(batch([0, 3, 4], [1, 1, 1]))
    expected = other.run(batch([0, 3, 4], [0, 1, 1]))
    assert torch.equal(grad, expected)
    assert torch.isfinite(grad).all()
    assert torch.equal(chunk.ramoe_alignment.metrics.sums_LM, other.ramoe_alignment.metrics.sums_LM)


@pytest.mark.parametrize("given", [True, False])
def test_ci_is_what_the_batch_says_and_else_what_is_aligned(given: bool) -> None:
    """The first sample has no prompt token, so no routing mass. All other samples are aligned."""
    chunk, micro = Chunk(), batch([0, 3, 4], [1, 1, 1])
    chunk.run(micro | ({"ramoe_ci": torch.tensor([True, False, True])} if given else {}))
    sums = dict(zip(COLUMNS, chunk.ramoe_alignment.metrics.sums_LM[0].tolist(), strict=True))
    assert (sums["ci"], sums["other"], sums["aligned"], sums["samples"]) == (
        (1, 1, 2, 3) if given else (2, 0, 2, 3)
    )


@pytest.mark.parametrize("tokens", ["prompt", "response", "all"])
def test_the_logged_mass_does_not_depend_on_the_pooling(tokens: str) -> None:
    """It is that of the mean distribution, also where the loss is a mean over tokens."""
    chunks = [Chunk(tokens=tokens, pooling=pooling) for pooling in ("sequence", "token")]
    for chunk in chunks:
        chunk.run(batch([2, 3, 4], [1, 0, 1]))
    sequence, token = (
        dict(zip(COLUMNS, chunk.ramoe_alignment.metrics.sums_LM[0].tolist(), strict=True)) for chunk in chunks
    )
    for mass in ("ci_mass", "other_mass"):
        assert sequence[mass] == pytest.approx(token[mass], rel=1e-6)
        assert sequence[mass] > 0


def test_evaluation_needs_no_labels_and_records_nothing() -> None:
    chunk = Chunk().eval()
    with routing_batch(chunk, {"tokens": torch.zeros(1)}):
        pass
    assert not chunk.ramoe_alignment.metrics.sums_LM.any()
    with (
        pytest.raises(RamoeError, match="ramoe_weight"),
        routing_batch(chunk.train(), {"tokens": torch.zeros(1)}),
    ):
        pass


@pytest.mark.parametrize("times", [0, 2])
def test_a_layer_that_does_not_run_once_is_told(times: int) -> None:
    chunk = Chunk()
    with pytest.raises(RamoeError, match=r"ran \{0: 0\} times|attached its alignment loss twice"):
        chunk.run(batch([2, 3, 4], [1, 1, 1]), times)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_the_router_distribution_is_megatrons_scores_divided_by_their_sum(score_function: str) -> None:
    from megatron.core.transformer.moe.moe_utils import compute_routing_scores_for_aux_loss

    logits = torch.randn(5, 2, E, generator=torch.Generator().manual_seed(1))
    _, expected = compute_routing_scores_for_aux_loss(logits.view(-1, E), 2, score_function)
    found = router_distribution(logits, score_function)
    torch.testing.assert_close(found.view(-1, E), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(RamoeError, match="--moe-router-score-function cosine"):
        router_distribution(logits, "cosine")


@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4)])
def test_the_pieces_of_a_sequence_cover_it_once(tp: int, cp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with Megatron's context-parallel slices, each split into equal tensor-parallel pieces."""
    from megatron.core.utils import get_batch_on_this_cp_rank

    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: group.rank())
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: group.size())
    length, seen = 16, []
    for c in range(cp):
        tokens = {"tokens": torch.arange(length)[None]}
        group = types.SimpleNamespace(size=lambda: cp, rank=lambda c=c: c)
        mine = get_batch_on_this_cp_rank(tokens, False, group)["tokens"][0] if cp > 1 else tokens["tokens"][0]
        for t, piece in enumerate(mine.chunk(tp)):
            tp_group = types.SimpleNamespace(size=lambda: tp, rank=lambda t=t: t)
            router = types.SimpleNamespace(
                tp_group=tp_group, cp_group=group, config=types.SimpleNamespace(sequence_parallel=tp > 1)
            )
            found = local_rows(router, len(piece))
            assert torch.equal(found, piece)
            seen += found.tolist()
    assert sorted(seen) == list(range(length))


def test_counts_are_those_of_the_masks() -> None:
    selection = TokenSelection(torch.tensor([0, 1, 4]), torch.tensor([3, 5, 6]))
    for choice in ("prompt", "response", "all", "last"):
        mask = selection.local(Chunk().router, 8).chosen(choice)
        assert torch.equal(selection.count(choice), mask.sum(dim=0).float()), choice
        assert selection.local(Chunk().router, 8).chosen(choice) is mask  # found once for all layers


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"overlap_moe_expert_parallel_comm": True}, "--overlap-moe-expert-parallel-comm"),
        ({"cuda_graph_impl": "full_iteration"}, "--cuda-graph-impl full_iteration"),
        ({"cuda_graph_impl": "local", "cuda_graph_modules": []}, "--cuda-graph-impl local"),
        (
            {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": [CudaGraphModule.moe_router]},
            "--cuda-graph-impl",
        ),
        ({"mlp_chunks_for_training": 2}, "--mlp-chunks-for-training"),
        ({"hybrid_context_parallel": True}, "--hybrid-context-parallel"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "--moe-router-load-balancing-type sinkhorn"),
        (
            {"moe_router_load_balancing_type": ["aux_loss", "sinkhorn"]},
            "--moe-router-load-balancing-type sinkhorn",
        ),
        ({"moe_router_force_load_balancing": True}, "--moe-router-force-load-balancing"),
        ({"moe_router_force_biased": -0.5}, "--moe-router-force-biased"),
        ({"fp8": "hybrid", "recompute_granularity": "full"}, "--fp8-format and --recompute-granularity full"),
        ({"fp4": "e2m1", "recompute_granularity": "selective", "recompute_modules": ["moe"]}, "--fp4-format"),
    ],
)
def test_settings_without_a_defined_alignment_are_refused(settings: dict[str, Any], flag: str) -> None:
    with pytest.raises(RamoeError, match=flag):
        refuse_unsupported(types.SimpleNamespace(**settings))


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"enable_cuda_graph": True}, "--cuda-graph-impl local"),
        ({"external_cuda_graph": True}, "--cuda-graph-impl transformer_engine"),
        ({"cuda_graph_impl": "local", "cuda_graph_modules": "full"}, "--cuda-graph-impl local"),
        ({"cuda_graph_impl": "local", "cuda_graph_modules": "moe_router"}, "--cuda-graph-impl local"),
        (
            {"cuda_graph_impl": "local", "cuda_graph_scope": "full_iteration"},
            "--cuda-graph-impl full_iteration",
        ),
        ({"cuda_graph_impl": "local", "cuda_graph_modules": "attn"}, None),
        ({"moe_layer_recompute": True}, None),
    ],
)
def test_every_spelling_reaches_the_refusal_through_megatrons_configuration(
    settings: dict[str, Any], flag: str | None
) -> None:
    small = {
        "num_layers": 2,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_moe_experts": 4,
        "add_bias_linear": False,
    }
    config = TransformerConfig(**small, **settings)
    with contextlib.nullcontext() if flag is None else pytest.raises(RamoeError, match=flag):
        refuse_unsupported(config)
    if settings == {"moe_layer_recompute": True}:
        config.fp8 = "hybrid"  # Megatron takes it only where transformer-engine is installed
        with pytest.raises(RamoeError, match="--recompute-granularity selective"):
            refuse_unsupported(config)


class ForeignLayer(BaseMoELayer):
    """An MoE layer with somebody's own router."""

    def __init__(self, router: torch.nn.Module) -> None:
        torch.nn.Module.__init__(self)
        self.router, self.layer_number = router, 3

    def forward(self, *_: Any) -> None: ...


def test_a_router_that_cannot_be_seen_is_refused() -> None:
    refuse_foreign_routers([torch.nn.Sequential(torch.nn.Linear(2, 2))])
    with pytest.raises(RamoeError, match="Megatron layer 3 has the router Linear"):
        refuse_foreign_routers([torch.nn.Sequential(ForeignLayer(torch.nn.Linear(2, 2)))])


def test_the_zone_is_refused_by_its_flag(tmp_path: Path) -> None:
    path = tmp_path / "experts.safetensors"
    expert_file(zone=NoZone("the curve is flat")).save(path)
    for layers, words in (
        ("2-9", "expected a rising range within 0 to 2"),
        ("auto", "the curve is flat"),
        ("0.0-0.1", "wider range"),
    ):
        with pytest.raises(RamoeError, match=rf"^--ramoe-layers {layers}: .*{words}"):
            resolve(alignment(layers=layers, experts=str(path)).config)


def test_the_files_of_an_alignment_are_read_once_until_they_change(tmp_path: Path) -> None:
    path = tmp_path / "experts.safetensors"
    expert_file(seed=1).save(path)
    config = alignment(layers="all", tokens="last", experts=str(path)).config
    first = resolve(config)
    assert resolve(RoutingAlignmentConfig(**dataclasses.asdict(config))) is first
    expert_file(seed=2).save(path)
    os.utime(path, ns=(0, 0))
    assert resolve(config) is not first
    assert not torch.equal(resolve(config).experts.expert_mask, first.experts.expert_mask)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"recompute_granularity": "full", "mlp_chunks_for_training": 1, "cuda_graph_impl": "none"},
        {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": [CudaGraphModule.attn]},
        {"fp8": "hybrid", "recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        {"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"], "moe_router_force_biased": None},
        {
            "moe_router_load_balancing_type": "quantile_balancing",
            "moe_router_enable_expert_bias": True,
            "moe_router_fusion": True,
        },
        {
            "moe_enable_routing_replay": True,
            "moe_shared_expert_overlap": True,
            "moe_latent_size": 16,
            "delay_wgrad_compute": True,
        },
    ],
)
def test_what_alignment_can_carry_is_let_through(settings: dict[str, Any]) -> None:
    refuse_unsupported(types.SimpleNamespace(**settings))
