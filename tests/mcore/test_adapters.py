"""Alignment of a model with frozen weights and adapters (LoRA): its gradient reaches what trains.

The adapter is a frozen linear layer plus a trained product of two small matrices. The law: the gradients of
all that trains are autograd's of the loss in plain torch (`small_gpt`), and frozen weights get none. If
nothing at or below an aligned router trains, the first step says so.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_gpt import HIDDEN, ZONE, alignment, batch, built, forward, logged, one_rank, reference, stepped
from small_gpt import worst_error as worst
from small_run import run_table

from ramoe_megatron import attach, routing_batch
from ramoe_megatron.errors import RamoeError

BOUND = 1e-5
NOTHING = (
    r"no trained weight is at or below the router of the last aligned MoE layer 2 \(Megatron's layer 3\), "
    "so the alignment loss changes nothing; unfreeze an aligned router"
)


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with one_rank():
        yield


class Adapted(torch.nn.Module):
    """A layer of Megatron with a low-rank product beside it."""

    def __init__(self, base: torch.nn.Module, inputs: int, outputs: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(inputs + outputs)
        self.base = base
        self.down = torch.nn.Parameter(torch.randn(2, inputs, generator=generator) / inputs**0.5)
        self.up = torch.nn.Parameter(torch.randn(outputs, 2, generator=generator) * 0.3)

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = self.base(inputs)
        return output + inputs @ self.down.T @ self.up.T, bias


class AdaptedRouter(Adapted):
    """A router whose logits have a low-rank product added."""

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight + self.up @ self.down

    def forward(self, inputs: torch.Tensor, padding_mask: torch.Tensor | None = None) -> Any:
        return self.base.routing(self.base.gating(inputs) + inputs @ self.down.T @ self.up.T, padding_mask)


def adapt(owner: torch.nn.Module, name: str) -> None:
    """Replace a linear layer by an adapted one."""
    base = getattr(owner, name)
    setattr(owner, name, Adapted(base, base.weight.shape[1], base.weight.shape[0]))


def in_attention(model: Any, *layers: int) -> None:
    for layer in layers or range(4):
        for name in ("linear_qkv", "linear_proj"):
            adapt(model.decoder.layers[layer].self_attention, name)


def in_attention_with_routers(model: Any) -> None:
    in_attention(model)
    for layer in model.decoder.layers:
        layer.mlp.router.requires_grad_(True)


def in_routers(model: Any) -> None:
    for layer in model.decoder.layers:
        router = layer.mlp.router
        layer.mlp.router = AdaptedRouter(router, HIDDEN, router.weight.shape[0])


def in_experts_of_the_first_layer(model: Any) -> None:
    for expert in model.decoder.layers[0].mlp.experts.local_experts:
        adapt(expert, "linear_fc2")


def in_attention_and_embedding(model: Any) -> None:
    in_attention(model)
    model.embedding.requires_grad_(True)


def frozen(adapters: Callable[..., None], *layers: int, **changes: Any) -> Any:
    """A model in which only the adapters train."""
    model = built(**changes)
    model.requires_grad_(False)
    adapters(model, *layers)
    return model


RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.mark.parametrize("first", ["adapters", "attach"])
@pytest.mark.parametrize(
    ("adapters", "changes"),
    [
        (in_attention, {}),
        (in_attention_with_routers, {}),
        (in_routers, {}),
        (in_experts_of_the_first_layer, {}),
        (in_attention_and_embedding, RECOMPUTE),
    ],
)
def test_what_trains_gets_the_gradient_of_the_reference(
    adapters: Callable[..., None], changes: dict[str, Any], first: str, tmp_path: Path
) -> None:
    twin = frozen(adapters)
    _, expected = reference(twin)
    model = built(**changes)
    if first == "attach":
        attach(model, alignment(tmp_path))
    model.requires_grad_(False)
    adapters(model)
    if first == "adapters":
        attach(model, alignment(tmp_path))
    found = stepped(model)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert found.keys() <= trained
    moved = {name for name, gradient in expected.items() if gradient.norm() > 0}
    assert moved
    assert moved <= found.keys()
    assert worst(found, expected) < BOUND
    assert logged()[0]["routing_alignment_loss"] > 0


def test_frozen_routers_pass_the_gradient_to_adapters_of_lower_layers(tmp_path: Path) -> None:
    """In layers up to the last aligned one, and in none above it."""
    model = attach(frozen(in_attention), alignment(tmp_path))
    reached = {int(name.split(".")[2]) for name, found in stepped(model).items() if found.norm() > 0}
    assert reached == set(range(ZONE[1] + 1))


def nowhere(model: Any, *_: int) -> None:
    model.output_layer.requires_grad_(True)


def in_experts_of_the_last_aligned_layer(model: Any, *_: int) -> None:
    model.decoder.layers[ZONE[1]].mlp.experts.requires_grad_(True)


UNMOVED = [(nowhere, ()), (in_experts_of_the_last_aligned_layer, ()), (in_attention, (3,))]


@pytest.mark.parametrize(("adapters", "layers"), UNMOVED)
def test_a_loss_that_moves_nothing_is_refused_at_the_first_micro_batch(
    adapters: Callable[..., None], layers: tuple[int, ...], tmp_path: Path
) -> None:
    model = attach(frozen(adapters, *layers), alignment(tmp_path))
    with torch.no_grad(), routing_batch(model, batch(0)):
        forward(model, batch(0))
    with routing_batch(model.eval(), batch(0)):
        forward(model, batch(0))
    model.train()
    with pytest.raises(RamoeError, match=NOTHING):
        stepped(model, weigh=1.0)


def requiring_input(model: Any) -> None:
    """The embedding's output requires a gradient, as adapters make it for recomputed layers."""
    model.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())


