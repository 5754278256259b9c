"""Words around questions and answers in each language, for prompts and for reading generated answers."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml

from ramoe_megatron.data.answers import language_code


@dataclass(frozen=True, slots=True)
class Words:
    """The words of one language."""

    question: str
    """Label of a question in a prompt, such as "Frage"."""
    answer: str
    """Label of an answer in a prompt, such as "Antwort"."""
    said: tuple[str, ...]
    """Phrases before the final answer of a text, such as "die antwort lautet"."""


@cache
def words_of(language: str) -> Words:
    """The words of a language; those of English when the language is unknown.

    Args:
        language: a CLDR or FLORES code ("de", "pt-BR", "deu_Latn") or an English name.
    """
    known = _table()
    entry = known.get(language_code(language) or "en", known["en"])
    return Words(entry["question"], entry["answer"], tuple(entry["said"]))


@cache
def _table() -> dict[str, dict]:
    return yaml.safe_load((files("ramoe_megatron.data") / "words.yaml").read_text(encoding="utf-8"))
