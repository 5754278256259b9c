"""Runs a table of jobs one after another on one set of ranks, and records what each produced.

    tests/support/worker.py TABLE.json OUT, on each rank

Each row: {"name", "job", "argv"}: a job of `ramoe_megatron.jobs`, or a script, run as from the command line;
with "lm": 0 the language- model loss is multiplied by 0; with "everything": true, the weights before the
first step, the gradients of all weights, the routers' expert biases at the end, the elements in gradient
buffers and in the optimizer's state, and the gradient norms that were logged are recorded too. A row runs in
a fork of its rank, which has imported Megatron and done nothing else: imports are paid once, and no row sees
what another left. Recorded per row and rank, in OUT/NAME.RANK.safetensors: the router gradients of the first
step after `finalize_model_grads` (before clipping), and the weights and expert biases at the end; in
OUT/NAME.json (rank 0): the figures that each step logged ("steps"; "first" and "figures" are the first and
the last of them; "megatron": Megatron's own) and the seconds that the row took, or the error.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.recipe.fork_server import IMPORTED

if (
    __name__ != "__mp_main__"
):  # Megatron's checkpoint writer starts a process that imports this file again, and needs nothing of it
    import torch
    from safetensors.torch import save_file


def main() -> None:
    table, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    from ramoe_megatron.mcore.arguments import known_flags
    from ramoe_megatron.mcore.compat import import_early, remember_docstrings
    from ramoe_megatron.mcore.cpu.backend import cpu_backend

    with cpu_backend():
        import_early((*IMPORTED, "ramoe_megatron.jobs.finetune"))
        remember_docstrings()
        known_flags()  # reads them, before there are forks
        for row in table:
            run_in_fork(row, out)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(f"cpu seconds: {sum(one.ru_utime + one.ru_stime for one in used):.1f}", flush=True)


def run_in_fork(row: dict[str, Any], out: Path) -> None:
    child = os.fork()
    if child == 0:
        meet_apart(row["name"])
        status = 1
        try:
            run_row(row, out)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            # Megatron's checkpoint writer keeps one, which would outlive its parent
            for process in multiprocessing.active_children():
                process.terminate()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    # torchrun stops the ranks of a failed one
    signal.signal(signal.SIGTERM, lambda *_: (os.kill(child, signal.SIGKILL), sys.exit(1)))
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit(f"the row {row['name']} failed")


def meet_apart(name: str) -> None:
    """Ranks meet at torchrun's own store, which is one for all rows: each under its own name there."""
    init_process_group = torch.distributed.init_process_group

    def under_name(*args: Any, **kwargs: Any) -> Any:
        rank, ranks, port = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        shared = torch.distributed.TCPStore(os.environ["MASTER_ADDR"], port, ranks, is_master=False)
        store = torch.distributed.PrefixStore(name, shared)
        return init_process_group(*args, **kwargs | {"store": store, "rank": rank, "world_size": ranks})

    torch.distributed.init_process_group = under_name


def run_row(row: dict[str, Any], out: Path) -> None:
    from megatron.training import argument_utils

    from ramoe_megatron.mcore.train import step as training

    started = time.monotonic()
    seen: dict[str, Any] = {
        "models": None,
        "grads": None,
        "steps": [],
        "everything": row.get("everything", False),
    }
    masked_loss = training.masked_loss

    def without_loss(loss_mask: torch.Tensor, losses: torch.Tensor) -> Any:
        loss, *rest = masked_loss(loss_mask, losses)
        return loss * 0, *rest

    makers = {
        name: getattr(argument_utils, name) for name in ("gpt_config_from_args", "hybrid_config_from_args")
    }

    def watched(maker: Any) -> Any:
        def config_from_args(args: Any) -> Any:
            config = maker(args)
            config.post_wrap_hooks.append(lambda models: watch(models, seen))
            return config

        return config_from_args

    for name, maker in makers.items():
        setattr(argument_utils, name, watched(maker))
    if seen["everything"]:
        kept_optimizer(seen)
        kept_norms(seen)
    kept_figures(seen)
    if row.get("lm") == 0:
        training.masked_loss = without_loss
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
        if int(os.environ["WORLD_SIZE"]) > 1:
            raise  # a rank that meets it alone must not have the others wait, as in `run_job`
        result["error"] = str(error)
    steps = [*seen["steps"], logged()]
    result |= {"first": steps[0], "figures": steps[-1], "steps": steps, "seconds": time.monotonic() - started}
    result |= {"megatron": seen["megatron"]}
    result |= {"gradient_norms": seen["norms"]} if seen["everything"] else {}
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    if seen["models"] is not None:
        save_file(tensors(seen), out / f"{row['name']}.{rank}.safetensors")
    if rank == 0:
        (out / f"{row['name']}.json").write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def logged() -> dict[str, float]:
    """The figures of ours that the last step logged; none before the first, and none without alignment."""
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    return {name: float(value) for name, value in getattr(get_moe_metrics_tracker(), "latest", {}).items()}