@pytest.mark.parametrize(("adapters", "layers"), UNMOVED)
def test_an_input_that_requires_a_gradient_hides_nothing(
    adapters: Callable[..., None], layers: tuple[int, ...], tmp_path: Path
) -> None:
    """As on a later pipeline stage: autograd finds a gradient, which ends in the input."""
    model = attach(frozen(adapters, *layers), alignment(tmp_path))
    requiring_input(model)
    stepped(model, weigh=1.0)
    with pytest.raises(RamoeError, match=NOTHING):
        logged()


@pytest.mark.parametrize("requires", [False, True])
def test_recomputed_layers_without_gradients_are_refused(requires: bool, tmp_path: Path) -> None:
    """Recomputation runs only for an input that requires a gradient: else no layer's adapter trains."""
    model = attach(frozen(in_attention, **RECOMPUTE), alignment(tmp_path))
    model.output_layer.requires_grad_(True)
    if requires:
        requiring_input(model)
    found = stepped(model, weigh=1.0)
    assert any("self_attention" in name for name in found) == requires
    if requires:
        assert logged()[0]["routing_alignment_loss"] > 0
        return
    with pytest.raises(RamoeError, match="the aligned layers ran without gradients only"):
        logged()


@pytest.mark.parametrize(("adapters", "layers"), [(in_attention, (2,)), (in_routers, ())])
def test_one_trained_place_is_enough(
    adapters: Callable[..., None], layers: tuple[int, ...], tmp_path: Path
) -> None:
    model = attach(frozen(adapters, *layers), alignment(tmp_path))
    requiring_input(model)
    assert stepped(model)
    assert logged()[0]["routing_alignment_loss"] > 0


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two pipeline stages found in each case of `adapted_stages`."""
    folder = tmp_path_factory.mktemp("stages")
    script = str(Path(__file__).parents[1] / "support/adapted_stages.py")
    run_table(2, [{"name": "adapted", "job": script, "argv": [str(folder)]}], folder)
    return [json.loads((folder / f"adapted.{rank}.stage.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize(
    ("case", "reached"),
    [
        ("first stage only", (True, False)),
        ("last stage only", (False, True)),
        ("aligned in the last, trained in the first", (True, False)),
    ],
)
def test_a_pipeline_stage_without_trained_weights_is_not_refused(
    stages: list[dict[str, Any]], case: str, reached: tuple[bool, bool]
) -> None:
    for found, some in zip(stages, reached, strict=True):
        assert "refusal" not in found[case]
        assert (found[case]["gradients"] > 0) == some
        assert found[case]["error"] < BOUND


def test_a_loss_that_moves_nothing_is_refused_on_every_pipeline_stage(stages: list[dict[str, Any]]) -> None:
    for found in stages:
        assert re.search(NOTHING, found["nothing below"]["refusal"])
