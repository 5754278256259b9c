"""What changes during training: the coefficient, its measured unit and refreshed labels.

Megatron's training loop calls `after_step` on every rank, after the step's log and validation and before its
checkpoint.

Shape suffix: B samples of the micro-batch.
"""

import json
import math
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ramoe_megatron.artifacts.files import atomic_write_text, read_json
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore import compat
from ramoe_megatron.mcore.align.metrics import LOSS, AlignmentMetrics
from ramoe_megatron.mcore.align.options import RoutingAlignmentConfig
from ramoe_megatron.method.schedule import coefficient_factor

FILE = "ramoe-parity.json"
"""File of the measured unit, beside the checkpoints of `--save`. A run that resumes reads it from `--load`
and writes it to its own `--save`."""


class Coefficient:
    """`--ramoe-coeff` under its schedule. A constant coefficient needs nothing from Megatron's training loop.

    With the unit lm-loss the coefficient is multiplied by the parity. The parity is the ratio of the
    language-model loss to the alignment loss, both means over the first global batch that has an aligned
    sample (XLR, arXiv 2610.01921). Until then the coefficient is 0. The parity is measured once and kept
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
        """Whether the unit has not been measured yet."""
        return self.parity is None

    def measure(self, lm_loss: Tensor, alignment_loss: Tensor) -> None:
        """Take the unit from the means of one global batch, which are the same on every rank.

        Without an aligned sample, nothing is measured and the next step calls this again.

        Raises:
            RamoeError: the loss function did not record a language-model loss.
        """
        lm, aligned = float(lm_loss), float(alignment_loss)
        if aligned <= 0:
            return
        if not (lm > 0 and math.isfinite(lm)):
            raise RamoeError(
                f"--ramoe-coeff-unit lm-loss: the language-model loss of the step is {lm:g}, "
                "expected a number above 0. In your own loss function call "
                "ramoe_megatron.record_lm_loss(loss, tokens), as examples/pretrain_gpt.py does"
            )
        self.parity = lm / aligned
        args = _training_args()
        measured = {"parity": self.parity, "lm_loss": lm, "iteration": args.curr_iteration}
        if torch.distributed.get_rank() == 0:
            losses = f"LM loss {lm:.4g}, alignment loss {aligned:.4g}"
            print(f"ramoe: {losses}: coefficient {self.config.coeff:g} x {self.parity:.4g}", flush=True)
            if args.save:
                atomic_write_text(Path(args.save) / FILE, json.dumps(measured) + "\n")

    def _resume(self, args: Any) -> None:
        if self.parity is not None or args.curr_iteration == 0:
            return
        path, first = Path(args.load or "") / FILE, torch.distributed.get_rank() == 0
        if not path.is_file():
            if first:  # not always an error: the run that saved may have seen no aligned sample
                print(
                    f"ramoe: no {path}: the unit of the coefficient (--ramoe-coeff-unit lm-loss) is "
                    "measured again",
                    flush=True,
                )
            return
        found = read_json(path)
        try:
            self.parity = float(found["parity"])
        except (KeyError, TypeError, ValueError) as error:
            raise RamoeError(
                f"{path}: {error!r}; "
                f'expected a number under "parity"; restore the file, or train from the start'
            ) from error
        if first and args.save and not (kept := Path(args.save) / FILE).is_file():
            atomic_write_text(kept, json.dumps(found) + "\n")


class RefreshedLabels(Protocol):
    """Labels that are scored again during training (`train.refresh`)."""

    def weight(self, example_B: Tensor) -> Tensor:
        """1 for an example that is currently aligned, else 0. [B]"""

    def is_ci(self, example_B: Tensor) -> Tensor:
        """Whether an example is currently ci. [B], bool"""

    def step(self, iteration: int) -> None:
        """After iteration `iteration` (counted from 1): refresh if it is due."""


class AlignmentState:
    """The state of one alignment in training, shared by the model chunks of this rank."""

    def __init__(self, config: RoutingAlignmentConfig, device: Any) -> None:
        self.config, self.coefficient = config, Coefficient(config)
        self.chunks: list[Any] = []
        """This rank's model chunks, unwrapped."""
        self.refresh: RefreshedLabels | None = None
        self.begun = False
        self.ran = False
        """Whether an aligned layer of this rank has run in training."""
        self.attached = False
        """Whether one has run with logits that require a gradient."""
        self._lm_2 = torch.zeros(2, dtype=torch.float64, device=device)

    def record_lm_loss(self, loss: Tensor, tokens: Tensor) -> None:
        """Add a micro-batch's language-model loss (a sum over its loss tokens) until the unit is measured.

        Losses without gradients are skipped: they come from Megatron's validation, not from the step.
        """
        if torch.is_grad_enabled() and self.coefficient.measures:
            self._lm_2 += torch.stack([loss.detach().double(), tokens.double()])

    def after_step(self, iteration: int) -> None:
        """Measure the unit and refresh the labels if due. Every rank calls it, with the iteration from 1."""
        self.begun = True
        if self.coefficient.measures:
            torch.distributed.all_reduce(self._lm_2)
            tracker = compat.moe_logging().get_moe_metrics_tracker()
            assert isinstance(tracker, AlignmentMetrics)  # `attach` installs it
            self.coefficient.measure(self._lm_2[0] / self._lm_2[1].clamp(min=1), tracker.latest[LOSS])
            self._lm_2.zero_()
        if self.refresh is not None:
            self.refresh.step(iteration)


_current: AlignmentState | None = None


def current_state() -> AlignmentState | None:
    """The state of the alignment that was attached last; None without alignment."""
    return _current


def state_of(config: RoutingAlignmentConfig, device: Any) -> AlignmentState:
    """The state for an alignment. Chunks that are attached one by one before the first step share a state.

    A state hooks into Megatron's training loop only if it has work to do after each step.
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
            "a coefficient that changes needs Megatron's own training loop, which counts the iterations; "
            "use it, or remove --ramoe-coeff-warmup-iters, --ramoe-coeff-decay and --ramoe-coeff-unit"
        )
    return args
