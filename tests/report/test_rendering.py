"""Laws of the vocabulary and of the table: one way to write a number, and no entry lost or read as markup."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.utils import markupsafe
from rich.console import Console

from ramoe_megatron.report.rendering import PageSection, Table, console, html_page, markdown
from ramoe_megatron.report.vocabulary import (
    NONE,
    compared,
    correlation,
    count,
    interval,
    listed,
    number,
    p_phrase,
    p_value,
    percent,
    points,
)

words = st.text(st.sampled_from("ab|<>*`[]\\$&;é漢"), min_size=1, max_size=12)
entries = st.one_of(st.none(), st.integers(-99, 99), st.floats(-9, 9), words)


@st.composite
def tables(draw: st.DrawFn) -> Table:
    width = draw(st.integers(1, 4))
    row = st.lists(entries, min_size=width, max_size=width)
    heads = draw(st.lists(words, min_size=width, max_size=width))
    return Table(heads, draw(st.lists(row, min_size=1, max_size=4)), "title", left=(0,), note="note")


def console_text(table: Table) -> str:
    terminal = Console(width=300)
    with terminal.capture() as captured:
        terminal.print(console([table]))
    return captured.get()


@given(tables())
@settings(max_examples=30, deadline=None)
def test_every_entry_is_shown_as_it_is_by_all_three(table: Table) -> None:
    section = PageSection("name", "Section", [table])
    page, document = html_page("run", "report", ["found"], [section]), markdown("run", [section])
    terminal = console_text(table)
    found = (
        re.findall(r"((?:\\.|[^|\\])*)\|", line[1:])
        for line in document.splitlines()
        if line.startswith("| ")
    )
    rows = [[cell.strip() for cell in line] for line in found]
    plain = [[re.sub(r"\\([\\|<*`])", r"\1", cell) for cell in row] for row in rows]
    assert plain == [list(table.heads), plain[1], *table.cells]
    for cell in (cell for row in table.cells for cell in row):
        assert cell in terminal
        assert f">{markupsafe.escape(cell)}</td>" in page


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1))
def test_an_interval_is_one_text_with_true_minus_signs(middle: float, below: float, above: float) -> None:
    row = {"change": middle, "low": middle - below, "high": middle + above}
    text = points(row)
    assert "-" not in text
    ends = [float(end) for end in re.findall(r"[+-][\d.]+", text.replace("−", "-"))]
    assert all(
        abs(end - 100 * row[name]) <= 0.051 for end, name in zip(ends, ("change", "low", "high"), strict=True)
    )
    assert points({**row, "low": None}) == text.split(" ")[0]


def test_no_value_is_one_dash_everywhere() -> None:
    empty = {"accuracy": None, "low": None, "high": None}
    assert {number(None), percent(None), percent(empty), points({}), p_value(None), interval(None, "x")} == {
        NONE
    }
    assert Table(("a",), [(None,)]).cells == [[NONE]]
    assert correlation({"r": None, "n": 3}) == "r undefined"


def test_p_values_counts_and_lists() -> None:
    assert (p_value(0.0009), p_value(0.001), p_value(1.0)) == ("< 0.001", "0.001", "1.000")
    assert (p_phrase(0.0009), p_phrase(0.0132)) == ("p < 0.001", "p = 0.013")
    assert (count(1, "seed"), count(2, "seed"), count(0, "seed")) == ("1 seed", "2 seeds", "0 seeds")
    assert (listed(["a"]), listed(["a", "b"]), listed("abc")) == ("a", "a and b", "a, b and c")


def test_a_comparison_names_the_side_that_is_higher() -> None:
    row = {"change": 0.02, "low": 0.01, "high": 0.03, "p": 0.0132, "p_holm": 0.02}
    brackets = "(95 % interval +1.0 to +3.0, p = 0.013, 0.020 after Holm's correction)"
    assert compared("a", "b", row) == f"a scored 2.0 points higher than b in the target languages {brackets}"
    alone = {"change": -0.02, "low": None, "high": None, "p": None}
    assert compared("a", "b", alone) == "a scored 2.0 points lower than b in the target languages"
    assert "the same as" in compared("a", "b", {**row, "change": 0.0001})
