"""SIB-200 topic classification (Adelani et al., 2023, arXiv 2309.07445) as parallel data with a tokenizer."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ramoe_megatron.artifacts.files import atomic_write, atomic_write_text
from ramoe_megatron.data.benchmarks.declaration import declared
from ramoe_megatron.data.benchmarks.sib200_source import CATEGORIES, Sentence, find_languages, read_split
from ramoe_megatron.data.parallel import write_rows
from ramoe_megatron.data.sampler import named_rng
from ramoe_megatron.data.tokenizer import train_tokenizer
from ramoe_megatron.errors import RamoeError

TASK = declared("sib200").task
_SPLITS = {"train": "train", "dev": "validation", "test": "test"}


@dataclass(frozen=True)
class SibConfig:
    """Options of the conversion of SIB-200 to parallel data."""

    source: str = ""
    """Folder of SIB-200, with one folder per language."""
    languages: tuple[str, ...] = ()
    """Languages to use, by folder name, including the anchor. Empty uses all languages in the folder."""
    anchor: str = "eng_Latn"
    """Anchor language, by folder name."""
    frame: str = "{text} Topic:"
    """Template of the prompt, the same in every language; {text} is replaced by the sentence."""
    seed: int = 1
    """Seed of the choice of the ids for pretraining."""
    pretrain_share: float = 0.6
    """Share of the training ids in split "pretrain": pretraining shows their labels in the anchor language.
    The other ids are split "train", for fine-tuning."""
    target_share: float = 0.1
    """Share of the "pretrain" ids whose labels pretraining shows in a target language. The ids are drawn for
    each language."""
    weight_text: float = 0.5
    """Share of pretraining draws for plain text in all languages."""
    weight_anchor: float = 0.4
    """Share of pretraining draws for the task in the anchor language."""
    weight_target: float = 0.1
    """Share of pretraining draws for the task in the target languages."""
    vocab_size: int = 8000
    """Number of pieces of the tokenizer, which is trained on the training sentences of all languages."""
    max_tokens: int | None = None
    """Maximum length of prompt + choice, in tokens. An id with a longer view in any language is dropped in
    all languages. Default: no maximum."""

    def __post_init__(self) -> None:
        for name in ("pretrain_share", "target_share"):
            if not 0 < getattr(self, name) < 1:
                raise RamoeError(f"{name} is {getattr(self, name)}, expected a share between 0 and 1.")
        if "{text}" not in self.frame:
            raise RamoeError(
                f"frame {self.frame!r} lacks {{text}}, the place of the sentence. Add {{text}} to the frame."
            )


@dataclass(frozen=True)
class SibStats:
    """Counts of a conversion. Lengths are tokens of prompt + longest choice, before any id is dropped."""

    rows: dict[str, int]
    ids: dict[str, int]
    """split -> number of kept ids"""
    dropped: dict[str, int]
    """split -> number of dropped ids, which have a view longer than ``max_tokens``"""
    lengths: dict[str, dict[str, float]]
    """language -> mean, 0.95 quantile and longest length, in tokens"""


def convert(config: SibConfig, out: Path) -> SibStats:
    """Writes parallel.jsonl, pretrain.jsonl, general.jsonl, weights.json and tokenizer.model into ``out``.

    - parallel.jsonl: the task "topic" in every language, with the seven categories as choices. The splits are
      pretrain, train, validation (SIB-200's dev) and test.
    - pretrain.jsonl: the training sentences of every language as plain text, and the task rows for
      pretraining.
    - weights.json: the sampling weights of the groups of pretrain.jsonl. The order of the patterns matters.
    - general.jsonl: the training sentences of the anchor language, without labels.

    The bytes depend only on the config, the bytes of the source and the version of SentencePiece.

    Raises:
        RamoeError: a folder, language or file is missing, a line is malformed (the message has the file and
            line), an id has no view in the anchor language or has two categories, or ``max_tokens`` drops
            every id of a split.
    """
    languages = find_languages(config.source, config.languages, config.anchor)
    splits = {name: read_split(config.source, languages, file) for file, name in _SPLITS.items()}
    sentences = [text for s in splits["train"].values() for text in s.texts.values()]
    model = train_tokenizer(
        (config.frame.format(text=text) for text in sentences), config.vocab_size, CATEGORIES
    )
    lengths = _lengths(splits, config, model)
    dropped = _drop_long(splits, lengths, config.max_tokens)
    splits = {"pretrain": {}, **splits}
    for id in _draw(list(splits["train"]), config.pretrain_share, config.seed, "pretrain"):
        splits["pretrain"][id] = splits["train"].pop(id)
    parallel = [
        _task_row(id, language, sentence, config, split)
        for split, members in splits.items()
        for id, sentence in members.items()
        for language in sentence.texts
    ]
    pretrain, general = _pretrain_rows(splits, languages, config)
    for name, rows in (("parallel", parallel), ("pretrain", pretrain), ("general", general)):
        atomic_write_text(out / f"{name}.jsonl", write_rows(rows))
    # A group belongs to the first pattern that matches.
    weights = {
        "text/*": config.weight_text,
        f"*/{config.anchor}": config.weight_anchor,
        "*": config.weight_target,
    }
    atomic_write_text(out / "weights.json", json.dumps(weights, indent=1) + "\n")
    with atomic_write(out / "tokenizer.model") as temporary:
        temporary.write_bytes(model)
    return SibStats(
        rows={"parallel": len(parallel), "pretrain": len(pretrain), "general": len(general)},
        ids={split: len(members) for split, members in splits.items()},
        dropped=dropped,
        lengths=_length_table(lengths),
    )


def _lengths(
    splits: Mapping[str, Mapping[str, Sentence]], config: SibConfig, model: bytes
) -> dict[str, dict[str, int]]:
    """id -> language -> number of tokens of the prompt and the longest choice."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    choice = max(len(processor.encode(category)) for category in CATEGORIES)
    return {
        id: {
            lang: len(processor.encode(config.frame.format(text=text))) + choice
            for lang, text in s.texts.items()
        }
        for members in splits.values()
        for id, s in members.items()
    }


def _drop_long(
    splits: dict[str, dict[str, Sentence]], lengths: Mapping[str, Mapping[str, int]], max_tokens: int | None
) -> dict[str, int]:
    """Removes ids with a view longer than ``max_tokens`` from ``splits``; returns split -> number removed."""
    if max_tokens is None:
        return {split: 0 for split in splits}
    dropped: dict[str, int] = {}
    for split, members in splits.items():
        long = [id for id in members if max(lengths[id].values()) > max_tokens]
        if len(long) == len(members):
            shortest = min(max(lengths[id].values()) for id in members)
            raise RamoeError(
                f"max_tokens {max_tokens} drops all {len(members)} ids of split {split!r}: "
                f"the shortest id needs {shortest} in its longest language. "
                "Raise max_tokens, or leave out the languages with the longest views."
            )
        for id in long:
            del members[id]
        dropped[split] = len(long)
    return dropped


def _length_table(lengths: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, float]]:
    by_language: dict[str, list[int]] = {}
    for views in lengths.values():
        for language, length in views.items():
            by_language.setdefault(language, []).append(length)
    return {
        language: {
            "mean": round(float(np.mean(values)), 1),
            "q95": round(float(np.quantile(values, 0.95)), 1),
            "longest": max(values),
        }
        for language, values in by_language.items()
    }


