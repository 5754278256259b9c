"""Stop strings are found in tokens as they come, wherever the borders of tokens and characters are."""

import pytest
from data_rows import TEXT, SmallTokenizer, example
from hypothesis import given
from hypothesis import strategies as st

from ramoe_megatron.data.encode import Decoding, Encoded, choice_scores, decoding
from ramoe_megatron.data.stops import StopStrings
from ramoe_megatron.data.tokenizer import train_tokenizer

TOKENIZER = SmallTokenizer(train_tokenizer(TEXT, 300))


class Bytes:
    """A tokenizer of single bytes, so that characters have several tokens."""

    def detokenize(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


def ends(stop: StopStrings, ids: list[int], tokenizer: object) -> int | None:
    """The number of tokens after which the watch ends the answer."""
    watch = stop.watch(tokenizer)  # type: ignore[arg-type]
    return next((count for count, token in enumerate(ids, 1) if watch(token)), None)


LETTERS = st.text("ab \nمä🙂", max_size=12)


@given(LETTERS, st.lists(st.text("ab \nمä🙂", min_size=1, max_size=3), min_size=1, max_size=2), LETTERS)
def test_an_answer_ends_with_the_byte_that_completes_a_stop_string(
    before: str, strings: list[str], after: str
) -> None:
    text = f"{before}{strings[-1]}{after}"
    stop = StopStrings(tuple(strings))
    first = min(len(text[: text.find(string) + len(string)].encode()) for string in strings if string in text)
    assert ends(stop, list(text.encode()), Bytes()) == first
    assert stop.before(text) == (min((text.partition(string)[0] for string in strings), key=len), True)


@given(LETTERS)
def test_an_answer_without_the_string_goes_on(text: str) -> None:
    assert ends(StopStrings(("c", "bü")), list(text.encode()), Bytes()) is None
    assert StopStrings(("c",)).before(text) == (text, False)


@given(
    st.lists(st.sampled_from(TEXT), min_size=1, max_size=3), st.sampled_from(["EUR", "AT ?", "currency of"])
)
def test_with_sentencepiece_it_is_the_first_token_whose_text_has_the_string(
    texts: list[str], string: str
) -> None:
    ids = TOKENIZER.tokenize(" ".join(texts))
    whole = [TOKENIZER.detokenize(ids[:count]) for count in range(1, len(ids) + 1)]
    expected = next((count for count, text in enumerate(whole, 1) if string in text), None)
    assert ends(StopStrings((string,)), ids, TOKENIZER) == expected


def test_bytes_that_never_become_a_character_do_not_hide_a_string() -> None:
    ids = [*b"ab", *[0xFF] * 20, *b"stop", *b"more"]
    assert ends(StopStrings(("stop",)), ids, Bytes()) == len(ids) - len(b"more")


@pytest.mark.parametrize("written", ["\n\n", "\n\nHe", ""])
def test_what_a_template_writes_before_the_answer_is_not_searched(written: str) -> None:
    lead = "<think>\n\n</think>\n\n"
    stop, text = StopStrings(("\n\n",), lead), f"{lead}yes{written}"
    assert ends(stop, list(text.encode()), Bytes()) == (None if not written else len(lead + "yes\n\n"))


def test_an_answer_is_the_text_before_the_string() -> None:
    asked = decoding(example(stop=("\n", "Q:")), TOKENIZER)
    for text, answer, stopped in (
        ("EUR\nQ: more", "EUR", True),
        ("EUR Q: more", "EUR ", True),
        ("EUR", "EUR", False),
    ):
        ids = list(text.encode())
        plain = Decoding(asked.prompt, asked.stops, until=asked.until)
        assert plain.answer(ids, Bytes()) == answer  # type: ignore[arg-type]
        assert plain.stopped(ids, Bytes()) == stopped  # type: ignore[arg-type]
    assert decoding(example(), TOKENIZER).until is None


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(None, [-6.0, -8.0]), ("sum", [-6.0, -8.0]), ("token", [-2.0, -4.0]), ("byte", [-1.5, -2.0])],
)
def test_scores_of_choices(kind: str | None, expected: list[float]) -> None:
    """Of 3 tokens and 4 bytes, and of 2 tokens and 4 bytes."""
    asked = example(choices=("ähh", "four"), response="four", choice_score=kind)
    assert [len(choice.encode()) for choice in asked.choices] == [4, 4]
    encoded = [Encoded([5, 6, 7, 8, 9], 2), Encoded([5, 6, 7, 9], 2)]
    assert choice_scores(asked, encoded, [-6.0, -8.0]) == expected
