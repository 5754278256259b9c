"""A run folder with a plan of four small stages that are real processes."""

import io
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ramoe_megatron.recipe.manifest import Manifest, locked
from ramoe_megatron.recipe.runner import run_stages
from ramoe_megatron.recipe.stage import Stage

# Writes OUTPUT from the number in each INPUT and its own; leaves a line in runs.txt; obeys files that a test
# puts down.
JOB = """
import sys
from pathlib import Path
name, number, output, *inputs = sys.argv[1:]
here = Path(__file__).parent
with open(here / "runs.txt", "a") as runs:
    runs.write(name + "\\n")
if (here / f"fail-{name}").exists():
    print("ramoe: error: rows.jsonl:3: found no answer\\n  ids: a, b", file=sys.stderr)
    sys.exit(2)
if (here / f"crash-{name}").exists():
    Path(output).with_suffix(".part").write_text("half")
    raise RuntimeError("out of memory")
total = sum(int(Path(path).read_text().split()[0]) for path in inputs)
Path(output).write_text(f"{(total + int(number)) // 2 * 2}")
"""


class Bench:
    """A run folder whose plan is a -> b -> c, and d of a alone; numbers are rounded down to even ones."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.code = folder / "run", folder / "code"
        self.code.mkdir()
        (self.code / "job.py").write_text(JOB)
        self.numbers = {"a": 10, "b": 20, "c": 30, "d": 40}
        self.shown = ""

    def plan(self) -> list[Stage]:
        sources = {"a": [], "b": ["a"], "c": ["b"], "d": ["a"]}
        return [self.stage(name, sources[name]) for name in self.numbers]

    def stage(self, name: str, sources: Sequence[str]) -> Stage:
        output, inputs = self.folder / f"{name}.txt", [self.folder / f"{source}.txt" for source in sources]
        words = ("job", name, str(self.numbers[name]), str(output), *map(str, inputs))
        return Stage(name, words, {"number": self.numbers[name]}, tuple(inputs), (output,), ranks=0)

    def run(self, begin: int = 0, end: int | None = None, force: bool = False) -> list[str]:
        """Names of the stages that ran, in order."""
        log = self.code / "runs.txt"
        log.unlink(missing_ok=True)
        shown = io.StringIO()
        plan = self.plan()
        try:
            with locked(self.folder):
                manifest = Manifest(self.folder, "bench")
                manifest.write()
                run_stages(plan, begin, end or len(plan), manifest, Console(file=shown, width=200), force)
        finally:
            self.shown = shown.getvalue()
            self.ran = log.read_text().split() if log.exists() else []
        return self.ran

    def superseded(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "superseded").rglob("*") if path.is_file())