def _pretrain_rows(
    splits: Mapping[str, Mapping[str, Sentence]], languages: Sequence[str], config: SibConfig
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of pretrain.jsonl and of general.jsonl."""
    seen = splits["pretrain"]
    training = {**seen, **splits["train"]}
    pretrain = [
        _text_row(id, language, "text", sentence.texts[language])
        for language in languages
        for id, sentence in training.items()
        if language in sentence.texts
    ]
    for language in languages:
        anchor = language == config.anchor
        for id in seen if anchor else _draw(list(seen), config.target_share, config.seed, language):
            if language in seen[id].texts:
                pretrain.append(_task_row(id, language, seen[id], config, "train"))
    general = [_text_row(id, config.anchor, "general", s.texts[config.anchor]) for id, s in training.items()]
    return pretrain, general


def _draw(ids: list[str], share: float, seed: int, name: str) -> list[str]:
    """A seeded random share of the ids, at least one id, in their original order."""
    return [
        ids[i] for i in sorted(named_rng(seed, name).permutation(len(ids))[: max(1, round(len(ids) * share))])
    ]


def _task_row(id: str, language: str, sentence: Sentence, config: SibConfig, split: str) -> dict[str, Any]:
    return {
        "id": f"{TASK}-{id}",
        "language": language,
        "task": TASK,
        "prompt": config.frame.format(text=sentence.texts[language]),
        "response": sentence.category,
        "answer": sentence.category,
        "choices": list(CATEGORIES),
        "split": split,
    }


def _text_row(id: str, language: str, task: str, text: str) -> dict[str, Any]:
    return {
        "id": f"{task}-{id}",
        "language": language,
        "task": task,
        "prompt": "",
        "response": text,
        "split": "train",
    }
