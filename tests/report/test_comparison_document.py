"""The documents of a comparison: sentences for given figures, marks, and no gaps in the text."""

import random
import re
from pathlib import Path
from typing import Any

import pytest
from comparison_runs import CELLS, SEEDS, TARGETS, Outcomes, p_within, plain, rising, row, write_run
from rich.console import Console

from ramoe_megatron.artifacts.files import load_document, save_document
from ramoe_megatron.report.comparison.assemble import compare, write_comparison
from ramoe_megatron.report.comparison.document import comparison_markdown, write_document
from ramoe_megatron.report.comparison.summary import comparison_findings
from ramoe_megatron.report.inspect import describe

RESULTS = Path(__file__).parents[2] / "docs/results"
HOSTILE = "<script>alert('|$x$')</script>"


def markdown_of(comparison: dict[str, Any]) -> str:
    return comparison_markdown(comparison, "comparison.json")


def test_claims_are_the_method_minus_its_control(tmp_path: Path) -> None:
    outcomes = {
        **rising(),
        **{("random-experts", s): {("a", "es"): 5 + s} for s in SEEDS},
        **{("reversed", s): {("a", "es"): 5} for s in SEEDS},
    }
    c = compare([write_run(tmp_path / "one", outcomes)])
    assert [(r["control"], r["verdict"]) for r in c["claims"]] == [
        ("random-experts", "not shown"),
        ("reversed", "supported"),
    ]
    supported = row(c["claims"], control="reversed")
    assert (supported["change"], supported["p_holm"]) == pytest.approx((3 / 40, 2 * 0.0132363), abs=1e-5)
    told = " ".join(comparison_findings(c))
    assert (
        "ra-moe scored 7.5 points higher than sft in the target languages (95 % interval +2.6 to +12.4, "
        "p = 0.013" in told
    )
    assert (
        "ra-moe scored higher than reversed (+7.5 [+2.6, +12.4]); no difference from random-experts (+0.0 "
        "[+0.0, +0.0])" in told
    )


def test_a_lead_over_a_reference_that_lost_is_told_beside_what_it_lost(tmp_path: Path) -> None:
    """The base model has 16 of 40 right, sft 14 (-5 points), one method 15, the other 17."""
    right = {"sft": 2, "ra-moe": 3, "rise": 5}
    worse = {(method, seed): {("a", "es"): n} for method, n in right.items() for seed in SEEDS}
    told = " ".join(comparison_findings(compare([write_run(tmp_path / "one", worse)])))
    assert "sft scored 5.0 points lower than base in the target languages" in told
    assert "base has 40.0 % right, so a method can beat sft by changing less" in told
    assert "1 of 2 other methods scores higher than base." in told
    better = " ".join(comparison_findings(compare([write_run(tmp_path / "two", rising())])))
    assert "lower than base" not in better


@pytest.mark.parametrize(
    ("sign", "told"), [(-1, "scored 7.5 points lower than sft"), (0, "scored the same as sft")]
)
def test_it_is_said_when_the_method_does_not_win(tmp_path: Path, sign: int, told: str) -> None:
    assert told in comparison_findings(compare([write_run(tmp_path / "one", rising(sign=sign))]))[0]


def test_the_loss_to_the_base_model_is_told_with_its_interval(tmp_path: Path) -> None:
    """2 of 40 rows lost: standard error sqrt(0.5 / 5), Student's 2.776; then sqrt(4 / 3), 4.303."""

    def told(*right: int) -> str:
        outcomes = {("sft", seed): {("a", "es"): n} for seed, n in enumerate(right, start=1)}
        return " ".join(
            comparison_findings(compare([write_run(tmp_path / "-".join(map(str, right)), outcomes)]))
        )

    narrow, wide = told(1, 2, 2, 2, 3), told(0, 2, 4)
    assert "5.0 points lower than base in the target languages (95 % interval −7.2 to −2.8, p = " in narrow
    assert "5.0 points lower than base in the target languages (95 % interval −17.4 to +7.4, p = " in wide
    assert ("holds zero" in narrow, "holds zero" in wide) == (False, True)


