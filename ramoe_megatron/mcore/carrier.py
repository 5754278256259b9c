"""Carries per-sample information to the routers, with a context that recomputation re-enters.

A process-wide variable would be wrong. With pipelining, the backward pass of micro-batch i re-runs the
forward pass of micro-batch i after micro-batch i+1 has run. Here each recomputed closure re-enters the
context in which it was created.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Protocol

import torch


class RoutingContext(Protocol):
    """Reads or changes the routing of a micro-batch while it passes through the model."""

    def on_logits(self, router: Any, logits: torch.Tensor) -> torch.Tensor:
        """Called before the top-k choice. `logits` [S_local, B, E]; returns the logits to route by."""
        ...

    def on_routing(
        self, router: Any, logits: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> torch.Tensor:
        """Called after the top-k choice. Returns the probabilities to use.

        `probs` and `routing_map` are [S_local*B, E]. A loss may be attached to the returned probabilities.
        """
        ...


_CURRENT: ContextVar[RoutingContext | None] = ContextVar("ramoe_routing_context", default=None)


def current() -> RoutingContext | None:
    """The context of the current micro-batch, if any."""
    return _CURRENT.get()


@contextlib.contextmanager
def routing_context(context: RoutingContext | None) -> Iterator[None]:
    """Make `context` current for the body, and for later recomputation of the body's checkpoints."""
    _install_recompute_carrier()
    token = _CURRENT.set(context)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def _install_recompute_carrier() -> None:
    """Wrap `tensor_parallel.checkpoint` once. Every call site looks it up as an attribute."""
    from megatron.core import tensor_parallel

    checkpoint = tensor_parallel.checkpoint
    if getattr(checkpoint, "carries_routing_context", False):
        return

    def checkpoint_in_context(function: Callable, *args: Any) -> Any:
        context = _CURRENT.get()
        if context is None:
            return checkpoint(function, *args)

        def in_context(*inputs: Any) -> Any:
            with routing_context(context):
                return function(*inputs)

        return checkpoint(in_context, *args)

    checkpoint_in_context.carries_routing_context = True  # type: ignore[attr-defined]
    tensor_parallel.checkpoint = checkpoint_in_context
