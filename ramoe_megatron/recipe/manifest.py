"""manifest.json: the settings and inputs of each stage of a run folder. A later run reads which results are
up to date."""

import contextlib
import datetime
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ramoe_megatron.artifacts.files import atomic_write_text, package_version
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.recipe.digests import digest_path, digest_value
from ramoe_megatron.recipe.stage import Stage

FORMAT, VERSION = "ramoe-manifest", 1
LOCK_SECONDS = 60.0  # milliseconds are usual; a network file system may be slow


@dataclass
class Entry:
    """The record of one stage."""

    state: Literal["started", "done", "failed"]
    settings: str
    """Digest of the settings that affect the result."""
    inputs: dict[str, str | None]
    """Path -> digest. A path inside the run folder is relative to it."""
    outputs: dict[str, str] = field(default_factory=dict)
    package_version: str = ""
    started: str = ""
    ended: str | None = None
    command: list[str] = field(default_factory=list)
    ranks: int = 1
    job: str | None = None
    """Slurm's job id, if the stage ran in a job."""
    nodes: str | None = None
    """Node list of that job."""

    @property
    def identity(self) -> str:
        """Digest of settings and inputs. Equal identities give equal results."""
        return digest_value({"settings": self.settings, "inputs": self.inputs})


class Manifest:
    """The record of one run folder, read when it is opened and written atomically at each change.

    Several jobs of one recipe may run a stage each at the same time. A stage's entry is therefore merged into
    the current content of the file.

    Args:
        recipe: name of the recipe. None takes the name in the file.

    Raises:
        RamoeError: the folder holds the results of another recipe, is not a run folder, or has a damaged
            manifest.
    """

    def __init__(self, folder: Path, recipe: str | None) -> None:
        self.folder, self.recipe, self.path = folder, recipe, folder / "manifest.json"
        self.stages: dict[str, Entry] = {}
        self.flags: dict[str, Any] = {}
        if self.path.is_file():
            self._read()
        elif folder.is_dir() and (
            found := sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        ):
            raise RamoeError(
                f"{folder} is not empty ({', '.join(found[:5])}) and holds no manifest.json, "
                "so it is no run folder: give another --out"
            )

    def _read(self) -> None:
        try:
            raw = json.loads(self.path.read_text(encoding="utf-8"))
            if raw["format"] != FORMAT or raw["version"] != VERSION:
                raise RamoeError(
                    f"{self.path}: found format {raw['format']} version {raw['version']}, "
                    f"expected {FORMAT} version {VERSION}: give another --out"
                )
            recipe, self.flags = raw["recipe"], raw["megatron_flags"]
            self.stages = {name: Entry(**entry) for name, entry in raw["stages"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, RamoeError):
                raise
            raise RamoeError(
                f"{self.path} is damaged ({error}): restore the file, or move the folder aside and start "
                "again"
            ) from error
        if self.recipe is None:
            self.recipe = recipe
        if recipe != self.recipe:
            raise RamoeError(
                f"{self.folder} holds the results of the recipe {recipe!r}, not of {self.recipe!r}: "
                "give another --out, or move the folder aside"
            )

    def write(self) -> None:
        """Write manifest.json atomically."""
        value = {
            "format": FORMAT,
            "version": VERSION,
            "recipe": self.recipe,
            "package_version": package_version(),
            "megatron_flags": self.flags,
            "stages": {name: asdict(entry) for name, entry in self.stages.items()},
        }
        atomic_write_text(self.path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    def name(self, path: Path) -> str:
        """A path as the manifest writes it. Paths inside the run folder are relative, so that the folder may
        be moved."""
        return str(path.relative_to(self.folder)) if path.is_relative_to(self.folder) else str(path)

    def digest(self, path: Path) -> str | None:
        """Digest of an input or output. A checkpoint's digest includes the identity of the stage that wrote
        it."""
        name = self.name(path)
        maker = next((entry.identity for entry in self.stages.values() if name in entry.outputs), None)
        return digest_path(path, maker)

    def current(self, stage: Stage) -> Entry:
        """The entry that the stage would get if it started now."""
        return Entry(
            state="started",
            settings=digest_value(stage.settings),
            inputs={self.name(path): self.digest(path) for path in stage.inputs},
            package_version=package_version(),
            started=now(),
            command=list(stage.command),
            ranks=stage.ranks,
            job=os.environ.get("SLURM_JOB_ID"),
            nodes=os.environ.get("SLURM_JOB_NODELIST"),
        )

    def reason_to_run(self, stage: Stage) -> str | None:
        """Why the stage has to run, as text; None when its result is up to date."""
        entry = self.stages.get(stage.name)
        if entry is None:
            return "not run yet"
        if entry.state == "failed":
            return "failed before"
        if entry.state == "started":
            return "interrupted before"
        fresh = self.current(stage)
        if fresh.settings != entry.settings:
            return "its settings changed"
        changed = [
            name
            for name in fresh.inputs.keys() | entry.inputs.keys()
            if fresh.inputs.get(name) != entry.inputs.get(name)
        ]
        if changed:
            return f"{sorted(changed)[0]} changed"
        for path in stage.outputs:
            name = self.name(path)
            if not path.exists():
                return f"{name} is gone"
            if entry.outputs.get(name) != self.digest(path):
                return f"{name} was changed by hand"
        return None

    def start(self, stage: Stage) -> bool:
        """Record that the stage starts. Returns True when the stage resumes its own unfinished result.

        A result of other settings is moved to superseded/ and never deleted.
        """
        entry, old = self.current(stage), self.stages.get(stage.name)
        resumes = old is not None and old.state != "done" and old.identity == entry.identity
        if not resumes:
            self.supersede((*stage.outputs, *stage.traces), stage.name)
        self._record(stage, entry)
        return resumes

    def finish(self, stage: Stage) -> None:
        """Record that the stage is done. Raises RamoeError when an output is missing."""
        entry = self.stages[stage.name]
        if missing := [self.name(path) for path in stage.outputs if not path.exists()]:
            self.fail(stage)
            raise RamoeError(
                f"{stage.name} ended without an error, but {missing[0]} is missing; "
                f"see {self.folder / stage.log}"
            )
        # `digest` finds a checkpoint's maker by these names.
        entry.outputs = {self.name(path): "" for path in stage.outputs}
        entry.outputs = {self.name(path): self.digest(path) or "" for path in stage.outputs}
        entry.state, entry.ended = "done", now()
        self._record(stage, entry)

    def fail(self, stage: Stage) -> None:
        """Record that the stage failed."""
        entry = self.stages[stage.name]
        entry.state, entry.ended = "failed", now()
        self._record(stage, entry)

    def _record(self, stage: Stage, entry: Entry) -> None:
        with locked(self.folder, ".manifest.lock", LOCK_SECONDS):
            if self.path.is_file():
                self._read()
            self.stages[stage.name] = entry
            self.write()

    def supersede(self, paths: tuple[Path, ...], why: str) -> None:
        """Move the existing `paths` to superseded/TIME-STAGE/, where they keep their relative paths."""
        existing = [path for path in paths if path.exists() and path.is_relative_to(self.folder)]
        if not existing:
            return
        stamp = f"{datetime.datetime.now():%Y%m%d-%H%M%S-%f}-{why.replace('/', '-')}"
        for path in existing:
            target = self.folder / "superseded" / stamp / path.relative_to(self.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)


@contextlib.contextmanager
def locked(folder: Path, name: str = ".lock", patience: float = 0) -> Iterator[None]:
    """Hold a lock of the run folder: the whole folder, or the part that `name` guards.

    Raises RamoeError when another run still holds the lock after `patience` seconds, or the folder is not
    writable.
    """
    import filelock

    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / name, fallback_to_soft=False)
    try:
        lock.acquire(timeout=patience)
    except filelock.Timeout:
        raise RamoeError(
            f"another run is at work in {folder}: wait for it to end, stop it, or give another --out"
        ) from None
    except OSError as error:
        raise RamoeError(
            f"{folder / name} cannot be locked ({error.strerror}): give an --out that you may write to"
        ) from error
    try:
        yield
    finally:
        lock.release()


def now() -> str:
    """Local time with its UTC offset, to the second."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
