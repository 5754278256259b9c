"""Rejects settings under which alignment or hard steering would silently be wrong, before a job starts."""

from collections.abc import Iterable
from typing import Any

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore import compat


def refuse_unsupported(config: Any) -> None:
    """Raise RamoeError unless alignment is defined under this Megatron model configuration.

    The error names every flag that does not work with alignment, and the reason.

    Args:
        config: a `TransformerConfig`, or an object with the same attributes. A missing attribute counts as
            off.
    """
    found = [f"{flag}: {reason}" for flag, reason, on in _unsupported(config) if on]
    if found:
        raise RamoeError(
            f"routing alignment does not run with {'; '.join(found)}. Remove the flag, or set --ramoe-coeff 0"
        )


def refuse_hard_steering(config: Any) -> None:
    """Raise RamoeError where the router's top-k may not be the experts with the largest logits.

    The error names every flag that causes this, and the reason. The paper (arXiv 2510.04694) has softmax
    routers only. That hard steering needs the largest logits to be the top-k is our reading.

    Args:
        config: a `TransformerConfig`, or validated arguments. A missing attribute counts as off.
    """
    found = [f"{flag}: {reason}" for flag, reason, on in _not_the_largest_logits(config) if on]
    if found:
        raise RamoeError(
            f"hard steering does not run with {'; '.join(found)}. Expected: "
            "a router whose top-k are the largest logits. Use soft steering: "
            "--ramoe-steer soft, for a search --ramoe-kinds soft, in a recipe steering.kind soft"
        )


def refuse_foreign_routers(model_chunks: Iterable[Any]) -> None:
    """Raise RamoeError for an MoE layer whose router is not Megatron's and does not contain Megatron's.

    Alignment could not read the routing of such a layer, so the layer would silently not be aligned. An
    adapter around the router contains it.
    """
    from megatron.core.transformer.moe.moe_layer import BaseMoELayer
    from megatron.core.transformer.moe.router import TopKRouter

    for module in (module for chunk in model_chunks for module in chunk.modules()):
        if isinstance(module, BaseMoELayer) and not any(
            isinstance(part, TopKRouter) for part in module.router.modules()
        ):
            raise RamoeError(
                f"Megatron layer {module.layer_number} has the router {type(module.router).__name__}, "
                "but routing alignment needs a TopKRouter (or a subclass of it): "
                "change the router, or set --ramoe-coeff 0"
            )


def unreached(config: Any) -> list[str]:
    """Settings under which the routers cannot know a micro-batch's samples, each as "FLAG: reason"."""
    return [f"{flag}: {reason}" for flag, reason, on in _unreached(config) if on]


def _unsupported(config: Any) -> list[tuple[str, str, bool]]:
    return [*_unreached(config), *_not_the_logits(config)]


def _unreached(config: Any) -> list[tuple[str, str, bool]]:
    def setting(name: str) -> Any:
        return getattr(config, name, None)

    named, modules = compat.graphed_modules(config)
    graphs = setting("cuda_graph_impl") or "none"
    # Without named modules whole layers are captured. A captured module replays kernels and runs no Python at
    # the routers.
    graphed_routers = graphs != "none" and (
        not modules or bool(modules & {"moe", "moe_router", "moe_preprocess", "full", "full_iteration"})
    )
    granularity, recomputed = setting("recompute_granularity"), setting("recompute_modules") or ()
    recomputed_routers = granularity == "full" or (granularity == "selective" and "moe" in recomputed)
    low_precision = next((name for name in ("fp8", "fp4") if setting(name)), None)
    return [
        (
            "--overlap-moe-expert-parallel-comm",
            "it runs the layers of two micro-batches at the same time, "
            "so a router cannot know which micro-batch it routes",
            bool(setting("overlap_moe_expert_parallel_comm")),
        ),
        (
            f"--cuda-graph-impl {graphs} over the routers",
            f"a replayed graph does not run our code at the routers ({named} attn mlp leaves them out)",
            graphed_routers,
        ),
        (
            "--mlp-chunks-for-training",
            "a router then sees a sequence in pieces and cannot take the mean over it",
            (setting("mlp_chunks_for_training") or 1) > 1,
        ),
        (
            f"--{low_precision}-format and --recompute-granularity {granularity}",
            "transformer-engine's recomputation does not know which samples it runs for "
            "(--recompute-granularity selective does not recompute the routers, "
            "unless --recompute-modules names moe)",
            low_precision is not None and recomputed_routers,
        ),
        (
            "--hybrid-context-parallel",
            "it splits each sample over its own set of ranks, but the routers only know the fixed "
            "context-parallel group",
            bool(setting("hybrid_context_parallel")),
        ),
    ]


def _not_the_logits(config: Any) -> list[tuple[str, str, bool]]:
    def setting(name: str) -> Any:
        return getattr(config, name, None)

    return [
        (
            "--moe-router-load-balancing-type sinkhorn",
            "it chooses experts by the balance of the whole micro-batch, not by the scores that are aligned",
            "sinkhorn" in _balancing(config),
        ),
        (
            "--moe-router-force-load-balancing",
            "it replaces the router's logits by random numbers",
            bool(setting("moe_router_force_load_balancing")),
        ),
        (
            "--moe-router-force-biased",
            "it replaces the router's logits by random numbers",
            setting("moe_router_force_biased") is not None,
        ),
    ]


def _not_the_largest_logits(config: Any) -> list[tuple[str, str, bool]]:
    def setting(name: str) -> Any:
        return getattr(config, name, None)

    groups = next(
        (name for name in ("group_topk", "topk_limited_devices") if setting(f"moe_router_{name}")),
        "group_topk",
    )
    return [
        (
            "--moe-router-score-function sigmoid",
            "large logits have equal scores in float32, so the choice among them is arbitrary",
            setting("moe_router_score_function") == "sigmoid",
        ),
        (
            "--moe-router-enable-expert-bias",
            "experts are chosen by score plus bias, not by the raised logits alone",
            bool(setting("moe_router_enable_expert_bias")),
        ),
        (
            f"--moe-router-{groups.replace('_', '-')} {setting(f'moe_router_{groups}')}",
            "an expert outside the chosen groups is not used, however large its logit is",
            bool(setting(f"moe_router_{groups}")),
        ),
        *(
            (
                f"--moe-router-load-balancing-type {kind}",
                "it chooses experts by its own scores, not by the logits",
                kind in _balancing(config),
            )
            for kind in ("sinkhorn", "quantile_balancing")
        ),
    ]


def _balancing(config: Any) -> list[str]:
    kinds = getattr(config, "moe_router_load_balancing_type", None) or []
    return [kinds] if isinstance(kinds, str) else list(kinds)
