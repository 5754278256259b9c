"""Laws of encoding, with real tokenizers: border of prompt and response, templates, special tokens."""

import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from data_rows import TEXT, SmallTokenizer, example
from hypothesis import given
from hypothesis import strategies as st

from ramoe_megatron.data.encode import check_tokenizer, encode, encode_choices, encode_prompt, longest_input
from ramoe_megatron.data.tokenizer import train_tokenizer
from ramoe_megatron.errors import RamoeError

TOKENIZER = SmallTokenizer()
MESSAGES = (
    {"role": "system", "content": "one"},
    {"role": "user", "content": "two ?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "three ?"},
    {"role": "assistant", "content": "no perhaps"},
)
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
FORGETFUL = "{{ messages[-1]['role'] }} {{ messages[-1]['content'] }}"
texts = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)


def megatron_tokenizer(path: Path, library: str, **options: Any) -> Any:
    from megatron.core.tokenizers import MegatronTokenizer

    return MegatronTokenizer.from_pretrained(str(path), {"library": library}, **options)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(TEXT, 400))
    return path


@given(texts, texts.filter(bool))
def test_prompt_response_and_one_eod(prompt: str, response: str) -> None:
    encoded = encode(example(prompt=prompt, response=response), TOKENIZER)
    head, tail = encoded.ids[: encoded.prompt_length], encoded.ids[encoded.prompt_length :]
    assert head == encode_prompt(example(prompt=prompt), TOKENIZER)
    assert tail[-1] == TOKENIZER.eod
    assert TOKENIZER.eod not in [*head, *tail[:-1]]
    assert TOKENIZER.detokenize(head) == prompt
    assert TOKENIZER.detokenize(tail[:-1]) == response


@given(texts, st.lists(texts.filter(bool), min_size=2, max_size=4))
def test_choices_share_the_prompt_and_end_as_responses_do(prompt: str, choices: list[str]) -> None:
    asked = example(prompt=prompt, response=choices[0], choices=tuple(choices))
    encoded = encode_choices(asked, TOKENIZER)
    assert encoded[0] == encode(asked, TOKENIZER)
    assert [TOKENIZER.detokenize(e.ids[e.prompt_length : -1]) for e in encoded] == choices
    assert len({(e.prompt_length, *e.ids[: e.prompt_length]) for e in encoded}) == 1
    assert longest_input(encoded) == max(len(e.ids) for e in encoded) - 1


def test_no_choices_is_an_error() -> None:
    with pytest.raises(RamoeError, match="id 'q1', language 'en': no field 'choices'"):
        encode_choices(example(), TOKENIZER)


def test_chat_template_masks_all_but_the_last_turn(model_file: Path) -> None:
    tokenizer = megatron_tokenizer(model_file, "sentencepiece", chat_template=TEMPLATE)
    chat = example(prompt="", response="no perhaps", messages=MESSAGES)
    encoded = encode(chat, tokenizer)
    head, tail = encoded.ids[: encoded.prompt_length], encoded.ids[encoded.prompt_length :]
    assert tokenizer.detokenize(head) == "system: one\nuser: two ?\nassistant: yes\nuser: three ?\nassistant:"
    assert tokenizer.detokenize(tail[:-1]).strip() == "no perhaps"
    assert tail[-1] == tokenizer.eod == TOKENIZER.eod
    assert head == encode_prompt(chat, tokenizer)
    plain = example(prompt="one two ?", response="no")
    assert encode(plain, tokenizer) == encode(plain, TOKENIZER)


def test_chat_choices_replace_the_last_turn(model_file: Path) -> None:
    tokenizer = megatron_tokenizer(model_file, "sentencepiece", chat_template=TEMPLATE)
    chat = example(prompt="", response="yes", messages=MESSAGES, choices=("yes", "no"))
    found = [
        tokenizer.detokenize(e.ids[e.prompt_length : -1]).strip() for e in encode_choices(chat, tokenizer)
    ]
    assert found == ["yes", "no"]


def test_messages_need_a_chat_template_that_only_appends(model_file: Path) -> None:
    chat = example(prompt="", response="no perhaps", messages=MESSAGES)
    for tokenizer in (TOKENIZER, megatron_tokenizer(model_file, "sentencepiece")):
        with pytest.raises(
            RamoeError, match="id 'q1', language 'en' has `messages`, but the tokenizer has no chat"
        ):
            encode(chat, tokenizer)
    with pytest.raises(RamoeError, match="writes the conversation before the last message differently"):
        encode(chat, megatron_tokenizer(model_file, "sentencepiece", chat_template=FORGETFUL))


@pytest.fixture(scope="module")
def wrapping_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Hugging Face tokenizer that writes <s> before and </s> after every text, as many do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *dict.fromkeys(" ".join(TEXT).split()), "a", ":", "<end>"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    folder = tmp_path_factory.mktemp("huggingface")
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    template = TEMPLATE.replace("\n", " </s> \n").replace(":", " :")
    return megatron_tokenizer(folder, "huggingface", chat_template="<s> " + template)


def test_special_tokens_around_a_text_stay_at_the_ends(wrapping_tokenizer: Any) -> None:
    encoded = encode(example(prompt="one two", response="yes no"), wrapping_tokenizer)
    words = wrapping_tokenizer._tokenizer.ids_to_tokens(encoded.ids)
    assert words == ["<s>", "one", "two", "yes", "no", "</s>"]
    assert encoded.prompt_length == 3


def test_chat_template_writes_its_own_special_tokens(wrapping_tokenizer: Any) -> None:
    encoded = encode(example(prompt="", response="no perhaps", messages=MESSAGES), wrapping_tokenizer)
    words = wrapping_tokenizer._tokenizer.ids_to_tokens(encoded.ids)
    assert words[:5] == ["<s>", "system", ":", "one", "</s>"]
    assert words[encoded.prompt_length - 2 :] == ["assistant", ":", "no", "perhaps", "</s>"]


@pytest.mark.parametrize(
    ("library", "told"),
    [
        ("sentencepiece", "has no end token"),
        ("huggingface", "has no end token"),
        ("none", "has no end token"),
        ("null-text", "does not tokenise text"),
    ],
)
def test_a_tokenizer_without_an_end_token_or_without_text_is_refused(
    tmp_path: Path, library: str, told: str
) -> None:
    """Each library has its own way to have no end token: an id of -1, None, and an exception."""
    check_tokenizer(TOKENIZER, "that is whole")
    with pytest.raises(RamoeError, match=f"the tokenizer of the test {told}.*--tokenizer-model"):
        check_tokenizer(without_end(tmp_path, library), "of the test")


def without_end(folder: Path, library: str) -> Any:
    if library == "null-text":
        return megatron_tokenizer(folder, library, vocab_size=9)
    if library == "none":
        from megatron.core.tokenizers.text.libraries.abstract_tokenizer import MegatronTokenizerTextAbstract

        class Bytes(MegatronTokenizerTextAbstract):
            """Of no library: Megatron's own base raises AttributeError."""

            def tokenize(self, text: str) -> list[int]:
                return list(text.encode())

            text_to_tokens = tokens_to_text = tokens_to_ids = ids_to_tokens = text_to_ids = ids_to_text = (
                tokenize
            )
            add_special_tokens = tokenize

        return Bytes()
    if library == "huggingface":
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import Whitespace
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer(WordLevel({"word": 0, "1": 1, "?": 2}, unk_token="?"))
        tokenizer.pre_tokenizer = Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
        return megatron_tokenizer(folder, library)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        eos_id=-1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return megatron_tokenizer(folder / "tokenizer.model", library)