def kept_figures(seen: dict[str, Any]) -> None:
    """Record Megatron's logged losses at the routers and of multi-token prediction, in each step."""
    from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    aggregate, track, seen["megatron"] = (
        MoEMetricsTracker._aggregate,
        MTPLossLoggingHelper.track_mtp_metrics,
        [],
    )

    def aggregated(*args: Any, **kwargs: Any) -> dict[str, Any]:
        found = aggregate(*args, **kwargs)
        seen["megatron"].append({name: float(value) for name, value in found.items()})
        return found

    def tracked(
        scale: float, iteration: int, writer: Any, wandb_writer: Any, total_loss_dict: dict[str, Any]
    ) -> None:
        figures: dict[str, Any] = {}
        track(scale, iteration, writer, wandb_writer, figures)
        seen["megatron"][-1] |= {name: float(value) for name, value in figures.items()}
        for name, value in figures.items():
            total_loss_dict[name] = total_loss_dict.get(name, 0) + value

    MoEMetricsTracker._aggregate = aggregated
    MTPLossLoggingHelper.track_mtp_metrics = staticmethod(tracked)


def watch(models: list[Any], seen: dict[str, Any]) -> list[Any]:
    """Record the models, and the routers' gradients after each call of Megatron's `finalize_model_grads`."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.utils import get_model_config

    from ramoe_megatron.mcore.router import local_routers

    seen["models"] = models
    config = get_model_config(models[0])

    def finalize_and_look(chunks: Any, *args: Any, **kwargs: Any) -> None:
        finalize_model_grads(chunks, *args, **kwargs)
        if seen["grads"] is not None:
            seen["steps"].append(logged())  # of the step before
            return
        for chunk in models:
            if chunk.ddp_config.use_distributed_optimizer:
                gather_gradients(chunk)
        # frozen ones have none
        routers = [router for router in local_routers(models) if hasattr(router.weight, "main_grad")]
        seen["grads"] = {router.layer_number: router.weight.main_grad.detach().clone() for router in routers}
        if seen["everything"]:
            seen["start"] = parameters(models, "start")
            seen["all grads"] = {
                f"gradient.{number}.{name}": parameter.main_grad.detach().clone().contiguous()
                for number, chunk in enumerate(models)
                for name, parameter in chunk.named_parameters()
                if hasattr(parameter, "main_grad")
            }

    config.finalize_model_grads_func = finalize_and_look
    return models


def gather_gradients(chunk: Any) -> None:
    """Gather the pieces of the reduced gradients, of which the distributed optimizer leaves each rank one."""
    for bucket_group in [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]:
        ranks = bucket_group.intra_distributed_optimizer_instance_group
        for bucket in bucket_group.buckets:
            own = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, own, group=ranks)


def tensors(seen: dict[str, Any]) -> dict[str, torch.Tensor]:
    found = {f"grad.{layer}": grad.contiguous() for layer, grad in (seen["grads"] or {}).items()}
    found |= parameters(seen["models"], "weight") | seen.get("start", {}) | seen.get("all grads", {})
    found |= layer_biases(seen["models"] or [])
    if seen["everything"]:
        found |= biases(seen["models"])
        found["elements"] = elements(seen["models"], seen["optimizer"])
    return found


def parameters(models: list[Any], kind: str) -> dict[str, torch.Tensor]:
    return {
        f"{kind}.{number}.{name}": parameter.detach().clone().contiguous()
        for number, chunk in enumerate(models)
        for name, parameter in chunk.named_parameters()
    }


def biases(models: list[Any]) -> dict[str, torch.Tensor]:
    """The routers' expert biases, which are no parameters."""
    return {
        f"bias.{number}.{name}": buffer.detach().clone()
        for number, chunk in enumerate(models)
        for name, buffer in chunk.named_buffers()
        if name.endswith(".expert_bias")
    }


def layer_biases(models: list[Any]) -> dict[str, torch.Tensor]:
    """The same by layer: "expert_bias.N", multi-token prediction's "expert_bias.mtp.N"."""
    from megatron.core.transformer.moe.router import TopKRouter

    routers = [module for chunk in models for module in chunk.modules() if isinstance(module, TopKRouter)]
    return {
        f"expert_bias.{'mtp.' * router.is_mtp_layer}{router.layer_number}": (
            router.expert_bias.detach().clone()
        )
        for router in routers
        if router.expert_bias is not None
    }


def elements(models: list[Any], optimizer: Any) -> torch.Tensor:
    """On this rank: elements in gradient buffers without padding, and in the optimizer's state."""
    buffers = sum(
        buffer.numel_unpadded
        for chunk in models
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]
    )
    states = [state for chained in optimizer.chained_optimizers for state in chained.optimizer.state.values()]
    kept = sum(
        value.numel()
        for state in states
        for key, value in state.items()
        if torch.is_tensor(value) and key != "step"
    )
    return torch.tensor([buffers, kept])


def kept_optimizer(seen: dict[str, Any]) -> None:
    """Note the optimizer that Megatron makes."""
    from megatron.training import training

    make = training.get_megatron_optimizer

    def get_megatron_optimizer(*args: Any, **kwargs: Any) -> Any:
        seen["optimizer"] = make(*args, **kwargs)
        return seen["optimizer"]

    training.get_megatron_optimizer = get_megatron_optimizer


def kept_norms(seen: dict[str, Any]) -> None:
    """Note the gradient norm of each step as Megatron's log is told it."""
    from megatron.training import training

    log, seen["norms"] = training.training_log, []

    def training_log(*args: Any, **kwargs: Any) -> Any:
        norm = inspect.signature(log).bind(*args, **kwargs).arguments["grad_norm"]
        seen["norms"].append(float(norm))
        return log(*args, **kwargs)

    training.training_log = training_log


if __name__ == "__main__":
    main()
