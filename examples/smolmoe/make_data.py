"""Write parallel questions in English and Spanish, and general English text.

    python examples/smolmoe/make_data.py --out runs/smolmoe-data

The questions are facts of Unicode CLDR, which the library Babel ships: the continent and the official
language of a territory. Questions and answers have names, not codes. The general text is this repository's
licence.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from babel import Locale

from ramoe_megatron.artifacts.files import atomic_write_text
from ramoe_megatron.data.parallel import write_rows
from ramoe_megatron.data.sampler import named_rng
from ramoe_megatron.data.world.facts import facts, questions

LANGUAGES = ("en", "es")
ANSWERS = {"continent": ("002", "019", "142", "150"), "language": ("ar", "en", "es", "fr")}
"""Task -> the answers to choose from, as codes of CLDR. Each is the answer of equally many questions."""
COUNTS = {"train": 3, "test": 4}
"""Split -> questions of each answer."""
WORDS = 25
"""Words of a row of general text."""
SEED = 1


def main() -> None:
    """Write parallel.jsonl and general.jsonl into the folder."""
    parser = argparse.ArgumentParser(prog="make_data.py")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    out = parser.parse_args().out
    for name, rows in (("parallel", list(parallel_rows())), ("general", list(general_rows()))):
        atomic_write_text(out / f"{name}.jsonl", write_rows(rows))
        print(f"{out / name}.jsonl: {len(rows)} rows")


def parallel_rows() -> Iterator[dict[str, Any]]:
    """The rows of each question in each language, as chats with four choices."""
    for task, answers in ANSWERS.items():
        known = facts(task)
        drawn = [known[place] for place in named_rng(SEED, task).permutation(len(known))]
        for answer in answers:
            members = iter([fact for fact in drawn if fact.answer == answer])
            for split, count in COUNTS.items():
                for _, fact in zip(range(count), members, strict=False):
                    for language in LANGUAGES:
                        yield _row(task, fact.key, answer, answers, language, split)


def _row(
    task: str, key: str, answer: str, answers: tuple[str, ...], language: str, split: str
) -> dict[str, Any]:
    locale = Locale(language)
    names = locale.territories if task == "continent" else locale.languages
    question = questions()[task][language][0].format(key=locale.territories[key])
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": names[answer]}]
    choices = [names[code] for code in answers]
    same = {"id": f"{task}-{key}", "language": language, "task": task, "split": split}
    return same | {"messages": turns, "choices": choices}


def general_rows() -> Iterator[dict[str, Any]]:
    """The licence in rows of plain text."""
    words = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8").split()
    for first in range(0, len(words), WORDS):
        text = " ".join(words[first : first + WORDS])
        same = {"id": f"licence-{first}", "language": "en", "task": "general", "split": "train"}
        yield same | {"prompt": "", "response": text}


if __name__ == "__main__":
    main()
