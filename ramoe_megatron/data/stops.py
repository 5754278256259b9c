"""Strings that end a generated answer, found while it is generated."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

UNFINISHED = "\ufffd"
"""What a tokenizer writes for bytes that are not yet a character."""
LONGEST_CHARACTER = 8
"""Tokens after which such bytes are text: a model may write bytes that never become a character."""


class Detokenizer(Protocol):
    """The part of a tokenizer that writes text."""

    def detokenize(self, ids: list[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class StopStrings:
    """The answer ends before the first of these strings. `lead` is a text before the answer, not searched."""

    strings: tuple[str, ...]
    lead: str = ""

    def before(self, text: str) -> tuple[str, bool]:
        """The text before the first of the strings, and whether it has one."""
        places = [place for string in self.strings if (place := text.find(string)) >= 0]
        return (text[: min(places)], True) if places else (text, False)

    def watch(self, tokenizer: Detokenizer) -> Callable[[int], bool]:
        """A function that gets the tokens one by one, and says whether the text so far has a stop string."""
        return _Watch(self, tokenizer)


class _Watch:
    """Decodes only the newest tokens, so that the time of a token does not grow with the text.

    A token's text may depend on the tokens before it (a space, the bytes of a character). So the newest
    tokens are decoded together with those of the last whole text, and what they add is the new text.
    """

    def __init__(self, stop: StopStrings, tokenizer: Detokenizer) -> None:
        self.stop, self.tokenizer = stop, tokenizer
        self.ids: list[int] = []
        self.text, self.known = "", 0
        """The text of all ids but those of an unfinished character, and how many of `ids` it has."""
        self.longest = max(map(len, stop.strings))

    def __call__(self, token: int) -> bool:
        self.ids.append(token)
        before = self.tokenizer.detokenize(self.ids[: self.known]) if self.known else ""
        now = self.tokenizer.detokenize(self.ids)
        if now.endswith(UNFINISHED) and len(self.ids) - self.known < LONGEST_CHARACTER:
            return False
        new = now[len(before) :] if now.startswith(before) else now
        self.text += new
        self.ids, self.known = self.ids[self.known :], len(self.ids) - self.known
        return self._found(len(new))

    def _found(self, new: int) -> bool:
        start = max(0, len(self.text) - new - self.longest + 1)
        if self.stop.lead:
            written = self.text.lstrip()
            if self.stop.lead.startswith(written):
                return False
            if written.startswith(self.stop.lead):
                start = max(start, len(self.text) - len(written) + len(self.stop.lead))
        return any(self.text.find(string, start) >= 0 for string in self.stop.strings)
