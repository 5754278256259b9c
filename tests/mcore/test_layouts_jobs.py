"""The offline jobs give the same files in every layout, and say what is wrong with bad input."""

import json
from pathlib import Path

import pytest
import torch
from broken_lines import FATAL, SOUND
from data_rows import SmallTokenizer
from safetensors.torch import load_file
from small_run import LANGUAGES

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.priors import Priors, bytes_per_id
from ramoe_megatron.artifacts.records import read_divergence, read_taxonomy
from ramoe_megatron.data.parallel import load_examples


@pytest.mark.parametrize("layout", ["tp", "pp", "ep"])
def test_profiles_agree_between_layouts(layouts: Path, layout: str) -> None:
    for file in ("experts", "experts-last", "priors"):
        one, other = (
            load_file(layouts / folder / f"{file}.safetensors") for folder in ("profile", f"profile-{layout}")
        )
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(
                other[key], tensor, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}"
            )
    curve, other_curve = (
        read_divergence(layouts / folder / "divergence.csv") for folder in ("profile", f"profile-{layout}")
    )
    assert [r.divergence for r in other_curve] == pytest.approx([r.divergence for r in curve], rel=1e-3)


def test_priors_of_what_a_fine_tune_reads_are_rows_of_the_whole(layouts: Path) -> None:
    whole, kept = (Priors(layouts / name / "priors.safetensors") for name in ("profile", "profile-kept"))
    right = {row.id for row in read_taxonomy(layouts / "taxonomy.jsonl") if row.english_correct}
    assert 0 < len(right & set(whole.ids)) < len(whole.ids)
    assert kept.ids == tuple(id_ for id_ in whole.ids if id_ in right)
    assert kept.layers == (1, 2)
    assert torch.equal(kept.rows(kept.ids), whole.rows(kept.ids, [1, 2]).bfloat16().float())
    log = (layouts / "ranks1.log").read_text()
    each = bytes_per_id(2, whole.shape.num_experts, "bfloat16")
    assert f"priors: {each} bytes an id (2 layers" in log


