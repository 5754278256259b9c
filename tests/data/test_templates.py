"""The law of chat templates: what a model is trained to write is right, or the template is refused."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATML, FAMILIES, GEMMA, QWEN3, ROLES, chat, load_tokenizer, write_tokenizer
from data_rows import TEXT, example
from hypothesis import given, settings
from hypothesis import strategies as st

from ramoe_megatron.data.answers import is_correct, normalise_answer
from ramoe_megatron.data.chat import TODAY
from ramoe_megatron.data.encode import (
    check_examples,
    decoding,
    encode,
    encode_answer,
    encode_choices,
    encode_prompt,
)
from ramoe_megatron.data.parallel import Example
from ramoe_megatron.data.tokenizer import train_tokenizer
from ramoe_megatron.errors import RamoeError

words = st.text(alphabet=st.characters(exclude_categories=["C"]), min_size=1, max_size=20)
# No text equals a gold answer of white space.
with_text = words.filter(lambda text: normalise_answer(text, "en") != "")
answers = st.one_of(
    with_text,
    with_text.map(lambda text: f" \n{text} \n"),
    st.sampled_from(["42", "3.5", "नमस्ते", "EUR .", "final answer", "user"]),
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("templates")
    return {name: load_tokenizer(write_tokenizer(folder / name, family)) for name, family in FAMILIES.items()}


def with_template(tokenizer: Any, template: str) -> Any:
    """The same tokenizer with another template."""
    return load_tokenizer(Path(tokenizer.path), chat_template=template)


def rendered(asked: Example, tokenizer: Any) -> str:
    text = tokenizer.apply_chat_template([dict(m) for m in asked.messages or ()], tokenize=False)
    return re.sub(r"\d{4}-\d\d-\d\d", f"{TODAY:%Y-%m-%d}", text)


def generated(asked: Example, tokenizer: Any) -> str:
    """What greedy decoding reads off a model that writes exactly what it was trained on."""
    encoded, how = encode(asked, tokenizer), decoding(asked, tokenizer)
    assert how.prompt == encode_prompt(asked, tokenizer) == encoded.ids[: encoded.prompt_length]
    trained = encoded.ids[encoded.prompt_length :]
    assert [n for n, token in enumerate(trained) if token in how.stops] == [len(trained) - 1], (
        "it stops, and only at the end"
    )
    return how.answer(trained[:-1], tokenizer)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=12)
@given(question=words, answer=answers)
def test_what_is_trained_is_right(tokenizers: dict[str, Any], name: str, question: str, answer: str) -> None:
    tokenizer, family = tokenizers[name], FAMILIES[name]
    systems: list[tuple[str, ...]] = [(), ("system",)] if family.system else [()]
    for roles in systems:
        for before in ((question,), ("one ?", "yes", question)):
            asked = chat(answer, *before)
            assert asked.messages is not None
            asked = replace(
                asked, messages=(*({"role": role, "content": "Be right."} for role in roles), *asked.messages)
            )
            assert is_correct(generated(asked, tokenizer), answer, "en")
            check_examples([asked], tokenizer)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_ids_are_the_rendered_text_up_to_the_end_of_the_turn(
    tokenizers: dict[str, Any], name: str
) -> None:
    tokenizer, family = tokenizers[name], FAMILIES[name]
    asked = chat("EUR", "Which ?", "EUR", "What is the currency of AT ?")
    encoded = encode(asked, tokenizer)
    text = "".join(rendered(asked, tokenizer).split())
    if family.end not in text:
        text = text + family.end
    trained = tokenizer.detokenize(encoded.ids[encoded.prompt_length :])
    assert text[: text.rindex(family.end)] + family.end == "".join(
        tokenizer.detokenize(encoded.ids).split()
    ), "one BOS, nothing after"
    assert trained.endswith(family.end)
    assert trained.strip().startswith(
        family.lead.strip() + ("\n\n" if family.lead.endswith("\n") else "") + "EUR"
    )
    assert tokenizer.detokenize(encoded.ids[-1:]) == family.end
    assert decoding(asked, tokenizer).stops == {tokenizer.eod, encoded.ids[-1]}


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_without_the_lead_is_right_and_one_with_more_words_is_wrong(
    tokenizers: dict[str, Any], name: str
) -> None:
    tokenizer = tokenizers[name]
    asked = chat("EUR", "What is the currency of AT ?")
    how = decoding(asked, tokenizer)
    assert is_correct(
        how.answer(tokenizer.tokenize("EUR")[bool(FAMILIES[name].bos) :], tokenizer), "EUR", "en"
    )
    longer = encode(chat("EUR and more", "What is the currency of AT ?"), tokenizer)
    assert not is_correct(how.answer(longer.ids[longer.prompt_length : -1], tokenizer), "EUR", "en")


@pytest.mark.parametrize("name", FAMILIES)
def test_choices_and_lengths_go_the_same_way(tokenizers: dict[str, Any], name: str) -> None:
    tokenizer = tokenizers[name]
    asked = chat("no", "yes ?", choices=("yes", "no", "perhaps"))
    encoded = encode_choices(asked, tokenizer)
    assert encoded[1] == encode(asked, tokenizer)
    assert [encode(chat(choice, "yes ?"), tokenizer) for choice in ("yes", "no", "perhaps")] == encoded
    check_examples([asked], tokenizer)
    assert encode_answer(asked, tokenizer) == encoded[1]


@pytest.mark.parametrize("name", ["mistral", "qwen3-base"])
@given(prompt=words, response=words)
def test_prompt_and_response_are_encoded_as_without_a_template(
    tokenizers: dict[str, Any], name: str, prompt: str, response: str
) -> None:
    tokenizer = tokenizers[name]
    ids, bos = tokenizer.tokenize, int(FAMILIES[name].bos is not None)
    plain = example(prompt=prompt, response=response)
    assert encode(plain, tokenizer).ids == [*ids(prompt), *ids(response)[bos:], tokenizer.eod]
    how = decoding(plain, tokenizer)
    assert (how.prompt, how.stops) == (ids(prompt), {tokenizer.eod})
    assert how.answer(ids(response)[bos:], tokenizer) == tokenizer.detokenize(ids(response)[bos:])
    assert len(encode_answer(plain, tokenizer).ids) == len(ids(prompt)) + len(ids(response)) - bos + 1


def test_sentencepiece_ends_the_turn_with_a_piece_or_with_text(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    for apart, end in (("", "</s>"), (("<|im_start|>", "<|im_end|>"), "<|im_end|>")):
        path.write_bytes(train_tokenizer(TEXT, 420, apart=apart))  # type: ignore[arg-type]
        tokenizer = load_tokenizer(path, "sentencepiece", chat_template=CHATML)
        for answer in ("EUR", " no, perhaps\n", "٣", "a<b|c"):
            asked = chat(answer, "What is one ?")
            assert is_correct(generated(asked, tokenizer), answer, "en")
            check_examples([asked], tokenizer)
        last = encode(chat("EUR", "What is one ?"), tokenizer).ids[-1]
        assert tokenizer._tokenizer.ids_to_tokens([last]) == [end]


def refusal(tokenizer: Any, *examples: Example) -> str:
    with pytest.raises(RamoeError) as error:
        check_examples(examples, tokenizer)
    return str(error.value)


def test_a_template_that_raises_is_told_with_its_own_words(tokenizers: dict[str, Any]) -> None:
    good = chat("no", "one ?", id="q1")
    system = replace(
        good,
        id="q7",
        language="hi",
        messages=({"role": "system", "content": "Be kind."}, *(good.messages or ())),
    )
    told = refusal(tokenizers["gemma"], good, system)
    assert re.match("id 'q7', language 'hi'.*roles system, user.*System role not supported", told), told
    twice = chat("no", "one ?", "two ?", roles=("user", "user"), id="q8")
    assert re.match("id 'q8'.*user, user.*Roles must alternate", refusal(tokenizers["mistral"], good, twice))
    assert re.match(
        "id 'q1'.*No channel in the content", refusal(tokenizers["gpt-oss"], chat("a<|channel|>b", "one ?"))
    )
    for broken in ("{% if %}", "{{ messages[0].content + 1 }}"):
        assert re.match(
            "id 'q1', language 'en': the chat template",
            refusal(with_template(tokenizers["chatml"], broken), good),
        )


@pytest.mark.parametrize(
    ("template", "answer", "words"),
    [
        (ROLES.replace("m.content", "m.content|upper"), "no", "nowhere"),
        (ROLES.replace("m.content", "m.content + m.content"), "no", "more than once"),
        (ROLES.replace("m.content", "m.content|replace('o', '0')"), "no", "nowhere"),
        (
            ROLES.replace("m.content", "m.content|replace('y', '')"),
            "yes",
            "gives the answer ' es', but the answer in the data is 'yes'",
        ),
        (
            CHATML.replace("'<|im_end|>\n'", "('?' if 'z' in m.content else '<|im_end|>')"),
            "zero",
            "ends the last turn with",
        ),
        (CHATML, "a<|im_end|>b", "ends with '<|im_end|>'.*before that"),
        (CHATML, "a</s>b", "ends with '<|im_end|>'.*before that"),
        (ROLES, "a</s>b", "ends with '</s>'.*before that"),
        (ROLES.replace("'\n'", "' over'"), "it is over now", "gives the answer 'it is ', but"),
        (
            CHATML.replace("m.role +", "('analysis<|im_end|>' if loop.last else m.role) +"),
            "no",
            "start of the response is unknown",
        ),
        (
            CHATML.replace(
                "'\n' + m.content", "'\n' + ('a<|im_end|>' if m.role == 'assistant' else '') + m.content"
            ),
            "no",
            "before that",
        ),
    ],
)
def test_pairs_that_break_the_law_are_refused(
    tokenizers: dict[str, Any], template: str, answer: str, words: str
) -> None:
    tokenizer = with_template(tokenizers["chatml"], template)
    told = refusal(tokenizer, chat(answer, "one ?", id="q3", language="tr"))
    assert re.match("id 'q3', language 'tr'", told), told
    assert re.search(words, told), told
    assert "`prompt` and `response`" in told


def test_thoughts_in_the_answer_are_kept_or_refused(tokenizers: dict[str, Any]) -> None:
    """A template that rewrites thoughts breaks the law only where the gold answer holds them."""
    tokenizer = tokenizers["qwen3"]
    kept = chat("<think>\nIt is AT.\n</think>\n\nEUR", "Which ?")
    assert is_correct(generated(kept, tokenizer), kept.answer, "en")
    check_examples([kept], tokenizer)
    rewritten = chat("<think>It is AT.</think>EUR", "Which ?")
    assert "the template or the tokenizer changes it" in refusal(tokenizer, rewritten)
    check_examples([replace(rewritten, answer="EUR")], tokenizer)
    check_examples(
        [chat("EUR", "Which ?", "<think>\nNo.\n</think>\n\nyes", "Sure ?")], tokenizer
    )  # stripped in both


def test_choices_that_the_template_writes_alike_are_refused(tokenizers: dict[str, Any]) -> None:
    asked = chat("no", "one ?", choices=("yes", "no ", "no"))
    assert "the same text for the choices ['no ', 'no']" in refusal(tokenizers["gemma"], asked)
    check_examples([asked], tokenizers["chatml"])


def test_a_tokenizer_that_loses_the_answer_is_refused(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {
        word: n
        for n, word in enumerate(
            ["<unk>", "</s>", "<start_of_turn>", "<end_of_turn>", "one", "no", "model", "user"]
        )
    }
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["</s>", "<start_of_turn>", "<end_of_turn>"])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>").save_pretrained(
        tmp_path
    )
    tokenizer = load_tokenizer(tmp_path, chat_template=GEMMA.replace("{{- bos_token -}}", ""))
    check_examples([chat("no", "one")], tokenizer)
    assert "gives the answer '<unk>'" in refusal(tokenizer, chat("perhaps", "one"))


def test_a_prompt_that_has_the_block_already_leads_to_the_answer_alone(tokenizers: dict[str, Any]) -> None:
    with_block, without = (tokenizers[name] for name in ("qwen3-no-thinking", "qwen3-base"))
    assert "BLOCK" in QWEN3
    asked = chat("EUR", "Which ?")
    assert encode(asked, with_block).ids == encode(asked, without).ids
    assert encode(asked, with_block).prompt_length > encode(asked, without).prompt_length
