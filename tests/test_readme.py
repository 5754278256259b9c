"""README.md against the code: its flags, its recipe, its rows and its links are those that exist."""

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
from pathlib import Path

import pytest
import yaml

from ramoe_megatron.data.parallel import load_examples, pair_with_anchor
from ramoe_megatron.jobs.evaluate import EvaluateOptions
from ramoe_megatron.jobs.offline_job import OfflineOptions
from ramoe_megatron.jobs.predict import PredictOptions
from ramoe_megatron.jobs.profile import ProfileOptions
from ramoe_megatron.jobs.steer import SteerOptions
from ramoe_megatron.mcore.arguments import DataOptions, RoutingAlignmentConfig
from ramoe_megatron.mcore.select.selective_options import SelectiveOptions
from ramoe_megatron.mcore.steer.steering_options import SteeringOptions
from ramoe_megatron.recipe.load import validate

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPTIONS = [
    RoutingAlignmentConfig, DataOptions, SelectiveOptions, OfflineOptions, ProfileOptions, EvaluateOptions, SteeringOptions, SteerOptions,
    PredictOptions,
]  # fmt: skip
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md"]


def docstrings(options: type) -> dict[str, str]:
    """Field -> the string below it, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(options))).body[0].body  # type: ignore[attr-defined]
    found = {}
    for node, below in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(below, ast.Expr):
            found[node.target.id] = " ".join(below.value.value.split())  # type: ignore[attr-defined]
    return found


def flags(options: type) -> dict[str, str]:
    return {f"--ramoe-{name.replace('_', '-')}": text for name, text in docstrings(options).items()}


def block(language: str, starts: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    return next(text for text in blocks if text.startswith(starts))


@pytest.mark.parametrize("options", OPTIONS)
def test_each_flags_row_is_its_docstring(options: type) -> None:
    expected = flags(options)
    assert len(expected) == len(dataclasses.fields(options))
    for flag, text in expected.items():
        rows = re.findall(rf"^\| `{flag}(?: [^`]*)?` \| [^|]* \| (.*) \|$", README, flags=re.MULTILINE)
        assert text in rows, flag


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_flag_is_named_that_does_not_exist(name: str) -> None:
    known = {flag for options in OPTIONS for flag in flags(options)}
    named = set(re.findall(r"--ramoe-[a-z]+(?:-[a-z]+)*", (ROOT / name).read_text(encoding="utf-8")))
    assert named <= known


def test_the_recipe_is_valid() -> None:
    recipe = validate(yaml.safe_load(block("yaml", "name:")), "README.md")
    assert [method.name for method in recipe.methods] == ["sft", "ra-moe", "ra-moe-shuffled"]


def test_the_rows_are_parallel_data(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(block("json", "{"), encoding="utf-8")
    examples = load_examples([str(tmp_path / "rows.jsonl")])
    assert len(pair_with_anchor(examples, "en")) == len(examples) / 2


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_files_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert ((ROOT / name).parent / target).exists(), target
    for path in re.findall(r"`((?:ramoe_megatron|tests|examples)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path


def test_the_anchors_are_headings() -> None:
    headings = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)$", README, flags=re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= headings
