"""Values of a recipe: set by `--set`, read from YAML as written, and passed to Megatron as flags."""

import argparse
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.recipe.load import RecipeLoader, set_value
from ramoe_megatron.recipe.megatron_flags import relevant, render

keys = st.from_regex(r"[a-z][a-z0-9*/-]{0,8}", fullmatch=True)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(st.characters(codec="utf-8", exclude_categories=["C"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(keys, values, max_size=4), st.lists(keys, min_size=1, max_size=4), values)
def test_set_puts_the_value_at_the_path_and_touches_nothing_else(
    raw: dict[str, Any], path: list[str], value: Any
) -> None:
    written = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
    change = f"{'.'.join(path)}={written}"
    node: Any = raw
    for key in path[:-1]:
        node = node.get(key, {}) if isinstance(node, dict) else node
    try:
        found = set_value(raw, change)
    except RamoeError:
        assert not reachable(raw, path)
        return
    node = found
    for key in path:
        node = node[key]
    assert node == value
    assert {key: item for key, item in found.items() if key != path[0]} == {
        key: item for key, item in raw.items() if key != path[0]
    }


def reachable(node: Any, path: list[str]) -> bool:
    for key in path:
        if node is None:
            return True
        if not isinstance(node, dict):
            return False
        node = node.get(key)
    return True


def test_set_reaches_into_lists_and_refuses_places_that_are_not_there() -> None:
    raw = {"methods": [{"name": "a"}, {"name": "b"}]}
    assert set_value(raw, "methods.1.name=c") == {"methods": [{"name": "a"}, {"name": "c"}]}
    assert raw == {"methods": [{"name": "a"}, {"name": "b"}]}
    for change, told in [
        ("methods.2=x", "no place in a list of 2"),
        ("name", "expected key.path=value"),
        ("=3", "expected"),
    ]:
        with pytest.raises(RamoeError, match=told):
            set_value(raw, change)
    with pytest.raises(RamoeError, match="is not a mapping"):
        set_value({"a": 3}, "a.b=4")


scalars = (
    st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("abc-./ =", min_size=1).filter(lambda text: text != "--")
)
# ("--" alone is argparse's own word, and no value of any flag)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z][a-z-]{0,6}[a-z]", fullmatch=True), st.booleans() | st.none() | scalars
    )
)
def test_argparse_reads_back_what_render_writes(flags: dict[str, Any]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for name, value in flags.items():
        bare = value is None or isinstance(value, bool)
        kind: dict[str, Any] = {"action": "store_true"} if bare else {"type": type(value)}
        parser.add_argument(f"--{name}", dest=name, **kind)
    read = vars(parser.parse_args(render(flags)))
    assert read == {name: bool(value) if value is None else value for name, value in flags.items()}


def test_a_list_is_several_values_of_one_flag() -> None:
    assert render({"moe-layer-freq": ["a", 2], "x": False, "y": None, "z": 0}) == [
        "--moe-layer-freq",
        "a",
        "2",
        "--z",
        "0",
    ]


def test_layout_and_logging_do_not_bear_on_results_but_zero_does() -> None:
    kept = relevant(
        {"tensor-model-parallel-size": 2, "log-interval": 1, "lr": 0, "bf16": True, "fp16": False, "x": None}
    )
    assert kept == {"lr": 0, "bf16": True}


@given(st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), st.none(), st.text(max_size=8)))
def test_yaml_values_are_read_as_they_were_written_and_a_time_limit_is_text(value: object) -> None:
    assert yaml.load(yaml.safe_dump(value), Loader=RecipeLoader) == value
    for text in ("12:00:00", "1:30", "190:20:30.15", "-1:05"):
        assert yaml.load(f"time: {text}", Loader=RecipeLoader) == {"time": text}
    for text in ("on", "off", "no", "NO", "yes", "y"):  # a key of methods, a language
        assert yaml.load(f"{text}: [{text}]", Loader=RecipeLoader) == {text: [text]}
    assert yaml.load("[true, False, TRUE]", Loader=RecipeLoader) == [True, False, True]
