"""A clean installation: pinned versions, the Makefile's search for Python 3.12, the wheel's contents."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
MAKE = shutil.which("make")


def constraints() -> dict[str, str]:
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*==[0-9][0-9A-Za-z.]*", line) for line in lines), lines
    return dict(line.split("==") for line in lines)


def requirements(extra: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(text) for text in project["dependencies"] + project["optional-dependencies"][extra]]


def test_pins_satisfy_the_declared_requirements() -> None:
    pins = constraints()
    for requirement in requirements("dev"):
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin, prereleases=True), f"{requirement}: pinned to {pin}"


def test_every_package_that_gets_installed_is_pinned() -> None:
    """Walks the installed packages' own requirements; PyTorch's wheel itself pins the CUDA libraries."""
    pins, seen, todo = constraints(), set(), requirements("dev")
    while todo:
        requirement = todo.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen or name.startswith(("nvidia-", "cuda-toolkit")):
            continue
        seen.add((name, extras))
        assert name in pins, f"{name} is installed but constraints.txt does not pin it"
        for line in importlib.metadata.requires(requirement.name) or []:
            child = Requirement(line)
            if child.marker is None or any(
                child.marker.evaluate({"extra": extra}) for extra in extras | {""}
            ):
                todo.append(child)


@pytest.mark.parametrize("name", ["Makefile", "constraints.txt", "pyproject.toml", ".ci/run"])
def test_packaging_names_no_host(name: str) -> None:
    assert not re.search(r"https?:|--index-url|--find-links", (ROOT / name).read_text())


# ---- the Makefile's search for an interpreter ----


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def find_python(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `make find-python` where only `home` and `home/path` hold a Python."""
    (home / "path").mkdir(exist_ok=True)
    if not (home / "path/bash").exists():
        os.symlink(shutil.which("bash") or "/bin/bash", home / "path/bash")
    command = [MAKE or "make", "--no-print-directory", "find-python", *arguments]
    environment = {"PATH": str(home / "path"), "HOME": str(home)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def real() -> str:
    base = Path(sys.base_prefix) / "bin/python3.12"
    return f'exec "{base if base.exists() else sys.executable}" "$@"'


needs_make = pytest.mark.skipif(MAKE is None, reason="make is not installed")


@needs_make
def test_no_python_3_12_is_an_error_that_says_what_was_looked_for(tmp_path: Path) -> None:
    shim = script(tmp_path / "path/python3.12", "echo 'not active' >&2; exit 127")
    answer = find_python(tmp_path)
    assert answer.returncode != 0
    assert answer.stdout == ""
    for expected in ("no Python 3.12 found", "on PATH", "pyenv", "conda", "uv", str(shim), "make PYTHON="):
        assert expected in answer.stderr


@needs_make
def test_a_shim_that_fails_does_not_hide_the_version_behind_it(tmp_path: Path, real: str) -> None:
    script(tmp_path / "path/python3.12", "exit 127")
    script(tmp_path / "path/python3", "exit 1")
    behind = script(tmp_path / ".pyenv/versions/3.12.9/bin/python3.12", real)
    assert find_python(tmp_path).stdout.strip() == str(behind)


@needs_make
def test_a_named_interpreter_is_used_and_a_wrong_one_refused(tmp_path: Path, real: str) -> None:
    named, wrong = script(tmp_path / "mine", real), script(tmp_path / "other", "exit 1")
    assert find_python(tmp_path, f"PYTHON={named}").stdout.strip() == str(named)
    answer = find_python(tmp_path, f"PYTHON={wrong}")
    assert answer.returncode != 0
    assert f"PYTHON={wrong} is not a Python 3.12" in answer.stderr


def test_the_wheel_holds_the_package_data_and_the_licence(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(
        ROOT / "ramoe_megatron", source / "ramoe_megatron", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
    ]
    subprocess.run([*pip, str(tmp_path), str(source)], check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    data = [p for p in (ROOT / "ramoe_megatron").rglob("*") if p.suffix in {".py", ".html", ".yaml", ".json"}]
    assert {str(path.relative_to(ROOT)) for path in data} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
