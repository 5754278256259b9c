"""From text to token ids, and from messages to text, for the three kinds of tokenizers that Megatron has.

Hugging Face, SentencePiece and tiktoken differ in the tokens that they put around a text, in what a chat
template can write, and in whether the tokenizer reads special tokens in a text.
"""

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ramoe_megatron.errors import RamoeError

TODAY = datetime.datetime(2025, 1, 1)
"""The date that every chat template gets, so that a prompt has the same ids on every day."""


def tokenize(text: str, tokenizer: Any, start: bool = False) -> list[int]:
    """Ids of the text; with `start` also what the tokenizer puts before any text, such as a BOS token.

    Hugging Face tokenizers put such tokens around every text. They would be wrong before a response, after a
    prompt, or around a rendered chat template, which writes its own.
    """
    before, after = _wrapping(tokenizer)
    ids = list(tokenizer.tokenize(text))
    return ids[0 if start else before : len(ids) - after]


def tokenize_rendered(text: str, tokenizer: Any) -> list[int]:
    """Ids of a text that a chat template wrote.

    SentencePiece never reads a control token, such as ``</s>``, in a text. So the text is split there. It
    also begins each text with a space: the template's own space after a control token counts as that space.
    """
    named = control_tokens(tokenizer)
    if not named:
        return tokenize(text, tokenizer)
    opens = _opens_with_space(tokenizer)
    ids: list[int] = []
    for place, part in enumerate(_any_of(tokenizer).split(text)):
        if place % 2:
            ids.append(named[part])
        elif part:
            ids += tokenize(part.removeprefix(" ") if place and opens else part, tokenizer)
    return ids


@functools.lru_cache(maxsize=8)
def control_tokens(tokenizer: Any) -> Mapping[str, int]:
    """Text and id of the control tokens that the tokenizer does not read in a text; only SentencePiece's."""
    if getattr(tokenizer, "library", None) != "sentencepiece":
        return {}
    model = tokenizer._tokenizer.tokenizer
    return {model.id_to_piece(i): i for i in range(model.get_piece_size()) if model.is_control(i)}


def shown(token: int, tokenizer: Any) -> str:
    """A token for a message: as SentencePiece writes it, with its space, or as text."""
    if getattr(tokenizer, "library", None) == "sentencepiece":
        return tokenizer._tokenizer.ids_to_tokens([token])[0]
    return tokenizer.detokenize([token])


def render_chat(messages: Sequence[Mapping[str, str]], tokenizer: Any, answer_follows: bool) -> str:
    """The messages as the tokenizer's chat template writes them, and the header of an answer that follows.

    Raises:
        RamoeError: the tokenizer has several named templates and none is named "default".
        Exception: any that the template raises.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise RamoeError(
                f"the tokenizer has the templates {', '.join(template)}, and none named 'default'"
            )
        template = template["default"]
    # Rendered to text and tokenised here, because the result of tokenize=True differs between libraries.
    return tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        chat_template=f"{_prelude(tokenizer, 'strftime_now' in template)}{template}",
        tokenize=False,
        add_generation_prompt=answer_follows,
    )


@functools.lru_cache(maxsize=8)
def _wrapping(tokenizer: Any) -> tuple[int, int]:
    """The number of tokens that the tokenizer puts before every text, and after every text."""
    wrap, letter = list(tokenizer.tokenize("")), list(tokenizer.tokenize("a"))
    before = next(
        (i for i, (one, other) in enumerate(zip(wrap, letter, strict=False)) if one != other), len(wrap)
    )
    return before, len(wrap) - before


@functools.lru_cache(maxsize=16)
def _prelude(tokenizer: Any, dated: bool) -> str:
    """What is put before a chat template: names that Megatron leaves out, and the date of `TODAY`."""
    parts = []
    if getattr(tokenizer, "library", None) in ("sentencepiece", "tiktoken"):
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eod}
        texts = {name: tokenizer._tokenizer.ids_to_tokens([i])[0] for name, i in ids.items() if i >= 0}
        parts += [f"{{% set {name} = {json.dumps(text)} %}}" for name, text in texts.items()]
    if dated:  # a function cannot be handed over: transformers makes a text of it
        codes = [f"%{code}" for code in (*"YymdBbAaHMSIpjFe", "-d", "-m")]
        filters = "".join(f"|replace({code!r}, {TODAY.strftime(code)!r})" for code in codes)
        unknown = "{{ raise_exception('the date format ' ~ format ~ ' is not known here') }}"
        known = f"{{% if '%' in written %}}{unknown}{{% endif %}}{{{{ written }}}}"
        written = f"{{% set written = format{filters} %}}{known}"
        parts.append(f"{{% macro strftime_now(format) %}}{written}{{% endmacro %}}")
    return "".join([*parts, "{{ '' }}"]) if parts else ""  # a block would take the line break after it


@functools.lru_cache(maxsize=8)
def _any_of(tokenizer: Any) -> re.Pattern[str]:
    """A pattern that splits a text at its control tokens, and keeps them."""
    longest_first = sorted(control_tokens(tokenizer), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})")


@functools.lru_cache(maxsize=8)
def _opens_with_space(tokenizer: Any) -> bool:
    """Whether a SentencePiece tokenizer begins each text with a space."""
    return tokenizer._tokenizer.ids_to_tokens(tokenize("a", tokenizer)[:1])[0].startswith("\u2581")
