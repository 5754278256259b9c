"""Megatron's tokenizer flags, through the start of real jobs: three kinds, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from chat_templates import (
    CHATML,
    FAMILIES,
    GEMMA,
    IM,
    LLAMA3,
    TIKTOKEN_SPECIAL,
    write_sentencepiece,
    write_tiktoken,
    write_tokenizer,
)
from data_rows import row, write_jsonl
from small_run import model_flags, without_value

from ramoe_megatron.jobs.check import check
from ramoe_megatron.mcore.cpu.backend import cpu_backend
from ramoe_megatron.mcore.findings import Line

ANSWERS = {"en": "EUR", "hi": "नमस्ते दुनिया", "ar": "مرحبا"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows in three forms, a tokenizer of each kind, and a folder that passes for a checkpoint."""
    folder = tmp_path_factory.mktemp("tokenizers")
    fields: dict[str, Any] = {"answer": None}
    plain = [row("q1", name, response=text, **fields) for name, text in ANSWERS.items()]
    turns = [
        [{"role": "user", "content": "Which ?"}, {"role": "assistant", "content": text}]
        for text in ANSWERS.values()
    ]
    files = {
        "plain": plain,
        "choices": [one | {"choices": [one["response"], "no"]} for one in plain],
        "chat": [
            {**one, "prompt": None, "response": None, "messages": turn}
            for one, turn in zip(plain, turns, strict=True)
        ],
    }
    for name, rows in files.items():
        write_jsonl(
            folder / f"{name}.jsonl", [{k: v for k, v in one.items() if v is not None} for one in rows]
        )
    write_jsonl(
        folder / "ends-in-space.jsonl", [row("q1", name, prompt="currency ? ", **fields) for name in ANSWERS]
    )
    write_sentencepiece(folder / "sentencepiece.model", control=IM)
    write_tiktoken(folder / "tiktoken.json")
    (folder / "published.tiktoken").write_text("IQ== 0\n")
    write_tokenizer(folder / "huggingface", FAMILIES["mixtral"])
    (folder / "base").mkdir()
    (folder / "base/latest_checkpointed_iteration.txt").write_text("1")
    return folder


def tokenizer_flags(folder: Path, kind: str) -> list[str]:
    sizes = ["--tiktoken-num-special-tokens", "20", "--vocab-size", str(tokens(folder) + 20)]
    return {
        "sentencepiece": ["SentencePieceTokenizer", "--tokenizer-model", f"{folder}/sentencepiece.model"],
        "tiktoken": [
            *("TikTokenizer", "--tokenizer-model", f"{folder}/tiktoken.json", *sizes),
            *("--tokenizer-special-tokens", *TIKTOKEN_SPECIAL, *IM),
        ],
        "huggingface": ["HuggingFaceTokenizer", "--tokenizer-model", f"{folder}/huggingface"],
    }[kind]


def tokens(folder: Path) -> int:
    return len(json.loads((folder / "tiktoken.json").read_text()))


def refused(
    folder: Path, job: str, data: str, tokenizer: list[str], *more: str, kept: dict[str, Any] | None = None
) -> str:
    """The fatal findings of the job's check."""
    flags = without_value(without_value(model_flags(folder), "--tokenizer-model"), "--tokenizer-type")
    own = ["--ramoe-data", str(folder / f"{data}.jsonl"), "--max-position-embeddings", "256"]
    if job == "finetune":
        own += "--micro-batch-size 1 --train-iters 1 --lr 1e-3 --eval-iters 0 --eval-interval 9".split()
        own += ["--seq-length", "256", "--pretrained-checkpoint", str(folder / "base"), "--finetune"]
    else:
        own += [
            "--load",
            str(folder / "base"),
            "--ramoe-output",
            str(folder / "out"),
            "--ramoe-split",
            "train",
        ]
    words = [*flags, "--tokenizer-type", *tokenizer, *own, *more]
    with cpu_backend() as on_cpu:
        found = check(
            Line(name="line", job=job, flags=words, ranks=1, nodes=1, coming={}),
            on_cpu,
            {} if kept is None else kept,
        )
    return "\n".join(finding.found for finding in found if finding.state == "fatal")


