"""Laws of the three kinds of tokenizers: chats of a template of one's own, borders, end tokens, dates."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_templates import (
    CHATML,
    FAMILIES,
    GPT_OSS,
    IM,
    LLAMA3,
    MISTRAL,
    OLMOE,
    QWEN3,
    TIKTOKEN_SPECIAL,
    chat,
    load_tokenizer,
    write_sentencepiece,
    write_tiktoken,
    write_tokenizer,
)
from data_rows import example, row, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from ramoe_megatron.data.answers import is_correct
from ramoe_megatron.data.chat import TODAY, tokenize
from ramoe_megatron.data.encode import check_examples, decoding, encode, encode_choices
from ramoe_megatron.data.parallel import load_examples
from ramoe_megatron.errors import RamoeError

SPECIAL = [*IM, "<think>", "</think>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TEMPLATES = {
    "mistral": (MISTRAL, "</s>"),
    "olmoe": (OLMOE, "</s>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "chatml": (CHATML, "<|im_end|>"),
    "qwen3": (QWEN3.replace("BLOCK", "false"), "<|im_end|>"),
}
SCRIPTS = ["नमस्ते दुनिया", "مرحبا", "日本語", "Ελλάδα", "Mikä", "\U0001f600 yes", "42", "no perhaps"]
words = st.one_of(st.sampled_from(SCRIPTS), st.text(alphabet="abc नम ؟ما?.-\n", min_size=1, max_size=8))

Build = Callable[[str | None], Any]


@pytest.fixture(scope="module")
def builders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Build]:
    """Each kind's tokenizer, by its chat template. SentencePiece has the special tokens in two forms."""
    folder = tmp_path_factory.mktemp("kinds")
    control = write_sentencepiece(folder / "control.model", control=SPECIAL)
    own = write_sentencepiece(folder / "own.model", own=SPECIAL)
    tokens = write_tiktoken(folder / "tiktoken.json")
    special = [*TIKTOKEN_SPECIAL, *SPECIAL]
    sizes = {"num_special_tokens": 20, "special_tokens": special, "vocab_size": tokens + 20}
    face = write_tokenizer(folder / "hf", replace(FAMILIES["chatml"], special=tuple(SPECIAL), template=None))  # type: ignore[arg-type]
    return {
        "sentencepiece-control": lambda text: load_tokenizer(control, "sentencepiece", chat_template=text),
        "sentencepiece": lambda text: load_tokenizer(own, "sentencepiece", chat_template=text),
        "tiktoken": lambda text: load_tokenizer(
            folder / "tiktoken.json", "tiktoken", chat_template=text, **sizes
        ),
        "huggingface": lambda text: load_tokenizer(face, chat_template=text),
    }


KINDS = ("sentencepiece-control", "sentencepiece", "tiktoken", "huggingface")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_template_of_ones_own_trains_is_right(
    builders: dict[str, Build], kind: str, name: str
) -> None:
    template, end = TEMPLATES[name]
    tokenizer = builders[kind](template)

    @settings(max_examples=10)
    @given(words, words)
    def holds(question: str, answer: str) -> None:
        asked = chat(answer.strip() or "no", question, "yes", question)
        check_examples([asked], tokenizer)
        encoded, how = encode(asked, tokenizer), decoding(asked, tokenizer)
        trained = encoded.ids[encoded.prompt_length :]
        assert how.prompt == encoded.ids[: encoded.prompt_length]
        assert [n for n, token in enumerate(trained) if token in how.stops] == [len(trained) - 1]
        assert tokenizer._tokenizer.ids_to_tokens(trained[-1:]) == [end], "the template's end, as one token"
        assert is_correct(how.answer(trained[:-1], tokenizer), asked.answer, "en")
        opening = tokenizer.bos_id if "bos_token" in template else tokenizer.eod
        if name in ("mistral", "llama3", "olmoe"):
            assert encoded.ids[0] == opening
        assert encoded.ids.count(tokenizer.bos_id) == ("bos_token" in template)
        assert encode_choices(replace(asked, choices=(asked.answer, "x")), tokenizer)[0] == encoded

    holds()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", SCRIPTS)
def test_answers_of_every_script_are_written_back(builders: dict[str, Build], kind: str, text: str) -> None:
    """None of the vocabularies has these words: they are written with bytes."""
    tokenizer = builders[kind](None)
    encoded = encode(example(prompt="Say ?", response=text), tokenizer)
    assert tokenizer.detokenize(encoded.ids[encoded.prompt_length : -1]) == text
    assert encoded.ids[-1] == tokenizer.eod


@pytest.mark.parametrize("kind", ["sentencepiece", "tiktoken", "huggingface"])
def test_a_sound_border_is_one_that_the_tokenizer_writes_itself(
    builders: dict[str, Build], kind: str
) -> None:
    """What the ids spell has just these ids. Only SentencePiece may spell a space between the two."""
    tokenizer = builders[kind](None)
    starts = int(kind == "huggingface")  # its BOS is no part of the text

    @settings(max_examples=80)
    @given(words, words)
    def holds(prompt: str, response: str) -> None:
        asked = example(prompt=prompt, response=response)
        ids = encode(asked, tokenizer).ids[starts:-1]
        text = tokenizer.detokenize(ids)
        agrees = tokenize(text, tokenizer) == ids
        try:
            check_examples([asked], tokenizer)
        except RamoeError:
            # SentencePiece may also read a text with two spaces at the border as these ids
            assert not agrees or (kind == "sentencepiece" and (prompt + " " + response).count("  "))
            return
        assert agrees
        assert text in (prompt + response, f"{prompt} {response}"[: None if kind == "sentencepiece" else 0])

    holds()


