"""Encodes an example as token ids: prompt, response and end of document; and where the response starts."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ramoe_megatron.data.answers import is_correct
from ramoe_megatron.data.border import border_fault, differing
from ramoe_megatron.data.chat import control_tokens, render_chat, tokenize, tokenize_rendered
from ramoe_megatron.data.parallel import Example
from ramoe_megatron.data.stops import StopStrings
from ramoe_megatron.errors import RamoeError


class Tokenizer(Protocol):
    """The interface that a tokenizer must have. Megatron's tokenizers have it."""

    @property
    def eod(self) -> int: ...
    def tokenize(self, text: str) -> list[int]: ...
    def detokenize(self, ids: list[int]) -> str: ...
    def __hash__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of prompt + response + end token. The first `prompt_length` ids are the prompt."""

    ids: list[int]
    prompt_length: int


def check_tokenizer(tokenizer: Tokenizer, name: str) -> None:
    """Check that a tokenizer can be used for training and scoring; `name` is for the message.

    Raises:
        RamoeError: the tokenizer does not tokenise text, or has no end token.
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
    except Exception:  # each library raises another error for a missing end token
        eod = None
    if not isinstance(eod, int) or eod < 0:
        raise RamoeError(
            f"the tokenizer {name} has no end token (found {eod!r}). Training appends it to each "
            f"response, and generation stops at it; {advice} that has one: eos_token of a Hugging Face "
            "tokenizer, eos_id of SentencePiece"
        )


@dataclass(frozen=True, slots=True)
class Decoding:
    """Where greedy decoding starts and stops, and which part of the generated text is the answer."""

    prompt: list[int]
    stops: frozenset[int]
    """Decoding stops at each of these tokens: the tokenizer's end of document, and a chat template's end of
    turn."""
    lead: str = ""
    """What a chat template writes before the content of the last turn, such as an empty thinking block."""
    close: str = ""
    """What a chat template writes between the content of the last turn and the end token; mostly nothing."""
    until: StopStrings | None = None
    """The strings that end the answer."""

    def answer(self, ids: list[int], tokenizer: Tokenizer) -> str:
        """The answer in generated ids, without the stop: their text without the template's own text."""
        return self._read(ids, tokenizer)[0]

    def stopped(self, ids: list[int], tokenizer: Tokenizer) -> bool:
        """Whether a stop string ends the answer in generated ids."""
        return self._read(ids, tokenizer)[1]

    def _read(self, ids: list[int], tokenizer: Tokenizer) -> tuple[str, bool]:
        text = tokenizer.detokenize(ids)
        if self.lead or self.close:
            text = text.strip().removeprefix(self.lead)
            text = text.partition(self.close)[0] if self.close else text
        return self.until.before(text) if self.until else (text, False)


@dataclass(frozen=True, slots=True)
class _Turn:
    """The last turn as the chat template writes it: `lead`, the content, `tail`."""

    start: str
    """The text before the turn: the earlier messages, and the header of the assistant's turn."""
    prompt: list[int]
    """Ids of `start`."""
    lead: str
    tail: str
    ending: list[int]
    """Ids of the tail, from the token that ends the turn. Empty if the template has no such token."""
    close: str
    """Text of the tail before `ending`, without outer white space."""

    def decoding(self, tokenizer: Tokenizer) -> Decoding:
        lead = tokenizer.detokenize(tokenize_rendered(self.lead, tokenizer)).strip()
        return Decoding(self.prompt, frozenset([tokenizer.eod, *self.ending[:1]]), lead, self.close)


CONTENT = "ramoecontent"
"""Each chat template is rendered with this content. The text around the content belongs to the template."""
INSTEAD = "Give `prompt` and `response` instead of `messages`, or another template (--chat-template)."


