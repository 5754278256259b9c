"""The alignment metrics of a step: summed on the device, reduced once, reported by Megatron's tracker.

The sums have the same shape on every rank from the first step on. So a pipeline stage without an aligned
layer, or a step without a ci sample, reduces zeros instead of hanging.

Megatron calls `report` on every rank after every step, whatever `--log-interval` and
`--tensorboard-log-interval` say. As with Megatron's own losses at the routers, TensorBoard and Weights &
Biases get the metrics of each step, and the printed line gets the mean over the steps since the last line.
Megatron's printed `lm loss` excludes a step that the optimizer skipped (float16 overflow), but its losses at
the routers include it and so read too large. Our metrics exclude it.

Shape suffixes: L MoE layers, Z recorded layers, M columns of the sums, B samples of a micro-batch, N samples
of all micro-batches of a step. "..." is L or empty.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ramoe_megatron.mcore import compat
from ramoe_megatron.mcore.cpu.backend import uncompiled

with uncompiled():
    moe_logging = compat.moe_logging()

COLUMNS = ("loss", "unit", "aligned", "samples", "ci_mass", "ci", "other_mass", "other")
LOSS, SHARE = "routing_alignment_loss", "ramoe/aligned_share"
CI_MASS, OTHER_MASS = "ramoe/task_expert_mass_ci", "ramoe/task_expert_mass_other"
COEFFICIENT = "ramoe/coefficient"
LAYER_NAMES = {LOSS: LOSS, CI_MASS: "ramoe_task_expert_mass_ci", OTHER_MASS: "ramoe_task_expert_mass_other"}


WAITING = 1 << 14
"""The most recorded layers whose figures wait for their sums, in a program that never reports a step."""


@dataclass(frozen=True, eq=False)
class LoggedSamples:
    """The samples of a micro-batch as the log counts them, the same at every aligned layer."""

    columns_MB: Tensor
    """For each of `COLUMNS`, what a sample adds to it, or what its divergence or its mass is multiplied by.
    [M, B], float32"""

    @classmethod
    def of(
        cls, weight_B: Tensor, unit_B: Tensor, aligned_B: Tensor, ci_B: Tensor, has_task_B: Tensor
    ) -> "LoggedSamples":
        """
        Args:
            weight_B: what the divergence is multiplied by in the sum of the losses.
            unit_B: each sample's weight in the mean: 1, or its number of loss tokens.
            aligned_B: whether a sample is aligned. bool
            ci_B: whether a sample is right in English and wrong in its own language. bool
            has_task_B: whether a sample's task experts are known and it has tokens to pool. bool
        """
        ci_B, other_B = ci_B & has_task_B, ~ci_B & has_task_B
        one_B = torch.ones_like(unit_B)
        columns = [weight_B, unit_B, aligned_B, one_B, ci_B, ci_B, other_B, other_B]
        return cls(torch.stack([column.float() for column in columns]))


class _Recorded(NamedTuple):
    samples: LoggedSamples
    divergence_B: Tensor
    masses_B2: Tensor


class AlignmentMetrics(moe_logging.MoEMetricsTracker):  # type: ignore[name-defined]
    """Megatron's metrics tracker with the alignment metrics added.

    `routing_alignment_loss`: the alignment loss without its coefficient, mean over the aligned layers.
    `ramoe/aligned_share`: share of the samples of the global batch that are aligned.
    `ramoe/task_expert_mass_ci`, `ramoe/task_expert_mass_other`: mean routing mass on the task experts in the
    aligned layers, of the ci samples and of all other samples of a known task, English samples included. A
    step without such a sample has 0, which is not written.

    `--moe-per-layer-logging` adds `moe/routing_alignment_loss_layer_i` and
    `moe/ramoe_task_expert_mass_ci_layer_i` (`_other_`) for the aligned layers. As in Megatron's own
    `moe/NAME_layer_i`, i is Megatron's layer number minus one, not the index among the MoE layers, so all
    curves of one router have the same number.

    `ramoe/coefficient`: the coefficient of the step, when the coefficient changes during training.

    `latest` holds the metrics of the last reported step.
    """

    def __init__(
        self, layer_numbers: Sequence[int], device: Any, coefficient: Callable[[], float] | None = None
    ) -> None:
        """
        Args:
            layer_numbers: Megatron's layer number (1-based) of each MoE layer of the whole model.
            device: the device of the sums.
            coefficient: returns the coefficient of the reported step; None for a constant coefficient.
        """
        super().__init__()
        self.coefficient = coefficient
        self.layer_numbers = tuple(layer_numbers)
        self._sums_LM = torch.zeros(len(layer_numbers), len(COLUMNS), dtype=torch.float32, device=device)
        self._waiting: dict[int, list[_Recorded]] = {}
        self._layer_weight: dict[int, float] = {}
        self.printed_M = torch.zeros(len(COLUMNS), dtype=torch.float64, device=device)
        self.printed_coefficient: Tensor | float = 0.0
        self.advanced = 0
        self.latest: dict[str, Tensor] = {}
        self.before_report: Callable[[], bool] | None = None
        """Called on every rank before a report, until it returns True."""

    @classmethod
    def install(
        cls, layer_numbers: Sequence[int], device: Any, coefficient: Callable[[], float] | None = None
    ) -> Self:
        """Replace Megatron's tracker by ours, and keep what Megatron's losses have recorded so far.

        Later model chunks of the same rank get the same tracker.
        """
        current = moe_logging.get_moe_metrics_tracker()
        if isinstance(current, cls) and current.layer_numbers == tuple(layer_numbers):
            current.coefficient = coefficient
            return current
        tracker = cls(layer_numbers, device, coefficient)
        tracker._metrics = current.metrics
        moe_logging.set_moe_metrics_tracker(tracker)
        return tracker

    def record_alignment(
        self, layer: int, samples: LoggedSamples, divergence_B: Tensor, masses_B2: Tensor, weight: float = 1.0
    ) -> None:
        """Keep one micro-batch at one aligned layer. Nothing is computed until the sums are read.

        Args:
            layer: index among the MoE layers.
            samples: the samples of the micro-batch, one object for all layers.
            divergence_B: each sample's divergence, finite. [B]
            masses_B2: routing mass on the sample's task experts, and on all others, finite. [B, 2]
            weight: weight of the layer.
        """
        self._waiting.setdefault(layer, []).append(_Recorded(samples, divergence_B, masses_B2))
        self._layer_weight[layer] = weight
        if sum(map(len, self._waiting.values())) > WAITING:
            self._add_waiting()

    @property
    def sums_LM(self) -> Tensor:
        """The sums of this rank since the last `clear`. [L, M], float32"""
        self._add_waiting()
        return self._sums_LM

    def _add_waiting(self) -> None:
        """Add what was recorded. Layers that saw the same micro-batches are added together."""
        waiting, self._waiting = self._waiting, {}
        groups: dict[tuple[int, ...], list[int]] = {}
        for layer, recorded in sorted(waiting.items()):
            groups.setdefault(tuple(id(one.samples) for one in recorded), []).append(layer)
        for layers in groups.values():
            recorded = [one for layer in layers for one in waiting[layer]]
            columns_MN = torch.cat([one.samples.columns_MB for one in waiting[layers[0]]], dim=1)
            divergence_ZN = torch.cat([one.divergence_B for one in recorded]).view(len(layers), -1)
            mass_ZN = torch.cat([one.masses_B2 for one in recorded]).view(len(layers), -1, 2)[..., 0]
            # multiplied by one where a column is a plain count
            of_column = [
                divergence_ZN,
                *[torch.ones_like(mass_ZN)] * 3,
                *[mass_ZN, torch.ones_like(mass_ZN)] * 2,
            ]
            sums_ZM = (torch.stack(of_column, dim=1) * columns_MN).sum(dim=-1)
            weights = [self._layer_weight[layer] for layer in layers]
            if any(weight != 1.0 for weight in weights):
                sums_ZM[:, 0] *= torch.tensor(weights, device=sums_ZM.device)
            self._sums_LM.index_add_(0, torch.tensor(layers, device=sums_ZM.device), sums_ZM)

    def reduced(self) -> dict[str, Tensor]:
        """The metrics of the step over all ranks, means over the aligned layers. One all-reduce of [L, M]."""
        return figures(self._totals().sum(dim=0))

    def _totals(self) -> Tensor:
        """The step's sums over all ranks. [L, M], float64

        Each rank that has a piece of a sequence (tensor and context parallelism) adds the whole sequence, so
        a sample is counted once for each piece. Ratios of the sums are not affected, and only ratios are
        logged.
        """
        totals_LM = self.sums_LM.double()
        torch.distributed.all_reduce(totals_LM)
        return totals_LM

    def report(
        self,
        loss_scale: float,
        iteration: int,
        writer: Any = None,
        wandb_writer: Any = None,
        per_layer_logging: bool = False,
        *args: Any,
        total_loss_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> str:
        """Report Megatron's metrics, then ours, to the loss table, TensorBoard and Weights & Biases.

        Raises:
            RamoeError: at the first report, the alignment loss reaches no trained weight.
        """
        if self.before_report is not None and self.before_report():
            self.before_report = None
        totals_LM = self._totals()  # before Megatron's report, which ends in clear()
        self.latest = figures(totals_LM.sum(dim=0))
        if self.coefficient is not None:
            self.latest[COEFFICIENT] = torch.full_like(self.latest[LOSS], self.coefficient())
        log = super().report(
            loss_scale,
            iteration,
            writer,
            wandb_writer,
            per_layer_logging,
            *args,
            total_loss_dict=total_loss_dict,
            **kwargs,
        )
        if writer is not None or wandb_writer is not None:
            self._write(totals_LM, per_layer_logging, iteration, writer, wandb_writer)
        if total_loss_dict is not None:
            self._print(totals_LM.sum(dim=0), total_loss_dict)
        return log

    def _write(
        self, totals_LM: Tensor, per_layer_logging: bool, iteration: int, writer: Any, wandb_writer: Any
    ) -> None:
        scalars = dict(zip(self.latest, torch.stack([*self.latest.values()]).tolist(), strict=True))
        if per_layer_logging:
            layers = {
                name: values.tolist() for name, values in figures(totals_LM).items() if name in LAYER_NAMES
            }
            for layer, samples in enumerate(totals_LM[:, COLUMNS.index("samples")].tolist()):
                if samples > 0:  # every sample passes every aligned layer, and no other
                    number = self.layer_numbers[layer] - 1
                    scalars |= {
                        f"moe/{LAYER_NAMES[name]}_layer_{number}": values[layer]
                        for name, values in layers.items()
                    }
        shown = {name: value for name, value in scalars.items() if value or "task_expert_mass" not in name}
        for name, value in shown.items():
            if writer is not None:
                writer.add_scalar(name, value, iteration)
            if wandb_writer is not None:
                wandb_writer.log({name: value}, iteration)

    def _print(self, totals_M: Tensor, table: dict[str, Any]) -> None:
        """Add our metrics to Megatron's loss table.

        Megatron divides the table's values by the number of optimizer steps since the last printed line.
        """
        advanced, skipped = table.get("advanced iterations", 1), table.get("skipped iterations", 0)
        if advanced + skipped <= 1:  # the first step since that line
            self.printed_M.zero_()
            self.printed_coefficient, self.advanced = 0.0, 0
        if advanced > self.advanced:
            self.printed_M += totals_M
            coefficient = self.latest.get(COEFFICIENT, 0.0)  # a tensor on the device when it changes
            self.printed_coefficient = self.printed_coefficient + coefficient
        self.advanced = advanced
        shown = figures(self.printed_M)
        if COEFFICIENT in self.latest:
            shown[COEFFICIENT] = self.printed_coefficient / max(1, advanced)
        for name, value in shown.items():
            if advanced > 0:
                table[name] = value * advanced
            else:  # no step counts yet: leave the metric out instead of writing 0
                table.pop(name, None)

    def clear(self) -> None:
        """Zero Megatron's entries and ours."""
        super().clear()
        self._waiting.clear()
        self._sums_LM.zero_()


def figures(sums: Tensor) -> dict[str, Tensor]:
    """The metrics from their sums; 0 where there is no sample. [..., M] to [...] each, float32"""
    total = dict(zip(COLUMNS, sums.unbind(dim=-1), strict=True))

    def ratio(numerator: str, denominator: str) -> Tensor:
        return (total[numerator] / total[denominator].clamp(min=1e-30)).float()

    return {
        LOSS: ratio("loss", "unit"),
        SHARE: ratio("aligned", "samples"),
        CI_MASS: ratio("ci_mass", "ci"),
        OTHER_MASS: ratio("other_mass", "other"),
    }
