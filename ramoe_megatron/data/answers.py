"""When a generated answer counts as the gold one: as a careful reader of the example's language would say.

Signs and symbols are content: "-3" is not "3", "C++" is not "C", "3 €" is not "3 $". How a text is typed is not: case, format
characters, white space, quotes and the punctuation around the whole text, the script of its digits, the marks within its numbers.

A number is read by the conventions of the example's language, which come from CLDR through Babel. Where these cannot read it, the
English conventions do, since models write English numbers in every language. So in German "1.000" is a thousand, "1,000" is one, and
"3.5" is "3,5": a German thousand has three digits after its mark. What neither can read, such as "1.2.3" or the English list "3,5", is
no number and keeps its marks.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from babel import Locale, UnknownLocaleError

from ramoe_megatron.data.encode import Tokenizer, encode_answer, encode_choices, longest_input
from ramoe_megatron.data.parallel import Example
from ramoe_megatron.errors import RamoeError

NEW_TOKENS = 16  # room for an answer that is spelt in more tokens than the gold one

DECIMAL_MARK = "\u066b"  # of a normalised number: the one mark that means the same in every language
GROUPING_SPACES = (
    "\u00a0\u2007\u2009\u202f"  # between two groups of digits these cannot be the border of two words
)
GROUPING_MARKS = "'\u066c"  # Swiss and Arabic; in every language

# Format characters that a reader sees or that change the sign: marks written around a number, and the tags in flags of regions.
_VISIBLE = frozenset("\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd") | frozenset(
    map(chr, [*range(0x600, 0x606), *range(0xE0020, 0xE0080)])
)
# Invisible too, but of other categories: joiners, fillers, variation selectors; and the Arabic stroke that stretches a word.
_INVISIBLE = frozenset(
    "\u034f\u0640\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0"
) | frozenset(map(chr, [*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)]))
_SPELLINGS = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\uff0d\ufe63", "-")
    | dict.fromkeys("\u2018\u2019\u201b\u02bc\u02bb", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb", '"')
    | {"\u066a": "%", "\u2044": "/"}
)
_CONTENT = frozenset(
    "-#%&@/\\§‰‱\u0609\u060a\u2032\u2033\u2034"
)  # punctuation to Unicode, content to a reader
_BULLETS = frozenset("-#")  # but none where white space parts them from the text: a list's bullet, a heading
_CURRENCY = "".join(char for char in map(chr, range(0x20D0)) if unicodedata.category(char) == "Sc")
_DOTTED_I = str.maketrans({"I": "ı", "İ": "i"})
_ARABIC_DIGIT = re.compile("[\u0660-\u0669\u06f0-\u06f9]")

_NUMBER = rf"\d+(?:{DECIMAL_MARK}\d+)?"
_SPACED = re.compile(rf"(?<!\d)[^\D0]\d{{0,2}}(?:[{GROUPING_SPACES}]\d{{3}})+(?!\d)")
_BEFORE_NUMBER = re.compile(
    rf"(?<![\w{_CURRENCY}])(?<!\d )(-?)([{_CURRENCY}%]) ?(-?)({_NUMBER})(?![\d{DECIMAL_MARK}]| ?[{_CURRENCY}%°])"
)
_APART = re.compile(rf"(?<=\d) (?=[{_CURRENCY}%‰°])")


@dataclass(frozen=True, slots=True)
class _Conventions:
    """How a language writes numbers and cases its letters."""

    decimal: str = "."
    groups: str = ","
    indian: bool = False
    """Whether groups of two digits come before the last group of three."""
    dotted_i: bool = False
    """Whether I is the capital of ı."""
    accents_in_lower_case_alone: bool = False

    def reads(self, run: str) -> str | None:
        """The digits of a number with `DECIMAL_MARK`; None for a run of digits and marks that is no number here."""
        inner = r"\d{2,3}" if self.indian else r"\d{3}"
        marks = re.escape(self.groups + GROUPING_MARKS)
        grouped = rf"[1-9]\d{{0,2}}(?=(?P<mark>[{marks}]))(?:(?P=mark){inner})*(?P=mark)\d{{3}}"
        decimals = rf"(?:[{re.escape(self.decimal)}{DECIMAL_MARK}](?P<decimals>\d+))?"
        found = re.fullmatch(rf"(?P<whole>{grouped}|\d*){decimals}", run)
        if found is None:
            return None
        whole = re.sub(r"\D", "", found["whole"]) or "0"
        return f"{whole}{DECIMAL_MARK}{found['decimals']}" if found["decimals"] else whole


_ENGLISH = _Conventions()
_DECIMAL_COMMA = _Conventions(decimal=",", groups="")


def normalise_answer(text: str, language: str) -> str:
    """Text as answers in a language are compared; applying it twice changes nothing.

    - Format characters go, but for those that a reader sees; so do quotes and punctuation (Unicode category P) around the whole text.
      A text of punctuation alone keeps it, lest everything equal "". A hyphen or # that touches the text stays: "A-" is not "A".
    - NFKC, except that an exponent stays one: "10²" is "10^2" and not "102". Full case folding; in Turkish and Azerbaijani i and ı stay
      two letters, and in Greek capitals carry no accent.
    - Every hyphen and minus is "-", every quote ' or ", every decimal digit ASCII, white space one space.
    - Numbers lose their grouping marks, and their decimal mark is `DECIMAL_MARK`. "$3", "$ 3" and "3 $" are the same; so for %.

    Args:
        language: a CLDR or FLORES code ("de", "pt-BR", "deu_Latn") or an English name; English conventions for any other.
    """
    own, before = _conventions(language), None
    while (
        text != before
    ):  # a symbol that moves behind its number may leave another number: at most a few rounds
        before, text = text, _normalised_once(text, own)
    return text


def is_correct(generated: str, answer: str, language: str) -> bool:
    """Whether the two texts are the same after `normalise_answer`. No text equals a gold answer without any."""
    return normalise_answer(generated, language) == normalise_answer(answer, language) != ""


def new_token_limits(
    examples: Sequence[Example], tokenizer: Tokenizer, given: int | None, positions: int
) -> list[int]:
    """How many tokens greedy decoding may write for each example, once it is clear that each can be answered right.

    The limit is `given`, or else `NEW_TOKENS`, or as many as the longest gold answer and its end token take; for each example as far
    as `positions` go. An example with choices has the limit 0: nothing is generated for it.

    Args:
        given: --ramoe-max-new-tokens.
        positions: --max-position-embeddings.

    Raises:
        RamoeError: for examples that no model can answer right, counted by reason and language: an empty prompt, a gold answer that
            is none of the choices, a choice that comes twice, a gold answer without text or with text that the tokenizer cannot
            write, a gold answer longer than the limit, a sequence longer than `positions`.
    """
    faults: dict[str, list[Example]] = {}
    room, needed = [0] * len(examples), [0] * len(examples)
    longest = 0
    for place, example in enumerate(examples):
        encoded = (
            encode_choices(example, tokenizer) if example.choices else [encode_answer(example, tokenizer)]
        )
        prompt = encoded[0].prompt_length
        if fault := _fault(example, tokenizer, [tuple(e.ids[prompt:]) for e in encoded], prompt):
            faults.setdefault(fault, []).append(example)
        elif longest_input(encoded) > positions:
            longest = max(longest, longest_input(encoded))
            faults.setdefault(_TOO_LONG, []).append(example)
        elif not example.choices:
            needed[place] = len(encoded[0].ids) - prompt
            room[place] = positions + 1 - prompt  # the last token is never an input
    most = given or max([NEW_TOKENS, *needed])
    if short := [example for example, tokens in zip(examples, needed, strict=True) if tokens > most]:
        faults[_CUT] = short
    if faults:
        values = {"longest": longest, "positions": positions, "most": most, "needed": max(needed)}
        reasons = "; ".join(
            f"{_by_language(wrong)}: {fault.format(**values)}" for fault, wrong in faults.items()
        )
        count = sum(map(len, faults.values()))
        raise RamoeError(
            f"{count} of {len(examples)} examples can never be answered right. {reasons}. Correct the rows, or drop their ids in "
            "every language."
        )
    return [min(most, tokens) for tokens in room]


_TOO_LONG = "prompt and answer take up to {longest} tokens, more than --max-position-embeddings {positions}"
_CUT = (
    "the gold answer and its end token take up to {needed} tokens, more than --ramoe-max-new-tokens {most} (give {needed} or more, or "
    "leave the flag out)"
)


def _fault(
    example: Example, tokenizer: Tokenizer, answers: Sequence[tuple[int, ...]], prompt: int
) -> str | None:
    """Why an example cannot be answered right, whatever the limits; `answers`: ids of its choices, or of the gold answer, with the end."""
    if prompt == 0:
        return "the prompt has no token, so nothing predicts the answer's first one"
    if example.choices:
        if example.answer not in example.choices:
            return "the gold answer is none of the choices"
        return "two choices are the same tokens" if len(set(answers)) < len(answers) else None
    if not normalise_answer(example.answer, example.language):
        return "the gold answer has no text"
    written = tokenizer.detokenize(list(answers[0][:-1]))
    return (
        None
        if is_correct(written, example.answer, example.language)
        else "the tokenizer cannot write the gold answer"
    )


def _by_language(examples: Sequence[Example]) -> str:
    counts = ", ".join(
        f"{count} in {language}" for language, count in sorted(Counter(e.language for e in examples).items())
    )
    return f"{counts} (ids {', '.join(dict.fromkeys(e.id for e in examples[:3]))}{', ...' if len(examples) > 3 else ''})"


def _normalised_once(text: str, own: _Conventions) -> str:
    seen = _SPACED.sub(lambda found: re.sub(r"\D", "", found[0]), _visible(text))
    seen = re.sub(r"\u2212\s+(?=\d)", "-", "".join(_exponents_apart(seen)))
    # again, since NFKC makes strokes of Arabic presentation forms
    plain = _visible(unicodedata.normalize("NFKC", seen)).translate(_SPELLINGS)
    words = " ".join(_read_numbers(_fold(plain, own), own).split())
    words = _APART.sub("", _BEFORE_NUMBER.sub(r"\1\3\4\2", words))
    first, last = 0, len(words)
    while first < last and _is_edge(words[first], words[first + 1 : last][:1]):
        first += 1
    while last > first and _is_edge(words[last - 1], words[first : last - 1][-1:]):
        last -= 1
    return words[first:last] or words


@cache
def _conventions(language: str) -> _Conventions:
    locale = _locale(language)
    if locale is None:
        return _ENGLISH
    symbols = locale.number_symbols["latn"]
    group = symbols["group"]
    return _Conventions(
        symbols["decimal"],
        " " if group in GROUPING_SPACES else group,
        indian=locale.decimal_formats[None].grouping[1] == 2,
        dotted_i=locale.language in ("tr", "az") and locale.script != "Cyrl",
        accents_in_lower_case_alone=locale.language == "el",
    )


def _locale(language: str) -> Locale | None:
    names = {name.casefold(): code for code, name in Locale("en").languages.items()}
    for code in (language.replace("-", "_"), names.get(language.casefold())):
        try:
            return Locale.parse(code) if code else None
        except (ValueError, UnknownLocaleError):
            continue
    return None


def _visible(text: str) -> str:
    """The text without its format characters, but for those that a reader sees."""
    return "".join(
        char
        for char in text
        if char in _VISIBLE or (char not in _INVISIBLE and unicodedata.category(char) != "Cf")
    )


def _exponents_apart(text: str) -> Iterator[str]:
    """The text's characters, and what NFKC would lose: "10²" is not "102", nor "1½" "11/2"."""
    before = ""
    for char in text:
        form, _, plain = unicodedata.decomposition(char).partition(" ")
        if before.isdecimal() and plain and not char.isdecimal():
            yield {"<super>": "^", "<sub>": "_", "<fraction>": " "}.get(form, "")
        yield char
        before = char


