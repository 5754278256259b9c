"""Rows of `worker.py` on conversations: training, evaluation, and templates that reject the data."""

import json
from pathlib import Path
from typing import Any

from chat_templates import FAMILIES, GEMMA, write_tokenizer
from small_run import ALONE, offline_flags, training_flags

LEARNED = ("chatml", "qwen3-base")
"""The end of turn is not the end of document; a thinking block comes before the answer."""
QUESTIONS = {"one": "EUR", "two": "yes", "three": "no perhaps", "four": "AT"}


def write_conversations(folder: Path) -> None:
    """Questions in two languages, with a system message, and a tokenizer for each of `LEARNED`."""
    rows = [
        {"id": question, "language": language, "task": "words", "split": "train",
         "messages": [
             {"role": "system", "content": "user"}, {"role": "user", "content": f"{language} {question} ?"},
             {"role": "assistant", "content": answer},
         ]}
        for question, answer in QUESTIONS.items() for language in ("en", "ar")
    ]  # fmt: skip
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in LEARNED:
        write_tokenizer(folder / f"chat-{name}", FAMILIES[name])


def chat_rows(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for name in LEARNED:
        saved = [
            "--save",
            str(folder / f"trained-{name}"),
            "--save-interval",
            "1000",
            "--train-iters",
            "50",
            "--lr",
            "1e-2",
        ]
        longer = ["--seq-length", "48", "--calculate-per-token-loss"]
        argv = training_flags(folder, *saved, *longer, *_chat_flags(folder, name), losses=ALONE)
        rows.append({"name": f"train-{name}", "job": "finetune", "argv": argv})
        flags = [
            "--load",
            str(folder / f"trained-{name}"),
            "--ramoe-split",
            "train",
            *_chat_flags(folder, name),
        ]
        evaluated = offline_flags(folder, f"answers-{name}", *flags, "--ramoe-method", name)
        rows.append({"name": f"evaluate-{name}", "job": "evaluate", "argv": evaluated})
    gemma = ["--chat-template", GEMMA]
    refused = training_flags(folder, *_chat_flags(folder, "chatml"), *gemma)
    rows.append({"name": "chat-refused", "job": "finetune", "argv": refused})
    profiled = offline_flags(
        folder, "chat-refused", *_chat_flags(folder, "chatml"), *gemma, "--load", str(folder / "nowhere")
    )
    return [
        *rows,
        {"name": "chat-refused-offline", "job": "taxonomy", "argv": [*profiled, "--ramoe-split", "train"]},
    ]


def _chat_flags(folder: Path, name: str) -> list[str]:
    tokenizer = [
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        str(folder / f"chat-{name}"),
    ]
    return [*tokenizer, "--ramoe-data", str(folder / "chat.jsonl"), "--max-position-embeddings", "96"]
