"""Options of routing steering: a setting from flags, or the best setting of a search."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ramoe_megatron.artifacts.files import load_document
from ramoe_megatron.errors import RamoeError

if TYPE_CHECKING:  # reading a recipe does not need torch
    from ramoe_megatron.artifacts.expert_file import ExpertFile
    from ramoe_megatron.method.steering import Steering


@dataclass(frozen=True)
class SteeringOptions:
    """Options of routing steering at inference (arXiv 2510.04694, eq. 4-5; open choices are our reading)."""

    steer: Literal["soft", "hard"] | None = None
    """Raise the router logits of the task experts at every token: soft (by --ramoe-steer-strength standard
    deviations) or hard (above all other logits; the router's top-k must be the largest logits). Needs
    --ramoe-experts. Default: no steering."""

    steer_strength: float = 0.5
    """Strength of soft steering, in standard deviations of a token's router logits."""

    steer_layers: str = "auto"
    """Steered layers: auto (the zone in the expert file), FIRST-LAST or FRACTION-FRACTION."""

    steer_tau: float | None = None
    """Steer the experts whose delta is above this value. Default: the experts stored in the expert file."""

    steering: str | None = None
    """steering.json of `ramoe steer`: use its best setting, instead of the flags above."""

    @property
    def on(self) -> bool:
        """Whether steering is requested. The best setting of a search may still be no steering."""
        return self.steer is not None or self.steering is not None

    def check(self, experts: str | None, args: Any) -> None:
        """Raise RamoeError for flags that do not work together.

        Args:
            experts: the value of --ramoe-experts.
            args: all validated arguments.
        """
        single = [
            f"--ramoe-{flag}"
            for flag, given in (
                ("steer-strength", self.steer_strength != SteeringOptions.steer_strength),
                ("steer-layers", self.steer_layers != SteeringOptions.steer_layers),
                ("steer-tau", self.steer_tau is not None),
            )
            if given
        ]
        if self.steering is not None and (self.steer is not None or single):
            found = ", ".join([*(["--ramoe-steer"] if self.steer else []), *single])
            raise RamoeError(
                f"--ramoe-steering {self.steering} and {found} both set the steering: remove one of them"
            )
        if self.steering is None and self.steer is None and single:
            raise RamoeError(
                f"{', '.join(single)} without --ramoe-steer: nothing would be steered; "
                "add --ramoe-steer soft or hard"
            )
        if self.steer == "hard" and "--ramoe-steer-strength" in single:
            raise RamoeError(
                "--ramoe-steer-strength with --ramoe-steer hard, which has no strength; "
                "remove it, or use --ramoe-steer soft"
            )
        if self.on and experts is None:
            raise RamoeError(
                "--ramoe-experts is missing: steering needs the expert file that `ramoe profile` wrote"
            )
        if self.steer == "hard":
            from ramoe_megatron.mcore.align.refusals import refuse_hard_steering

            refuse_hard_steering(args)

    def setting(self, experts: "ExpertFile", args: Any) -> "Steering | None":
        """The steering setting; None for no steering.

        Raises:
            RamoeError: a value or a file is invalid, the tau chooses no expert in these layers, or the best
                setting is hard steering and the router does not allow it.
        """
        from ramoe_megatron.mcore.align.refusals import refuse_hard_steering
        from ramoe_megatron.method.layers import parse_layers
        from ramoe_megatron.method.steering import Steering

        if self.steering is not None:
            found = best_of(self.steering)
            if found is not None and found.kind == "hard":
                refuse_hard_steering(args)
        elif self.steer is not None:
            layers = parse_layers(self.steer_layers, experts.shape.num_moe_layers, experts.zone)
            found = Steering(
                self.steer, self.steer_strength if self.steer == "soft" else None, self.steer_tau, layers
            )
        else:
            return None
        if found is not None and not experts.steered_by(found).any():
            raise RamoeError(
                f"{experts.path}: {found} chooses no expert; use a lower --ramoe-steer-tau or other layers"
            )
        return found


def best_of(path: str) -> "Steering | None":
    """The best setting of a steering.json; None where no steering was best.

    Raises:
        RamoeError: the file is damaged, or is not a steering.json.
    """
    from ramoe_megatron.method.steering import Steering

    return Steering.from_document(load_document(path, "ramoe-steering")["best"], path)


def told(steering: "Steering | None", experts: "ExpertFile", tasks: set[str]) -> list[str]:
    """Sentences for the log: what is steered, and which of the tasks are not."""
    if steering is None:
        return ["steering: in the search no setting was better than no steering, so nothing is steered"]
    chosen_GLE = experts.steered_by(steering)
    empty = [
        task for task in experts.tasks if task in tasks and not chosen_GLE[experts.task_index(task)].any()
    ]
    absent = sorted(tasks - set(experts.tasks))
    sentences: list[Any] = [
        f"steering: {steering}; {int(chosen_GLE.sum())} experts over all tasks and layers"
    ]
    sentences += [
        f"steering: task {task!r} has no expert in these layers and is not steered" for task in empty
    ]
    return [
        *sentences,
        *(f"steering: task {task!r} is not in {experts.path} and is not steered" for task in absent),
    ]
