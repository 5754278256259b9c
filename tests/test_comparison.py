"""Methods over seeds and base models: pairs, intervals, corrections, verdicts and hits worked by hand; the documents that tell them."""

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
from comparison_runs import CELLS, TARGETS, write_run
from rich.console import Console

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.files import load_document
from ramoe_megatron.method.inspect import describe
from ramoe_megatron.report.comparison import compare, write_comparison
from ramoe_megatron.report.comparison_document import document
from ramoe_megatron.report.comparison_relations import hits
from ramoe_megatron.report.comparison_tables import VERDICTS
from ramoe_megatron.report.comparison_words import findings
from ramoe_megatron.report.contrasts import direction

HOSTILE = "<script>alert('|$x$')</script>"
SEEDS = (1, 2, 3, 4, 5)


def plain(*methods: str) -> dict[tuple[str, int | None], dict[tuple[str, str], int]]:
    """Every method 4 right of 10 in every cell, for every seed."""
    return {(method, seed): {} for seed in SEEDS for method in methods}


def rising(method: str = "ra-moe", sign: int = 1) -> dict[tuple[str, int | None], dict[tuple[str, str], int]]:
    """Seed s has s more (or fewer) right answers than SFT's 5, in one cell of four: differences of s / 40."""
    start = {("sft", seed): {("a", "es"): 5} for seed in SEEDS}
    return {**start, **{(method, seed): {("a", "es"): 5 + sign * seed} for seed in SEEDS}}


