"""Tiny converted models with tokenizers, and local tasks of lm-evaluation-harness on which they are asked."""

import json
import random
from pathlib import Path
from typing import Any

import yaml
from chat_templates import FAMILIES, write_tokenizer
from data_rows import write_jsonl
from tiny_models import make_model

from ramoe_megatron.models.convert import convert_folder, plan_conversion

WORDS = (
    "one two three four five six seven eight nine ten red green blue old new big small cat dog bird".split()
)
TEXTS = [" ".join(WORDS[n:] + WORDS[:n]) for n in range(len(WORDS))] * 3
NAMES = ("mixtral", "olmoe")
"""The families: a tokenizer with BOS that begins texts with a space, and one of bytes without BOS."""
POSITIONS = 48
TASKS = ("pick", "say", "roll", "echo")
COMMON = {"dataset_path": "json", "test_split": "test", "num_fewshot": 0}
METRIC = {"aggregation": "mean", "higher_is_better": True}


def write_world(folder: Path) -> None:
    """Write the models as folder/NAME-hf and folder/NAME, and the tasks to folder/tasks."""
    for name in NAMES:
        target = folder / f"{name}-hf"
        write_tokenizer(target, FAMILIES[name], TEXTS)
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(target)
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        # more rows than the tokenizer has tokens, as published models have
        sizes = {"vocab_size": len(tokenizer) + 6, "max_position_embeddings": POSITIONS}
        make_model(name, **sizes, **ids).save_pretrained(target)
        convert_folder(plan_conversion(target), folder / name)
    write_tasks(folder, ["?"] * 8)


def documents(number: int, seed: int) -> list[dict[str, Any]]:
    """Questions with four choices of other lengths. Some are longer than the models' maximum."""
    generator = random.Random(seed)
    rows = []
    for n in range(number):
        length = 60 if n % 5 == 4 else generator.randint(1, 9)
        question = " ".join(generator.choices(WORDS, k=length))
        choices = [" ".join(generator.choices(WORDS, k=k)) for k in (1, 1, 2, 4)]
        while len(set(choices)) < 4:
            choices[0] = generator.choice(WORDS)
        rows.append(
            {"question": question, "choices": choices, "gold": generator.randrange(4), "key": f"q{n}"}
        )
    return rows


def write_tasks(folder: Path, answers: list[str]) -> None:
    """Write the tasks and their documents. `answers`: gold answers of the generated texts."""
    tasks = folder / "tasks"
    tasks.mkdir(exist_ok=True)
    said = [
        {**row, "answer": answer} for row, answer in zip(documents(len(answers), 2), answers, strict=True)
    ]
    asked = {"doc_to_text": "{{question}} ?"}
    generated = {
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 14, "do_sample": False},
        "metric_list": [{"metric": "exact_match", **METRIC}],
    }
    made: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
        "pick": (documents(16, 1), asked | {
            "output_type": "multiple_choice",
            "doc_to_target": "gold",
            "doc_to_choice": "choices",
            "metric_list": [{"metric": "acc", **METRIC}, {"metric": "acc_norm", **METRIC}],
        }),
        "say": (said, asked | generated),
        "roll": (documents(5, 3), {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question}}",
            "metric_list": [{"metric": "byte_perplexity", "aggregation": "weighted_perplexity",
                             "higher_is_better": False}],
        }),
        "echo": (documents(4, 4), {
            "output_type": "loglikelihood",
            "doc_to_text": "",
            "doc_to_target": "{{choices[0]}}",
            "metric_list": [{"metric": "acc", **METRIC}],
        }),
    }  # fmt: skip
    for name, (rows, config) in made.items():
        path = write_jsonl(tasks / f"{name}.jsonl", rows)
        config = {"task": name, **COMMON, **config, "dataset_kwargs": {"data_files": {"test": path}}}
        (tasks / f"{name}.yaml").write_text(yaml.safe_dump(config))


def samples_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Task -> the lines of the newest sample file that lm_eval wrote below a folder."""
    found = {}
    for task in TASKS:
        if paths := sorted(folder.rglob(f"samples_{task}_*.jsonl")):
            found[task] = [json.loads(line) for line in paths[-1].read_text().splitlines()]
    return found
