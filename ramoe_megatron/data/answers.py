"""Comparison of a generated answer with the gold answer, as by a careful reader of the language.

Signs and symbols count: "-3" is not "3", "C++" is not "C", "3 €" is not "3 $". Typing does not count: case,
format characters, white space, quotes and punctuation around the whole text, the script of digits, and the
marks in numbers.

Numbers follow the conventions of the example's language, from CLDR through Babel. A number that these
conventions cannot read is read with the English conventions, because models write English numbers in every
language. So in German, "1.000" is a thousand, "1,000" is one, and "3.5" is "3,5", because a German thousand
has three digits after the mark. Text that neither convention can read, such as "1.2.3" or the English list
"3,5", is not a number and keeps its marks.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from babel import Locale, UnknownLocaleError

DECIMAL_MARK = "\u066b"  # in normalised numbers, because this mark has one meaning in all languages
GROUPING_SPACES = "\u00a0\u2007\u2009\u202f"  # never a border of words between two groups of digits
GROUPING_MARKS = "'\u066c"  # Swiss and Arabic marks, accepted in every language

# Format characters with a visible effect: marks written around a number, and the tags in flags of regions.
_VISIBLE = frozenset("\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd") | frozenset(
    map(chr, [*range(0x600, 0x606), *range(0xE0020, 0xE0080)])
)
# Characters without meaning in other categories: joiners, fillers, variation selectors, and the Arabic stroke
# that stretches a word.
_INVISIBLE = frozenset(
    "\u034f\u0640\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0"
) | frozenset(map(chr, [*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)]))
_SPELLINGS = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\uff0d\ufe63", "-")
    | dict.fromkeys("\u2018\u2019\u201b\u02bc\u02bb", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb", '"')
    | {"\u066a": "%", "\u2044": "/"}
)
# Unicode punctuation that counts as content
_CONTENT = frozenset("-#%&@/\\§‰‱\u0609\u060a\u2032\u2033\u2034")
_BULLETS = frozenset("-#")  # not content when white space follows: a bullet, a heading
_CURRENCY = "".join(char for char in map(chr, range(0x20D0)) if unicodedata.category(char) == "Sc")
_DOTTED_I = str.maketrans({"I": "ı", "İ": "i"})
_ARABIC_DIGIT = re.compile("[\u0660-\u0669\u06f0-\u06f9]")

_NUMBER = rf"\d+(?:{DECIMAL_MARK}\d+)?"
_SPACED = re.compile(rf"(?<!\d)[^\D0]\d{{0,2}}(?:[{GROUPING_SPACES}]\d{{3}})+(?!\d)")
_BEFORE_NUMBER = re.compile(
    rf"(?<![\w{_CURRENCY}])(?<!\d )(-?)([{_CURRENCY}%]) ?(-?)({_NUMBER})"
    rf"(?![\d{DECIMAL_MARK}]| ?[{_CURRENCY}%°])"
)
_APART = re.compile(rf"(?<=\d) (?=[{_CURRENCY}%‰°])")


@dataclass(frozen=True, slots=True)
class _Conventions:
    """How a language writes numbers and cases its letters."""

    decimal: str = "."
    groups: str = ","
    indian: bool = False
    """Whether the groups before the last group have two digits."""
    dotted_i: bool = False
    """Whether the lower case of I is ı."""
    accents_in_lower_case_alone: bool = False

    def reads(self, run: str) -> str | None:
        """The digits of a number, with `DECIMAL_MARK`; None if the run is no number in these conventions."""
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
    """The form in which two answers of a language are compared. Normalising twice changes nothing.

    - Invisible format characters are removed, and so are quotes and punctuation (Unicode category P) around
      the whole text. A text of punctuation only is kept, because it must not equal the empty text. A hyphen
      or # that touches the text is kept: "A-" is not "A".
    - The text is NFKC, but exponents are kept: "10²" is "10^2" and not "102". Case is folded. In Turkish and
      Azerbaijani, i and ı remain different letters. In Greek, accents are dropped, because capitals have
      none.
    - Every hyphen and minus is "-", every quote is ' or ", every decimal digit is ASCII, and white space is
      one space.
    - Numbers have no grouping marks, and their decimal mark is `DECIMAL_MARK`. "$3", "$ 3" and "3 $" are the
      same, and likewise for %.

    Args:
        text: an answer.
        language: a CLDR or FLORES code ("de", "pt-BR", "deu_Latn") or an English name. Any other value means
            the English conventions.
    """
    own, before = _conventions(language), None
    while text != before:  # moving a symbol behind its number may leave another number
        before, text = text, _normalised_once(text, own)
    return text


def is_correct(generated: str, answer: str, language: str) -> bool:
    """Whether the texts are equal after `normalise_answer`; always false for a gold answer without text."""
    return normalise_answer(generated, language) == normalise_answer(answer, language) != ""


@cache
def language_code(language: str) -> str | None:
    """The CLDR code of a language without script and region: "de" for "deu_Latn" and for "German".

    None for a language that CLDR does not have.
    """
    locale = _locale(language)
    return locale.language if locale else None


def _normalised_once(text: str, own: _Conventions) -> str:
    seen = _SPACED.sub(lambda found: re.sub(r"\D", "", found[0]), _visible(text))
    seen = re.sub(r"\u2212\s+(?=\d)", "-", "".join(_exponents_apart(seen)))
    # Again, because NFKC turns Arabic presentation forms into strokes.
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
    """The text without invisible format characters."""
    return "".join(
        char
        for char in text
        if char in _VISIBLE or (char not in _INVISIBLE and unicodedata.category(char) != "Cf")
    )


def _exponents_apart(text: str) -> Iterator[str]:
    """The text's characters, with marks where NFKC would join numbers: "10²" into "102", "1½" into "11/2"."""
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
    """The text with numbers as `_Conventions.reads` returns them, and with ASCII digits only."""
    space = " " if " " in own.groups else ""

    def read(run: str) -> str:
        digits = "".join(str(unicodedata.decimal(char)) if char.isdecimal() else char for char in run)
        # A decimal comma with Arabic digits, because few keyboards have the Arabic decimal mark.
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
    """Whether a character at an end of a text does not count; ``inner`` is the next character inwards."""
    if char in _BULLETS:
        return inner in ("", " ")
    return char == " " or (unicodedata.category(char).startswith("P") and char not in _CONTENT)
