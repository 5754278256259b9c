"""Settings under which routing alignment would be silently wrong or silently absent: refused by name, before training starts."""

from typing import Any

from ramoe_megatron.errors import RamoeError


def refuse_unsupported(config: Any) -> None:
    """Raise RamoeError, naming every flag and why, unless alignment is defined under this Megatron model configuration.

    Args:
        config: a `TransformerConfig`, or whatever stands for one: a setting that it lacks is taken as off.
    """
    found = [f"{flag}: {reason}" for flag, reason, on in _unsupported(config) if on]
    if found:
        raise RamoeError(f"routing alignment does not run with {'; '.join(found)}. Remove the flag, or set --ramoe-coeff 0")


def _unsupported(config: Any) -> list[tuple[str, str, bool]]:
    def setting(name: str) -> Any:
        return getattr(config, name, None)

    modules = {getattr(module, "name", str(module)) for module in setting("cuda_graph_modules") or ()}
    graphs = setting("cuda_graph_impl") or "none"
    # No module named: whole layers are captured. What is captured replays kernels, and runs no Python at the routers.
    graphed_routers = graphs != "none" and (not modules or bool(modules & {"moe", "moe_router", "moe_preprocess", "full"}))
    granularity, recomputed = setting("recompute_granularity"), setting("recompute_modules") or ()
    recomputed_routers = granularity == "full" or (granularity == "selective" and "moe" in recomputed)
    low_precision = next((name for name in ("fp8", "fp4") if setting(name)), None)
    return [
        (
            "--overlap-moe-expert-parallel-comm",
            "it schedules the layers of two micro-batches at once, out of the order that carries a micro-batch's samples",
            bool(setting("overlap_moe_expert_parallel_comm")),
        ),
        (
            f"--cuda-graph-impl {graphs} over the routers",
            "a replayed graph does not pass through them (--cuda-graph-modules attn mlp leaves them out)",
            graphed_routers,
        ),
        (
            "--mlp-chunks-for-training",
            "a router then sees a sequence in pieces, and no mean over it",
            (setting("mlp_chunks_for_training") or 1) > 1,
        ),
        (
            f"--{low_precision}-format and --recompute-granularity {granularity}",
            "transformer-engine's recomputation forgets which samples it runs for",
            low_precision is not None and recomputed_routers,
        ),
    ]
