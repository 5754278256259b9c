"""Writes the generated documentation.

These are `docs/flags.md`, the recipe keys at the end of `docs/recipes.md`, and the table at the end of
`docs/benchmarks.md`.

python -m ramoe_megatron.cli.reference docs
"""

import ast
import dataclasses
import inspect
import itertools
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from ramoe_megatron.artifacts.files import atomic_write_text
from ramoe_megatron.data.benchmarks.declaration import benchmark_names, declared
from ramoe_megatron.data.benchmarks.engine import BenchmarkConfig
from ramoe_megatron.data.benchmarks.sib200 import SibConfig
from ramoe_megatron.data.world.build import WorldConfig
from ramoe_megatron.jobs.evaluate import EvaluateOptions
from ramoe_megatron.jobs.offline_job import OfflineOptions
from ramoe_megatron.jobs.predict import PredictOptions
from ramoe_megatron.jobs.profile import ProfileOptions
from ramoe_megatron.jobs.steer import SteerOptions
from ramoe_megatron.mcore.align.options import RoutingAlignmentConfig
from ramoe_megatron.mcore.arguments import DataOptions
from ramoe_megatron.mcore.select.selective_options import SelectiveOptions
from ramoe_megatron.mcore.steer.steering_options import SteeringOptions
from ramoe_megatron.recipe.methods import Method
from ramoe_megatron.recipe.schema import Evaluate, Grid, Profile, Recipe, Taxonomy, Tune
from ramoe_megatron.recipe.sections import (
    AlignmentSection,
    Data,
    Launch,
    OptionsSection,
    SelectionSection,
    Slurm,
    SteeringSection,
)

OFFLINE = ("taxonomy", "profile", "evaluate", "steer", "predict")
FLAGS: tuple[tuple[str, type, tuple[str, ...]], ...] = (
    ("Alignment", RoutingAlignmentConfig, ("finetune",)),
    ("Selective training", SelectiveOptions, ("finetune",)),
    ("Data", DataOptions, ("finetune", *OFFLINE)),
    ("Forward-only jobs", OfflineOptions, OFFLINE),
    ("Profile", ProfileOptions, ("profile",)),
    ("Evaluation", EvaluateOptions, ("evaluate",)),
    ("Steering", SteeringOptions, ("evaluate",)),
    ("Search for a steering setting", SteerOptions, ("steer",)),
    ("Prediction", PredictOptions, ("predict",)),
)
"""Heading, option dataclass, and the jobs that accept its flags."""
KEYS: tuple[tuple[str, type], ...] = (
    ("", Recipe),
    ("data", Data),
    ("data.world", WorldConfig),
    ("data.sib200", SibConfig),
    ("data.benchmark", BenchmarkConfig),
    ("taxonomy", Taxonomy),
    ("profile", Profile),
    ("alignment", AlignmentSection),
    ("selection", SelectionSection),
    ("steering", SteeringSection),
    ("methods", Method),
    ("evaluate", Evaluate),
    ("tune", Tune),
    ("tune.methods", Grid),
    ("launch", Launch),
    ("launch.slurm", Slurm),
)
"""Key path of a section in a recipe, and the class that declares its keys."""
KEYS_HEADING = "## Every key\n"
BENCHMARKS_HEADING = "## Every benchmark\n"
GENERATED = "`make docs` writes this {what} from the docstrings in the code. Edit the docstrings.\n"


def docstrings(declared: type) -> dict[str, str]:
    """Field -> the docstring below it in the body of a class, on one line; empty where there is none."""
    made: Any = ast.parse(textwrap.dedent(inspect.getsource(declared))).body[0]
    found = {}
    for node, below in itertools.pairwise([*made.body, ast.Pass()]):
        if isinstance(node, ast.AnnAssign):
            match below:
                case ast.Expr(ast.Constant(str(text))):
                    found[ast.unparse(node.target)] = " ".join(text.split())
                case _:
                    found[ast.unparse(node.target)] = ""
    return found


def flags_page() -> str:
    """The text of `docs/flags.md`."""
    lines = [
        "# Flags\n",
        "Megatron's flags mean what they mean in Megatron. Our flags begin with `--ramoe-`.",
        "`ramoe JOB -- --help` prints both. " + GENERATED.format(what="page"),
    ]
    for heading, options, jobs in FLAGS:
        taken = f"Taken by {', '.join(f'`{job}`' for job in jobs)}. Declared in `{options.__name__}`."
        lines += [f"## {heading}\n", f"{_summary(options)} {taken}\n"]
        rows = [
            (f"`--ramoe-{name.replace('_', '-')}{values}`", default, text)
            for name, values, default, text in _fields(options)
        ]
        lines.append(_table(("flag", "default", "meaning"), rows))
    return "\n".join(lines)