def row(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    (found,) = (r for r in rows if all(r[key] == value for key, value in wanted.items()))
    return found


# ---- differences ----


def test_paired_seeds_of_two_base_models_worked_by_hand(tmp_path: Path) -> None:
    """Differences 1..5 fortieths in one base model, none in the other; t and its quantiles from tables."""
    one, two = write_run(tmp_path / "one", rising()), write_run(tmp_path / "two", plain("sft", "ra-moe"))
    alone = row(compare([one])["headline"], method="ra-moe")["against"]
    half = 2.776445 * math.sqrt(2.5 / 5) / 40
    assert (alone["change"], alone["low"], alone["high"]) == pytest.approx((3 / 40, 3 / 40 - half, 3 / 40 + half), abs=1e-6)
    assert alone["p"] == pytest.approx(0.013236, abs=1e-5)
    assert (alone["n"], alone["seeds_higher"], alone["seeds_lower"]) == (5, 5, 0)
    both = compare([one, two])
    found = row(both["headline"], method="ra-moe")
    assert (found["bases"], found["seeds"], found["outcomes"], found["against"]["n"]) == (2, 5, 10, 10)
    assert found["accuracy"] == pytest.approx((0.4 * 10 * 40 + 5 + 15) / 400)
    spread = math.sqrt((sum((d - 1.5) ** 2 for d in range(1, 6)) + 5 * 1.5**2) / 9)
    half = 2.262157 * spread / math.sqrt(10) / 40
    assert found["against"]["change"] == pytest.approx(1.5 / 40)
    assert found["against"]["high"] == pytest.approx(1.5 / 40 + half, abs=1e-6)
    assert [b["change"] for b in found["against"]["by_base"]] == pytest.approx([3 / 40, 0])
    assert row(both["english"], method="ra-moe")["against"]["change"] == 0
    assert row(both["english"], method="ra-moe")["accuracy"] == pytest.approx(0.4)


def test_an_example_is_one_draw_in_every_language_seed_and_base_model(tmp_path: Path) -> None:
    """The interval over examples is the same however often the same answers were given."""
    runs = [write_run(tmp_path / name, {("sft", 1): {}, ("ra-moe", 1): dict.fromkeys(TARGETS, 6)}) for name in ("one", "two")]
    one, two = (row(compare(folders)["headline"], method="ra-moe")["against"] for folders in (runs[:1], runs))
    assert one["low"] is None  # a single seed
    # 4 of 20 ids gain in both languages: the sum of squares over clusters is 4 (2 * 0.8)^2 + 16 (2 * 0.2)^2 = 12.8.
    half = 2.093024 * math.sqrt(20 / 19 * 12.8) / 40
    assert one["by_example"]["high"] == pytest.approx(0.2 + half, abs=1e-6)
    for end in ("change", "low", "high"):
        assert two["by_example"][end] == pytest.approx(one["by_example"][end])


def test_an_outcome_without_a_seed_meets_every_seed_of_the_reference(tmp_path: Path) -> None:
    outcomes = {**{("sft", seed): {("a", "es"): seed} for seed in SEEDS}, ("steering-soft", None): {("a", "es"): 9}}
    found = row(compare([write_run(tmp_path / "one", outcomes)])["headline"], method="steering-soft")
    assert [pair["change"] for pair in found["against"]["by_seed"]] == pytest.approx([(9 - seed) / 40 for seed in SEEDS])
    assert [pair["seed"] for pair in found["against"]["by_seed"]] == list(SEEDS)
    assert (found["outcomes"], found["seeds"], found["against"]["seeds_higher"]) == (1, 0, 5)


def test_no_figure_depends_on_the_order_of_files_lines_or_folders(tmp_path: Path) -> None:
    draw = random.Random(0)
    outcomes = {(m, s): {cell: draw.randint(0, 10) for cell in CELLS} for m in ("sft", "ra-moe", "random-experts") for s in SEEDS}
    folders = [write_run(tmp_path / "one", outcomes), write_run(tmp_path / "two", rising())]
    before = compare(folders)
    for path in (tmp_path / "one/evaluations").glob("*.jsonl"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(draw.sample(lines, len(lines))))
    recipe = tmp_path / "one/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("- 1\n- 2\n- 3\n- 4\n- 5", "- 4\n- 1\n- 5\n- 3\n- 2"))
    after = compare(folders[::-1])
    for name in ("headline", "claims", "cells", "english", "mass", "ablation", "cost"):
        assert sorted(map(json.dumps, before[name])) == sorted(map(json.dumps, after[name]))


# ---- families and verdicts ----


def test_each_family_is_corrected_by_itself(tmp_path: Path) -> None:
    """Three methods of p, p and 1: Holm gives 3p, 3p (no lower than the first), 1; Benjamini-Hochberg 3p/2, 3p/2, 1."""
    outcomes = {**plain("same"), **rising("ra-moe"), **rising("other", -1)}
    for seed in SEEDS:
        outcomes["same", seed] = {("a", "es"): 5}
    c = compare([write_run(tmp_path / "one", outcomes)])
    p = 0.0132363
    adjusted = {r["method"]: (r["against"]["p_holm"], r["against"]["p_bh"]) for r in c["headline"] if r["against"]}
    assert adjusted == {
        "ra-moe": pytest.approx((3 * p, 1.5 * p), abs=1e-5),
        "other": pytest.approx((3 * p, 1.5 * p), abs=1e-5),
        "same": (1.0, 1.0),
    }
    # 3 methods x 4 cells: two cells hold a difference, the ten others none at all.
    cell = row(c["cells"], method="ra-moe", task="a", language="es")["against"]
    assert cell["change"] == pytest.approx(3 / 10)
    assert cell["p_holm"] == pytest.approx(12 * p, abs=1e-4)


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [(1e-9, 1.0, "supported"), (0.0, 1.0, "not shown"), (-1.0, 0.0, "not shown"), (-1.0, -1e-9, "contradicted"), (None, None, "not shown")],
)
def test_a_verdict_needs_the_whole_interval(low: float | None, high: float | None, word: str) -> None:
    assert VERDICTS[direction({"low": low, "high": high})] == word


def test_claims_are_the_method_minus_its_control(tmp_path: Path) -> None:
    outcomes = {
        **rising(),
        **{("random-experts", s): {("a", "es"): 5 + s} for s in SEEDS},
        **{("reversed", s): {("a", "es"): 5} for s in SEEDS},
    }
    c = compare([write_run(tmp_path / "one", outcomes)])
    assert [(r["control"], r["verdict"]) for r in c["claims"]] == [("random-experts", "not shown"), ("reversed", "supported")]
    supported = row(c["claims"], control="reversed")
    assert (supported["change"], supported["p_holm"]) == pytest.approx((3 / 40, 2 * 0.0132363), abs=1e-5)
    told = " ".join(findings(c))
    assert "RA-MoE (our reading) beat SFT: +7.5 [+2.6, +12.4] points" in told
    assert "random-experts did as well as RA-MoE (our reading), as far as this comparison can tell: the difference is +0.0" in told
    assert "“Direction matters” is supported: RA-MoE (our reading) did better than reversed, by +7.5" in told


