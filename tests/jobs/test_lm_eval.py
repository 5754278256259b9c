"""lm-evaluation-harness on converted models: over ranks it measures what its hf model measures."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'ramoe-megatron[lm-eval]'")

from data_rows import write_jsonl
from harness_world import NAMES, POSITIONS, TASKS, documents, samples_of, write_tasks, write_world
from small_run import outcome, run_table

from ramoe_megatron.artifacts.records import read_examples
from ramoe_megatron.cli.lm_eval_command import job_words, model_flags, ranks_of
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.jobs import from_samples
from ramoe_megatron.recipe.megatron_flags import render

SCRIPT = str(Path(__file__).parents[1] / "support/harness_job.py")
SIZES = {"mixtral": "tensor_parallel=2", "olmoe": "expert_parallel=2"}
"""Family -> its layout on two ranks: half of each tensor, or half of the requests and of the experts."""
LANGUAGES = ("en", "sw")


@dataclass(frozen=True)
class World:
    folder: Path
    hf: dict[str, dict[str, list[dict[str, Any]]]]
    """Family -> task -> samples of lm-eval's hf model."""
    ours: dict[str, dict[str, list[dict[str, Any]]]]
    """Family -> task -> samples of the model `ramoe`."""


def of_transformers(folder: Path, name: str, tasks: list[str]) -> dict[str, list[dict[str, Any]]]:
    """What lm-eval's hf model measures, one sequence at a time, without padding."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder / f"{name}-hf"), "dtype": "float32"},
        tasks=tasks,
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        device="cpu",
        batch_size=1,
        bootstrap_iters=0,
    )
    return found["samples"]


def parallel_rows() -> list[dict[str, Any]]:
    """Questions in two languages, with choices or to be answered freely."""
    rows = []
    for place, language in enumerate(LANGUAGES):
        for number, document in enumerate(documents(24, 5 + place)):
            gold = document["choices"][document["gold"]]
            fields = {
                "id": f"q{number}",
                "language": language,
                "task": ("even", "odd")[number % 2],
                "prompt": " ".join(document["question"].split()[:5]) + "\n",
                "response": gold,
                "split": "test",
            }
            rows.append(fields | ({"choices": document["choices"]} if number < 18 else {}))
    return rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("harness")
    write_world(folder)
    # half of the gold answers are what the first model says
    said = of_transformers(folder, NAMES[0], ["say"])["say"]
    write_tasks(folder, [s["filtered_resps"][0] if n % 2 else "no" for n, s in enumerate(said)])
    data = write_jsonl(folder / "parallel.jsonl", parallel_rows())
    table = []
    for name in NAMES:
        model = ["--model_args", f"checkpoint={folder / name},batch_tokens=256", SIZES[name]]
        asked = ["--tasks", *TASKS, "--include_path", str(folder / "tasks"), "--log_samples"]
        words, ranks = job_words([*model, *asked, "--output_path", str(folder / f"{name}-out")])
        assert ranks == 2
        table.append({"name": name, "job": SCRIPT, "argv": words})
    own = [*render(model_flags({"checkpoint": str(folder / "olmoe"), "expert_parallel": 2}))]
    own += ["--ramoe-data", data, "--ramoe-split", "test"]
    for job, more in (("taxonomy", []), ("evaluate", ["--ramoe-save-samples"])):
        argv = [*own, *more, "--ramoe-output", str(folder / job)]
        table.append({"name": job, "job": job, "argv": argv})
    run_table(2, table, folder)
    for row in table:
        outcome(folder, row["name"])
    return World(
        folder,
        {name: of_transformers(folder, name, list(TASKS)) for name in NAMES},
        {name: samples_of(folder / f"{name}-out") for name in NAMES},
    )


def pairs(world: World, name: str, task: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(ours, hf's) of each document; the documents and what was asked are the same."""
    ours, theirs = world.ours[name][task], world.hf[name][task]
    found = list(zip(ours, sorted(theirs, key=lambda sample: sample["doc_id"]), strict=True))
    for one, other in found:
        for key in ("doc_id", "doc_hash", "prompt_hash", "target_hash"):
            assert one[key] == other[key]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_choice_is_that_of_transformers(name: str, world: World) -> None:
    found = pairs(world, name, "pick")
    assert len({(one["acc"], one["acc_norm"]) for one, _ in found}) >= 3  # the decisions do differ
    for ours, theirs in found:
        assert (ours["acc"], ours["acc_norm"]) == (theirs["acc"], theirs["acc_norm"])
        for (score, greedy), [(right, right_greedy)] in zip(
            ours["filtered_resps"], theirs["resps"], strict=True
        ):
            assert float(score) == pytest.approx(right, abs=1e-4)
            assert greedy == str(right_greedy)


@pytest.mark.parametrize("name", NAMES)
def test_every_generated_text_is_that_of_transformers(name: str, world: World) -> None:
    found = pairs(world, name, "say")
    for ours, theirs in found:
        assert ours["filtered_resps"] == theirs["filtered_resps"]
        assert ours["exact_match"] == theirs["exact_match"]
    texts = [ours["filtered_resps"][0] for ours, _ in found]
    assert len(set(texts)) > len(texts) // 2
    assert not any("e" in text for text in texts)  # each ends before the text that ends it
    if name == NAMES[0]:
        assert {ours["exact_match"] for ours, _ in found} == {0.0, 1.0}


