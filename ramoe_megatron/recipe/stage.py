"""A stage of a recipe: a command, what it reads, what it writes."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from ramoe_megatron.artifacts.files import read_json

JOBS = "ramoe_megatron.jobs"


def log_of(name: str) -> Path:
    """Place of a stage's log in the run folder."""
    return Path("logs") / f"{name.replace('/', '-')}.log"


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    `settings` is what, of the command, bears on the result: a change in it outdates the stage. Paths inside
    the run folder and the parallel layout do not belong to it.
    """

    name: str
    """Such as "taxonomy" or "finetune/sft-seed1"."""
    command: tuple[str, ...]
    """Module and arguments: what follows `python -m`."""
    settings: Any
    inputs: tuple[Path, ...] = ()
    outputs: tuple[Path, ...] = ()
    traces: tuple[Path, ...] = ()
    """What it also writes (TensorBoard curves): moved aside with the outputs, but neither required nor read
    by other stages."""
    weights: Path | None = None
    """JSON file of sampling weights (PATTERN -> share) that the generated data bring along; given as
    --ramoe-weights when it exists."""
    ranks: int = 1
    """Ranks per node; 0 for a stage that runs as one plain process, without torchrun."""
    nodes: int = 1

    def arguments(self) -> tuple[str, ...]:
        """`command` with the weights of the generated data, which exist only once the stage before has run."""
        if self.weights is None or not self.weights.is_file():
            return self.command
        pairs = read_json(self.weights)
        return (*self.command, "--ramoe-weights", *(f"{pattern}={share}" for pattern, share in pairs.items()))

    @property
    def kind(self) -> str:
        """The part of the name before the slash: what `--from` and `--until` name."""
        return self.name.partition("/")[0]

    @property
    def log(self) -> Path:
        """Place of the log in the run folder."""
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
        """The stage that `document` was made of."""
        paths = {name: tuple(map(Path, document[name])) for name in _PATHS}
        weights = Path(document["weights"]) if document["weights"] else None
        return cls(**document | paths | {"command": tuple(document["command"]), "weights": weights})


_PATHS = ("inputs", "outputs", "traces")
