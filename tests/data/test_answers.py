"""Laws of comparing answers, closed cases by language, and which examples no model can answer right."""

import unicodedata

import pytest
from data_rows import SmallTokenizer, example
from hypothesis import given
from hypothesis import strategies as st

from ramoe_megatron.data.answers import is_correct, normalise_answer
from ramoe_megatron.data.encode import encode_answer
from ramoe_megatron.data.limits import NEW_TOKENS, new_token_limits
from ramoe_megatron.errors import RamoeError

TOKENIZER = SmallTokenizer()
LANGUAGES = [
    "en",
    "de",
    "fr",
    "es",
    "tr",
    "el",
    "ar",
    "fa",
    "hi",
    "ru",
    "de-CH",
    "deu_Latn",
    "Turkish",
    "unknown",
]
# language -> decimal mark, grouping mark
MARKS = {
    "en": (".", ","), "zh": (".", ","), "sw": (".", ","), "th": (".", ","), "hi": (".", ","),
    "unknown": (".", ","), "de": (",", "."), "es": (",", "."), "tr": (",", "."), "id": (",", "."),
    "pt-BR": (",", "."), "ell_Grek": (",", "."), "fr": (",", "\u202f"), "ru": (",", "\u00a0"),
    "fi": (",", " "), "pl": (",", "\u00a0"), "de-CH": (".", "’"), "ar": ("٫", "٬"), "fa": ("٫", "٬"),
}  # fmt: skip
languages = st.sampled_from(LANGUAGES)
FORMATS = "\u200e\u200f\u061c\u200b\u200c\u200d\u2060\ufeff\u00ad\u2066\u2069\u202b\u202c"
MINUS = "-−－–‐‑﹣"
SEPARATORS = "0123٣५.,'’٫٬ \u00a0\u202f-−$€%°²½₂/(\"#aIıiİΣς\u0301\u0345\u200f\ufe71\ufcf2"


@given(st.text() | st.text(alphabet=SEPARATORS, max_size=12), languages)
def test_normalising_twice_is_normalising_once(text: str, language: str) -> None:
    once = normalise_answer(text, language)
    assert normalise_answer(once, language) == once


@given(
    st.text(alphabet="abc éß漢٣3.,!", min_size=1),
    st.sampled_from(["", ".", "!", "。", "؟", '"', "  ", "\n"]),
    languages,
)
def test_case_outer_white_space_and_punctuation_do_not_count(text: str, edge: str, language: str) -> None:
    words = text.strip(".,! ")
    assert is_correct(f"{edge} {words.upper()} {edge}", words, language) or not any(
        c.isalnum() for c in words
    )


@given(st.integers(0, 10**6), st.sampled_from("٠۰०๐০០０"), languages)
def test_digits_of_every_script_are_equal(number: int, zero: str, language: str) -> None:
    assert unicodedata.decimal(zero) == 0
    native = "".join(chr(ord(zero) + int(digit)) for digit in str(number))
    assert is_correct(native, str(number), language)


@given(
    st.text(alphabet="abc نعم हिन्दी 3-", min_size=1).filter(lambda text: any(c.isalnum() for c in text)),
    st.data(),
    languages,
)
def test_format_characters_do_not_count(text: str, data: st.DataObject, language: str) -> None:
    marked = "".join(data.draw(st.sampled_from(["", *FORMATS])) + char for char in text) + data.draw(
        st.sampled_from(FORMATS)
    )
    assert is_correct(marked, text, language)


@given(st.integers(1, 10**9), st.sampled_from(MINUS), st.sampled_from(MINUS), languages)
def test_every_minus_is_one_and_none_is_lost(number: int, one: str, other: str, language: str) -> None:
    assert is_correct(f"{one}{number}", f"\u200f{other}{number}.", language)
    assert not is_correct(f"{one}{number}", str(number), language)


