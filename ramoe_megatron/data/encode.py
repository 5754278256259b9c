"""From an example to token ids: prompt, response and end of document, with the place where the response starts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ramoe_megatron.data.parallel import Example
from ramoe_megatron.errors import RamoeError


class Tokenizer(Protocol):
    """What is asked of a tokenizer: Megatron's tokenizers fit."""

    @property
    def eod(self) -> int: ...
    def tokenize(self, text: str) -> list[int]: ...
    def detokenize(self, ids: list[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of prompt + response + end of document; the first `prompt_length` of them are the prompt's."""

    ids: list[int]
    prompt_length: int


def check_tokenizer(tokenizer: Tokenizer, name: str) -> None:
    """Refuse a tokenizer that cannot do what training and scoring ask of it; `name` is for the message.

    Raises:
        RamoeError: the tokenizer makes no tokens of text, or has no end token.
    """
    advice = "give the model's own tokenizer (--tokenizer-type, --tokenizer-model)"
    try:
        ids = list(tokenizer.tokenize("word 1"))
    except Exception as error:
        raise RamoeError(f"the tokenizer {name} does not tokenise text ({error}); {advice}") from error
    if not ids:
        raise RamoeError(f"the tokenizer {name} makes no token of 'word 1'; {advice}")
    try:
        eod = tokenizer.eod
    except Exception:  # each library has its own way to say that there is none
        eod = None
    if not isinstance(eod, int) or eod < 0:
        raise RamoeError(
            f"the tokenizer {name} has no end token (found {eod!r}), which training puts behind each "
            f"response and generation ends at; {advice}, with one: eos_token of a Hugging Face tokenizer, "
            "eos_id of SentencePiece"
        )


def encode(example: Example, tokenizer: Tokenizer) -> Encoded:
    """Ids of prompt + response + eod.

    Prompt and response are tokenised apart, so that no token straddles them and a prompt's ids are the same in training
    and in scoring. With `messages`, the tokenizer's chat template does it: the prompt is the conversation before the
    last message, with the header of the assistant's turn, and the response is what the whole conversation adds to it.

    Raises:
        RamoeError: for `messages` with a tokenizer that has no chat template, or whose template rewrites
            the earlier turns when a later one follows.
    """
    prompt = encode_prompt(example, tokenizer)
    if example.messages is None:
        response = _tokenize(example.response, tokenizer)
    else:
        response = _chat_response(example, tokenizer, prompt)
    return Encoded([*prompt, *response, tokenizer.eod], len(prompt))


def encode_prompt(example: Example, tokenizer: Tokenizer) -> list[int]:
    """Ids of the prompt alone, as `encode` writes them: what generation starts from."""
    if example.messages is None:
        return _tokenize(example.prompt, tokenizer, start=True) if example.prompt else []
    return _tokenize(_render(example, tokenizer, len(example.messages) - 1), tokenizer)


def encode_choices(example: Example, tokenizer: Tokenizer) -> list[Encoded]:
    """Each of the choices encoded as the response, in the order of `choices`.

    Raises:
        RamoeError: if the example has no choices.
    """
    if example.choices is None:
        raise RamoeError(f"id {example.id!r}, language {example.language!r}: no field 'choices' to score.")
    return [encode(_with_response(example, choice), tokenizer) for choice in example.choices]


def encode_answer(example: Example, tokenizer: Tokenizer) -> Encoded:
    """The gold answer encoded as the response: what generation has to write to be counted right."""
    return encode(_with_response(example, example.answer), tokenizer)


def longest_input(encoded: Sequence[Encoded]) -> int:
    """Longest model input in tokens: all ids but the last, which is only ever a label."""
    return max((len(e.ids) - 1 for e in encoded), default=0)


def _with_response(example: Example, response: str) -> Example:
    if example.messages is None:
        return replace(example, response=response)
    last = {**example.messages[-1], "content": response}
    return replace(example, response=response, messages=(*example.messages[:-1], last))


def _tokenize(text: str, tokenizer: Tokenizer, start: bool = False) -> list[int]:
    """Ids of the text alone; with `start` also what the tokenizer puts before any text, such as a BOS token.

    Hugging Face tokenizers wrap every text in such tokens. Before a response, after a prompt or around a rendered chat
    template, which writes its own, they would be wrong.
    """
    wrap, letter = list(tokenizer.tokenize("")), list(tokenizer.tokenize("a"))
    before = next((i for i, (one, other) in enumerate(zip(wrap, letter, strict=False)) if one != other), len(wrap))
    ids = list(tokenizer.tokenize(text))
    return ids[0 if start else before : len(ids) - (len(wrap) - before)]


def _chat_response(example: Example, tokenizer: Tokenizer, prompt: list[int]) -> list[int]:
    assert example.messages is not None
    start = _render(example, tokenizer, len(example.messages) - 1)
    whole = _render(example, tokenizer, len(example.messages))
    if not whole.startswith(start):
        raise RamoeError(
            f"id {example.id!r}, language {example.language!r}: the chat template writes the conversation before the "
            "last message differently once that message follows, so the response cannot be told from the prompt. "
            "Give `prompt` and `response` instead of `messages`, or another template."
        )
    ids = _tokenize(whole, tokenizer)
    # a token that straddles the border is split there: generation starts from the prompt's own ids
    response = ids[len(prompt) :] if ids[: len(prompt)] == prompt else _tokenize(whole[len(start) :], tokenizer)
    # drop what a template writes after the end of the turn, such as a line break
    return response[: response.index(tokenizer.eod)] if tokenizer.eod in response else response


def _render(example: Example, tokenizer: Any, count: int) -> str:
    """The first `count` messages as text, by the tokenizer's own chat template."""
    assert example.messages is not None
    if not getattr(tokenizer, "chat_template", None):
        raise RamoeError(
            f"id {example.id!r}, language {example.language!r} has `messages`, but the tokenizer has no chat template. "
            "Use a tokenizer that has one, or give `prompt` and `response`."
        )
    conversation = [dict(message) for message in example.messages[:count]]
    # text, tokenised by us: what tokenising at once returns (list, dict, tensor) differs between tokenizer libraries
    return tokenizer.apply_chat_template(
        conversation, tokenize=False, add_generation_prompt=count < len(example.messages)
    )