@pytest.mark.parametrize("layout", ["tp", "pp", "ep", "padded", "padded-tp"])
def test_scores_agree_between_layouts(layouts: Path, layout: str) -> None:
    one, other = (
        load_file(layouts / f / "reference.safetensors") for f in ("reference", f"reference-{layout}")
    )
    for key, tensor in one.items():
        torch.testing.assert_close(
            other[key], tensor, rtol=1e-4, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("layout", ["scoring", "scoring-tp", "scoring-pp", "scoring-ep"])
def test_what_a_model_without_an_answer_gets(layouts: Path, layout: str) -> None:
    """Equal logits prefer no choice and write no end. NaN and infinity raise the same error on all ranks."""
    examples = load_examples([str(layouts / "parallel.jsonl")], split="test")
    tokenizer = SmallTokenizer((layouts / "tokenizer.model").read_bytes())
    ranks = json.loads((layouts / layout / "scores.json").read_text())
    assert ranks == [ranks[0]] * (1 if layout == "scoring" else 2)
    found = ranks[0]
    assert found["plain"] == json.loads((layouts / "scoring/scores.json").read_text())[0]["plain"]
    for example, right in zip(examples, found["equal"], strict=True):
        if example.choices:
            gold, *others = (
                len(tokenizer.tokenize(choice)) for choice in (example.answer, *example.choices[1:])
            )
            assert right == (gold < min(others))
    assert found["cut"] == [False] * sum(example.choices is None for example in examples)
    for kind in ("nan", "infinite"):
        assert f"in {len(examples)} of {len(examples)} examples: sum/24 (en), sum/24 (es)" in found[kind]


def test_scoring_laws(layouts: Path) -> None:
    found = load_file(layouts / "reference/reference.safetensors")
    assert (found["likelihood"] < 0).all()
    torch.testing.assert_close(found["likelihood.small_batches"], found["likelihood"], rtol=1e-5, atol=1e-5)
    # routing a prompt by its own logits changes nothing; by another prompt's it does
    torch.testing.assert_close(found["likelihood.own_routing"], found["likelihood"], rtol=1e-5, atol=1e-5)
    assert torch.equal(found["answers.own_routing"], found["answers"])
    assert ((found["likelihood.other_routing"] - found["likelihood"]).abs() > 1e-4).any()
    # counts of K experts for each token; distributions sum to one
    shape = found["logits"].shape[:2]
    for tokens in ("prompt", "response", "all", "last"):
        torch.testing.assert_close(found[f"frequency.{tokens}"].sum(-1), torch.full(shape, 2.0))
        torch.testing.assert_close(found[f"pooled.{tokens}"].sum(-1), torch.ones(shape))
    topk = torch.zeros_like(found["logits"]).scatter(-1, found["logits"].topk(2).indices, 1.0)
    torch.testing.assert_close(found["frequency.last"], topk)
    torch.testing.assert_close(found["logits"].softmax(-1), found["pooled.last"], rtol=1e-4, atol=1e-6)


def test_job_files(layouts: Path) -> None:
    rows = read_taxonomy(layouts / "taxonomy/taxonomy.jsonl")
    assert {(row.id, row.language) for row in rows} == {
        (f"sum/{n}", language) for n in range(36) for language in ("es", "tr")
    }
    evaluation = json.loads((layouts / "evaluations/base.json").read_text())
    assert sum(row["n"] for row in evaluation["rows"]) == 12 * len(LANGUAGES)
    assert len((layouts / "evaluations/base.jsonl").read_text().splitlines()) == 12 * len(LANGUAGES)
    experts = ExpertFile.load(layouts / "profile/experts.safetensors")
    assert experts.tasks == ("even", "odd")
    assert experts.expert_mask.sum(-1).unique().tolist() == [3]
    assert experts.layer_number.tolist() == [1, 2, 3, 4]
    last = ExpertFile.load(layouts / "profile/experts-last.safetensors")
    assert (experts.select_tokens, last.select_tokens) == ("all", "last")
    counts = (
        last.task_frequency
        * torch.tensor([last.sequences["english_task"][task] for task in last.tasks])[:, None, None]
    )
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-4)  # one token of each sequence
    torch.testing.assert_close(last.task_frequency.sum(-1), torch.full(last.delta.shape[:2], 2.0))
    assert torch.equal(last.general_frequency, experts.general_frequency)
    assert not torch.equal(last.delta, experts.delta)
    assert json.loads((layouts / "predict/predict.json").read_text())["rows"]
    assert not list(layouts.glob("taxonomy/.*"))  # finished shards are gone


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other-model", ["experts.safetensors", "num_experts is 8 in the file, 4 in the model"]),
        ("bad-layers", ["2-9", "0 to 3"]),
        ("bad-tokens", ["priors.safetensors", "'last'", "'all'"]),
        (
            "short-limit",
            ["72 of 72 examples", "24 in en, 24 in es, 24 in tr", "more than --ramoe-max-new-tokens 1"],
        ),
        ("absent", ["nowhere", "latest_checkpointed_iteration.txt"]),
        ("absent-base", ["nowhere", "--pretrained-checkpoint"]),
        (
            "warm-up",
            ["optimizer_param_scheduler.py, line ", "self.lr_warmup_steps is 80, self.lr_decay_steps is 32"],
        ),
        ("unevaluated", ["megatron/training/training.py, line ", "args.eval_interval is None"]),
        ("other-shape", ["base", "does not fit the model flags"]),
    ],
)
def test_bad_input_is_told(layouts: Path, name: str, words: list[str]) -> None:
    error = json.loads((layouts / f"{name}.json").read_text())["error"]
    for word in words:
        assert word in error, error
    if name in ("warm-up", "unevaluated"):
        assert not list(layouts.glob(f"{name}.*.safetensors")), "before any model"


@pytest.mark.parametrize("name", FATAL)
def test_a_check_finds_first_what_the_job_dies_of(layouts: Path, name: str) -> None:
    """A job ends with the error that its check calls fatal: the check's text begins with the job's error."""
    place = name.replace(" ", "-")
    job, check = (
        json.loads((layouts / f"{kind}-{place}.json").read_text())["error"] for kind in ("broken", "checked")
    )
    first = check.splitlines()[0].partition(": ")[2]
    assert first.startswith(" ".join(job.split())), (job, check)
    assert not (layouts / "unmade").exists()


@pytest.mark.parametrize("kind", SOUND)
def test_a_check_of_a_sound_job_ends_well(layouts: Path, kind: str) -> None:
    result = json.loads((layouts / f"sound-{kind}.json").read_text())
    assert "error" not in result