@given(
    st.integers(0, 10**9),
    st.none() | st.text("0123456789", min_size=1, max_size=4),
    st.sampled_from(sorted(MARKS)),
)
def test_a_number_is_read_by_the_marks_of_its_language(
    number: int, decimals: str | None, language: str
) -> None:
    mark, group = MARKS[language]
    tail = "" if decimals is None else mark + decimals
    grouped, plain = f"{number:,}".replace(",", group) + tail, f"{number}{tail}"
    # a thousand without grouping may be told from a grouped one only by its decimals: 1000,5 is never 10005
    assert is_correct(grouped, plain, language)
    assert decimals is None or not is_correct(grouped, f"{number}{decimals}", language)


@given(st.integers(0, 10**9), st.sampled_from(sorted(MARKS)))
def test_english_grouping_of_millions_and_english_decimals_are_read_everywhere(
    number: int, language: str
) -> None:
    assert is_correct(f"{number + 10**6:,}", str(number + 10**6), language)
    assert is_correct(f"{number}.5", f"{number}{MARKS[language][0]}5", language)


RIGHT = [
    ("1\u00a0000", "1000", "en"), ("1\u202f000", "1000", "en"), ("1'000", "1000", "de"),
    ("1.000,5", "1,000.5", "de"), ("1 000", "1000", "fr"), ("1,00,000", "100000", "hi"),
    ("१,००,०००", "100000", "hi"), ("100,000", "100000", "hi"), ("١٬٠٠٠٫٥", "1000.5", "ar"),
    ("٣,٥", "3.5", "ar"), ("١,٠٠٠", "1000", "ar"), (".5", "0.5", "en"), ("-.5", "-0,5", "de"),
    ("1.234", "1234", "German"), ("1.234", "1234", "deu_Latn"), ("− 3", "-3", "en"), ("€3", "3 €", "de"),
    ("-$3", "$-3", "en"), ("5 %", "5%", "de"), ("%5", "5%", "tr"), ("٪٥", "5%", "ar"), ("20℃", "20 °C", "en"),
    ("½", "1/2", "en"), ("İSTANBUL", "istanbul", "tr"), ("ISPARTA", "ısparta", "tur_Latn"),
    ("BAKI", "bakı", "az"), ("ISPARTA", "isparta", "en"), ("ΑΘΗΝΑ", "Αθήνα", "el"), ("ΟΔΟΣ", "οδος", "el"),
    ("STRASSE", "straße", "de"), ("ᲗᲑᲘᲚᲘᲡᲘ", "თბილისი", "ka"), ("\u200fنعم\u200e", "نعم", "ar"),
    ("می\u200cخواهم", "میخواهم", "fa"), ("نـــعم", "نعم", "ar"), ("क्\u200dष", "क्ष", "hi"),
    ("- Paris", "Paris", "en"), ("**Paris**", "Paris", "en"), ("l’eau", "L'EAU", "fr"), ("«ja»", "ja", "de"),
    ("Ｃ＋＋", "c++", "ja"), ("O−", "O-", "en"),
]  # fmt: skip
WRONG = [
    ("3", "-3", "en"), ("3", "−3", "ar"), ("C", "C++", "en"), ("C", "C#", "en"), ("3 $", "3 €", "de"),
    ("5", "5%", "en"), ("A", "A-", "en"), ("Na", "Na+", "en"), ("5", ".5", "en"), ("3", "+3", "en"),
    ("1", "1.000", "de"), ("1000", "1,000", "de"), ("35", "3,5", "de"), ("3.5", "3,5", "en"),
    ("100000", "1,00,000", "en"), ("12345", "12 345", "en"), ("123", "1.2.3", "de"), ("102", "10²", "en"),
    ("11/2", "1½", "en"), ("isparta", "ISPARTA", "tr"), ("istanbul", "ISTANBUL", "az"), ("3.5", "35", "en"),
    ("a-b", "ab", "en"), ("EUR USD", "EUR", "en"), ("", "EUR", "en"), ("?", "!", "en"), ("10", "1", "en"),
    ("a b", "ab", "en"), ("", "\u200f", "ar"),
]  # fmt: skip


@pytest.mark.parametrize(("generated", "answer", "language"), RIGHT)
def test_a_reader_calls_it_right(generated: str, answer: str, language: str) -> None:
    assert is_correct(generated, answer, language)
    assert is_correct(answer, generated, language)


