"""Laws of grading generated answers: numbers of all languages and scripts, exact match, F1, instructions."""

import json
from decimal import Decimal

import pytest
from babel.numbers import format_decimal
from data_rows import SmallTokenizer
from hypothesis import given
from hypothesis import strategies as st

from ramoe_megatron.data import grading
from ramoe_megatron.data.answers import is_correct
from ramoe_megatron.data.grading import answer_f1, answer_number, grade, ungradable
from ramoe_megatron.data.limits import new_token_limits
from ramoe_megatron.data.parallel import METRICS, Example
from ramoe_megatron.data.words import words_of
from ramoe_megatron.errors import RamoeError

MGSM = ("bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh")
ZEROS = "0٠०০౦๐０"
"""The digit 0 of ASCII, Arabic, Devanagari, Bengali, Telugu, Thai and full-width digits."""
whole = st.integers(0, 10**7)
languages = st.sampled_from(MGSM)
texts = st.text(alphabet="abc 0123456789.,-=+$%\n:。", max_size=30)


def example(answer: str, language: str, metric: str | None, *answers: str) -> Example:
    return Example(
        "1", language, "t", "p", answer, answer, None, "test", metric=metric, answers=answers or None
    )


@given(whole, languages, st.sampled_from(["", "-"]), st.sampled_from(["", "\n"]), st.sampled_from(ZEROS))
def test_a_number_as_its_language_writes_it_is_read(
    number: int, language: str, sign: str, end: str, zero: str
) -> None:
    grouped = format_decimal(number, locale=language, numbering_system="latn")
    for written in (str(number), grouped):
        digits = "".join(chr(ord(zero) + int(char)) if char.isascii() and char.isdigit() else char
                         for char in written)  # fmt: skip
        found = answer_number(f"{words_of(language).answer}: {sign}{digits}{end}", language)
        assert found == Decimal(f"{sign}{number}"), digits


@given(whole, st.sampled_from(range(1, 100)), languages)
def test_decimals_are_read_with_the_mark_of_the_language(number: int, hundredths: int, language: str) -> None:
    value = Decimal(number) + Decimal(hundredths) / 100
    written = format_decimal(value, format="#,##0.00", locale=language, numbering_system="latn")
    assert answer_number(written, language) == value


@given(texts, whole, languages, st.data())
def test_only_what_follows_the_last_marker_counts(
    before: str, number: int, language: str, data: st.DataObject
) -> None:
    marker = data.draw(st.sampled_from([*words_of(language).said, f"{words_of(language).answer}:", "####"]))
    text = f"{before}\n{marker} {number}. "
    assert answer_number(text, language) == number
    assert grade(example(str(number), language, "number"), text)
    assert not grade(example(str(number + 1), language, "number"), text)


@given(texts.filter(lambda text: not any(char.isdigit() for char in text)), whole, languages)
def test_without_a_marker_the_last_number_counts(words: str, number: int, language: str) -> None:
    assert answer_number(f"7 {words} 8 = {number}", language) == number
    assert answer_number(words, language) is None


@pytest.mark.parametrize(
    ("text", "language", "number"),
    [
        ("16-3=13", "en", "13"),
        ("16-3", "en", "3"),
        ("答案是-3", "zh", "-3"),
        ("一共18个鸡蛋", "zh", "18"),
        ("ราคา๑๘บาท", "th", "18"),
        ("Die Antwort lautet 1.234,50 Euro, nicht 7.", "de", "1234.5"),
        ("The answer is $1,000. Then 7.", "en", "1000"),
        ("So 18.00 dollars.", "en", "18"),
        ("#### 2,125", "te", "2125"),
    ],
)
def test_numbers_in_sentences(text: str, language: str, number: str) -> None:
    assert answer_number(text, language) == Decimal(number)


@given(texts, texts.filter(str.strip), languages)
def test_without_a_metric_grading_is_equality(generated: str, answer: str, language: str) -> None:
    assert grade(example(answer, language, None), generated) == is_correct(generated, answer, language)


@given(st.lists(st.text(alphabet="abcde", min_size=2), min_size=1, max_size=5), languages)
def test_f1_is_1_for_an_exact_match_and_does_not_depend_on_order(words: list[str], language: str) -> None:
    gold = " ".join(words)
    asked = example("other", language, "exact", "nothing", gold)
    assert grade(asked, f"“{gold.upper()}!”")
    assert answer_f1(asked, gold) == answer_f1(asked, " ".join(reversed(words))) == 1
    assert answer_f1(asked, f"{gold} zz") == pytest.approx(2 * len(words) / (2 * len(words) + 1))


def test_articles_do_not_count_in_english_alone() -> None:
    assert grade(example("Broncos", "en", "exact"), "the Broncos.")
    assert not grade(example("Broncos", "de", "exact"), "the Broncos.")
    assert not grade(example("-3", "en", "exact"), "3")
    assert answer_f1(example("丹佛野马", "zh", "exact"), "野马") == pytest.approx(2 / 3)


def instruction(*names: str) -> Example:
    asked = {"prompt": "p", "instruction_id_list": list(names), "kwargs": [{} for _ in names]}
    return example(json.dumps(asked), "en", "ifeval")


class NoComma:
    """A checker with the interface of lm-eval's."""


def test_instructions_that_nothing_installed_checks_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def checker(language: str) -> object:
        if language == "ja":
            raise RamoeError("the metric 'ifeval' needs lm-eval")
        known = {"punctuation:no_comma": NoComma}
        return known, lambda given, text: given["instruction_id_list"] == [*known] and "," not in text

    monkeypatch.setattr(grading, "_checker", checker)
    asked = instruction("en:punctuation:no_comma")
    assert ungradable(asked) is None
    assert (grade(asked, "a b"), grade(asked, "a, b")) == (True, False)
    assert "fr:special:accents" in str(ungradable(instruction("fr:special:accents")))
    assert "lm-eval" in str(ungradable(instruction("ja:letters:kanji")))
    assert "no JSON object" in str(ungradable(example("{}", "en", "ifeval")))


def test_gold_answers_that_no_generation_can_match_are_found_before_any_forward_pass() -> None:
    tokenizer = SmallTokenizer()
    with pytest.raises(RamoeError, match="no number"):
        new_token_limits([example("a", "en", "number")], tokenizer, None, 64)
    with pytest.raises(RamoeError, match="no JSON object"):
        new_token_limits([example("a", "en", "ifeval")], tokenizer, 9, 64)
    worked = Example("1", "en", "t", "p", "1 2 3 4 5 6 7 8 9 10 11 12", "12", None, "test", metric="number")
    plain = example("12", "en", "number")
    short, long = new_token_limits([plain, worked], tokenizer, None, 512)
    assert short == long > len(tokenizer.tokenize(worked.response))


def test_every_metric_is_one_that_grading_knows() -> None:
    for metric in METRICS:
        assert ungradable(example("", "en", metric)) is None or metric != "exact"
