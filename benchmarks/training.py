"""One shape's training steps: stock Megatron and aligned training, alternating in one process group.

    torchrun --nproc-per-node N -m benchmarks.training PRESET SHAPE FOLDER OUT.json ROUNDS

All arms have the same weights. Every arm runs Megatron's `train_step` (DDP, schedule, optimizer,
load-balancing loss and z-loss) on the same samples, and then reports the routers' metrics, as Megatron's
training log does at every step. The control is the model with our routers but without a routing context. It
differs from stock Megatron only by its place in memory, so its ratio shows the resolution of this machine.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import WARM_UP, Ratio, Seconds, alternate, machine, operations, peak_memory, timed
from benchmarks.shapes import PRESETS, Shape, training_flags
from ramoe_megatron.jobs.offline_job import ProgressLines
from ramoe_megatron.mcore.arguments import RoutingAlignmentConfig, add_arguments
from ramoe_megatron.mcore.launch import megatron_arguments, run_job

STOCK, CONTROL = "stock Megatron", "control (our routers)"


@dataclass
class Trained:
    """A model with its optimizer, as Megatron's `setup_model_and_optimizer` returns them."""

    model: list[Any]
    optimizer: Any
    scheduler: Any
    config: Any

    @property
    def static_bytes(self) -> int:
        """Bytes of weights, gradient buffers and optimizer state."""
        parameters = list(self.model[0].parameters())
        tensors = [*parameters, *(parameter.main_grad for parameter in parameters)]
        # The experts have a separate optimizer.
        for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            tensors += [parameter for group in part.param_groups for parameter in group["params"]]
            tensors += [
                value
                for state in part.optimizer.state.values()
                for value in state.values()
                if torch.is_tensor(value)
            ]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


class Arm:
    """One way to train, with its own samples and metrics tracker."""

    def __init__(
        self,
        args: Any,
        trained: Trained,
        forward_step: Callable,
        samples: Iterator,
        before: Callable[[], Any],
    ) -> None:
        from megatron.core.transformer.moe.moe_logging import (
            MoEMetricsTracker,
            get_moe_metrics_tracker,
            set_moe_metrics_tracker,
        )

        self.args, self.trained, self.forward_step, self.samples, self.before = (
            args,
            trained,
            forward_step,
            samples,
            before,
        )
        self.iteration = 0
        set_moe_metrics_tracker(MoEMetricsTracker())
        before()  # attaching alignment replaces Megatron's tracker
        self.tracker = get_moe_metrics_tracker()

    def prepare(self) -> None:
        """Set the process-wide tracker and the shared model's alignment, before each turn of this arm."""
        from megatron.core.transformer.moe.moe_logging import set_moe_metrics_tracker

        set_moe_metrics_tracker(self.tracker)
        self.before()
        self.tracker.before_report = None  # a training makes this check once, not at every step

    def step(self, schedule: Callable | None = None) -> None:
        """One step of Megatron's training loop. `schedule` replaces Megatron's forward-backward function."""
        from megatron.core.num_microbatches_calculator import get_num_microbatches
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.training.training import train_step

        args, trained = self.args, self.trained
        losses = train_step(
            self.forward_step,
            self.samples,
            trained.model,
            trained.optimizer,
            trained.scheduler,
            trained.config,
            schedule or get_forward_backward_func(),
            iteration=self.iteration,
        )[0]
        self.tracker.report(
            loss_scale=1 / get_num_microbatches(),
            iteration=self.iteration,
            force_initialize=True,
            track_names=["load_balancing_loss", "z_loss"],
            num_layers=args.num_layers,
            moe_layer_freq=args.moe_layer_freq,
            total_loss_dict=losses,
        )
        self.losses, self.iteration = losses, self.iteration + 1

    def seconds(self) -> Seconds:
        """The time of a step."""
        self.prepare()
        return timed(self.step)

    def memory(self, on_cpu: bool) -> dict[str, int]:
        """Bytes held between steps, and peaks beyond them: of forward and backward, and of a whole step."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        activations: list[int] = []

        def measured_schedule(**arguments: Any) -> Any:
            losses: list[Any] = []
            schedule = get_forward_backward_func()
            activations.append(peak_memory(lambda: losses.extend(schedule(**arguments)), on_cpu))
            return losses

        self.prepare()
        self.step(measured_schedule)
        return {
            "activations": activations[0],
            "step": peak_memory(self.step, on_cpu),
            "between": self.trained.static_bytes,
        }

    def operations(self, on_cpu: bool) -> int:
        """Operations of a step."""
        self.prepare()
        return operations(self.step, on_cpu)


def main() -> None:
    """Measure the shape that the command line names, and write OUT.json."""
    preset, name, folder, out, rounds = (
        sys.argv[1],
        sys.argv[2],
        Path(sys.argv[3]),
        Path(sys.argv[4]),
        int(sys.argv[5]),
    )
    shape = next(shape for shape in PRESETS[preset] if shape.name == name)
    from ramoe_megatron.mcore.cpu.backend import cuda_absent

    sys.argv = [sys.argv[0], *training_flags(shape, folder, int(os.environ["WORLD_SIZE"]))]
    with megatron_arguments(add_arguments, trains=True) as args:
        arms = build_arms(args, shape, folder, rounds)
        progress = ProgressLines(WARM_UP + rounds, f"rounds of {len(arms)} arms")
        seconds = alternate({label: arm.seconds for label, arm in arms.items()}, rounds, after_round=progress)
        losses = {
            label: {name: float(value) for name, value in arm.losses.items()} for label, arm in arms.items()
        }
        # Torch's profiler counts freed memory only if it saw the allocation, so a measured step of each model
        # comes first.
        for arm in {id(arm.trained): arm for arm in arms.values()}.values():
            arm.memory(cuda_absent())
        progress, memory, counts = ProgressLines(len(arms), "arms: memory and operations"), {}, {}
        for label, arm in arms.items():
            memory[label] = arm.memory(cuda_absent())
            counts[label] = arm.operations(cuda_absent())
            progress(1)
        measured = {
            label: figures(label, seconds, memory) | {"losses": losses[label], "operations": counts[label]}
            for label in arms
        }
        result = {
            "machine": machine(cuda_absent()),
            "shape": asdict(shape),
            "description": str(shape),
            "rounds": rounds,
            "arms": measured,
        }
        if torch.distributed.get_rank() == 0:
            out.write_text(json.dumps(result, indent=1))
        save(arms[STOCK])


def figures(
    label: str, seconds: dict[str, list[Seconds]], memory: dict[str, dict[str, int]]
) -> dict[str, Any]:
    """The figures of an arm: seconds and bytes, and their ratios to stock Megatron."""
    own, stock = memory[label], memory[STOCK]
    times = {
        name: {
            "seconds": [getattr(one, name) for one in seconds[label]],
            "ratio": asdict(
                Ratio.of(
                    [getattr(one, name) for one in seconds[label]],
                    [getattr(one, name) for one in seconds[STOCK]],
                )
            ),
        }
        for name in Seconds._fields
    }
    return {
        **times,
        "bytes": own,
        "activations": own["activations"] / stock["activations"],
        "whole": (own["step"] + own["between"]) / (stock["step"] + stock["between"]),
    }


def build_arms(args: Any, shape: Shape, folder: Path, rounds: int) -> dict[str, Arm]:
    """Stock, control, and an arm for each variant. All except stock share a model with stock's weights."""
    from megatron.training.initialize import initialize_megatron, set_jit_fusion_options

    from ramoe_megatron.mcore.align.attach import attach
    from ramoe_megatron.mcore.train.step import forward_step

    initialize_megatron()
    set_jit_fusion_options(tp_size=1)
    stock, ours = build(args), build(args)
    attach(ours.model, shape.variants[0].config(folder))
    with torch.no_grad():
        for source, copy in zip(stock.model[0].parameters(), ours.model[0].parameters(), strict=True):
            copy.copy_(source)
    ours.optimizer.reload_model_params()
    arms = {STOCK: Arm(args, stock, stock_forward_step, samples(args, rounds), lambda: None)}
    if shape.control:
        arms[CONTROL] = Arm(args, ours, stock_forward_step, samples(args, rounds), lambda: None)
    for variant in shape.variants:
        config = variant.config(folder)
        arms[variant.name] = Arm(
            args, ours, forward_step, samples(args, rounds, config), partial(attach, ours.model, config)
        )
    return arms