def recipe_keys() -> str:
    """The end of `docs/recipes.md`: the keys of every section."""
    lines = [KEYS_HEADING, GENERATED.format(what="section")]
    for place, section in KEYS:
        lines += [f"### {f'`{place}`' if place else 'Top level'}\n", f"{_summary(section)}\n"]
        if issubclass(section, OptionsSection):
            lines.append(_flags_of(section))
        kebab = issubclass(section, BaseModel)
        rows = [
            (f"`{name.replace('_', '-') if kebab else name}{values}`", default, text)
            for name, values, default, text in _fields(section)
        ]
        lines += [_table(("key", "default", "meaning"), rows)] if rows else []
    return "\n".join(lines)


def benchmark_table() -> str:
    """The end of `docs/benchmarks.md`: the declared benchmarks and their traps."""
    rows, traps = [], []
    for name in benchmark_names():
        entry = declared(name)
        hub = next((f"`{form.hub}`" for form in entry.forms if form.hub), "")
        files = ", ".join(f"`{form.files}`" for form in entry.forms if form.files)
        rows.append((f"`{name}`", entry.title, files, hub, entry.licence, entry.paper))
        traps += [f"- **{entry.title}.** {trap}\n" for trap in entry.traps]
    head = ("name", "benchmark", "files, any of", "on the hub", "licence", "paper")
    made = "`make docs` writes this section from the files of the benchmarks.\n"
    return "\n".join([BENCHMARKS_HEADING, made, _table(head, rows), "".join(traps)])


def _flags_of(section: type[OptionsSection]) -> str:
    """A pointer to the flags that are also keys of a section."""
    options: Any = section.made_of
    heading = next(heading for heading, declared, _ in FLAGS if declared is options)
    files = sorted({field.name for field in dataclasses.fields(options)} - set(section.model_fields))
    return (
        f"The flags of [{heading}](flags.md#{heading.lower().replace(' ', '-')}) without `--ramoe-`. "
        f"The run gives {', '.join(f'`{name}`' for name in files)} to the jobs itself.\n"
    )


def _fields(declared: type) -> Iterator[tuple[str, str, str, str]]:
    """Name, choices, default and docstring of each field in the body of a class."""
    hints = get_type_hints(declared)
    for name, text in docstrings(declared).items():
        yield name, _values(hints[name]), _default(declared, name), text


def _summary(declared: type) -> str:
    """The first paragraph of a class's docstring, on one line."""
    return " ".join((inspect.getdoc(declared) or "").partition("\n\n")[0].split())


def _values(hint: Any) -> str:
    """` {a,b}` for a choice, ` ...` for a list of values."""
    kinds = [get_args(part)[0] if get_origin(part) is Annotated else part for part in [hint, *get_args(hint)]]
    for kind in kinds:
        if get_origin(kind) is Literal:
            return f" {{{','.join(map(str, get_args(kind)))}}}" if get_origin(hint) is not list else " ..."
        if get_origin(kind) in (list, tuple):
            return " ..."
    return ""


def _default(declared: Any, name: str) -> str:
    if issubclass(declared, BaseModel):
        field: Any = declared.model_fields[name]
        required, value = field.is_required(), field.get_default(call_default_factory=True)
    else:
        field = next(field for field in dataclasses.fields(declared) if field.name == name)
        made = field.default_factory is not dataclasses.MISSING
        required, value = False, field.default_factory() if made else field.default
    if required:
        return "required"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, BaseModel):
        return "section"
    if value is None or value in ([], {}, (), ""):
        return "none"
    if isinstance(value, dict):
        return f"`{', '.join(f'{key}: {number:g}' for key, number in value.items())}`"
    return f"`{' '.join(map(str, value)) if isinstance(value, list | tuple) else f'{value}'}`"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(folder: Path) -> None:
    """Write the pages into the documentation folder."""
    atomic_write_text(folder / "flags.md", flags_page())
    recipes = (folder / "recipes.md").read_text(encoding="utf-8").partition(KEYS_HEADING)[0]
    atomic_write_text(folder / "recipes.md", recipes + recipe_keys())
    benchmarks = (folder / "benchmarks.md").read_text(encoding="utf-8").partition(BENCHMARKS_HEADING)[0]
    atomic_write_text(folder / "benchmarks.md", benchmarks + benchmark_table())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
