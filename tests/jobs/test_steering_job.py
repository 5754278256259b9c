"""Routing steering in real Megatron: effects in every layout, the search, and jobs that use its result."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from small_run import offline_flags, outcome, profile_flags, run_table, training_flags, write_world
from steering_job import LAYERS

from ramoe_megatron.artifacts.checkpoints import TRACKER
from ramoe_megatron.report.inspect import describe

SCRIPT = str(Path(__file__).parents[1] / "support/steering_job.py")
SEARCH = "--ramoe-split validation --ramoe-taus file 0.99 --ramoe-zones 1-2 --ramoe-strengths 0.5 4.0".split()
LAYOUTS = {
    "tp": ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    "ep": ("--expert-model-parallel-size", "2"),
    "pp": ("--pipeline-model-parallel-size", "2"),
}
GROUPS = ("--moe-router-num-groups", "4", "--moe-router-group-topk", "2")
CASES = ("none", "soft-0", "empty", "other-tasks", "one-task", "soft", "minus", "hard", "full")
EVALUATIONS: dict[str, tuple[str, ...]] = {
    "soft": ("--ramoe-steer", "soft", "--ramoe-steer-layers", "1-2"),
    "strong": ("--ramoe-steer", "soft", "--ramoe-steer-layers", "1-2", "--ramoe-steer-strength", "4"),
    "hard": ("--ramoe-steer", "hard", "--ramoe-steer-layers", "1-2"),
    "zero": ("--ramoe-steer", "soft", "--ramoe-steer-layers", "1-2", "--ramoe-steer-strength", "0"),
    "best": ("--ramoe-steering", "{folder}/search/steering.json"),
    "groups": ("--ramoe-steer", "soft", "--ramoe-steer-layers", "1-2", *GROUPS),
}
REFUSED = {
    "base-name": ("evaluate", "--ramoe-steer hard --ramoe-steer-layers 1-2",
                  "--ramoe-method base names the base model as it is"),
    "twice": ("evaluate", "--ramoe-method x --ramoe-steering s.json --ramoe-steer soft --ramoe-steer-tau 0.3",
              "--ramoe-steer, --ramoe-st"),
    "alone": ("evaluate", "--ramoe-method x --ramoe-steer-tau 0.3",
              "--ramoe-steer-tau without --ramoe-steer"),
    "no-experts": ("evaluate", "--ramoe-method x --ramoe-steer soft --ramoe-experts",
                   "--ramoe-experts is missing"),
    "hard-strength": ("evaluate", "--ramoe-method x --ramoe-steer hard --ramoe-steer-strength 1",
                      "hard, which has no strength"),
    "hard-groups": ("evaluate", f"--ramoe-method x --ramoe-steer hard {' '.join(GROUPS)}",
                    "--moe-router-group-topk 2: an expert outside"),
    "no-expert": ("evaluate",
                  "--ramoe-method x --ramoe-steer soft --ramoe-steer-layers 1-2 --ramoe-steer-tau 0.99",
                  "chooses no expert"),
    "wide": ("evaluate", "--ramoe-method x --ramoe-steer soft --ramoe-steer-layers 1-9",
             "'1-9' means MoE layers 1 to 9"),
    "anchor-alone": ("steer", "--ramoe-split validation --ramoe-languages en", "only 'en' examples"),
    "split": ("steer", "--ramoe-split dev", "empty split 'dev'"),
    "nothing": ("steer", "--ramoe-split validation --ramoe-taus 0.99 --ramoe-zones 1-2", "nothing to try"),
    "search-groups": ("steer", f"--ramoe-split validation {' '.join(GROUPS)}",
                      "hard steering does not run with --moe-router-group-topk 2"),
    "tau": ("steer", "--ramoe-split validation --ramoe-taus most", "--ramoe-taus: found 'most'"),
}  # fmt: skip


def flags(folder: Path, output: str, *more: str) -> list[str]:
    experts = ["--ramoe-experts", str(folder / "profile/experts.safetensors")]
    return offline_flags(folder, output, *experts, "--ramoe-max-new-tokens", "4", *more)


def refused(folder: Path, words: str) -> list[str]:
    """A command line whose checkpoint has no weights, so its fault must be found before a model is built.

    Words that end with --ramoe-experts give a command line without an expert file.
    """
    given = offline_flags if words.endswith("--ramoe-experts") else flags
    return [
        *given(folder, "refused", *words.removesuffix("--ramoe-experts").split()),
        "--load",
        str(folder / "weightless"),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steering")
    write_world(folder)
    (folder / "weightless").mkdir()
    (folder / "weightless" / TRACKER).write_text("4")
    saved = ["--train-iters", "4", "--save", str(folder / "base"), "--save-interval", "4"]
    rows: list[dict[str, Any]] = [
        {"name": "base", "job": "finetune", "argv": training_flags(folder, *saved)},
        {"name": "profile", "job": "profile", "argv": profile_flags(folder, "profile")},
        {"name": "one", "job": SCRIPT, "argv": flags(folder, "one", "--ramoe-split", "test")},
        {"name": "search", "job": "steer", "argv": flags(folder, "search", *SEARCH)},
        {
            "name": "plain",
            "job": "evaluate",
            "argv": flags(folder, "evaluations", "--ramoe-split", "validation"),
        },
    ]
    for name, words in EVALUATIONS.items():
        own = [word.format(folder=folder) for word in words]
        argv = flags(folder, "evaluations", "--ramoe-split", "validation", "--ramoe-method", name, *own)
        rows.append({"name": f"evaluate-{name}", "job": "evaluate", "argv": argv})
    rows += [
        {"name": name, "job": job, "argv": refused(folder, words)}
        for name, (job, words, _) in REFUSED.items()
    ]
    run_table(1, rows, folder)
    run_table(
        2,
        [
            *(
                {"name": name, "job": SCRIPT, "argv": flags(folder, name, "--ramoe-split", "test", *own)}
                for name, own in LAYOUTS.items()
            ),
            {
                "name": "search-pp",
                "job": "steer",
                "argv": flags(folder, "search-pp", *SEARCH, *LAYOUTS["pp"]),
            },
        ],
        folder,
    )
    return folder


def steered(runs: Path, layout: str = "one") -> dict[str, torch.Tensor]:
    return load_file(runs / layout / "steered.safetensors")


def evaluation(runs: Path, name: str) -> dict[str, Any]:
    outcome(runs, "plain" if name == "base" else f"evaluate-{name}")
    return json.loads((runs / "evaluations" / f"{name}.json").read_text())


def search(runs: Path, name: str = "search") -> dict[str, Any]:
    outcome(runs, name)
    return json.loads((runs / name / "steering.json").read_text())


@pytest.mark.parametrize("case", ["soft-0", "empty", "other-tasks"])
def test_what_steers_nothing_changes_no_bit(runs: Path, case: str) -> None:
    found = steered(runs)
    for kind in ("likelihood", "frequency", "answers"):
        assert torch.equal(found[f"{kind}.{case}"], found[f"{kind}.none"])


def test_only_the_steered_task_is_steered(runs: Path) -> None:
    """The other task's sequences are the same bits, though they stand in the same micro-batches."""
    found = steered(runs)
    odd = found["row"] == 1
    assert torch.equal(found["frequency.one-task"][~odd], found["frequency.none"][~odd])
    assert torch.equal(found["frequency.one-task"][odd], found["frequency.hard"][odd])
    assert ((found["likelihood.one-task"] - found["likelihood.none"])[odd].abs() > 1e-4).any()