def _fold(text: str, own: _Conventions) -> str:
    if own.dotted_i:
        text = text.translate(_DOTTED_I)
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text.casefold()).casefold())
    if own.accents_in_lower_case_alone:
        folded = unicodedata.normalize("NFC", unicodedata.normalize("NFD", folded).replace("\u0301", ""))
    return folded


def _read_numbers(text: str, own: _Conventions) -> str:
    """The text with its numbers as `_Conventions.reads` gives them, and every decimal digit ASCII."""
    space = " " if " " in own.groups else ""

    def read(run: str) -> str:
        digits = "".join(str(unicodedata.decimal(char)) if char.isdecimal() else char for char in run)
        # an Arabic decimal mark is on few keyboards
        tried = [own, _ENGLISH, *([_DECIMAL_COMMA] if _ARABIC_DIGIT.search(run) else [])]
        if number := next(
            (found for conventions in tried if (found := conventions.reads(digits)) is not None), None
        ):
            return number
        return " ".join(map(read, run.split(" "))) if " " in run else digits

    marks = f"[.,{GROUPING_MARKS}{DECIMAL_MARK}{space}]"
    return re.sub(
        rf"(?<![\w.,{DECIMAL_MARK}])[.,{DECIMAL_MARK}]\d+|\d+(?:{marks}\d+)*",
        lambda found: read(found[0]),
        text,
    )


def _is_edge(char: str, inner: str) -> bool:
    """Whether a character at an end of a text, before (or behind) the character `inner`, is no content."""
    if char in _BULLETS:
        return inner in ("", " ")
    return char == " " or (unicodedata.category(char).startswith("P") and char not in _CONTENT)