def test_a_lead_over_a_reference_that_lost_is_told_beside_what_it_lost(tmp_path: Path) -> None:
    """The base model has 16 of 40 right, SFT 14 (-5 points), one method 15, the other 17."""
    right = {"sft": 2, "ra-moe": 3, "rise": 5}
    worse = {(method, seed): {("a", "es"): n} for method, n in right.items() for seed in SEEDS}
    told = " ".join(findings(compare([write_run(tmp_path / "one", worse)])))
    assert "SFT stands 5.0 points below the model before fine-tuning (40.0 %)" in told
    assert "1 of 2 methods stands above that model: rise." in told
    better = " ".join(findings(compare([write_run(tmp_path / "two", rising())])))
    assert "below the model before fine-tuning" not in better


@pytest.mark.parametrize(
    ("sign", "told"), [(-1, "did worse than SFT: −7.5"), (0, "did not beat SFT, as far as this comparison can tell: +0.0")]
)
def test_it_is_said_when_the_method_does_not_win(tmp_path: Path, sign: int, told: str) -> None:
    assert told in findings(compare([write_run(tmp_path / "one", rising(sign=sign))]))[0]


def test_a_lone_seed_gives_no_verdict_and_no_p(tmp_path: Path) -> None:
    outcomes = {("sft", 1): {}, ("ra-moe", 1): dict.fromkeys(TARGETS, 6), ("reversed", 1): {}}
    c = compare([write_run(tmp_path / "one", outcomes)])
    assert row(c["claims"], control="reversed")["verdict"] == "not shown"
    assert row(c["headline"], method="ra-moe")["against"]["p_holm"] is None
    assert "too few seeds for an interval" in findings(c)[0]


# ---- what the gain goes with ----


def test_transplant_hits_worked_by_hand(tmp_path: Path) -> None:
    changes = {("a", "es"): 0.1, ("a", "tr"): 0.1, ("b", "es"): -0.1, ("b", "tr"): 0.0}
    gains = {("a", "es"): 6, ("a", "tr"): 3, ("b", "es"): 2, ("b", "tr"): 9}
    folder = write_run(tmp_path / "one", {("sft", 1): {}, ("ra-moe", 1): gains}, transplant=changes)
    found = compare([folder])["transplant"]
    pairs = row(found["hits"], level="pairs", base=None)
    assert {name: pairs[name] for name in ("up_up", "up_down", "down_up", "down_down", "ties")} == {
        "up_up": 1,
        "up_down": 1,
        "down_up": 0,
        "down_down": 1,
        "ties": 1,
    }
    assert (pairs["hits"], pairs["n"], pairs["rate"]) == (2, 3, pytest.approx(2 / 3))
    assert (pairs["low"], pairs["high"]) == pytest.approx((0.2077, 0.9385), abs=1e-4)  # Wilson, 2 of 3
    assert pairs["p"] == pytest.approx(1.0)  # 2 or more, or 1 or fewer, of 3
    assert pairs["expected"] == pytest.approx((2 * 1 + 1 * 2) / 9)
    # Task a: +0.1 and (2 - 1) / 20 up; task b: -0.05 and (-2 + 5) / 20 up; together +0.025 and +4 / 40.
    assert [(u["task"], u["outcome"]) for u in found["tasks"]] == [("a", "up_up"), ("b", "down_up")]
    assert [(u["base"], u["outcome"], u["gain"]) for u in found["bases"]] == [("one", "up_up", pytest.approx(0.1))]


def test_each_base_model_is_told_with_what_it_left_to_gain(tmp_path: Path) -> None:
    """ci 1 + 3 + 0 + 5 of 40 rows, and 2 of each 10."""
    ci = {("a", "es"): 1, ("a", "tr"): 3, ("b", "es"): 0, ("b", "tr"): 5}
    one = write_run(tmp_path / "one", rising(), ci=ci, transplant=dict.fromkeys(CELLS, -0.02))
    two = write_run(tmp_path / "two", rising(), ci=dict.fromkeys(ci, 2))
    c = compare([one, two])
    assert [base["ci_share"] for base in c["bases"]] == pytest.approx([0.225, 0.2])
    told = next(sentence for sentence in findings(c) if sentence.startswith("By base model"))
    assert "one +7.5 [+2.6, +12.4] points, 5 seeds (ci share 22.5 %, transplant test −2.0 points); two +7.5" in told