def encode(example: Example, tokenizer: Tokenizer) -> Encoded:
    """Ids of prompt + response + end token.

    Prompt and response are tokenised separately. So no token covers parts of both, and a prompt has the same
    ids in training and in scoring. `check_examples` refuses examples that have other tokens together. The end
    token is the tokenizer's end of document.

    With `messages`, the tokenizer's chat template writes both. The prompt is the conversation before the last
    message, with the header of the assistant's turn. The response is what the whole conversation adds to the
    prompt, up to the token that ends the turn. What the template writes after that token, such as a line
    break, is dropped. Where the template ends the turn without a single token, the end of document follows.

    Raises:
        RamoeError: for `messages` with a tokenizer that has no chat template, or whose template raises an
            error, rewrites the earlier turns when a later one follows, does not write the content of the last
            message once, or writes the token that ends the turn in the middle of the turn.
    """
    if example.messages is not None:
        return _encode_turn(example, tokenizer, _turn(example, tokenizer))
    prompt = encode_prompt(example, tokenizer)
    return Encoded([*prompt, *tokenize(example.response, tokenizer), tokenizer.eod], len(prompt))


def encode_prompt(example: Example, tokenizer: Tokenizer) -> list[int]:
    """Ids of the prompt, as in `encode`. Generation starts from them."""
    if example.messages is None:
        return tokenize(example.prompt, tokenizer, start=True) if example.prompt else []
    return tokenize_rendered(_render(example, tokenizer, example.messages[:-1]), tokenizer)


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
        made = Decoding(encode_prompt(example, tokenizer), frozenset([tokenizer.eod]))
    else:
        made = _turn(example, tokenizer).decoding(tokenizer)
    return replace(made, until=StopStrings(example.stop, made.lead)) if example.stop else made


def check_examples(examples: Iterable[Example], tokenizer: Tokenizer) -> None:
    """Check what the tokenizer and its chat template make of every example, before a model is built.

    A model that writes exactly its training data must be scored as right, and its tokens must be those that
    the tokenizer makes of the whole text.

    Raises:
        RamoeError: as `encode`; for an answer that the template or the tokenizer changes; for two choices
            that the template renders to the same text; for an end token inside a response; for a prompt and
            response that have other tokens together than apart. The last message counts the examples, and has
            place, id and tokens of the first.
    """
    asked = list(examples)
    refuse_borders(border_faults(asked, tokenizer), len(asked))


def border_faults(examples: Iterable[Example], tokenizer: Tokenizer) -> list[str]:
    """The border faults among the examples, each with place and id. Raises the other errors of
    `check_examples`."""
    faults = []
    for example in examples:
        if example.messages is not None:
            _check_conversation(example, tokenizer)
        if fault := next(
            (fault for answered in _answered(example) if (fault := _border_fault(answered, tokenizer))), None
        ):
            faults.append(f"{_name(example)}: {fault}")
    return faults


def refuse_borders(faults: Sequence[str], asked: int) -> None:
    """Raise RamoeError for border faults, with their number among the ``asked`` examples and the first."""
    if faults:
        raise RamoeError(
            f"{len(faults)} of {asked} examples have other tokens at the border of prompt and response when "
            f"the two are tokenised together. {'The first is ' if len(faults) > 1 else ''}{faults[0]}."
        )


def _answered(example: Example) -> list[Example]:
    """The example with its response, and with each of its choices."""
    others = [choice for choice in example.choices or () if choice != example.response]
    return [example, *(_with_response(example, choice) for choice in others)]


def _border_fault(example: Example, tokenizer: Tokenizer) -> str | None:
    """What is wrong at the border of prompt and response, and what to do; None if nothing is.

    Raises RamoeError for an end token inside the response.
    """
    if example.messages is not None:
        start = _render(example, tokenizer, example.messages[:-1])
        whole = _render(example, tokenizer, example.messages)
        apart, together = (tokenize_rendered(text, tokenizer) for text in (start, whole))
        if together[: len(apart)] == apart:
            return None
        apart += tokenize_rendered(whole[len(start) :], tokenizer)
        return (
            f"{differing(apart, together, tokenizer)}. To do: begin the last message without white space, or "
            "use a template whose header of the assistant's turn ends with a token of its own"
        )
    if not example.prompt:
        return None
    if tokenizer.eod in tokenize(example.response, tokenizer):
        raise RamoeError(
            f"{_name(example)}: the response {example.response!r} has the end token in it, and generation "
            "would stop there. Leave it out: each response gets one at its end."
        )
    return border_fault(example.prompt, example.response, tokenizer)


