"""When a generated answer counts as the gold one."""

import unicodedata


def normalise_answer(text: str) -> str:
    """Text as answers are compared: NFKC, case folded, white space collapsed, outer punctuation dropped.

    Decimal digits of every script become ASCII, so "٣" and "३" are "3". Only punctuation (Unicode category P) around
    the whole text goes: "3.5" and "a-b" keep theirs. A text of punctuation alone keeps it, lest everything equal "".
    Applying it twice changes nothing.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    digits = "".join(str(unicodedata.decimal(char)) if char.isdecimal() else char for char in folded)
    words = " ".join(digits.split())
    first, last = 0, len(words)
    while first < last and _is_edge(words[first]):
        first += 1
    while last > first and _is_edge(words[last - 1]):
        last -= 1
    return words[first:last] or words


def is_correct(generated: str, answer: str) -> bool:
    """Exact match after `normalise_answer`."""
    return normalise_answer(generated) == normalise_answer(answer)


def _is_edge(char: str) -> bool:
    return char == " " or unicodedata.category(char).startswith("P")
