"""From an example to token ids: prompt, response and end of document, with the place where the response starts."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ramoe_megatron.data.answers import is_correct
from ramoe_megatron.data.parallel import Example
from ramoe_megatron.errors import RamoeError


class Tokenizer(Protocol):
    """What is asked of a tokenizer: Megatron's tokenizers fit."""

    @property
    def eod(self) -> int: ...
    def tokenize(self, text: str) -> list[int]: ...
    def detokenize(self, ids: list[int]) -> str: ...
    def __hash__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of prompt + response + end token; the first `prompt_length` of them are the prompt's."""

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


@dataclass(frozen=True, slots=True)
class Decoding:
    """Where greedy decoding of an example starts and stops, and which part of the generated text is the answer."""

    prompt: list[int]
    stops: frozenset[int]
    """Decoding stops at each of these tokens: the tokenizer's end of document, and a chat template's end of turn."""
    lead: str = ""
    """What a chat template writes before the content of the last turn, such as an empty thinking block."""
    close: str = ""
    """What a chat template writes between that content and the end token; nothing in most templates."""

    def answer(self, ids: list[int], tokenizer: Tokenizer) -> str:
        """The answer in generated ids that end before the stop: their text without what the template writes."""
        if not self.lead and not self.close:
            return tokenizer.detokenize(ids)
        text = tokenizer.detokenize(ids).strip().removeprefix(self.lead)
        return text.partition(self.close)[0] if self.close else text


@dataclass(frozen=True, slots=True)
class _Turn:
    """The last turn as the chat template writes it: `lead`, the content, `tail`."""

    start: str
    """All before the turn: the earlier messages, and the header of the assistant's turn."""
    prompt: list[int]
    """Ids of `start`."""
    lead: str
    tail: str
    ending: list[int]
    """Ids of the tail, from the token that ends the turn. Empty where the template has no such token."""
    close: str
    """Text of the tail before `ending`, without outer white space."""

    def decoding(self, tokenizer: Tokenizer) -> Decoding:
        lead = tokenizer.detokenize(_tokenize(self.lead, tokenizer)).strip()
        return Decoding(self.prompt, frozenset([tokenizer.eod, *self.ending[:1]]), lead, self.close)


CONTENT = "ramoecontent"
"""Each chat template is tried with this content: what it writes around it belongs to the template."""
INSTEAD = "Give `prompt` and `response` instead of `messages`, or another template (--chat-template)."


def encode(example: Example, tokenizer: Tokenizer) -> Encoded:
    """Ids of prompt + response + end token.

    Prompt and response are tokenised apart, so that no token straddles them and a prompt's ids are the same in training
    and in scoring. The end token is the tokenizer's end of document.

    With `messages`, the tokenizer's chat template writes both. The prompt is the conversation before the last message,
    with the header of the assistant's turn. The response is what the whole conversation adds to the prompt, up to the
    token that ends the turn. What the template writes after that token, such as a line break, is dropped. Where the
    template ends the turn without a single token, the end of document follows.

    Raises:
        RamoeError: for `messages` with a tokenizer that has no chat template, or whose template raises an error,
            rewrites the earlier turns when a later one follows, does not write the content of the last message once,
            or writes the token that ends the turn in the middle of the turn.
    """
    if example.messages is not None:
        return _encode_turn(example, tokenizer, _turn(example, tokenizer))
    prompt = encode_prompt(example, tokenizer)
    return Encoded([*prompt, *_tokenize(example.response, tokenizer), tokenizer.eod], len(prompt))


def encode_prompt(example: Example, tokenizer: Tokenizer) -> list[int]:
    """Ids of the prompt alone, as `encode` writes them: what generation starts from."""
    if example.messages is None:
        return _tokenize(example.prompt, tokenizer, start=True) if example.prompt else []
    return _tokenize(_render(example, tokenizer, example.messages[:-1]), tokenizer)


def encode_choices(example: Example, tokenizer: Tokenizer) -> list[Encoded]:
    """Each of the choices encoded as the response, in the order of `choices`.

    Raises:
        RamoeError: if the example has no choices; and as `encode`.
    """
    if example.choices is None:
        raise RamoeError(f"{_name(example)}: no field 'choices' to score.")
    answered = [_with_response(example, choice) for choice in example.choices]
    if example.messages is None:
        return [encode(choice, tokenizer) for choice in answered]
    turn = _turn(example, tokenizer)
    return [_encode_turn(choice, tokenizer, turn) for choice in answered]


def decoding(example: Example, tokenizer: Tokenizer) -> Decoding:
    """How greedy decoding answers the example. Raises as `encode`."""
    if example.messages is None:
        return Decoding(encode_prompt(example, tokenizer), frozenset([tokenizer.eod]))
    return _turn(example, tokenizer).decoding(tokenizer)


def check_conversations(examples: Iterable[Example], tokenizer: Tokenizer) -> None:
    """Try the chat template on every example with `messages`, before a model is built.

    The law: a model that writes exactly what it was trained on is counted right.

    Raises:
        RamoeError: as `encode`; for an answer that the template or the tokenizer changes; for two choices that the
            template writes alike.
    """
    for example in examples:
        if example.messages is None:
            continue
        turn = _turn(example, tokenizer)
        encoded = _encode_turn(example, tokenizer, turn)
        if example.choices is not None:
            _refuse_equal_choices(example, encode_choices(example, tokenizer))
        elif example.answer == example.response:
            written = encoded.ids[encoded.prompt_length : -1]  # up to the stop
            text = turn.decoding(tokenizer).answer(written, tokenizer)
            if not is_correct(text, example.answer, example.language):
                raise RamoeError(
                    f"{_name(example)}: a model that writes the last message as the chat template does gives the answer "
                    f"{text!r}, but the answer in the data is {example.answer!r}: the template or the tokenizer changes "
                    f"it. {INSTEAD}"
                )


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
    before, after = _wrapping(tokenizer)
    ids = list(tokenizer.tokenize(text))
    return ids[0 if start else before : len(ids) - after]