def test_hits_without_a_sign_have_no_rate() -> None:
    assert hits([{"outcome": "ties"}]) == {
        **dict.fromkeys(("up_up", "up_down", "down_up", "down_down", "hits", "n"), 0),
        "ties": 1,
        **dict.fromkeys(("rate", "low", "high", "p", "expected")),
    }
    uneven = {"up_up": 3, "up_down": 1, "down_down": 2, "ties": 4}
    six = hits([{"outcome": outcome} for outcome, count in uneven.items() for _ in range(count)])
    assert (six["hits"], six["n"]) == (5, 6)
    assert (six["p"], six["expected"]) == pytest.approx((2 * (1 + 6) / 2**6, (4 * 3 + 2 * 3) / 36))
    ten = hits([{"outcome": "up_up"}] * 10)
    assert (ten["p"], ten["expected"]) == (pytest.approx(2 / 2**10), 1.0)


def test_ci_share_stands_beside_the_headroom_of_the_reference(tmp_path: Path) -> None:
    """Gains over base that lie on a line in ci share: r = 1 for both, and undefined for their constant difference."""
    ci = {cell: place + 1 for place, cell in enumerate(TARGETS)}
    sft = {cell: 4 + share for cell, share in ci.items()}
    folder = write_run(tmp_path / "one", {("sft", 1): sft, ("ra-moe", 1): {c: n + 1 for c, n in sft.items()}}, ci=ci)
    found = compare([folder])["ci_gain"]
    for method in ("sft", "ra-moe"):
        assert row(found["correlations"], method=method, over="base", base=None)["r"] == pytest.approx(1)
    assert row(found["correlations"], method="ra-moe", over="reference", base=None)["r"] is None
    point = row(found["points"], method="ra-moe", task="b", language="tr")
    assert (point["ci_share"], point["over_base"], point["over_reference"]) == pytest.approx((0.4, 0.5, 0.1))


def test_mass_is_the_mean_over_the_zone(tmp_path: Path) -> None:
    """Zone: the two inner layers, 0.5 and 0.5 + 0.02 seed; seeds 1 to 5."""
    found = {r["method"]: r for r in compare([write_run(tmp_path / "one", plain("sft", "ra-moe"))])["mass"]}
    assert found["ra-moe"]["mass"] == pytest.approx(0.53)
    assert found["ra-moe"]["anchor"] == pytest.approx(0.93)
    assert found["ra-moe"]["against"]["change"] == pytest.approx(0.2)
    assert found["base"]["against"]["change"] == pytest.approx(0.2 - 0.33)


def test_cost_is_a_ratio_over_paired_seeds(tmp_path: Path) -> None:
    """Ratios 2 and 8 have the geometric mean 4; the first iteration is left out; no memory was told for SFT."""

    def log(*times: float) -> str:
        return "".join(f" iteration {i} | elapsed time per iteration (ms): {t} | lm loss\n" for i, t in enumerate(times))

    logs = {"sft-seed1": log(900, 10, 10, 10), "sft-seed2": log(900, 10), "ra-moe-seed1": log(900, 20, 20, 90)}
    logs["ra-moe-seed2"] = log(900, 80) + "ramoe: peak resident memory: 512.5 MiB\n"
    seconds = {("sft", 1): 10, ("sft", 2): 20, ("ra-moe", 1): 20, ("ra-moe", 2): 40}
    outcomes = {(method, seed): {} for seed in (1, 2) for method in ("sft", "ra-moe")}
    found = row(compare([write_run(tmp_path / "one", outcomes, logs=logs, seconds=seconds)])["cost"], method="ra-moe")
    assert found["iteration"]["ratio"]["ratio"] == pytest.approx(4)
    half = 12.7062 * math.log(2)  # Student's quantile at one degree of freedom; log 4 and its neighbours at log 2
    assert found["iteration"]["ratio"]["high"] == pytest.approx(4 * math.exp(half), rel=1e-4)
    assert (found["wall"]["ratio"]["ratio"], found["wall"]["median"]) == (pytest.approx(2), 30)
    assert found["memory"] == {"median": 512.5, "ratio": None}


