"""The map: what alignment adds is the difference of two methods, by world and by ci share."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from comparison_runs import SEEDS, TARGETS, Outcomes, p_within, row, write_run

from ramoe_megatron.artifacts.files import load_document
from ramoe_megatron.cli import main
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.report.comparison.assemble import write_comparison
from ramoe_megatron.report.comparison.gain_map import gain_map, map_markdown, write_map

COMMANDS = {
    "sft": ["--lr", "0.1"],
    "wide": ["--lr", "0.1", "--ramoe-coeff", "50"],
    "off": ["--lr", "0.1", "--ramoe-coeff", "0.0"],
    "sft-4": ["--lr", "0.1", "--ramoe-ids-per-task", "4"],
    "wide-4": ["--lr", "0.1", "--ramoe-ids-per-task", "4", "--ramoe-coeff", "50"],
}
CI = {("a", "es"): 0, ("a", "tr"): 1, ("b", "es"): 4, ("b", "tr"): 10}
"""Of 10: bands 0 to 10, 10 to 20, and twice 40 to 100 %. The base model has 4 of 10 right everywhere."""


def world(root: Path, name: str, gain: int) -> Path:
    """Alignment adds `gain` of 10 in one cell to the whole data, and 2 more in every cell to few examples."""
    outcomes: Outcomes = {}
    for seed in SEEDS:
        outcomes["sft", seed] = outcomes["off", seed] = {("b", "es"): 5}
        outcomes["wide", seed] = {("b", "es"): 5 + gain}
        outcomes["sft-4", seed] = {}
        outcomes["wide-4", seed] = dict.fromkeys(TARGETS, 6 if seed > 1 else 7)
    run = write_run(root / f"runs/{name}", outcomes, commands=COMMANDS, ci=CI)
    write_comparison([run], root / name)
    return root / name


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("map")
    page = write_map([world(root, "near", 2), world(root, "far", 4)], root / "out", root / "doc/where.md")
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 1
    assert "Where alignment helps" in text
    assert json.loads((root / "doc/where.json").read_text()) == json.loads(
        (root / "out/map.json").read_text()
    )
    assert "where.json" in (root / "doc/where.md").read_text()
    shown = CliRunner().invoke(main, ["inspect", str(root / "out/map.json")])
    assert shown.exit_code == 0
    assert "What alignment adds" in shown.output
    return load_document(root / "out/map.json", "ramoe-map")


def test_what_alignment_adds_is_the_difference_of_two_methods_on_the_same_samples(
    found: dict[str, Any],
) -> None:
    """By hand: 2 and 4 of 40 rows; with four ids a task 2 of 10, and 3 of 10 with the first of five seeds."""
    rows = {(r["world"], r["method"]): r for r in found["rows"]}
    assert list(rows) == [("near", "wide"), ("near", "wide-4"), ("far", "wide"), ("far", "wide-4")]
    assert [r["added"]["change"] for r in rows.values()] == pytest.approx(
        [2 / 40, 2.2 / 10, 4 / 40, 2.2 / 10]
    )
    assert [(r["beside"], r["examples"]) for r in rows.values()] == [("sft", None), ("sft-4", 4)] * 2
    assert rows["near", "wide"]["beside_from_base"]["change"] == pytest.approx(1 / 40)
    assert [w["world"] for w in found["worlds"]] == ["near", "far"]
    assert found["worlds"][0]["ci_share"] == pytest.approx(15 / 40)


def test_bands_hold_the_pairs_of_their_ci_share(found: dict[str, Any]) -> None:
    """A whole share belongs to the last band. Two base models, of which one gains twice as much."""
    bands = [b for b in found["bands"] if b["method"] == "wide"]
    assert [(b["from"], b["to"], b["added"]["n"], b["bases"]) for b in bands] == [
        (0.0, 0.1, 2, 2),
        (0.1, 0.2, 2, 2),
        (0.4, 1.0, 4, 2),
    ]
    assert [b["added"]["change"] for b in bands] == pytest.approx([0, 0, (2 + 4) / 40])
    assert bands[2]["trained"]["change"] == pytest.approx((1 + 1) / 40)
    assert bands[2]["added"]["low"] < 0
    assert bands[0]["added"]["p"] == 1
    few = row(found["bands"], method="wide-4", **{"from": 0.4})
    assert few["added"]["change"] == pytest.approx(0.22)


def test_the_document_tells_each_method(found: dict[str, Any]) -> None:
    text = map_markdown(found, "map.json")
    assert "- wide-4 (4 examples of each task): alignment adds accuracy in 2 of 2 worlds" in text
    assert "| near | wide-4 | sft-4 | 4 |" in text
    assert "| wide | 40 to 100 | 4 | 2 | +5.0" in text
    assert not any(word in text for word in ("None", "nan", "{"))


def test_the_published_map_agrees_with_its_seeds_and_its_pairs() -> None:
    """The p-values again with scipy, from the differences by seed; the bands from the pairs themselves."""
    m = load_document(Path(__file__).parents[2] / "docs/results/map.json", "ramoe-map")
    assert len(m["rows"]) == 14
    for r in m["rows"]:
        by_base: dict[str, list[float]] = {}
        for each in r["added"]["by_seed"]:
            by_base.setdefault(each["base"], []).append(each["change"])
        assert r["added"]["p"] == pytest.approx(p_within(by_base))
        cells = [c for c in m["cells"] if (c["world"], c["method"]) == (r["world"], r["method"])]
        assert len(cells) == 18 * len(by_base)
    for band in m["bands"]:
        own = [
            cell["added"]
            for cell in m["cells"]
            if cell["method"] == band["method"] and band["from"] <= cell["ci_share"] < band["to"]
        ]
        assert (band["added"]["n"], band["added"]["change"]) == (
            len(own),
            pytest.approx(statistics.mean(own)),
        )


def test_worlds_that_cannot_be_mapped_are_refused(tmp_path: Path) -> None:
    one = world(tmp_path / "here", "same", 1)
    other = world(tmp_path / "there", "same", 1)
    with pytest.raises(RamoeError, match=r"second world named 'same': rename"):
        write_map([one, other], tmp_path / "out")
    with pytest.raises(RamoeError, match=r"run its `ramoe compare` again"):
        gain_map({"plain": {"added": [], "bases": []}})
    with pytest.raises(RamoeError, match=r"map\.json"):
        gain_map({"x": load_document(tmp_path / "none/map.json", "ramoe-map")})
    assert not (tmp_path / "out").exists()