def told(tokenizer: Any, *rows: Any) -> str:
    with pytest.raises(RamoeError) as error:
        check_examples(rows, tokenizer)
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "prompt", "response", "tokens", "advice"),
    [
        (
            "huggingface",
            "currency ? ",
            "EUR",
            "' .', .*' '.* apart, .*' EUR'.* together",
            "move the white space",
        ),
        ("tiktoken", "currency ? ", "EUR", "' '.* apart, .*' EUR'.* together", "move the white space"),
        (
            "sentencepiece",
            "currency ? ",
            "EUR",
            "'▁', .*'▁EUR'.* apart, .*'▁EUR'.* together",
            "leave out the",
        ),
        (
            "sentencepiece",
            "currency ?",
            " EUR",
            "'▁', .*'▁EUR'.* apart, .*'▁EUR'.* together",
            "leave out the",
        ),
        (
            "huggingface",
            "Which EU",
            "R",
            "' EU', .*'R'.* apart, .*' EUR'.* together",
            "start the response with a space",
        ),
    ],
)
def test_a_border_that_the_tokenizer_moves_is_told_with_the_row_and_what_mends_it(
    builders: dict[str, Build],
    tmp_path: Path,
    kind: str,
    prompt: str,
    response: str,
    tokens: str,
    advice: str,
) -> None:
    tokenizer = builders[kind](None)
    good = row("q1", prompt="What is one ?\n", response="no")
    bad = [row(f"q{n}", prompt=prompt, response=response, answer=None) for n in (2, 3)]
    path = write_jsonl(tmp_path / "rows.jsonl", [good, *bad])
    message = told(tokenizer, *load_examples([path]))
    assert message.startswith("2 of 3 examples have other tokens at the border"), message
    assert f"{path}, line 2: id 'q2', language 'en'" in message
    assert re.search(tokens, message), message
    assert f"To do: {advice}" in message
    asked = example(prompt=prompt.rstrip(), response="EUR" if advice.startswith("leave") else f" {response}")
    check_examples([asked], tokenizer)


def test_the_border_of_every_choice_is_tried(builders: dict[str, Build]) -> None:
    tokenizer = builders["huggingface"](None)
    asked = example(prompt="Which EU", response=" no", choices=(" no", "R"))
    assert "' EU', " in told(tokenizer, asked)
    check_examples([replace(asked, choices=(" no", " R"))], tokenizer)


def test_a_chat_whose_answer_joins_the_header_is_told(builders: dict[str, Build]) -> None:
    joined = CHATML.replace("'\n' + m.content", "' EU' + m.content").replace("assistant\n", "assistant EU")
    tokenizer = builders["huggingface"](joined)
    check_examples([chat(" no", "Which ?")], tokenizer)
    message = told(tokenizer, replace(chat("R", "Which ?"), place="rows.jsonl, line 7"))
    assert "rows.jsonl, line 7: id 'q1', language 'en'" in message
    assert re.search("' EU', .*'R'.* apart, but .*' EUR'.* together", message), message


@pytest.mark.parametrize("kind", ["tiktoken", "huggingface"])
def test_an_end_token_inside_a_response_is_refused(builders: dict[str, Build], kind: str) -> None:
    """Generation would stop there, and a model that writes its training data would be wrong."""
    message = told(builders[kind](None), example(prompt="Say ?\n", response="yes</s> no"))
    assert "id 'q1', language 'en': the response 'yes</s> no' has the end token in it" in message


def test_sentencepiece_reads_no_end_token_in_a_response(builders: dict[str, Build]) -> None:
    tokenizer = builders["sentencepiece"](None)
    asked = example(prompt="Say ?", response="yes</s> no")
    check_examples([asked], tokenizer)
    assert encode(asked, tokenizer).ids.count(tokenizer.eod) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_template_the_error_says_how_to_give_one(builders: dict[str, Build], kind: str) -> None:
    message = told(builders[kind](None), chat("no", "one ?"))
    assert "id 'q1', language 'en' has `messages`, but the tokenizer has no chat template" in message
    assert "--chat-template" in message


@pytest.mark.parametrize("kind", KINDS)
def test_the_date_that_a_template_writes_is_the_same_every_day(builders: dict[str, Build], kind: str) -> None:
    tokenizer = builders[kind](GPT_OSS)
    prompt = decoding(chat("no", "one ?"), tokenizer).prompt
    assert f"Date: {TODAY:%Y-%m-%d}. Channels" in tokenizer.detokenize(prompt)


def test_a_date_that_cannot_be_written_is_refused(builders: dict[str, Build]) -> None:
    template = GPT_OSS.replace("%Y-%m-%d", "%e of %B, week %U")
    message = told(builders[KINDS[0]](template), chat("no", "one ?"))
    assert "the date format %e of %B, week %U is not known" in message


def test_of_several_templates_the_default_is_used(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = write_tokenizer(tmp_path / "several", FAMILIES["chatml"])
    asked, one = chat("no", "one ?"), load_tokenizer(folder)
    saved = AutoTokenizer.from_pretrained(folder)
    saved.chat_template = {"tool_use": MISTRAL, "default": CHATML}
    saved.save_pretrained(folder)
    several = load_tokenizer(folder)
    assert isinstance(several.chat_template, dict)
    assert encode(asked, several) == encode(asked, one)
    del several.chat_template["default"]
    assert re.match("id 'q1'.* has the templates tool_use, and none named 'default'", told(several, asked))