def _check_conversation(example: Example, tokenizer: Tokenizer) -> None:
    turn = _turn(example, tokenizer)
    encoded = _encode_turn(example, tokenizer, turn)
    if example.choices is not None:
        _refuse_equal_choices(example, encode_choices(example, tokenizer))
    elif example.answer == example.response:
        written = encoded.ids[encoded.prompt_length : -1]  # up to the stop
        text = turn.decoding(tokenizer).answer(written, tokenizer)
        if not is_correct(text, example.answer, example.language):
            raise RamoeError(
                f"{_name(example)}: a model that writes the last message as the chat template does gives "
                f"the answer {text!r}, but the answer in the data is {example.answer!r}: "
                f"the template or the tokenizer changes it. {INSTEAD}"
            )


def encode_answer(example: Example, tokenizer: Tokenizer) -> Encoded:
    """The gold answer encoded as the response: the ids that a correct generation has."""
    return encode(_with_response(example, example.answer), tokenizer)


def choice_scores(example: Example, encoded: Sequence[Encoded], likelihoods: Sequence[float]) -> list[float]:
    """The score of each choice by the example's `choice_score`.

    Args:
        encoded: the choices, from `encode_choices`.
        likelihoods: sum of the natural log-likelihoods of each choice's tokens and its end token.
    """
    choices = example.choices or ()
    if example.choice_score == "token":
        sizes = [len(e.ids) - max(e.prompt_length, 1) for e in encoded]
    elif example.choice_score == "byte":
        sizes = [len(choice.encode()) for choice in choices]
    else:
        sizes = [1] * len(choices)
    return [likelihood / size for likelihood, size in zip(likelihoods, sizes, strict=True)]


def longest_input(encoded: Sequence[Encoded]) -> int:
    """Longest model input in tokens: all ids except the last, which is only a label."""
    return max((len(e.ids) - 1 for e in encoded), default=0)


def _with_response(example: Example, response: str) -> Example:
    if example.messages is None:
        return replace(example, response=response)
    last = {**example.messages[-1], "content": response}
    return replace(example, response=response, messages=(*example.messages[:-1], last))


def _turn(example: Example, tokenizer: Tokenizer) -> _Turn:
    """The chat template's text around the last message, found by rendering the turn with other content."""
    assert example.messages is not None
    start = _render(example, tokenizer, example.messages[:-1])
    tried = _with_response(example, CONTENT).messages
    lead, content, tail = _after(example, start, _render(example, tokenizer, tried)).partition(CONTENT)
    if not content or CONTENT in tail:
        raise RamoeError(
            f"{_name(example)}: the chat template writes the content of the last message "
            f"{'more than once' if content else 'nowhere'}. {INSTEAD}"
        )
    return _Turn(start, tokenize_rendered(start, tokenizer), lead, tail, *_ending(tail, tokenizer))


@functools.lru_cache(maxsize=8)
def _ending(tail: str, tokenizer: Tokenizer) -> tuple[list[int], str]:
    """`ending` and `close` of a turn with this tail."""

    def ids_of(text: str) -> list[int]:
        return _added(CONTENT + text, CONTENT, tokenize_rendered(CONTENT, tokenizer), tokenizer)

    ids = ids_of(tail)
    named = {token: text for text, token in control_tokens(tokenizer).items()}
    texts = [named.get(token) or tokenizer.detokenize([token]).strip() for token in ids]
    first = next((n for n, text in enumerate(texts) if text), None)
    ends = [n for n, token in enumerate(ids) if token == tokenizer.eod]
    # a single token writes the first word of the tail
    if first is not None and [texts[first]] == tail.split()[:1]:
        ends.append(first)
    written = ids[: min(ends)] if ends else ids_of(tail.rstrip())
    return ids[min(ends) :] if ends else [], tokenizer.detokenize(written).strip()


