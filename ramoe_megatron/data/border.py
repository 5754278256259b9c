"""The border of prompt and response: it is sound where the two have the same tokens apart and together."""

from itertools import takewhile
from typing import Any

from ramoe_megatron.data.chat import shown, tokenize

SHOWN = 3
"""How many tokens after the last common token a message shows."""


def border_fault(prompt: str, response: str, tokenizer: Any) -> str | None:
    """What is wrong at the border, and what to do; None if nothing is.

    The ids of prompt and response, tokenised apart, must be those of one text, prompt + response. A tokenizer
    that begins every text with a space (SentencePiece) begins the response with one. For it the text is
    prompt + space + response, with no further space at the border.
    """
    if _is_sound(prompt, response, tokenizer):
        return None
    apart, together = _apart(prompt, response, tokenizer), tokenize(prompt + response, tokenizer, start=True)
    advice = next(
        (text for text, start, end in _mendings(prompt, response) if _is_sound(start, end, tokenizer)),
        "end the prompt with another separator, or give `messages`",
    )
    return f"{differing(apart, together, tokenizer)}. To do: {advice}"


def differing(apart: list[int], together: list[int], tokenizer: Any) -> str:
    """The tokens of two lists from the last common token on, for a message."""
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(apart, together, strict=False))))

    def part(ids: list[int]) -> str:
        texts = [f"{token} {shown(token, tokenizer)!r}" for token in ids[max(same - 1, 0) : same + SHOWN]]
        return f"[{', '.join([*texts, *(['...'] if len(ids) > same + SHOWN else [])])}]"

    return f"the tokens are {part(apart)} apart, but {part(together)} together"


def _is_sound(prompt: str, response: str, tokenizer: Any) -> bool:
    apart = _apart(prompt, response, tokenizer)
    if apart == tokenize(prompt + response, tokenizer, start=True):
        return True
    spaced = prompt.endswith(" ") or response.startswith(" ")
    return not spaced and apart == tokenize(f"{prompt} {response}", tokenizer, start=True)


def _apart(prompt: str, response: str, tokenizer: Any) -> list[int]:
    return tokenize(prompt, tokenizer, start=True) + tokenize(response, tokenizer)


def _mendings(prompt: str, response: str) -> list[tuple[str, str, str]]:
    """What may mend the border: the advice, the prompt and the response."""
    bare, answer = prompt.rstrip(), response.lstrip()
    space = prompt[len(bare) :] + response[: len(response) - len(answer)]
    return [
        (
            "move the white space from the end of the prompt to the start of the response",
            bare,
            space + answer,
        ),
        ("leave out the white space between prompt and response", bare, answer),
        ("start the response with a space", bare, f" {answer}"),
        ("end the prompt with a line break", f"{bare}\n", answer),
    ]
