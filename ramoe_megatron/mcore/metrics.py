"""The alignment figures of a step: summed on the device, reduced once, reported through Megatron's own metrics tracker.

The layout of the sums is the same on every rank from the first step on, so a pipeline stage without an aligned layer, or a step
without a ci sample, reduces zeros instead of hanging.
"""

from typing import Any, Self

import torch
from megatron.core.transformer.moe import moe_logging
from torch import Tensor

COLUMNS = ("loss", "unit", "aligned", "samples", "mass_aligned", "with_task", "mass_other", "other_with_task")


class AlignmentMetrics(moe_logging.MoEMetricsTracker):
    """Megatron's tracker with more in its report: `routing_alignment_loss` and the routing mass on the task experts.

    `latest` holds the figures of the last step that was reported.
    """

    def __init__(self, num_moe_layers: int, device: Any) -> None:
        super().__init__()
        self.sums_LM = torch.zeros(num_moe_layers, len(COLUMNS), dtype=torch.float32, device=device)
        self.latest: dict[str, Tensor] = {}

    @classmethod
    def install(cls, num_moe_layers: int, device: Any) -> Self:
        """Make our tracker Megatron's; what stock losses have recorded so far goes on in it. A second model chunk gets the same one."""
        current = moe_logging.get_moe_metrics_tracker()
        if isinstance(current, cls) and len(current.sums_LM) == num_moe_layers:
            return current
        tracker = cls(num_moe_layers, device)
        tracker._metrics = current.metrics
        moe_logging.set_moe_metrics_tracker(tracker)
        return tracker

    def record_alignment(
        self, layer: int, loss: Tensor, unit: Tensor, aligned: Tensor, has_task: Tensor, task_mass: Tensor
    ) -> None:
        """Add one micro-batch at one aligned layer; nothing leaves the device.

        Args:
            layer: place among the MoE layers.
            loss: each sample's weighted divergence. [B]
            unit: what one sample counts for in the mean: 1, or its loss tokens. [B]
            aligned, has_task: whether a sample is aligned, and whether it belongs to a task of the expert file. [B], bool
            task_mass: routing mass on the sample's task experts. [B]
        """
        other = has_task & ~aligned
        self.sums_LM[layer] += torch.stack(
            [
                loss.sum(),
                unit.sum(),
                aligned.sum(),
                torch.ones_like(loss).sum(),
                task_mass.masked_fill(~aligned, 0.0).sum(),
                (aligned & has_task).sum(),
                task_mass.masked_fill(~other, 0.0).sum(),
                other.sum(),
            ]
        ).float()

    def reduced(self) -> dict[str, Tensor]:
        """Each figure of the step over all ranks: alignment loss (mean over aligned layers), share of samples aligned, mean routing
        mass on the task experts for aligned and for other task samples. One all-reduce of [L, M]."""
        sums_LM = self.sums_LM.clone()
        # Pieces of one sequence (tensor and context parallel) each hold the whole sequence's figures.
        sums_LM /= self._ranks_per_sample()
        torch.distributed.all_reduce(sums_LM)
        total = dict(zip(COLUMNS, sums_LM.double().sum(dim=0), strict=True))

        def ratio(numerator: str, denominator: str) -> Tensor:
            return (total[numerator] / total[denominator].clamp(min=1e-30)).float()

        return {
            "routing_alignment_loss": ratio("loss", "unit"),
            "ramoe/aligned_share": ratio("aligned", "samples"),
            "ramoe/task_expert_mass_aligned": ratio("mass_aligned", "with_task"),
            "ramoe/task_expert_mass_other": ratio("mass_other", "other_with_task"),
        }

    @staticmethod
    def _ranks_per_sample() -> int:
        from megatron.core import parallel_state

        return (
            parallel_state.get_tensor_model_parallel_world_size()
            * parallel_state.get_context_parallel_world_size()
        )

    def report(
        self,
        loss_scale: float,
        iteration: int,
        writer: Any = None,
        wandb_writer: Any = None,
        *args: Any,
        total_loss_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> str:
        """Megatron's report, then ours: into its loss table, TensorBoard and Weights & Biases."""
        figures = self.latest = self.reduced()  # first: Megatron's report ends in clear()
        log = super().report(
            loss_scale, iteration, writer, wandb_writer, *args, total_loss_dict=total_loss_dict, **kwargs
        )
        self._log_scalars(figures, iteration, writer, wandb_writer)
        if total_loss_dict is not None:
            name = "routing_alignment_loss"
            total_loss_dict[name] = total_loss_dict.get(name, 0.0) + figures[name]
        return log

    def clear(self) -> None:
        """Zero Megatron's entries and ours."""
        super().clear()
        self.sums_LM.zero_()
