"""`ramoe data`: the benchmarks as a table, and one of them written as parallel data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ramoe_megatron.data.benchmarks.declaration import benchmark_names, declared
from ramoe_megatron.data.benchmarks.engine import BenchmarkConfig, write_benchmark
from ramoe_megatron.data.config import config_from_mapping
from ramoe_megatron.errors import RamoeError


def listing() -> Table:
    """Every benchmark with its source on the hub, licence and paper."""
    table = Table("benchmark", "data", "on the hub", "licence", "paper")
    for name in benchmark_names():
        entry = declared(name)
        hub = next((form.hub for form in entry.forms if form.hub), "")
        table.add_row(name, entry.title, hub, entry.licence, entry.paper)
    return table


def shares(words: Sequence[str]) -> dict[str, float | str]:
    """The values of --splits.

    Raises:
        RamoeError: a value is not SPLIT=SHARE or SPLIT=SPLIT.
    """
    found: dict[str, float | str] = {}
    for word in words:
        name, equals, part = word.partition("=")
        if not (name and equals and part):
            raise RamoeError(f"--splits {word}: expected SPLIT=SHARE or SPLIT=SPLIT, such as train=0.4")
        try:
            found[name] = float(part)
        except ValueError:
            found[name] = part
    return found


def write(values: Mapping[str, Any], out: Path, replace: bool) -> Table:
    """Write the rows of a benchmark to a new file; the counts by split and language.

    Raises:
        RamoeError: a file would be overwritten, or as `read_benchmark`.
    """
    if out.suffix != ".jsonl":
        raise RamoeError(f"--out {out}: expected a file that ends in .jsonl")
    if not replace and (taken := [path for path in (out, out.with_suffix(".json")) if path.exists()]):
        raise RamoeError(f"--out: {taken[0]} exists; give another name, or --replace")
    stats = write_benchmark(config_from_mapping(BenchmarkConfig, values), out)
    languages = [*stats.languages]
    table = Table("split", *languages)
    for split, counts in stats.rows.items():
        table.add_row(split, *(str(counts.get(language, 0)) for language in languages))
    for reason, count in stats.left_out.items():
        table.add_row(f"left out ({reason})", f"{count} ids")
    return table