@functools.lru_cache(maxsize=8)
def _wrapping(tokenizer: Tokenizer) -> tuple[int, int]:
    """How many tokens the tokenizer puts before every text, and how many after."""
    wrap, letter = list(tokenizer.tokenize("")), list(tokenizer.tokenize("a"))
    before = next(
        (i for i, (one, other) in enumerate(zip(wrap, letter, strict=False)) if one != other), len(wrap)
    )
    return before, len(wrap) - before


def _turn(example: Example, tokenizer: Tokenizer) -> _Turn:
    """What the chat template writes around the last message of this conversation, found by rendering another content."""
    assert example.messages is not None
    start = _render(example, tokenizer, example.messages[:-1])
    tried = _with_response(example, CONTENT).messages
    lead, content, tail = _after(example, start, _render(example, tokenizer, tried)).partition(CONTENT)
    if not content or CONTENT in tail:
        raise RamoeError(
            f"{_name(example)}: the chat template writes the content of the last message "
            f"{'more than once' if content else 'nowhere'}. {INSTEAD}"
        )
    return _Turn(start, _tokenize(start, tokenizer), lead, tail, *_ending(tail, tokenizer))


@functools.lru_cache(maxsize=8)
def _ending(tail: str, tokenizer: Tokenizer) -> tuple[list[int], str]:
    """`ending` and `close` of a turn with this tail."""

    def ids_of(text: str) -> list[int]:
        return _added(CONTENT + text, CONTENT, _tokenize(CONTENT, tokenizer), tokenizer)

    ids = ids_of(tail)
    texts = [tokenizer.detokenize([token]).strip() for token in ids]
    first = next((n for n, text in enumerate(texts) if text), None)
    ends = [n for n, token in enumerate(ids) if token == tokenizer.eod]
    if (
        first is not None and [texts[first]] == tail.split()[:1]
    ):  # one token writes the first word of the tail
        ends.append(first)
    written = ids[: min(ends)] if ends else ids_of(tail.rstrip())
    return ids[min(ends) :] if ends else [], tokenizer.detokenize(written).strip()


def _encode_turn(example: Example, tokenizer: Tokenizer, turn: _Turn) -> Encoded:
    """The whole conversation, of whose last turn `_turn` found what the template writes around the content."""
    added = _after(example, turn.start, _render(example, tokenizer, example.messages))
    if not added.endswith(turn.tail):
        raise RamoeError(
            f"{_name(example)}: the chat template ends the last turn with {added[-40:]!r}, but other answers with "
            f"{turn.tail!r}, so the end of the answer is unknown. {INSTEAD}"
        )
    if turn.ending:
        response, ending = _added(turn.start + added, turn.start, turn.prompt, tokenizer), turn.ending
    else:
        text = turn.start + added.removesuffix(turn.tail) + turn.tail.rstrip()
        response, ending = [*_added(text, turn.start, turn.prompt, tokenizer), tokenizer.eod], [tokenizer.eod]
    stop = next((n for n, token in enumerate(response) if token in (ending[0], tokenizer.eod)), None)
    if stop is None or response[stop:] != ending:
        raise RamoeError(
            f"{_name(example)}: the turn ends with {tokenizer.detokenize(ending[:1])!r}, and the template or the last "
            f"message writes an end token before that: {added!r}. Generation would stop there. {INSTEAD}"
        )
    return Encoded([*turn.prompt, *response[: stop + 1]], len(turn.prompt))


def _added(text: str, start: str, before: list[int], tokenizer: Tokenizer) -> list[int]:
    """Ids that a text adds to those of its start, `before`. A token that straddles the border is split there."""
    ids = _tokenize(text, tokenizer)
    return ids[len(before) :] if ids[: len(before)] == before else _tokenize(text[len(start) :], tokenizer)


def _after(example: Example, start: str, whole: str) -> str:
    if not whole.startswith(start):
        raise RamoeError(
            f"{_name(example)}: the chat template writes the conversation before the last message differently once that "
            f"message follows, so the response cannot be told from the prompt. {INSTEAD}"
        )
    return whole[len(start) :]


def _refuse_equal_choices(example: Example, encoded: Sequence[Encoded]) -> None:
    assert example.choices is not None
    for n, one in enumerate(encoded):
        if one in encoded[:n]:
            equal = [example.choices[encoded.index(one)], example.choices[n]]
            raise RamoeError(
                f"{_name(example)}: the chat template writes the choices {equal} alike. {INSTEAD}"
            )


def _name(example: Example) -> str:
    return f"id {example.id!r}, language {example.language!r}"


def _render(example: Example, tokenizer: Any, messages: Sequence[dict[str, str]] | None) -> str:
    """These first messages of the example as text, by the tokenizer's own chat template."""
    assert example.messages is not None
    assert messages is not None
    if not getattr(tokenizer, "chat_template", None):
        raise RamoeError(
            f"{_name(example)} has `messages`, but the tokenizer has no chat template. "
            "Use a tokenizer that has one, or give `prompt` and `response`."
        )
    # text, tokenised by us: what tokenising at once returns (list, dict, tensor) differs between tokenizer libraries
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=len(messages) < len(example.messages),
        )
    except Exception as error:  # a template can raise anything, mostly jinja2.TemplateError
        roles = ", ".join(message["role"] for message in messages)
        raise RamoeError(
            f"{_name(example)}: the chat template refuses the roles {roles}: {error} ({type(error).__name__}). {INSTEAD}"
        ) from error
