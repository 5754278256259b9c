"""Chat templates in the form of well-known models, each with a small tokenizer with its special tokens."""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
from data_rows import TEXT, example

from ramoe_megatron.data.parallel import Example

CHATML = """{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""
QWEN2 = (
    "{%- if messages[0].role != 'system' -%}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{%- endif -%}"
    + CHATML
)
QWEN3 = """{%- set ns = namespace(query=0) -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{%- set ns.query = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- set parts = m.content.split('</think>') -%}
{%- if m.role != 'assistant' -%}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- elif loop.index0 > ns.query and loop.last -%}
{%- set thought = parts[0].split('<think>')[-1].strip('\n') if parts|length > 1 else '' -%}
{{ '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n'
   + parts[-1].lstrip('\n') + '<|im_end|>\n' }}
{%- else -%}
{{ '<|im_start|>assistant\n' + parts[-1].lstrip('\n') + '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}
{%- if BLOCK -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}{%- endif -%}"""
LLAMA3 = """{{- bos_token -}}
{%- for m in messages -%}
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content|trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"""
MISTRAL = """{{- bos_token -}}
{%- for m in messages -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Roles must alternate user and assistant') }}
{%- endif -%}
{%- if m.role == 'user' -%}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- else -%}{{ ' ' + m.content + eos_token }}{%- endif -%}
{%- endfor -%}"""
PHI = """{%- for m in messages -%}
{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- else -%}{{ eos_token }}{%- endif -%}"""
GPT_OSS = """{{- '<|start|>system<|message|>Date: ' + strftime_now('%Y-%m-%d')
    + '. Channels: analysis, final.<|end|>' -}}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- if '<|channel|>' in m.content -%}{{ raise_exception('No channel in the content') }}{%- endif -%}
{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}
{%- if loop.last and not add_generation_prompt -%}{{ '<|return|>' }}{%- else -%}{{ '<|end|>' }}{%- endif -%}
{%- else -%}
{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start|>assistant' }}{%- endif -%}"""
GEMMA = """{{- bos_token -}}
{%- if messages[0].role == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}
{%- for m in messages -%}
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n'
   + m.content|trim + '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""
LLAMA2 = """{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ bos_token + '[INST] ' + m.content|trim + ' [/INST]' }}
{%- else -%}{{ ' ' + m.content|trim + ' ' + eos_token }}{%- endif -%}
{%- endfor -%}"""
MIXTRAL = MISTRAL.replace("'[INST] '", "' [INST] '")
OLMOE = """{{- eos_token -}}
{%- for m in messages -%}
{{ '<|' + m.role + '|>\n' + m.content }}
{%- if m.role == 'assistant' -%}{{ eos_token }}{%- endif -%}
{%- if not loop.last or add_generation_prompt -%}{{ '\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- endif -%}"""
ROLES = """{%- for m in messages -%}{{ m.role + ': ' + m.content + '\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'assistant:' }}{%- endif -%}"""
SIGNED = ROLES.replace("m.content + '\\n'", "m.content + '\n-- END --\n'")
TWO_ENDS = LLAMA3.replace(
    "'<|eot_id|>'", "'<|eot_id|>' + (eos_token if loop.last and not add_generation_prompt else '')"
)


@dataclass(frozen=True)
class Family:
    """A template and the special tokens of its tokenizer."""

    template: str
    special: tuple[str, ...]
    """Tokens of the tokenizer that the template writes."""
    eos: str
    end: str
    """The token that ends the assistant's turn: decoding has to stop at it."""
    lead: str = ""
    """What the template writes before the answer, after its generation prompt."""
    bos: str | None = None
    """With one, the tokenizer writes it before every text."""
    system: bool = True
    """Whether the template takes a system message."""
    metaspace: bool = False
    """A tokenizer of Llama's form: a space before every text, BPE without other splits, byte fallback."""


IM = ("<|im_start|>", "<|im_end|>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
HARMONY = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>")
PHI_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
"""They take the white space after them."""
BLOCK = "<think>\n\n</think>\n\n"
FAMILIES = {
    "qwen2.5": Family(QWEN2, IM, "<|im_end|>", "<|im_end|>"),
    "qwen2.5-base": Family(QWEN2, IM, "<|endoftext|>", "<|im_end|>"),
    "qwen3": Family(
        QWEN3.replace("BLOCK", "false"), (*IM, "<think>", "</think>"), "<|im_end|>", "<|im_end|>", BLOCK
    ),
    "qwen3-base": Family(
        QWEN3.replace("BLOCK", "false"), (*IM, "<think>", "</think>"), "<|endoftext|>", "<|im_end|>", BLOCK
    ),
    "qwen3-no-thinking": Family(
        QWEN3.replace("BLOCK", "true"), (*IM, "<think>", "</think>"), "<|endoftext|>", "<|im_end|>"
    ),
    "qwen3-block-in-pieces": Family(
        QWEN3.replace("BLOCK", "false"), IM, "<|endoftext|>", "<|im_end|>", BLOCK
    ),
    "llama3": Family(LLAMA3, HEADERS, "<|end_of_text|>", "<|eot_id|>", bos="<|begin_of_text|>"),
    "llama3-two-ends": Family(
        TWO_ENDS, HEADERS, "<|end_of_text|>", "<|end_of_text|>", bos="<|begin_of_text|>"
    ),
    "llama2": Family(LLAMA2, (), "</s>", "</s>", bos="<s>", system=False),
    "mistral": Family(MISTRAL, ("[INST]", "[/INST]"), "</s>", "</s>", bos="<s>", system=False),
    "phi": Family(PHI, PHI_TOKENS, "<|endoftext|>", "<|end|>"),
    "gpt-oss": Family(GPT_OSS, HARMONY, "<|return|>", "<|return|>", "<|channel|>final<|message|>"),
    "gpt-oss-other-eos": Family(
        GPT_OSS, HARMONY, "<|endoftext|>", "<|return|>", "<|channel|>final<|message|>"
    ),
    "mixtral": Family(MIXTRAL, (), "</s>", "</s>", bos="<s>", system=False, metaspace=True),
    "olmoe": Family(OLMOE, (), "<|endoftext|>", "<|endoftext|>"),
    "phi-3.5": Family(PHI, PHI_TOKENS, "<|endoftext|>", "<|end|>", metaspace=True),
    "chatml": Family(CHATML, IM, "</s>", "<|im_end|>", bos="<s>"),
    "chatml-in-pieces": Family(CHATML, (), "</s>", "</s>"),
    "gemma": Family(
        GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<eos>", "<end_of_turn>", bos="<bos>", system=False
    ),
    "no-end": Family(ROLES, (), "</s>", "</s>"),
    "signed": Family(SIGNED, (), "</s>", "</s>"),
}


def write_tokenizer(folder: Path, family: Family, texts: Sequence[str] = TEXT) -> Path:
    """A Hugging Face tokenizer: BPE, trained on `texts`, with the family's tokens and template."""
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    backend = (_metaspace if family.metaspace else _byte_level)(texts)
    thinking = ("<think>", "</think>")  # in Qwen3 these are added tokens that are not special
    backend.add_special_tokens(
        [AddedToken(t, special=True, rstrip=t in PHI_TOKENS) for t in family.special if t not in thinking]
    )
    backend.add_tokens([AddedToken(t, special=False) for t in family.special if t in thinking])
    ends = [token for token in (family.bos, family.eos) if token]
    backend.add_special_tokens(ends)
    if family.bos:
        bos = (family.bos, backend.token_to_id(family.bos))
        backend.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[bos]
        )
    names = {"eos_token": family.eos, **({"bos_token": family.bos} if family.bos else {})}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    made.chat_template = family.template
    made.save_pretrained(folder)
    return folder


def _byte_level(texts: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _metaspace(texts: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    found = json.loads(learned.to_str())["model"]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *found["vocab"]]
    backend = Tokenizer(
        models.BPE(
            {piece: n for n, piece in enumerate(pieces)},
            [tuple(pair) for pair in found["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def write_sentencepiece(path: Path, control: Sequence[str] = (), own: Sequence[str] = ()) -> Path:
    """A SentencePiece model with control symbols, which it reads in no text, and symbols that it reads."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=list(control),
        user_defined_symbols=list(own),
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path


TIKTOKEN_SPECIAL = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")


def write_tiktoken(path: Path) -> int:
    """A vocabulary of Megatron's TikTokenizer: all bytes, and words of TEXT by growing beginnings.

    Returns:
        The number of tokens.
    """
    words = dict.fromkeys(f" {word}".encode() for text in TEXT for word in text.split())
    grown = dict.fromkeys(part for word in words for n in range(2, len(word) + 1) for part in (word[:n],))
    tokens = [*(bytes([byte]) for byte in range(256)), *grown]
    path.write_text(
        json.dumps(
            [
                {"rank": n, "token_bytes": base64.b64encode(token).decode(), "token_str": repr(token)}
                for n, token in enumerate(tokens)
            ]
        )
    )
    return len(tokens)


def load_tokenizer(folder: Path, library: str = "huggingface", **options: Any) -> Any:
    """Megatron's tokenizer of that library."""
    from megatron.core.tokenizers import MegatronTokenizer

    return MegatronTokenizer.from_pretrained(str(folder), {"library": library}, **options)


def chat(answer: str, *before: str, roles: Sequence[str] = ("user", "assistant"), **changes: Any) -> Example:
    """A conversation that ends with the answer, after messages in turns of which the user has the last."""
    turns = [{"role": roles[(len(before) - n - 1) % 2], "content": text} for n, text in enumerate(before)]
    messages = (*turns, {"role": "assistant", "content": answer})
    return example(prompt="\n".join(before), response=answer, messages=messages, **changes)