@pytest.mark.parametrize("name", NAMES)
def test_whole_texts_and_texts_without_context_have_the_likelihood_of_transformers(
    name: str, world: World
) -> None:
    for ours, theirs in pairs(world, name, "roll"):
        assert float(ours["resps"][0][0]) == pytest.approx(theirs["resps"][0][0], abs=1e-3)
    for ours, theirs in pairs(world, name, "echo"):
        assert float(ours["resps"][0][0][0]) == pytest.approx(theirs["resps"][0][0][0], abs=1e-4)
        assert ours["acc"] == theirs["acc"]


def test_contexts_beyond_the_models_maximum_are_cut_as_by_transformers_and_counted(world: World) -> None:
    import transformers

    for name in NAMES:
        tokenizer = transformers.AutoTokenizer.from_pretrained(world.folder / f"{name}-hf")
        asked = [sample["arguments"]["gen_args_0"]["arg_0"] for sample in world.ours[name]["say"]]
        assert any(len(tokenizer.encode(text)) > POSITIONS for text in asked)
    log = (world.folder / "ranks2.log").read_text()
    assert f"do not fit into the model's maximum length of {POSITIONS} tokens and were cut on the left" in log


def test_the_samples_of_an_evaluation_give_the_taxonomy_of_our_own_scoring(world: World) -> None:
    own = (world.folder / "taxonomy/taxonomy.jsonl").read_bytes()
    assert {json.loads(line)["category"] for line in own.splitlines()} >= {"ci", "ic", "ii"}
    out = world.folder / "again"
    files = [
        f"{language}={path}"
        for language in LANGUAGES
        for path in sorted((world.folder / "evaluate/base-samples").glob(f"*_{language}.jsonl"))
    ]
    words = ["--from-samples", *files, "--id", "{id}", "--ramoe-data", str(world.folder / "parallel.jsonl")]
    assert len(files) == 4
    assert from_samples.main([*words, "--ramoe-output", str(out)]) == 0
    assert (out / "taxonomy.jsonl").read_bytes() == own
    pairs = [
        json.loads((folder / "taxonomy.json").read_text())["pairs"]
        for folder in (out, world.folder / "taxonomy")
    ]
    assert pairs[0] == pairs[1]


def test_the_samples_of_an_evaluation_hold_what_its_decisions_are_made_from(world: World) -> None:
    """With choices, the gold one alone is the most likely. The score of a choice includes the end token."""
    import torch
    import transformers

    folder = world.folder / "evaluate"
    right = {(row["id"], row["language"]): row["correct"] for row in read_examples(folder / "base.jsonl")}
    lines = [
        json.loads(line)
        for path in (folder / "base-samples").iterdir()
        for line in path.read_text().splitlines()
    ]
    assert len(lines) == len(right) == 48
    for line in lines:
        doc = line["doc"]
        assert bool(line["acc"]) == right[doc["id"], doc["language"]]
        if "choices" in doc:
            scores = [float(score) for score, _ in line["filtered_resps"]]
            best = scores.index(max(scores)) == int(line["target"]) and scores.count(max(scores)) == 1
            assert best == bool(line["acc"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(world.folder / "olmoe-hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(world.folder / "olmoe-hf").eval()
    line = next(line for line in lines if "choices" in line["doc"])
    prompt = tokenizer(line["doc"]["prompt"]).input_ids
    for choice, (score, _) in zip(line["doc"]["choices"], line["filtered_resps"], strict=True):
        answer = [*tokenizer(choice).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        logits = logits[:, : len(tokenizer)]  # the tokenizer's tokens alone
        expected = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()
        assert float(score) == pytest.approx(float(expected), abs=1e-4)


def test_the_flags_of_a_checkpoint_are_those_beside_it(world: World) -> None:
    given = {"checkpoint": str(world.folder / "olmoe"), "tensor_parallel": 2, "dtype": "bfloat16"}
    flags = model_flags({**given, "expert_parallel": 4, "num_layers": 7})
    assert flags["moe-router-pre-softmax"] is True  # of OLMoE, from model_args.yaml
    assert (flags["num-layers"], flags["seq-length"]) == (7, POSITIONS)
    assert flags["tokenizer-model"] == str(world.folder / "olmoe/huggingface")
    assert (flags["bf16"], flags["sequence-parallel"], flags["expert-tensor-parallel-size"]) == (
        True,
        True,
        1,
    )
    assert ranks_of(flags) == 4
    assert ranks_of({**flags, "pipeline-model-parallel-size": 3}) == 12


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "pick"], "names no checkpoint"),
        (["--model", "hf", "--model_args", "checkpoint=x"], "--model hf: expected ramoe"),
        (["--model_args", "checkpoint=nowhere"], "model_args.yaml: cannot be read"),
        (["--model_args", "checkpoint=W/olmoe,dtype=int8"], "dtype=int8: expected one of float32"),
        (["--model_args", "checkpoint=W/olmoe,tensor_parallel=0"], "expected a whole number of at least 1"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_wrong_command_is_refused_before_ranks_start(words: list[str], said: str, world: World) -> None:
    with pytest.raises(RamoeError, match=said):
        job_words([word.replace("W/", f"{world.folder}/") for word in words])


def test_the_model_without_its_ranks_says_how_to_start_them() -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    from ramoe_megatron.jobs import harness_model

    assert harness_model.RamoeLM.started is None
    manager = TaskManager(include_defaults=False)
    with pytest.raises(RamoeError, match="start it with `ramoe lm-eval"):
        lm_eval.simple_evaluate(model="ramoe", model_args="", tasks=["pick"], task_manager=manager)