def test_base_models_that_fine_tuning_helps_and_harms_are_told(tmp_path: Path) -> None:
    def told(*right: int) -> str:
        runs = [{("sft", seed): {("a", "es"): n} for seed in SEEDS} for n in right]
        names = [f"{'-'.join(map(str, right))}-{place}" for place in range(len(right))]
        runs = [write_run(tmp_path / name, run) for name, run in zip(names, runs, strict=True)]
        return " ".join(comparison_findings(compare(runs)))

    for right in ((2, 6), (6, 2), (7, 3)):  # the base model has 4
        assert "read each base model before any mean" in told(*right)
    assert "sft helps 2-6-1 (+5.0 points) and harms 2-6-0 (−5.0 points)" in told(2, 6)
    for right in ((6, 7), (2, 3), (4, 2)):
        assert "harms" not in told(*right)


def test_equal_differences_are_no_spread_rather_than_too_few_seeds(tmp_path: Path) -> None:
    outcomes = {
        (method, seed): {("a", "es"): right}
        for method, right in (("sft", 4), ("ra-moe", 6))
        for seed in SEEDS
    }
    assert (
        "no interval: no spread over seeds"
        in comparison_findings(compare([write_run(tmp_path / "one", outcomes)]))[0]
    )


def test_methods_that_share_the_highest_accuracy_are_all_named(tmp_path: Path) -> None:
    outcomes = {
        (method, 1): {("a", "es"): right} for method, right in (("sft", 5), ("ra-moe", 6), ("rise", 6))
    }
    told = " ".join(comparison_findings(compare([write_run(tmp_path / "one", outcomes)])))
    assert "The highest target accuracy is 45.0 % (ra-moe and rise)." in told


def test_a_method_that_trains_nothing_is_marked_wherever_the_spread_is_the_references_alone(
    tmp_path: Path,
) -> None:
    outcomes = {**rising(), ("steering-soft", None): {("a", "es"): 9, ("b", "es"): 9}}
    for seed in SEEDS:
        outcomes["sft", seed] = {("a", "es"): 4 + seed % 2}
    c = compare([write_run(tmp_path / "one", outcomes)])
    text = markdown_of(c)
    rows = [line for line in text.splitlines() if line.startswith("| steering-soft ")]
    assert [line.count("‡") for line in rows] == [1, 1, 1, 0, 0, 1, 1]  # not in the two rows of the ci share
    assert (
        text.count("‡: trains nothing, so it has one outcome for a base model, paired with every seed of sft")
        == 5
    )
    assert (
        "‡" not in markdown_of(compare([write_run(tmp_path / "two", rising())])).split("## Routing mass")[0]
    )


def test_the_findings_are_a_short_list_that_holds_the_caveats(tmp_path: Path) -> None:
    """A method that trains nothing is not counted as different, and no finding repeats a long table."""
    methods = ("sft", "ra-moe", "reversed", "all-layers", "coeff-zero", "rise", "xlr")
    outcomes = {**plain(*methods), ("steering-soft", None): {("b", "tr"): 10}, **rising()}
    told = comparison_findings(compare([write_run(tmp_path / name, outcomes) for name in ("one", "two")]))
    assert len(told) <= 8
    assert "of 6 trained methods" in " ".join(told)
    assert "steering-soft" not in " ".join(told).replace("(steering-soft)", "")


