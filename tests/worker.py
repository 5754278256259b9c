"""Runs a table of jobs one after another in one set of ranks, and records what each produced.

    python -m torch.distributed.run --nproc-per-node N tests/worker.py TABLE.json OUT

Each row: {"name", "job", "argv"}: a job of `ramoe_megatron.jobs`, run as from the command line. Recorded per row and rank, in
OUT/NAME.RANK.safetensors: the router gradients of the first step after `finalize_model_grads` (before clipping), and the weights at
the end; in OUT/NAME.json (rank 0): the figures of the last step, or the error.
"""

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ramoe_megatron.errors import RamoeError


def main() -> None:
    table, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    from ramoe_megatron.mcore.cpu import cpu_backend

    with cpu_backend():  # around all rows: the process group and the imports are shared
        for row in table:
            run_row(row, out)
    torch.distributed.destroy_process_group()


def run_row(row: dict[str, Any], out: Path) -> None:
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker, get_moe_metrics_tracker
    from megatron.training import argument_utils
    from megatron.training.training import destroy_global_state

    seen: dict[str, Any] = {"models": None, "grads": None}
    makers = {name: getattr(argument_utils, name) for name in ("gpt_config_from_args", "hybrid_config_from_args")}

    def watched(maker: Any) -> Any:
        def config_from_args(args: Any) -> Any:
            config = maker(args)
            config.post_wrap_hooks.append(lambda models: watch(models, seen))
            return config

        return config_from_args

    for name, maker in makers.items():
        setattr(argument_utils, name, watched(maker))
    sys.argv = [row["job"], *row["argv"]]
    result: dict[str, Any] = {}
    try:
        if row["job"].endswith(".py"):
            spec = importlib.util.spec_from_file_location("script", row["job"])
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(f"ramoe_megatron.jobs.{row['job']}")
        module.main()
    except RamoeError as error:
        result["error"] = str(error)
    finally:
        for name, maker in makers.items():
            setattr(argument_utils, name, maker)
    figures = getattr(get_moe_metrics_tracker(), "latest", {})
    result["first"] = seen.get("first", {})
    result["figures"] = {name: float(value) for name, value in figures.items()}
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    if seen["models"] is not None:
        save_file(tensors(seen), out / f"{row['name']}.{rank}.safetensors")
    if rank == 0:
        (out / f"{row['name']}.json").write_text(json.dumps(result))
    destroy_moe_metrics_tracker()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        destroy_global_state()


def watch(models: list[Any], seen: dict[str, Any]) -> list[Any]:
    """Note the models, and have Megatron's own `finalize_model_grads` followed by a look at the routers' gradients."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    from megatron.core.utils import get_model_config

    from ramoe_megatron.mcore.router import local_routers

    seen["models"] = models
    config = get_model_config(models[0])

    def finalize_and_look(chunks: Any, *args: Any, **kwargs: Any) -> None:
        finalize_model_grads(chunks, *args, **kwargs)
        if seen["grads"] is None:
            tracker = get_moe_metrics_tracker()
            if hasattr(tracker, "reduced"):
                seen["first"] = {name: float(value) for name, value in tracker.reduced().items()}
            seen["grads"] = {r.layer_number: r.weight.main_grad.detach().clone() for r in local_routers(models)}

    config.finalize_model_grads_func = finalize_and_look
    return models


def tensors(seen: dict[str, Any]) -> dict[str, torch.Tensor]:
    found = {f"grad.{layer}": grad.contiguous() for layer, grad in (seen["grads"] or {}).items()}
    for number, chunk in enumerate(seen["models"]):
        for name, parameter in chunk.named_parameters():
            found[f"weight.{number}.{name}"] = parameter.detach().clone().contiguous()
    return found


if __name__ == "__main__":
    main()
