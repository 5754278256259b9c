"""What of an alignment changes while training runs: the coefficient and its measured unit, and labels that are refreshed.

Megatron's training loop calls `after_step` on every rank, after the step's log and validation and before its checkpoint.

Shape suffix: B samples of the micro-batch.
"""

import json
import math
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core.transformer.moe import moe_logging
from torch import Tensor

from ramoe_megatron.artifacts.files import atomic_write_text, read_json
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore import compat
from ramoe_megatron.mcore.align.metrics import LOSS, AlignmentMetrics
from ramoe_megatron.mcore.align.options import RoutingAlignmentConfig
from ramoe_megatron.method.schedule import coefficient_factor

FILE = "ramoe-parity.json"
"""Beside the checkpoints of `--save`: the measured unit, for a run that resumes. That run passes it on to its own `--save`."""


class Coefficient:
    """`--ramoe-coeff` under its schedule. A constant one asks nothing of Megatron's training loop.

    With the unit lm-loss the coefficient counts in parities: the ratio of the language-model loss to the alignment loss, both means over
    the first global batch that has an aligned sample (XLR, arXiv 2610.01921). Until then it is 0. The ratio is measured once, and kept
    beside the checkpoints.
    """

    def __init__(self, config: RoutingAlignmentConfig) -> None:
        self.config, self.parity = config, None if config.coeff_unit == "lm-loss" else 1.0
        self._looked = False

    def now(self) -> float:
        """The coefficient at this iteration."""
        if not self.config.scheduled:
            return self.config.coeff
        args = _training_args()
        if not self._looked:
            self._looked = True
            self._resume(args)
        if self.parity is None:
            return 0.0
        factor = coefficient_factor(
            args.curr_iteration, self.config.coeff_warmup_iters, self.config.coeff_decay, args.train_iters
        )
        return self.config.coeff * self.parity * factor

    @property
    def measures(self) -> bool:
        """Whether the unit is still to be measured."""
        return self.parity is None

    def measure(self, lm_loss: Tensor, alignment_loss: Tensor) -> None:
        """Take the unit from the means of one global batch, the same on every rank; without an aligned sample, wait for the next.

        Raises:
            RamoeError: the loss function told no language-model loss.
        """
        lm, aligned = float(lm_loss), float(alignment_loss)
        if aligned <= 0:
            return
        if not (lm > 0 and math.isfinite(lm)):
            raise RamoeError(
                f"--ramoe-coeff-unit lm-loss: the language-model loss of the step is {lm:g}, expected a number above 0. A loss function of "
                "your own has to tell it: call ramoe_megatron.record_lm_loss(loss, tokens) there, as examples/pretrain_gpt.py does"
            )
        self.parity = lm / aligned
        args = _training_args()
        measured = {"parity": self.parity, "lm_loss": lm, "iteration": args.curr_iteration}
        if torch.distributed.get_rank() == 0:
            told = f"LM loss {lm:.4g}, alignment loss {aligned:.4g}: coefficient {self.config.coeff:g} x {self.parity:.4g}"
            print(f"ramoe: {told}", flush=True)
            if args.save:
                atomic_write_text(Path(args.save) / FILE, json.dumps(measured) + "\n")

    def _resume(self, args: Any) -> None:
        if self.parity is not None or args.curr_iteration == 0:
            return
        path, first = Path(args.load or "") / FILE, torch.distributed.get_rank() == 0
        if not path.is_file():
            if first:  # not always a fault: the run that saved may have seen no aligned sample
                print(
                    f"ramoe: no {path}: the unit of the coefficient (--ramoe-coeff-unit lm-loss) is measured anew",
                    flush=True,
                )
            return
        found = read_json(path)
        try:
            self.parity = float(found["parity"])
        except (KeyError, TypeError, ValueError) as error:
            raise RamoeError(
                f"{path}: {error!r}; expected a number under parity: restore it, or train from the start"
            ) from error
        if first and args.save and not (kept := Path(args.save) / FILE).is_file():
            atomic_write_text(kept, json.dumps(found) + "\n")


class RefreshedLabels(Protocol):
    """Labels that are scored anew while training runs (`train.refresh`)."""

    def weight(self, example_B: Tensor) -> Tensor:
        """1 where an example is aligned now, else 0. [B]"""

    def is_ci(self, example_B: Tensor) -> Tensor:
        """Whether an example is ci now. [B], bool"""

    def step(self, iteration: int) -> None:
        """After iteration `iteration` (from 1): refresh where it is due."""


class AlignmentState:
    """The state of one alignment in training, shared by the model chunks of this rank."""

    def __init__(self, config: RoutingAlignmentConfig, device: Any) -> None:
        self.config, self.coefficient = config, Coefficient(config)
        self.chunks: list[Any] = []
        """This rank's model chunks, unwrapped."""
        self.refresh: RefreshedLabels | None = None
        self.begun = False
        self._lm_2 = torch.zeros(2, dtype=torch.float64, device=device)

    def record_lm_loss(self, loss: Tensor, tokens: Tensor) -> None:
        """Add a micro-batch's language-model loss, a sum over its loss tokens, while the unit of the coefficient is measured.

        Megatron's validation runs without gradients: its loss is not the step's.
        """
        if torch.is_grad_enabled() and self.coefficient.measures:
            self._lm_2 += torch.stack([loss.detach().double(), tokens.double()])

    def after_step(self, iteration: int) -> None:
        """After iteration `iteration` (from 1), on every rank: measure the unit, refresh the labels, each where it is due."""
        self.begun = True
        if self.coefficient.measures:
            torch.distributed.all_reduce(self._lm_2)
            tracker = moe_logging.get_moe_metrics_tracker()
            assert isinstance(tracker, AlignmentMetrics)  # `attach` installs it
            self.coefficient.measure(self._lm_2[0] / self._lm_2[1].clamp(min=1), tracker.latest[LOSS])
            self._lm_2.zero_()
        if self.refresh is not None:
            self.refresh.step(iteration)


_current: AlignmentState | None = None


def current_state() -> AlignmentState | None:
    """The state of the alignment that was attached last; None where none was."""
    return _current


def state_of(config: RoutingAlignmentConfig, device: Any) -> AlignmentState:
    """A new state for an alignment; chunks that are attached one by one before the first step share one.

    Only a state that has something to do after each step hooks into Megatron's training loop.
    """
    global _current
    if _current is None or _current.begun or _current.config != config:
        _current = AlignmentState(config, device)
        if _current.coefficient.measures or config.refresh_interval is not None:
            compat.call_after_each_step(_current.after_step)
    return _current


def _training_args() -> Any:
    from megatron.training import get_args

    args = get_args()
    if not hasattr(args, "curr_iteration"):
        raise RamoeError(
            "a coefficient that changes needs Megatron's own training loop, which counts the iterations"
        )
    return args