@pytest.mark.parametrize(("generated", "answer", "language"), WRONG)
def test_a_reader_calls_it_wrong(generated: str, answer: str, language: str) -> None:
    assert not is_correct(generated, answer, language)
    assert not is_correct(answer, generated, language)


def tokens(answer: str) -> int:
    """Tokens of an answer and its end."""
    encoded = encode_answer(example(response=answer), TOKENIZER)
    return len(encoded.ids) - encoded.prompt_length


LONG = " ".join("one two three four five six seven eight nine ten".split() * 4)


@given(
    st.lists(st.sampled_from(["EUR", "one two", LONG]), min_size=1, max_size=4),
    st.integers(1, 99),
    st.integers(30, 200),
)
def test_a_limit_holds_every_gold_answer_or_is_refused(
    answers: list[str], given: int, positions: int
) -> None:
    rows = [example(f"q{number}", "hi", response=answer) for number, answer in enumerate(answers)]
    prompts = [encode_answer(row, TOKENIZER).prompt_length for row in rows]
    needed = [tokens(answer) for answer in answers]
    fits = all(prompt + most - 1 <= positions for prompt, most in zip(prompts, needed, strict=True))
    for asked in (None, given):
        most = asked or max(NEW_TOKENS, *needed)
        if fits and max(needed) <= most:
            limits = new_token_limits(rows, TOKENIZER, asked, positions)
            assert limits == [min(most, positions + 1 - prompt) for prompt in prompts]
            assert all(limit >= tokens for limit, tokens in zip(limits, needed, strict=True))
        else:
            with pytest.raises(RamoeError, match="can never be answered right"):
                new_token_limits(rows, TOKENIZER, asked, positions)


def test_what_a_limit_cuts_is_counted_by_language_with_the_number_that_is_needed() -> None:
    rows = [
        example(f"q{n}", language, response=LONG if language == "hi" else "EUR")
        for n in range(2)
        for language in ("en", "hi")
    ]
    with pytest.raises(RamoeError) as error:
        new_token_limits(rows, TOKENIZER, 16, 200)
    for words in (
        "2 of 4 examples",
        "2 in hi (ids q0, q1)",
        f"up to {tokens(LONG)} tokens",
        "--ramoe-max-new-tokens 16",
    ):
        assert words in str(error.value)
    assert new_token_limits(rows, TOKENIZER, tokens(LONG), 200) == [tokens(LONG)] * 4


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": ""}, "the prompt has no token"),
        ({"prompt": "", "choices": ("EUR", "yes")}, "the prompt has no token"),
        ({"choices": ("yes", "no")}, "the gold answer is none of the choices"),
        ({"choices": ("EUR", "yes", "EUR")}, "two choices are the same tokens"),
        ({"response": "\u200f"}, "the gold answer has no text"),
        ({"response": "EUR", "stop": ("U",)}, "the gold answer has a stop string in it"),
        ({"prompt": "one " * 60}, "more than --max-position-embeddings 50"),
        ({"prompt": "one " * 60, "choices": ("EUR", "yes")}, "more than --max-position-embeddings 50"),
    ],
)
def test_what_can_never_be_right_is_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(RamoeError) as error:
        new_token_limits([example("q1"), example("q2", "es", **changes)], TOKENIZER, None, 50)
    for words in ("1 of 2 examples", "1 in es (ids q2)", reason, "in every language"):
        assert words in str(error.value)


def test_a_tokenizer_that_cannot_write_the_gold_answer_is_refused() -> None:
    class Lossy(SmallTokenizer):
        """Without a token for Z, as a tokenizer without byte fallback."""

        def tokenize(self, text: str) -> list[int]:
            return super().tokenize(text.replace("Z", ""))

    rows = [example("q1", "fi", response="Zone"), example("q2", "fi", response="one")]
    with pytest.raises(RamoeError, match=r"1 in fi \(ids q1\): the tokenizer cannot write the gold answer"):
        new_token_limits(rows, Lossy(), None, 50)
    with pytest.raises(RamoeError, match="two choices are the same tokens"):
        new_token_limits([example(response="one", choices=("one", "Zone"))], Lossy(), None, 50)
    assert len(new_token_limits(rows, TOKENIZER, None, 50)) == 2