def test_methods_of_other_training_flags_are_told_with_what_was_run(tmp_path: Path) -> None:
    methods = [
        "sft",
        {"name": "ra-moe", "train": {"train-iters": 144}},
        {"name": "rise", "train": {"lr": 0.1, "train-iters": 72}},
    ]
    methods += [{"name": "steered", "preset": ["steering-soft"], "on": "ra-moe"}]
    outcomes = plain("sft", "ra-moe", "rise", "steered")
    c = compare([write_run(tmp_path / "one", outcomes, recipe={"methods": methods})])
    assert [(r["method"], r["flag"], r["value"], r["reference"]) for r in c["training"]] == [
        ("ra-moe", "train-iters", "144", "72"),
        ("rise", "lr", "0.1", "not given"),
        ("steered", "train-iters", "144", "72"),
    ]
    told = markdown_of(c)
    assert "ra-moe train-iters 144 (72); rise lr 0.1 (not given); steered train-iters 144 (72)." in told
    assert "Every trained method has the training flags of sft (steps" in markdown_of(
        compare([write_run(tmp_path / "two", rising())])
    )


def test_a_lone_seed_gives_no_verdict_and_no_p(tmp_path: Path) -> None:
    outcomes = {("sft", 1): {}, ("ra-moe", 1): dict.fromkeys(TARGETS, 6), ("reversed", 1): {}}
    c = compare([write_run(tmp_path / "one", outcomes)])
    assert row(c["claims"], control="reversed")["verdict"] == "not shown"
    assert row(c["headline"], method="ra-moe")["against"]["p_holm"] is None
    assert "no interval: too few seeds" in comparison_findings(c)[0]


def test_the_main_method_is_ra_moe_or_the_first_one_that_was_run(tmp_path: Path) -> None:
    runs = {
        name: write_run(tmp_path / name, {**rising("wide"), **plain(*more)})
        for name, more in (("one", ["narrow"]), ("two", ["ra-moe"]))
    }
    assert {name: compare([run])["main"] for name, run in runs.items()} == {"one": "wide", "two": "ra-moe"}
    assert compare([runs["two"]], main="wide")["main"] == "wide"
    assert comparison_findings(compare([runs["one"]]))[0].startswith("wide scored 7.5 points higher than sft")


def test_each_base_model_is_told_with_what_it_left_to_gain(tmp_path: Path) -> None:
    """ci 1 + 3 + 0 + 5 of 40 rows, and 2 of each 10."""
    ci = {("a", "es"): 1, ("a", "tr"): 3, ("b", "es"): 0, ("b", "tr"): 5}
    one = write_run(tmp_path / "one", rising(), ci=ci, transplant=dict.fromkeys(CELLS, -0.02))
    two = write_run(tmp_path / "two", rising(), ci=dict.fromkeys(ci, 2))
    c = compare([one, two])
    assert [base["ci_share"] for base in c["bases"]] == pytest.approx([0.225, 0.2])
    lines = markdown_of(c).splitlines()
    assert [line for line in lines if line.startswith("| one | 40.0 |")] == [
        "| one | 40.0 | 40.0 | 22.5 | −2.0 | 40 | 20 |"
    ]


# ---- zero, ablations ----


def test_a_coefficient_of_zero_must_be_equal_in_answers_and_weights(tmp_path: Path) -> None:
    outcomes = {**plain("sft", "coeff-zero"), ("coeff-zero", 3): {("b", "en"): 5}}
    weights = {
        ("sft", 1): "ab",
        ("coeff-zero", 1): "ab",
        ("sft", 2): "ab",
        ("coeff-zero", 2): "cd",
        ("sft", 3): "ab",
    }
    c = compare([write_run(tmp_path / "one", outcomes, weights=weights)])
    told = [
        (r["seed"], r["outcomes_equal"], r["differing"], r["weights_equal"])
        for r in c["coefficient_zero"][:3]
    ]
    assert told == [(1, True, 0, True), (2, True, 0, False), (3, False, 1, None)]
    assert (
        "did NOT leave training as it was (one seed 2: 0 answers and the weights and one seed 3: 1 answer)"
        in comparison_findings(c)[-1]
    )
    assert c["ablation"] == []
    fine = compare([write_run(tmp_path / "two", plain("sft", "coeff-zero"))])
    assert "gave the answers of sft in all 5 runs; no digest" in comparison_findings(fine)[-1]


