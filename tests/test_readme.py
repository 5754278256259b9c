"""The documents against the code: links, flags, keys, commands, recipes and rows that they name exist."""

import ast
import dataclasses
import itertools
import re
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from ramoe_megatron import _HOMES
from ramoe_megatron.cli import main
from ramoe_megatron.cli.reference import (
    BENCHMARKS_HEADING,
    FLAGS,
    KEYS,
    KEYS_HEADING,
    benchmark_table,
    docstrings,
    flags_page,
    recipe_keys,
)
from ramoe_megatron.data.parallel import load_examples, pair_with_anchor
from ramoe_megatron.recipe.load import validate
from ramoe_megatron.recipe.schema import Recipe
from ramoe_megatron.report.artefact_tables import summary_table

ROOT = Path(__file__).parents[1]
FOLDERS = (".", "docs", "docs/results", "examples", "examples/smolmoe", "benchmarks", "slurm")
TEXTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for folder in FOLDERS
    for path in sorted((ROOT / folder).glob("*.md"))
}
every_document = pytest.mark.parametrize("name", TEXTS)


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXTS[name], flags=re.DOTALL | re.MULTILINE)


def prose(name: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", TEXTS[name], flags=re.DOTALL | re.MULTILINE)


def anchors(name: str) -> set[str]:
    """The anchors of a page's headings, as a Git host makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(name), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code(name: str) -> list[str]:
    """Each line of a block of commands, and each piece of code in the prose."""
    lines = [line for block in blocks(name, "bash") for line in block.splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", prose(name))


def test_a_newcomer_reads_the_readme_in_five_minutes() -> None:
    assert len(TEXTS["README.md"].splitlines()) < 200
    assert len(TEXTS["README.md"].split()) < 1500


def test_the_readme_shows_the_table_that_the_demo_prints() -> None:
    heads = summary_table({"recipe": "demo", "anchor": "en", "seeds": [], "methods": [], "summary": []}).heads
    table = TEXTS["README.md"].partition(f"| {' | '.join(heads)} |\n")[2].splitlines()
    rows = itertools.takewhile(lambda line: line.startswith("|"), table[1:])
    demo = validate(yaml.safe_load((ROOT / "examples/demo.yaml").read_text(encoding="utf-8")), "demo.yaml")
    methods = ["base", *(method.name for method in demo.methods)]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == methods


def test_the_generated_pages_are_current() -> None:
    assert TEXTS["docs/flags.md"] == flags_page(), "run `make docs`"
    recipes = TEXTS["docs/recipes.md"]
    assert recipes[recipes.index(KEYS_HEADING) :] == recipe_keys(), "run `make docs`"
    benchmarks = TEXTS["docs/benchmarks.md"]
    assert benchmarks[benchmarks.index(BENCHMARKS_HEADING) :] == benchmark_table(), "run `make docs`"


@pytest.mark.parametrize(("heading", "options"), [entry[:2] for entry in FLAGS])
def test_each_flags_row_is_its_docstring(heading: str, options: type) -> None:
    section = TEXTS["docs/flags.md"].split(f"## {heading}\n")[1].split("\n## ")[0]
    expected, fields = docstrings(options), dataclasses.fields(options)
    assert list(expected) == [field.name for field in fields]
    for name, text in expected.items():
        flag = f"--ramoe-{name.replace('_', '-')}"
        rows = re.findall(rf"^\| `{flag}(?: [^`]*)?` \| [^|]* \| (.*) \|$", section, flags=re.MULTILINE)
        assert text, flag
        assert rows == [text], flag


def test_the_page_of_flags_knows_each_jobs_options() -> None:
    from ramoe_megatron.recipe.doctor import JOB_NAMES

    listed = {job: {options for _, options, jobs in FLAGS if job in jobs} for job in JOB_NAMES}
    assert listed == {
        job: set(import_module(f"ramoe_megatron.jobs.{job}").JOB.options()) for job in JOB_NAMES
    }


def test_the_keys_of_a_recipe_are_all_there() -> None:
    """Each section that a recipe can hold is listed, and each key has a meaning."""

    def sections(found: Any) -> set[type]:
        if isinstance(found, type) and issubclass(found, BaseModel):
            return {found}.union(*(sections(field.annotation) for field in found.model_fields.values()))
        return set().union(*map(sections, get_args(found)))

    listed = {section for _, section in KEYS}
    assert sections(Recipe) == {section for section in listed if issubclass(section, BaseModel)}
    for section in listed:
        assert all(docstrings(section).values()), section


@every_document
def test_no_flag_is_named_that_does_not_exist(name: str) -> None:
    known = {f"--ramoe-{field.replace('_', '-')}" for _, options, _ in FLAGS for field in docstrings(options)}
    assert set(re.findall(r"--ramoe-[a-z]+(?:-[a-z]+)*", TEXTS[name])) <= known


@every_document
def test_commands_exist(name: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    for piece in code(name):
        for command in re.findall(r"(?:^|[/ (`])ramoe ([a-z][\w-]*)", piece.split("#")[0]):
            assert command in main.commands, piece
        for target in re.findall(r"^make ([a-z][a-z-]*)", piece):
            assert target in targets, piece
        for module in re.findall(r"-m (ramoe_megatron[\w.]+)", piece):
            module = module.replace("NAME", "finetune")
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), piece


def test_the_recipe_is_valid() -> None:
    (text,) = (block for block in blocks("docs/recipes.md", "yaml") if block.startswith("name:"))
    recipe = validate(yaml.safe_load(text), "docs/recipes.md")
    assert [method.name for method in recipe.methods] == ["sft", "ra-moe", "ra-moe-shuffled"]


@pytest.mark.parametrize("name", ["README.md", "docs/data.md"])
def test_the_rows_are_parallel_data(name: str, tmp_path: Path) -> None:
    (rows,) = blocks(name, "json")
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    examples = load_examples([str(tmp_path / "rows.jsonl")])
    assert len(pair_with_anchor(examples, "en")) == len(examples) / 2


def test_the_pages_of_rows_agree() -> None:
    assert blocks("docs/data.md", "json")[0].startswith(blocks("README.md", "json")[0])


@every_document
def test_python_names_what_exists(name: str) -> None:
    for block in blocks(name, "python"):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "ramoe_megatron":
                assert node.attr in _HOMES, node.attr
            if isinstance(node, ast.ImportFrom):
                source = (ROOT / str(node.module).replace(".", "/")).with_suffix(".py")
                body = ast.parse(source.read_text(encoding="utf-8")).body
                defined = {getattr(made, "name", None) for made in body}
                assert {alias.name for alias in node.names} <= defined


@every_document
def test_links_and_files_exist(name: str) -> None:
    here = (ROOT / name).parent
    for target, _, anchor in re.findall(r"\]\(([^)#\s]*)(#([^)]+))?\)", TEXTS[name]):
        if target.startswith("http"):
            continue
        page = (here / target).resolve() if target else ROOT / name
        assert page.exists(), target
        if anchor:
            assert anchor in anchors(str(page.relative_to(ROOT))), f"{target}#{anchor}"
    rooms = "ramoe_megatron|tests|examples|docs|slurm|benchmarks"
    for path in re.findall(rf"`((?:{rooms})/[\w./-]+)`", TEXTS[name]):
        assert (ROOT / path).exists(), path


def sources() -> list[str]:
    """Every string of the package, its placeholders as a mark, and the scripts that print errors."""
    found = [(ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "slurm/common.sh")]
    for path in (ROOT / "ramoe_megatron").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                pieces = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                found.append("".join(map(str, pieces)))
            elif isinstance(node, ast.Constant):
                found.append(str(node.value))
    return found


def test_the_messages_are_those_of_the_code() -> None:
    """The longest piece between placeholders (`...`, N, numbers, quotes) of each message is in the code."""
    known = sources()
    for cell in re.findall(r"^\| (`.*?) \| ", TEXTS["docs/troubleshooting.md"], flags=re.MULTILINE):
        for message in re.findall(r"`([^`]+)`", cell):
            pieces = re.split(r"\.\.\.|\b[A-Z]+\b|\d+|'[^']*'|[\\\"{}();:,?]", message)
            piece = max((piece.strip() for piece in pieces), key=len)
            theirs = "megatron/core" in cell  # GNU make's words
            assert theirs or any(piece in text for text in known), message


def test_the_readme_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\((docs/[^)#]+)", TEXTS["README.md"]))
    pages = {name for name in TEXTS if name.startswith("docs/") and not name.startswith("docs/results/")}
    assert pages <= linked
