"""Laws of answer normalisation."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramoe_megatron.data.answers import is_correct, normalise_answer


@given(st.text())
def test_normalising_twice_is_normalising_once(text: str) -> None:
    once = normalise_answer(text)
    assert normalise_answer(once) == once


@given(st.text(alphabet="abc éß漢٣3.,!", min_size=1), st.sampled_from(["", ".", "!", "。", "؟", '"', "  ", "\n"]))
def test_case_outer_white_space_and_punctuation_do_not_count(text: str, edge: str) -> None:
    assert is_correct(f"{edge} {text.upper()} {edge}", text) or not any(c.isalnum() for c in text)


@given(st.integers(0, 10**6), st.sampled_from("٠۰०๐০０"))
def test_digits_of_every_script_are_equal(number: int, zero: str) -> None:
    assert unicodedata.decimal(zero) == 0
    native = "".join(chr(ord(zero) + int(digit)) for digit in str(number))
    assert is_correct(native, str(number))


@pytest.mark.parametrize(
    ("generated", "answer"),
    [("3.5", "35"), ("a-b", "ab"), ("EUR USD", "EUR"), ("", "EUR"), ("?", "!"), ("10", "1"), ("a b", "ab")],
)
def test_what_differs_inside_stays_different(generated: str, answer: str) -> None:
    assert not is_correct(generated, answer)