def test_hard_sends_every_token_to_the_steered_experts(runs: Path) -> None:
    found, (first, last) = steered(runs), LAYERS
    chosen, inside = found["chosen"].bool(), slice(first, last + 1)
    assert (chosen.sum(-1) == 2).all()
    shares = found["frequency.hard"][:, inside][chosen[:, inside]]
    assert torch.equal(shares, torch.ones_like(shares))
    unsteered = found["frequency.none"][:, inside][chosen[:, inside]]
    assert unsteered.mean() < 0.9
    # of three for two places, none but they are used
    full = (found["frequency.full"] * found["chosen.full"]).sum(-1)[:, inside]
    torch.testing.assert_close(full, torch.full_like(full, 2.0))
    # before the first steered layer nothing has changed
    assert torch.equal(found["frequency.hard"][:, :first], found["frequency.none"][:, :first])
    # and the strengths lie in order
    share = {
        case: found[f"frequency.{case}"][:, inside][chosen[:, inside]].mean()
        for case in ("minus", "none", "soft", "hard")
    }
    assert list(share.values()) == sorted(share.values())
    assert len({value.item() for value in share.values()}) == 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steering_is_the_same_in_every_layout(runs: Path, layout: str) -> None:
    one, other = steered(runs), steered(runs, layout)
    for case in CASES:
        torch.testing.assert_close(
            other[f"likelihood.{case}"], one[f"likelihood.{case}"], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(other[f"frequency.{case}"], one[f"frequency.{case}"], rtol=1e-4, atol=1e-6)
        assert torch.equal(other[f"answers.{case}"], one[f"answers.{case}"])
    for case in ("soft", "hard"):
        assert ((one[f"likelihood.{case}"] - one["likelihood.none"]).abs() > 1e-2).any()


def test_an_evaluation_without_steering_says_nothing_of_it_and_one_of_strength_zero_is_equal(
    runs: Path,
) -> None:
    plain, zero = evaluation(runs, "base"), evaluation(runs, "zero")
    assert "steering" not in plain
    setting = zero.pop("steering")
    assert setting.pop("experts")[0]["path"] == str(runs / "profile/experts.safetensors")
    assert setting == {"kind": "soft", "strength": 0.0, "tau": None, "layers": [1, 2]}
    assert zero | {"method": "base", "examples": "base.jsonl"} == plain
    assert (runs / "evaluations/zero.jsonl").read_bytes() == (runs / "evaluations/base.jsonl").read_bytes()


def test_the_mass_of_a_steered_evaluation_is_that_of_the_steered_routing(runs: Path) -> None:
    first, last = LAYERS
    for plain, hard in zip(evaluation(runs, "base")["mass"], evaluation(runs, "hard")["mass"], strict=True):
        assert hard["mass"][:first] == plain["mass"][:first]
        assert all(
            h > p + 0.01
            for h, p in zip(hard["mass"][first : last + 1], plain["mass"][first : last + 1], strict=True)
        )


def test_the_search_tries_each_setting_and_tells_what_it_leaves_out(runs: Path) -> None:
    document = search(runs)
    settings = [(s["kind"], s["strength"], s["tau"], s["layers"]) for s in document["settings"]]
    assert settings == [
        ("none", None, None, None),
        ("soft", 0.5, None, [1, 2]),
        ("soft", 4.0, None, [1, 2]),
        ("hard", None, None, [1, 2]),
    ]
    assert document["skipped"] == ["tau=0.99 in MoE layers 1-2: no expert to steer; left out"]
    assert {(s["n"], s["anchor_n"]) for s in document["settings"]} == {(12, 6)}
    assert document["best"] in document["settings"]
    assert document["best"]["correct"] == max(s["correct"] for s in document["settings"])
    assert {path.name for path in (runs / "search").iterdir()} == {"steering.json"}


@pytest.mark.parametrize(
    ("name", "number"), [("base", 0), ("soft", 1), ("strong", 2), ("hard", 3), ("best", None)]
)
def test_an_evaluation_under_a_setting_gives_what_the_search_counted(
    runs: Path, name: str, number: int | None
) -> None:
    found, document = evaluation(runs, name), search(runs)
    setting = document["best"] if number is None else document["settings"][number]
    right = {"en": 0, "es": 0, "tr": 0}
    for row in found["rows"]:
        right[row["language"]] += row["correct"]
    assert right.pop("en") == setting["anchor_correct"]
    assert right == {row["language"]: row["correct"] for row in setting["languages"]}
    if name != "base":
        assert {key: found["steering"][key] for key in ("kind", "strength", "tau", "layers")} == {
            key: setting[key] for key in ("kind", "strength", "tau", "layers")
        }


def test_the_search_finds_the_same_over_pipeline_stages(runs: Path) -> None:
    assert search(runs, "search-pp") == search(runs)


def test_inspect_shows_both_files(runs: Path) -> None:
    console = Console(width=400, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(describe(runs / "search/steering.json"))
    console.print(describe(runs / "evaluations/hard.json"))
    text = console.export_text()
    for words in (
        "no steering",
        "soft 4, the file's experts, MoE layers 1-2",
        "tau=0.99 in MoE layers 1-2: no expert",
    ):
        assert words in text
    assert "hard, the file's experts, MoE layers 1-2" in text.split("ramoe-evaluation")[1]


def test_soft_runs_on_the_routers_that_hard_is_refused_for(runs: Path) -> None:
    assert evaluation(runs, "groups")["steering"]["kind"] == "soft"


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_told_before_a_model_is_built(runs: Path, name: str) -> None:
    error = json.loads((runs / f"{name}.json").read_text())["error"]
    assert REFUSED[name][2] in error, error