def test_further_methods_are_listed_with_what_they_change(tmp_path: Path) -> None:
    commands = {
        "ra-moe": ["--lr", "0.1", "--ramoe-coeff", "50.0", "--ramoe-data", "/x"],
        "strong": ["--lr", "0.1", "--ramoe-coeff", "90.0"],
    }
    commands["strong"] += ["--ramoe-pack", "--save", "/y"]
    folder = write_run(tmp_path / "one", plain("sft", "ra-moe", "all-layers", "strong"), commands=commands)
    (found,) = compare([folder])["ablation"]
    assert (found["method"], found["settings"]) == (
        "strong",
        ["coeff 90.0 (ra-moe: 50.0)", "pack on (ra-moe: not given)"],
    )
    assert found["beside"] is None  # no command of sft is told
    assert [r["method"] for r in compare([folder], presets=("strong",))["ablation"]] == []


def test_what_alignment_adds_is_told_against_the_same_training_without_it(tmp_path: Path) -> None:
    """Methods are paired by trained weights and Megatron's flags. By hand: 9 - 5 of 40 rows."""
    commands = {
        "sft": ["--lr", "0.1", "--ramoe-split", "train"],
        "ra-moe": ["--lr", "0.1", "--ramoe-coeff", "50"],
        "routers": ["--lr", "0.1", "--ramoe-train", "routers"],
        "ra-moe-routers": [
            "--lr",
            "0.1",
            "--ramoe-train",
            "routers",
            "--ramoe-coeff",
            "50",
            "--ramoe-tokens",
            "all",
        ],
        "ra-moe-js": ["--lr", "0.1", "--ramoe-coeff", "1", "--ramoe-divergence", "js"],
        "ra-moe-slow": ["--lr", "0.01", "--ramoe-coeff", "50"],
        "ra-moe-curve": [
            "--lr",
            "0.1",
            "--ramoe-coeff",
            "50",
            "--ramoe-layer-weights",
            "/run/divergence.csv",
            "--ramoe-data",
            "/x",
        ],
    }
    routers = {
        (method, seed): {("a", "es"): right}
        for method, right in (("routers", 5), ("ra-moe-routers", 9))
        for seed in SEEDS
    }
    c = compare([write_run(tmp_path / "one", {**plain(*commands), **routers}, commands=commands)])
    rows = {r["method"]: r for r in c["ablation"]}
    beside = {
        "routers": None,
        "ra-moe-routers": "routers",
        "ra-moe-js": "sft",
        "ra-moe-slow": None,
        "ra-moe-curve": "sft",
    }
    assert {name: r["beside"] for name, r in rows.items()} == beside
    assert rows["ra-moe-js"]["without"] == {
        k: v for k, v in rows["ra-moe-js"]["against"].items() if k not in ("p_holm", "p_bh")
    }
    assert rows["ra-moe-routers"]["without"]["change"] == pytest.approx(4 / 40)
    assert rows["routers"]["without"] is None
    assert rows["routers"]["settings"] == ["train routers (sft: not given)", "split not given (sft: train)"]
    assert rows["ra-moe-curve"]["settings"] == ["layer-weights divergence.csv (ra-moe: not given)"]
    line = next(
        line
        for line in markdown_of(c).splitlines()
        if line.startswith("| ra-moe-routers") and "(routers)" in line
    )
    assert "+10.0 (routers)" in line


def test_what_alignment_adds_is_told_for_the_same_samples_and_for_tuned_learning_rates(
    tmp_path: Path,
) -> None:
    few, mixed = ["--ramoe-ids-per-task", "4"], ["--ramoe-weights", "*/en=0.2"]
    commands = {
        "sft": ["--lr", "0.1"],
        "ra-moe": ["--lr", "0.2", "--ramoe-coeff", "50"],
        "sft-4": ["--lr", "0.1", *few],
        "wide-4": ["--lr", "0.4", *few, "--ramoe-coeff", "50"],
        "wide-mixed": ["--lr", "0.1", *mixed, "--ramoe-coeff", "50"],
        "wide": ["--lr", "0.4", "--ramoe-coeff", "50"],
    }
    folder = write_run(tmp_path / "one", plain(*commands), commands=commands)
    tuning = {"split": "validation", "seeds": [9], "bases": [], "budget": 1, "rows": []}
    beside = [
        {r["method"]: r["beside"] for r in compare([folder], **changes)["ablation"]}
        for changes in ({}, {"tuning": tuning})
    ]
    assert beside[0] == {"sft-4": None, "wide-4": None, "wide-mixed": None, "wide": None}
    assert beside[1] == {"sft-4": None, "wide-4": "sft-4", "wide-mixed": None, "wide": "sft"}


