"""Rows, files and tokenizers shared by the tests of the data modules."""

import json
from pathlib import Path
from typing import Any

import sentencepiece

from ramoe_megatron.data.parallel import Example
from ramoe_megatron.data.tokenizer import train_tokenizer

TEXT = [
    "What is the currency of AT ? EUR",
    "Mikä on maan AT valuutta ? EUR",
    "ما هي عملة AT ؟ EUR",
    "user assistant system yes no perhaps one two three four five six seven eight nine ten",
] * 4


def row(id: str = "q1", language: str = "en", **changes: Any) -> dict[str, Any]:
    """A valid row; a field changed to None is left out."""
    fields = {
        "id": id,
        "language": language,
        "task": "currency",
        "prompt": f"{language} {id}?",
        "response": "EUR",
        "answer": "EUR",
        "split": "train",
    }
    return {name: value for name, value in (fields | changes).items() if value is not None}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def example(id: str = "q1", language: str = "en", task: str = "currency", **changes: Any) -> Example:
    fields: dict[str, Any] = {"prompt": "What is one ?", "response": "EUR", "choices": None, "split": "train"}
    fields |= changes
    return Example(id=id, language=language, task=task, answer=fields["response"], **fields)


class SmallTokenizer:
    """A SentencePiece tokenizer with the interface of Megatron's, by default trained on TEXT."""

    def __init__(self, model: bytes | None = None) -> None:
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model or train_tokenizer(TEXT, 400))
        self.eod = self.processor.eos_id()

    def tokenize(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def detokenize(self, ids: list[int]) -> str:
        return self.processor.decode(ids)