def build(args: Any) -> Trained:
    """A model and its optimizer, with the settings that Megatron's `train` makes in the configuration."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.utils import get_model_config
    from megatron.training import get_timers
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.training import setup_model_and_optimizer

    from ramoe_megatron.mcore import compat

    container = pretrain_cfg_container_from_args(args, compat.model_config_from_args(args))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model, optimizer, scheduler = setup_model_and_optimizer(
        compat.model_type(), cfg_container=container, pg_collection=groups
    )
    config = get_model_config(model[0])
    config.grad_scale_func, config.timers, config.finalize_model_grads_func = (
        optimizer.scale_loss,
        get_timers(),
        finalize_model_grads,
    )
    for chunk in model:
        chunk.train()
    return Trained(model, optimizer, scheduler, config)


def samples(args: Any, rounds: int, alignment: RoutingAlignmentConfig | None = None) -> Iterator:
    """Micro-batches of Megatron's data loader over our data set, with labels if there is an alignment."""
    from megatron.core.rerun_state_machine import RerunDataIterator
    from megatron.training import get_tokenizer
    from megatron.training.datasets.data_samplers import build_pretraining_data_loader

    from ramoe_megatron.data.dataset import SFTDataset
    from ramoe_megatron.data.parallel import load_examples
    from ramoe_megatron.mcore.align.labels import AlignedDataset

    steps = WARM_UP + rounds + 5  # the last ones measure memory and count operations
    dataset: Any = SFTDataset(
        load_examples(args.ramoe_data),
        get_tokenizer(),
        args.seq_length,
        steps * args.global_batch_size,
        args.seed,
    )
    if alignment is not None:
        dataset = AlignedDataset(dataset, alignment, "en", args.global_batch_size)
    return RerunDataIterator(iter(build_pretraining_data_loader(dataset, 0)))


def stock_forward_step(data_iterator: Iterator, model: Any) -> tuple[torch.Tensor, Callable]:
    """Our forward step, without alignment."""
    from ramoe_megatron.mcore.train.step import masked_loss, next_batch

    batch = next_batch(data_iterator)
    output = model(
        batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=batch["loss_mask"]
    )
    return output, partial(masked_loss, batch["loss_mask"])


def save(stock: Arm) -> None:
    """Save the stock weights as a checkpoint, which the profiling benchmark reads."""
    from megatron.training.checkpointing import save_checkpoint

    save_checkpoint(1, stock.trained.model, None, None, 0)


if __name__ == "__main__":
    run_job(main)