# ---- documents ----

SECTIONS = (
    "What came out",
    "What was run",
    "All methods against sft",
    "How each method's settings were chosen",
    "Claims and their controls",
    "Each base model",
    "Tasks and languages",
    "Anchor language (en)",
    "Transplant test against outcome",
    "ci share against gain",
    "Divergence against the gap between languages",
    "Routing mass on the task experts",
    "Time and memory",
    "A coefficient of zero",
    "What else was tried",
    "How this was made",
    "Limits",
)


@pytest.mark.parametrize("full", [True, False])
def test_markdown_has_every_section_and_shows_no_hole(tmp_path: Path, full: bool) -> None:
    folders = [write_run(tmp_path / "one", rising() if full else {("sft", 1): {}}, tasks=(HOSTILE, "b"))]
    if full:
        more = {
            **rising(),
            **plain("coeff-zero", "reversed", "strong"),
            ("steering-soft", None): {("b", "tr"): 8},
        }
        folders = [write_run(tmp_path / name, more, tasks=(HOSTILE, "b")) for name in ("one", "two")]
    text = markdown_of(compare(folders, command="ramoe compare one two"))
    assert tuple(re.findall(r"^## (.*)$", text, flags=re.MULTILINE)) == SECTIONS
    assert not re.search(r"\b(nan|NaN|None|inf)\b|[{}]", text)
    assert "<script" not in text.replace("\\<script", "")
    assert "ramoe run study.yaml" in text
    assert "ramoe compare one two" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(columns) == 1, block
    assert re.search(r"^\| one \| 40\.0 \| \d+\.\d \|", text, flags=re.MULTILINE)
    if full:
        assert re.search(r"^\| steering-soft \| 2 on 2 \|", text, flags=re.MULTILINE)


def test_page_and_json_are_written_and_shown(tmp_path: Path) -> None:
    outcomes = {**rising(), **{("reversed", seed): {} for seed in SEEDS}}
    run = write_run(tmp_path / "one", outcomes, tasks=(HOSTILE, "b"))
    assert "own report" not in write_comparison([run], tmp_path / "out").read_text()
    (run / "report.html").write_text("")
    page = write_comparison([run], tmp_path / "out").read_text()
    assert re.findall(r'<a href="([^"#][^"]*)">([^<]*)</a>', page) == [("../one/report.html", "one")]
    assert not re.search(r"https?:|[\"'(=]\s*//|@import|<link|<script|url\(|<iframe|<object", page)
    assert page.count("data:image/png;base64,") == 3
    assert "&lt;script&gt;" in page
    assert len(set(re.findall(r'<h2 id="([^"]*)"', page))) == page.count("<h2")
    assert (
        (tmp_path / "out/experiment.md")
        .read_text()
        .startswith("# ra-moe and its controls against sft: study\n")
    )
    saved = load_document(tmp_path / "out/comparison.json", "ramoe-comparison")
    assert row(saved["headline"], method="ra-moe")["against"]["change"] == pytest.approx(3 / 40)
    del saved["counts"]  # as an earlier version wrote it
    save_document(tmp_path / "earlier.json", "ramoe-comparison", saved)
    describe(tmp_path / "earlier.json")
    console = Console(width=200)
    with console.capture() as captured:
        console.print(describe(tmp_path / "out/comparison.json"))
    assert re.search(r"ra-moe +5 on 1 .*\+7\.5 \[\+2\.6, \+12\.4\] .* 0\.013", captured.get())
    assert re.search(r"direction matters +ra-moe +reversed .* supported", captured.get())


