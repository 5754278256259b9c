"""Building the embedded world: a small multilingual data set and its tokenizer, without a download."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ramoe_megatron.artifacts.files import atomic_write, atomic_write_text
from ramoe_megatron.data.parallel import write_rows
from ramoe_megatron.data.sampler import named_rng
from ramoe_megatron.data.tokenizer import train_tokenizer
from ramoe_megatron.data.world.facts import TASKS, Fact, facts, questions
from ramoe_megatron.data.world.text import codes, list_rows, name_rows
from ramoe_megatron.errors import RamoeError

ANCHOR = "en"
PUNCTUATION = "?؟.,:،।"


@dataclass(frozen=True)
class WorldConfig:
    """Options of the embedded world. Shares are shares of the facts of each task, in [0, 1]."""

    seed: int = 1
    """Seed of the splits, the phrasings and the held-out facts."""
    tasks: list[str] = field(default_factory=lambda: [*TASKS])
    """Tasks of the world: currency, language and continent of a territory, and month arithmetic."""
    target_shares: dict[str, float] = field(
        default_factory=lambda: {"es": 0.20, "tr": 0.14, "fi": 0.10, "sw": 0.07, "ar": 0.05, "hi": 0.035}
    )
    """Target language -> share of the facts that pretraining shows in this language. The facts are from split
    "pretrain"."""
    pretrain_share: float = 0.25
    """Share of the facts in split "pretrain", which pretraining may show in the target languages."""
    finetune_share: float = 0.30
    """Share of the facts for fine-tuning, in splits "train" and "validation". The remaining facts are split
    "test"."""
    train_per_pair: int = 16
    """Number of facts of each task in split "train", the same facts in every language. Split "validation" has
    the remaining facts of finetune_share."""
    english_held_out: float = 0.10
    """Share of splits "train", "validation" and "test" that pretraining does not show in English."""
    weight_english: float = 0.40
    """Share of pretraining draws for the tasks in English."""
    weight_names: float = 0.40
    """Share of pretraining draws for code-name pairs in all languages."""
    weight_lists: float = 0.15
    """Share of pretraining draws for ordered lists in all languages."""
    weight_target: float = 0.05
    """Share of pretraining draws for the tasks in the target languages."""
    vocab_size: int = 3000
    """Number of pieces of the tokenizer."""
    max_tokens: int = 24
    """Maximum length of prompt + response, in tokens. Longer names and lists are left out; a longer question
    is an error."""
    general_rows: int = 600
    """Maximum number of rows of general English text."""

    def __post_init__(self) -> None:
        if not self.tasks or not {*self.tasks} <= {*TASKS}:
            raise RamoeError(f"tasks: {', '.join(self.tasks) or 'none'}. Known: {', '.join(TASKS)}.")
        for language in self.target_shares:
            if language == ANCHOR or language not in questions()[TASKS[0]]:
                known = ", ".join(sorted(set(questions()[TASKS[0]]) - {ANCHOR}))
                raise RamoeError(f"target_shares: unknown target language {language!r}. Known: {known}.")
        for name, share in (*self.target_shares.items(), ("english_held_out", self.english_held_out)):
            if not 0 <= share <= 1:
                raise RamoeError(f"share of {name} is {share}, expected 0 to 1.")
        if max(self.target_shares.values(), default=0) > self.pretrain_share:
            raise RamoeError(
                f"a target share is above pretrain_share {self.pretrain_share}, "
                "but the facts of a target language are drawn from split 'pretrain'. "
                "Lower the target share or raise pretrain_share."
            )
        if self.pretrain_share + self.finetune_share >= 1:
            raise RamoeError("pretrain_share and finetune_share leave no facts for the test split.")


@dataclass(frozen=True)
class WorldStats:
    """Counts of a built world: rows by file, facts by split, dropped rows, lengths of prompt + response."""

    rows: dict[str, int]
    facts: dict[str, dict[str, int]]
    """task -> split -> number of facts"""
    dropped: int
    """Number of names and lists longer than ``max_tokens``."""
    lengths: dict[str, dict[str, float]]
    """"TASK/LANGUAGE" -> mean and longest length, in tokens"""


def build_world(config: WorldConfig, out: Path) -> WorldStats:
    """Writes parallel.jsonl, pretrain.jsonl, general.jsonl, weights.json and tokenizer.model into ``out``.

    The bytes depend only on the config and on the versions of Babel and SentencePiece.

    - parallel.jsonl: every fact in every language, with its split. Each fact has one phrasing, the same in
      every language.
    - pretrain.jsonl: the tasks in English and, in part, in the target languages, in every phrasing; code-name
      pairs; ordered lists.
    - weights.json: the sampling weights of the groups of pretrain.jsonl. The order of the patterns matters.
    - general.jsonl: English text without the tasks.

    Raises:
        RamoeError: a question is longer than ``max_tokens``, or the vocabulary does not fit the text.
    """
    languages = [ANCHOR, *config.target_shares]
    parallel: list[dict[str, Any]] = []
    pretrain: list[dict[str, Any]] = []
    for task in config.tasks:
        splits = _split(task, config)
        parallel += _parallel_rows(task, splits, languages, config.seed)
        pretrain += _task_rows(task, splits, config)
    other = [row for language in languages for rows in (name_rows, list_rows) for row in rows(language)]
    model = train_tokenizer(
        _tokenizer_text(parallel + pretrain, other), config.vocab_size, codes(), PUNCTUATION
    )
    lengths = _Lengths(model)
    kept = [row for row in other if lengths(row) <= config.max_tokens]
    pretrain += [{**row, "answer": row["response"], "split": "train"} for row in kept]
    longest = max(parallel + pretrain, key=lengths)
    if lengths(longest) > config.max_tokens:
        raise RamoeError(
            f"the question {longest['prompt']!r} has {lengths(longest)} tokens with its answer, "
            f"more than max_tokens {config.max_tokens}. Raise max_tokens or vocab_size."
        )
    general = _general_rows(kept, config)
    for name, rows in (("parallel", parallel), ("pretrain", pretrain), ("general", general)):
        atomic_write_text(out / f"{name}.jsonl", write_rows(rows))
    # A group belongs to the first pattern that matches.
    weights = {
        "names/*": config.weight_names,
        "lists/*": config.weight_lists,
        f"*/{ANCHOR}": config.weight_english,
        **(
            {"*": config.weight_target}
            if any(r["task"] in config.tasks and r["language"] != ANCHOR for r in pretrain)
            else {}
        ),
    }
    atomic_write_text(out / "weights.json", json.dumps(weights, indent=1) + "\n")
    with atomic_write(out / "tokenizer.model") as temporary:
        temporary.write_bytes(model)
    counts: dict[str, dict[str, int]] = {task: {} for task in config.tasks}
    for (task, split), count in Counter(
        (r["task"], r["split"]) for r in parallel if r["language"] == ANCHOR
    ).items():
        counts[task][split] = count
    return WorldStats(
        rows={"parallel": len(parallel), "pretrain": len(pretrain), "general": len(general)},
        facts=counts,
        dropped=len(other) - len(kept),
        lengths=lengths.table(parallel),
    )


def _split(task: str, config: WorldConfig) -> dict[str, list[Fact]]:
    """split -> its sorted facts. Extra keys: "held out" (of English pretraining) and the target languages."""
    all_facts = facts(task)
    rng = named_rng(config.seed, task)
    shuffled = [all_facts[i] for i in rng.permutation(len(all_facts))]
    first, second = (round(len(shuffled) * share) for share in (config.pretrain_share, config.finetune_share))
    pool, finetune, test = shuffled[:first], shuffled[first : first + second], shuffled[first + second :]
    if len(finetune) < config.train_per_pair:
        raise RamoeError(
            f"train_per_pair is {config.train_per_pair}, but task {task!r} has {len(finetune)} facts for "
            "fine-tuning. Lower train_per_pair or raise finetune_share."
        )
    splits = {
        "pretrain": pool,
        "train": finetune[: config.train_per_pair],
        "validation": finetune[config.train_per_pair :],
        "test": test,
    }
    held_out: list[Fact] = []
    for name in ("train", "validation", "test"):
        count = round(len(splits[name]) * config.english_held_out)
        held_out += [splits[name][i] for i in rng.permutation(len(splits[name]))[:count]]
    splits["held out"] = held_out
    for language, share in config.target_shares.items():
        chosen = named_rng(config.seed, f"{task}/{language}").permutation(len(pool))[
            : round(len(all_facts) * share)
        ]
        splits[language] = [pool[i] for i in chosen]
    return {name: sorted(members, key=lambda fact: fact.key) for name, members in splits.items()}


def _parallel_rows(
    task: str, splits: dict[str, list[Fact]], languages: Sequence[str], seed: int
) -> list[dict[str, Any]]:
    rows = []
    for split in ("pretrain", "train", "validation", "test"):
        for fact in splits[split]:
            frames = {language: questions()[task][language] for language in languages}
            phrasing = int(named_rng(seed, f"{task}-{fact.key}").integers(len(frames[ANCHOR])))
            for language in languages:
                rows.append(_row(fact, f"{task}-{fact.key}", language, frames[language][phrasing], split))
    return rows


def _task_rows(task: str, splits: dict[str, list[Fact]], config: WorldConfig) -> list[dict[str, Any]]:
    """Pretraining rows: the facts that pretraining shows in each language, in every phrasing."""
    held_out = set(splits["held out"])
    english = [fact for name in ("pretrain", "train", "validation", "test") for fact in splits[name]]
    shown = {ANCHOR: [fact for fact in english if fact not in held_out]}
    shown |= {language: splits[language] for language in config.target_shares}
    return [
        _row(fact, f"{task}-{fact.key}#{number}", language, frame, "train")
        for language, members in shown.items()
        for fact in members
        for number, frame in enumerate(questions()[task][language])
    ]


def _general_rows(kept: list[dict[str, Any]], config: WorldConfig) -> list[dict[str, Any]]:
    english = [row for row in kept if row["language"] == ANCHOR]
    chosen = sorted(named_rng(config.seed, "general").permutation(len(english))[: config.general_rows])
    rows = []
    for row in (english[i] for i in chosen):
        text = f"{row['prompt']} {row['response']}"
        rows.append(
            {**row, "task": "general", "prompt": "", "response": text, "answer": text, "split": "train"}
        )
    return rows


def _tokenizer_text(questions_: Iterable[dict[str, Any]], other: Iterable[dict[str, Any]]) -> Iterable[str]:
    # The parallel rows have equally many questions in every language, so every language gets whole words.
    for row in questions_:
        yield row["prompt"]
    for row in other:
        yield row["prompt"]
        yield row["response"]


def _row(fact: Fact, id: str, language: str, frame: str, split: str) -> dict[str, Any]:
    return {
        "id": id,
        "language": language,
        "task": fact.task,
        "prompt": frame.format(**dict(fact.slots)),
        "response": fact.answer,
        "answer": fact.answer,
        "split": split,
    }


class _Lengths:
    """Number of tokens of prompt + response of a row, with a tokenizer model."""

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    def __call__(self, row: dict[str, Any]) -> int:
        return len(self._processor.encode(row["prompt"])) + len(self._processor.encode(row["response"]))

    def table(self, rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
        groups: dict[str, list[int]] = {}
        for row in rows:
            groups.setdefault(f"{row['task']}/{row['language']}", []).append(self(row))
        return {
            name: {"mean": round(float(np.mean(group)), 2), "longest": max(group)}
            for name, group in groups.items()
        }