def _encode_turn(example: Example, tokenizer: Tokenizer, turn: _Turn) -> Encoded:
    """The encoded whole conversation. `turn` is the template's text around its last message, from `_turn`."""
    added = _after(example, turn.start, _render(example, tokenizer, example.messages))
    if not added.endswith(turn.tail):
        raise RamoeError(
            f"{_name(example)}: the chat template ends the last turn with {added[-40:]!r}, "
            f"but other answers with {turn.tail!r}, so the end of the answer is unknown. {INSTEAD}"
        )
    text = turn.start + (added if turn.ending else added.removesuffix(turn.tail) + turn.tail.rstrip())
    response, ending = _added(text, turn.start, turn.prompt, tokenizer), turn.ending
    if not ending:
        response, ending = [*response, tokenizer.eod], [tokenizer.eod]
    stop = next((n for n, token in enumerate(response) if token in (ending[0], tokenizer.eod)), None)
    if stop is None or response[stop:] != ending:
        raise RamoeError(
            f"{_name(example)}: the turn ends with {tokenizer.detokenize(ending[:1])!r}, "
            f"and the template or the last message writes an end token before that: {added!r}. "
            f"Generation would stop there. {INSTEAD}"
        )
    return Encoded([*turn.prompt, *response[: stop + 1]], len(turn.prompt))


def _added(text: str, start: str, before: list[int], tokenizer: Tokenizer) -> list[int]:
    """Ids that a text adds to `before`, the ids of its start. A token that crosses the border is split."""
    ids = tokenize_rendered(text, tokenizer)
    if ids[: len(before)] == before:
        return ids[len(before) :]
    return tokenize_rendered(text[len(start) :], tokenizer)


def _after(example: Example, start: str, whole: str) -> str:
    if not whole.startswith(start):
        raise RamoeError(
            f"{_name(example)}: the chat template writes the conversation before the last message "
            f"differently when that message follows, so the start of the response is unknown. {INSTEAD}"
        )
    return whole[len(start) :]


def _refuse_equal_choices(example: Example, encoded: Sequence[Encoded]) -> None:
    assert example.choices is not None
    for n, one in enumerate(encoded):
        if one in encoded[:n]:
            equal = [example.choices[encoded.index(one)], example.choices[n]]
            raise RamoeError(
                f"{_name(example)}: the chat template writes the same text for the choices {equal}. {INSTEAD}"
            )


def _name(example: Example) -> str:
    where = f"{example.place}: " if example.place else ""
    return f"{where}id {example.id!r}, language {example.language!r}"


def _render(example: Example, tokenizer: Any, messages: Sequence[dict[str, str]] | None) -> str:
    """The given first messages of the example as text, from the tokenizer's chat template."""
    assert example.messages is not None
    assert messages is not None
    if not getattr(tokenizer, "chat_template", None):
        raise RamoeError(
            f"{_name(example)} has `messages`, but the tokenizer has no chat template. Give the model's own "
            "with --chat-template (the template's text, not a file), use a tokenizer that has one, or give "
            "`prompt` and `response`."
        )
    try:
        return render_chat(messages, tokenizer, answer_follows=len(messages) < len(example.messages))
    except RamoeError as error:
        raise RamoeError(f"{_name(example)}: {error}") from error
    except Exception as error:  # a template can raise anything, mostly jinja2.TemplateError
        roles = ", ".join(message["role"] for message in messages)
        raise RamoeError(
            f"{_name(example)}: the chat template rejects the roles {roles}: {error} "
            f"({type(error).__name__}). {INSTEAD}"
        ) from error
