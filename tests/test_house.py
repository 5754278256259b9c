"""Laws of the source tree: allowed imports between rooms, no cycles, one name per thing, line width."""

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ramoe_megatron"
FLOORS = (
    "errors",
    "statistics",
    "method",
    "artifacts",
    "data",
    "models",
    "mcore",
    "jobs",
    "report",
    "recipe",
    "cli",
)
"""The rooms from the ground up. A room imports itself and the rooms below it."""
MCORE_FLOORS = (("align",), ("train", "offline"), ("select", "steer"))
"""Rooms of `mcore/` above its own files: alignment does not know who else uses it."""
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports(module: str) -> set[str]:
    """The modules of this package that a module imports, also inside functions and only for types."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ramoe_megatron"):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
    return found


def room(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"ramoe_megatron"}))
def test_imports_go_down(module: str) -> None:
    for other in imports(module) - {"ramoe_megatron"}:
        assert FLOORS.index(room(other)) <= FLOORS.index(room(module)), (
            f"{module} imports {other}, which is above it"
        )


def test_the_rooms_of_mcore_import_down() -> None:
    floor = {name: height for height, names in enumerate(MCORE_FLOORS, 1) for name in names}

    def height(module: str) -> int:
        parts = module.split(".")
        return floor.get(parts[2], 0) if len(parts) > 3 else 0

    for module in MODULES:
        if room(module + ".") == "mcore" and height(module):
            for other in imports(module):
                if other.startswith("ramoe_megatron.mcore."):
                    assert height(other) <= height(module), f"{module} imports {other}, which is above it"


def test_there_are_no_circles() -> None:
    try:
        TopologicalSorter({module: imports(module) for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_only_mcore_and_the_jobs_import_megatron() -> None:
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(name.split(".")[0] == "megatron" for name in names):
                assert room(module) in ("mcore", "jobs"), f"{module} imports Megatron"


def test_no_two_modules_have_one_name() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for module, path in MODULES.items():
        if not path.name.startswith("__"):
            homes[path.stem].append(module)
    assert not {name: found for name, found in homes.items() if len(found) > 1}


def test_no_two_files_of_tests_have_one_name() -> None:
    """They are no packages, so pytest imports each under its own name alone."""
    names = [path.stem for path in (ROOT / "tests").rglob("*.py") if path.stem != "conftest"]
    assert sorted(set(names)) == sorted(names)


def test_no_two_public_names_mean_different_things() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for module, path in MODULES.items():
        if room(module + ".") == "cli":  # a command's function has the command's name
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if (
                isinstance(node, ast.FunctionDef | ast.ClassDef)
                and not node.name.startswith("_")
                and node.name != "main"
            ):
                homes[node.name].append(module)
    assert not {name: found for name, found in homes.items() if len(found) > 1}
