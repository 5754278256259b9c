"""A stage of a recipe: a command, its inputs and its outputs."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from ramoe_megatron.artifacts.files import read_json

JOBS = "ramoe_megatron.jobs"


def log_of(name: str) -> Path:
    """Path of a stage's log in the run folder."""
    return Path("logs") / f"{name.replace('/', '-')}.log"


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    `settings` are the parts of the command that affect the result. When they change, the stage has to run
    again. Paths inside the run folder and the parallel layout are no settings.
    """

    name: str
    """Such as "taxonomy" or "finetune/sft-seed1"."""
    command: tuple[str, ...]
    """Module and arguments, as after `python -m`."""
    settings: Any
    inputs: tuple[Path, ...] = ()
    outputs: tuple[Path, ...] = ()
    traces: tuple[Path, ...] = ()
    """Further outputs, such as TensorBoard curves. They are moved aside with the outputs, but no stage
    requires or reads them."""
    weights: Path | None = None
    """JSON file of sampling weights (PATTERN -> share) that the generated data include. It is passed as
    --ramoe-weights if it exists."""
    ranks: int = 1
    """Ranks per node. 0: the stage runs as one plain process, without torchrun."""
    nodes: int = 1

    def arguments(self) -> tuple[str, ...]:
        """`command` with the weights of the generated data, a file that exists only once the data stage has
        run."""
        if self.weights is None or not self.weights.is_file():
            return self.command
        pairs = read_json(self.weights)
        return (*self.command, "--ramoe-weights", *(f"{pattern}={share}" for pattern, share in pairs.items()))

    @property
    def kind(self) -> str:
        """The part of the name before the slash, which `--from` and `--until` may name."""
        return self.name.partition("/")[0]

    @property
    def log(self) -> Path:
        """Path of the log in the run folder."""
        return log_of(self.name)

    def document(self) -> dict[str, Any]:
        """The stage as plain JSON values, for a job that runs it later."""
        return (
            asdict(self)
            | {name: [str(path) for path in getattr(self, name)] for name in _PATHS}
            | {"weights": str(self.weights) if self.weights else None}
        )

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Self:
        """The stage from the result of `document`."""
        paths = {name: tuple(map(Path, document[name])) for name in _PATHS}
        weights = Path(document["weights"]) if document["weights"] else None
        return cls(**document | paths | {"command": tuple(document["command"]), "weights": weights})


_PATHS = ("inputs", "outputs", "traces")