def drawn_study(tmp_path: Path) -> Path:
    draw = random.Random(1)
    runs = []
    for name, seeds in (("one", SEEDS), ("two", SEEDS[:3])):
        outcomes: Outcomes = {
            (m, s): {cell: draw.randint(2, 9) for cell in CELLS}
            for m in ("sft", "ra-moe", "reversed")
            for s in seeds
        }
        outcomes["steering-soft", None] = {("b", "tr"): 8}
        runs.append(write_run(tmp_path / name, outcomes))
    write_document(compare(runs), tmp_path / "docs/study.md")
    return tmp_path / "docs/study.json"


def test_sara_was_compared_on_the_same_base_models_beside_the_same_sft() -> None:
    found = []
    for name in ("tuned", "sara"):
        counts = load_document(RESULTS / f"{name}.json", "ramoe-comparison")["counts"]
        shared = [r for r in counts["rows"] if r["method"] in ("base", "sft")]
        found.append(
            (counts["cells"], sorted(shared, key=lambda r: (r["method"], r["base"], r["seed"] or 0)))
        )
    assert len(found[0][1]) == 3 + 15
    assert found[0] == found[1]


@pytest.mark.parametrize(("published", "number"), [("", 3), ("tuned", 15), ("sara", 1), ("fresh", 3)])
def test_every_p_value_can_be_computed_again_from_the_json_beside_the_document(
    tmp_path: Path, published: str, number: int
) -> None:
    """The t-test within base models of the differences by seed, by scipy's t, only from `counts`."""
    data = RESULTS / f"{published}.json" if published else drawn_study(tmp_path)
    c = load_document(data, "ramoe-comparison")
    assert "`counts`" in data.with_suffix(".md").read_text().replace("\\", "")
    methods = {r["method"] for r in c["headline"] if r["against"]}
    assert len(methods) == number
    by_method: dict[str, list[dict[str, Any]]] = {}
    for each in c["counts"]["rows"]:
        by_method.setdefault(each["method"], []).append(each)

    def share(each: dict[str, Any], wanted: list[bool]) -> float:
        right, n = (sum(v for v, w in zip(each[key], wanted, strict=True) if w) for key in ("correct", "n"))
        return right / n

    def differences(method: str, other: str, wanted: list[bool]) -> dict[str, list[float]]:
        by_base: dict[str, list[float]] = {}
        for a in by_method[method]:
            for b in by_method[other]:
                if a["base"] == b["base"] and (a["seed"] == b["seed"] or None in (a["seed"], b["seed"])):
                    by_base.setdefault(a["base"], []).append(share(a, wanted) - share(b, wanted))
        return by_base

    def p(method: str, other: str, wanted: list[bool]) -> float:
        return p_within(differences(method, other, wanted))

    cells = [(cell["task"], cell["language"]) for cell in c["counts"]["cells"]]
    target = [language != c["anchor"] for _, language in cells]
    for method in methods:
        assert row(c["headline"], method=method)["against"]["p"] == pytest.approx(p(method, "sft", target))
    for claim in c["claims"]:
        assert claim["p"] == pytest.approx(p(claim["method"], claim["control"], target))
    main = c["main"]
    for task, language in [cell for cell, wanted in zip(cells, target, strict=True) if wanted]:
        found = row(c["cells"], method=main, task=task, language=language)["against"]
        by_base = differences(main, "sft", [cell == (task, language) for cell in cells])
        if found["p"] is None:  # seeds that all differ alike have no spread to estimate
            assert all(max(own) - min(own) < 1e-12 for own in by_base.values())
        else:
            assert found["p"] == pytest.approx(p_within(by_base), abs=1e-12)
    english = row(c["english"], method=main)["against"]
    assert english["p"] == pytest.approx(p(main, "sft", [not wanted for wanted in target]))