@pytest.mark.parametrize("kind", ["sentencepiece", "tiktoken", "huggingface"])
def test_every_kind_reads_every_form_of_data(folder: Path, kind: str) -> None:
    flags = tokenizer_flags(folder, kind)
    for data in ("plain", "choices", "chat"):
        own = ["--chat-template", LLAMA3] if data == "chat" and kind != "huggingface" else []
        for job in ("finetune", "evaluate"):
            assert refused(folder, job, data, flags, *own) == ""


@pytest.mark.parametrize(
    ("kind", "data", "more", "told"),
    [
        ("sentencepiece", "chat", [], "line 1: id 'q1', language 'en' has `messages`.*--chat-template"),
        ("tiktoken", "chat", [], "line 1: id 'q1', language 'en' has `messages`.*--chat-template"),
        ("tiktoken", "ends-in-space", [], "3 of 3 examples .*line 1: id 'q1'.* together. To do: move the"),
        ("sentencepiece", "ends-in-space", [], "3 of 3 examples .*line 1: id 'q1'.* To do: leave out the"),
        ("sentencepiece", "plain", ["--tokenizer-sentencepiece-legacy"], "no end token. Leave the flag out"),
    ],
)
def test_what_does_not_fit_is_told_before_a_model_is_built(
    folder: Path, kind: str, data: str, more: list[str], told: str
) -> None:
    for job in ("finetune", "evaluate"):
        assert_told(refused(folder, job, data, tokenizer_flags(folder, kind), *more), told)


def test_the_size_and_the_form_of_a_tiktoken_file_are_told(folder: Path) -> None:
    size = tokens(folder)
    flags = ["TikTokenizer", "--tokenizer-model", str(folder / "tiktoken.json")]
    assert_told(
        refused(folder, "finetune", "plain", flags),
        f"{size} tokens.* 1000, fewer.* --vocab-size {size + 1000}",
    )
    assert refused(folder, "finetune", "plain", [*flags, "--vocab-size", str(size + 1000)]) == ""
    flags[-1] = str(folder / "published.tiktoken")
    assert_told(refused(folder, "finetune", "plain", flags), "a file .*json with a list of objects `rank`")


def test_a_template_that_takes_no_system_turn_is_told_for_every_kind(folder: Path) -> None:
    chats = [json.loads(line) for line in (folder / "chat.jsonl").read_text().splitlines()]
    for chat in chats:
        chat["messages"].insert(0, {"role": "system", "content": "Be right."})
    write_jsonl(folder / "system.jsonl", chats)
    for kind in ("sentencepiece", "tiktoken", "huggingface"):
        own = ["--chat-template", GEMMA] if kind != "huggingface" else []
        message = refused(folder, "finetune", "system", tokenizer_flags(folder, kind), *own)
        assert_told(message, "line 1: id 'q1', language 'en': the chat template rejects the roles system")
        assert (
            refused(folder, "finetune", "system", tokenizer_flags(folder, kind), "--chat-template", CHATML)
            == ""
        )


def test_a_template_of_the_metadata_file_is_used_and_tried_anew(folder: Path) -> None:
    """Command lines of one check share what they found out, but not across tokenizers."""
    kept: dict[str, Any] = {}
    for name, template, told in (("one", LLAMA3, "^$"), ("two", GEMMA.replace("m.content", "''"), "nowhere")):
        metadata = folder / f"{name}.json"
        metadata.write_text(json.dumps({"library": "tiktoken", "chat_template": template}))
        flags = [*tokenizer_flags(folder, "tiktoken"), "--tokenizer-metadata", str(metadata)]
        for job in ("finetune", "evaluate"):
            assert_told(refused(folder, job, "chat", flags, kept=kept), told)


def assert_told(message: str, pattern: str) -> None:
    assert re.search(pattern, message), message