def test_hours_count_stages_side_by_side_once_and_breaks_not_at_all(tmp_path: Path) -> None:
    run = write_run(tmp_path / "one", {("sft", 1): {}, ("ra-moe", 1): {}})
    manifest = json.loads((run / "manifest.json").read_text())
    spans = {"a": ("12:00", "13:00"), "b": ("12:10", "12:20"), "c": ("12:30", "13:30"), "d": ("15:00", "15:15")}
    manifest["stages"] = {
        name: {"state": "done", "started": f"2026-01-01T{start}:00+00:00", "ended": f"2026-01-01T{end}:00+00:00", "command": []}
        for name, (start, end) in spans.items()
    } | {"failed": {"state": "failed", "started": "2026-01-01T16:00:00+00:00", "ended": "2026-01-01T20:00:00+00:00", "command": []}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert compare([run])["bases"][0]["hours"] == pytest.approx(1.75)


# ---- zero, ablations ----


def test_a_coefficient_of_zero_must_be_equal_in_answers_and_weights(tmp_path: Path) -> None:
    outcomes = {**plain("sft", "coeff-zero"), ("coeff-zero", 3): {("b", "en"): 5}}
    weights = {("sft", 1): "ab", ("coeff-zero", 1): "ab", ("sft", 2): "ab", ("coeff-zero", 2): "cd", ("sft", 3): "ab"}
    c = compare([write_run(tmp_path / "one", outcomes, weights=weights)])
    told = [(r["seed"], r["outcomes_equal"], r["differing"], r["weights_equal"]) for r in c["coefficient_zero"][:3]]
    assert told == [(1, True, 0, True), (2, True, 0, False), (3, False, 1, None)]
    assert "did NOT leave training as it was (one seed 2, 0 answers and the weights; one seed 3, 1 answer)" in findings(c)[-1]
    assert c["ablation"] == []
    fine = compare([write_run(tmp_path / "two", plain("sft", "coeff-zero"))])
    assert "gave the answers of SFT in all 5 runs; no digest" in findings(fine)[-1]


def test_further_methods_are_listed_with_what_they_change(tmp_path: Path) -> None:
    commands = {
        "ra-moe": ["--lr", "0.1", "--ramoe-coeff", "50.0", "--ramoe-data", "/x"],
        "strong": ["--lr", "0.1", "--ramoe-coeff", "90.0"],
    }
    commands["strong"] += ["--ramoe-pack", "--save", "/y"]
    folder = write_run(tmp_path / "one", plain("sft", "ra-moe", "all-layers", "strong"), commands=commands)
    (found,) = compare([folder])["ablation"]
    assert (found["method"], found["settings"]) == ("strong", ["coeff 90.0 (ra-moe: 50.0)", "pack on (ra-moe: not given)"])
    assert found["beside"] is None  # no command of sft is told
    assert [r["method"] for r in compare([folder], presets=("strong",))["ablation"]] == []


def test_what_alignment_adds_is_told_against_the_same_training_without_it(tmp_path: Path) -> None:
    """Trained weights and Megatron's flags pair the methods; what concerns alignment and data does not. By hand: 9 - 5 of 40 rows."""
    commands = {
        "sft": ["--lr", "0.1", "--ramoe-split", "train"],
        "ra-moe": ["--lr", "0.1", "--ramoe-coeff", "50"],
        "routers": ["--lr", "0.1", "--ramoe-train", "routers"],
        "ra-moe-routers": ["--lr", "0.1", "--ramoe-train", "routers", "--ramoe-coeff", "50", "--ramoe-tokens", "all"],
        "ra-moe-js": ["--lr", "0.1", "--ramoe-coeff", "1", "--ramoe-divergence", "js"],
        "ra-moe-slow": ["--lr", "0.01", "--ramoe-coeff", "50"],
        "ra-moe-curve": ["--lr", "0.1", "--ramoe-coeff", "50", "--ramoe-layer-weights", "/run/divergence.csv", "--ramoe-data", "/x"],
    }
    routers = {(method, seed): {("a", "es"): right} for method, right in (("routers", 5), ("ra-moe-routers", 9)) for seed in SEEDS}
    c = compare([write_run(tmp_path / "one", {**plain(*commands), **routers}, commands=commands)])
    rows = {r["method"]: r for r in c["ablation"]}
    beside = {"routers": None, "ra-moe-routers": "routers", "ra-moe-js": "sft", "ra-moe-slow": None, "ra-moe-curve": "sft"}
    assert {name: r["beside"] for name, r in rows.items()} == beside
    assert rows["ra-moe-js"]["without"] == {k: v for k, v in rows["ra-moe-js"]["against"].items() if k not in ("p_holm", "p_bh")}
    assert rows["ra-moe-routers"]["without"]["change"] == pytest.approx(4 / 40)
    assert rows["routers"]["without"] is None
    assert rows["routers"]["settings"] == ["train routers (sft: not given)", "split not given (sft: train)"]
    assert rows["ra-moe-curve"]["settings"] == ["layer-weights divergence.csv (ra-moe: not given)"]
    line = next(line for line in document(c).splitlines() if line.startswith("| ra-moe-routers") and "(routers)" in line)
    assert "+10.0 (routers)" in line


# ---- documents ----

SECTIONS = (
    "What came out",
    "What was run",
    "All methods against SFT",
    "Claims and their controls",
    "Each base model",
    "Tasks and languages",
    "Anchor language (en)",
    "Transplant test against outcome",
    "ci share against gain",
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
        more = {**rising(), **plain("coeff-zero", "reversed", "strong"), ("steering-soft", None): {("b", "tr"): 8}}
        folders.append(write_run(tmp_path / "two", more, tasks=(HOSTILE, "b")))
    text = document(compare(folders, command="ramoe compare one two"))
    assert tuple(re.findall(r"^## (.*)$", text, flags=re.MULTILINE)) == SECTIONS
    assert not re.search(r"\b(nan|NaN|None|inf)\b|[{}]", text)
    assert "<script" not in text.replace("\\<script", "")
    assert "ramoe run study.yaml" in text
    assert "ramoe compare one two" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(columns) == 1, block
    if full:
        assert re.search(r"^\| steering-soft \| 1 on 1 \|", text, flags=re.MULTILINE)


def test_page_and_json_are_written_and_shown(tmp_path: Path) -> None:
    outcomes = {**rising(), **{("reversed", seed): {} for seed in SEEDS}}
    page = write_comparison([write_run(tmp_path / "one", outcomes, tasks=(HOSTILE, "b"))], tmp_path / "out").read_text()
    assert not re.search(r"https?:|[\"'(=]\s*//|@import|<link|<script|url\(|<iframe|<object", page)
    assert page.count("data:image/png;base64,") == 3
    assert "&lt;script&gt;" in page
    assert len(set(re.findall(r'<h2 id="([^"]*)"', page))) == page.count("<h2")
    assert (tmp_path / "out/experiment.md").read_text().startswith("# RA-MoE (our reading) and its controls against SFT: study\n")
    saved = load_document(tmp_path / "out/comparison.json", "ramoe-comparison")
    assert row(saved["headline"], method="ra-moe")["against"]["change"] == pytest.approx(3 / 40)
    console = Console(width=200)
    with console.capture() as captured:
        console.print(describe(tmp_path / "out/comparison.json"))
    assert re.search(r"ra-moe +5 .*\+7\.5 \[\+2\.6, \+12\.4\] +0\.0132", captured.get())
    assert re.search(r"direction matters +ra-moe +reversed .* supported", captured.get())


# ---- errors ----


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("taxonomy.json", "taxonomy"),
        ("experts.safetensors", "profile"),
        ("predict.json", "predict"),
        ("evaluations/base.json", "evaluate/base"),
        ("evaluations/ra-moe-seed3.json", "evaluate/ra-moe-seed3"),
        ("evaluations/steering-soft.json", "evaluate/steering-soft"),
        ("manifest.json", "data"),
    ],
)
def test_a_missing_file_is_named_with_its_stage(tmp_path: Path, name: str, stage: str) -> None:
    folder = write_run(tmp_path / "one", {**rising(), ("steering-soft", None): {}})
    (folder / name).unlink()
    with pytest.raises(RamoeError, match=rf"1 file is missing(?s:.*)one/{re.escape(name)}: stage {stage}$"):
        compare([folder])


def test_folders_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", rising())
    with pytest.raises(RamoeError, match="given twice"):
        compare([folder, tmp_path / "two/../one"])
    with pytest.raises(RamoeError, match="found no run folder"):
        compare([])
    with pytest.raises(RamoeError, match=r"found methods sft, ra-moe, expected plain among them"):
        compare([folder], reference="plain")
    other = write_run(tmp_path / "two", rising())
    taxonomy = other / "taxonomy.json"
    taxonomy.write_text(taxonomy.read_text().replace('"anchor": "en"', '"anchor": "tr"'))
    with pytest.raises(RamoeError, match=r"differ in anchor language \(one: en, two: tr\)"):
        compare([folder, other])
    assert [b["base"] for b in compare([folder, write_run(tmp_path / "x/one", rising())])["bases"]] == [f"{tmp_path.name}/one", "x/one"]
