"""Whether a generated answer is right, by the metric of its example.

- None: the whole answer equals the gold answer (`data.answers`).
- "number": the number after the last marker of an answer in the language ("the answer is", "Antwort:",
  "####") is the gold number (Shi et al., 2022, arXiv 2210.03057). Without a marker, the last number of the
  text counts, which is our reading.
- "exact": the answer is one of the gold answers without punctuation, case and English articles, as by
  SQuAD's exact match (Rajpurkar et al., 2016, arXiv 1606.05250).
- "ifeval": the text follows all instructions, strictly, by the checkers of lm-evaluation-harness (Zhou et
  al., 2023, arXiv 2311.07911). The gold answer is a JSON object with IFEval's columns.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from decimal import Decimal
from functools import cache
from typing import Any

from ramoe_megatron.data.answers import DECIMAL_MARK, language_code, normalise_answer
from ramoe_megatron.data.answers import is_correct as equals_answer
from ramoe_megatron.data.parallel import Example
from ramoe_megatron.data.words import words_of
from ramoe_megatron.errors import RamoeError

GSM8K_MARKER = "####"
_NUMBER = re.compile(
    rf"(?:(?<![0-9a-z){DECIMAL_MARK}%$€])-)?(?<![0-9a-z{DECIMAL_MARK}])[0-9]+({DECIMAL_MARK}[0-9]+)?"
)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_SPACES = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
"""Characters of scripts that do not write spaces between words: Thai, Lao, Burmese, Khmer, kana, Han."""
_TOKEN = re.compile(rf"[{_NO_SPACES}]|[^\s{_NO_SPACES}]+")
INSTALL_IFEVAL = "pip install 'lm-eval[ifeval]'"


def grade(example: Example, generated: str) -> bool:
    """Whether a generated text is a right answer to the example, by the example's metric.

    Raises:
        RamoeError: the metric is "ifeval" and `ungradable` has a reason.
    """
    if example.metric == "number":
        found = answer_number(generated, example.language)
        return found is not None and found == answer_number(example.answer, example.language)
    if example.metric == "exact":
        written = _squad_form(generated, example.language)
        return any(written == _squad_form(gold, example.language) != "" for gold in _golds(example))
    if example.metric == "ifeval":
        if reason := ungradable(example):
            raise RamoeError(f"{example.place or example.id}: {reason}")
        return _follows(json.loads(example.answer), generated)
    return equals_answer(generated, example.answer, example.language)


def answer_number(text: str, language: str) -> Decimal | None:
    """The number that a text gives as its answer; None without a number.

    Numbers are read as by `normalise_answer`: digits of all scripts, and the marks of the language. A hyphen
    is a sign unless a number, a letter or a bracket is before it: "16-3" has the numbers 16 and 3.
    """
    plain = normalise_answer(text, language)
    ends = [found.end() for marker in _markers(language) for found in marker.finditer(plain)]
    found = _NUMBER.search(plain, max(ends)) if ends else None
    last = found or next(reversed(list(_NUMBER.finditer(plain))), None)
    return Decimal(last[0].replace(DECIMAL_MARK, ".")) if last else None


def answer_f1(example: Example, generated: str) -> float:
    """SQuAD's F1 of a generated text: the overlap of its words with the nearest gold answer, in [0, 1].

    Each character of a script without spaces counts as a word, as in MLQA (Lewis et al., 2020, arXiv
    1910.07475). Reports hold exact match alone, because the jobs share one right or wrong for each example.
    """
    written = _TOKEN.findall(_squad_form(generated, example.language))
    golds = (_TOKEN.findall(_squad_form(gold, example.language)) for gold in _golds(example))
    return max(_overlap(written, gold) for gold in golds)


def ungradable(example: Example) -> str | None:
    """Why no answer to the example can be graded; None if answers can be graded."""
    if example.metric == "number":
        number = answer_number(example.answer, example.language)
        return None if number is not None else "the gold answer has no number, and the metric is 'number'"
    if example.metric != "ifeval":
        return None
    try:
        given = json.loads(example.answer)
        wanted = [str(name) for name in given["instruction_id_list"]]
        sound = len(given["kwargs"]) == len(wanted) and isinstance(given["prompt"], str)
    except (ValueError, TypeError, KeyError):
        sound = False
    if not sound:
        return "the answer is no JSON object with prompt, instruction_id_list and as many kwargs"
    try:
        known, _ = _checker(_prefix(wanted))
    except RamoeError as error:
        return str(error)
    missing = [name for name in wanted if _bare(name) not in known]
    return f"the installed lm-eval has no checker of the instruction {missing[0]}" if missing else None


def _golds(example: Example) -> tuple[str, ...]:
    return example.answers or (example.answer,)


@cache
def _markers(language: str) -> list[re.Pattern[str]]:
    """Patterns of the markers in normalised text, of the language and of English."""
    found = [re.escape(GSM8K_MARKER)]
    for words in {words_of(language), words_of("en")}:
        found += [re.escape(normalise_answer(phrase, language)) for phrase in words.said]
        found.append(re.escape(normalise_answer(words.answer, language)) + " ?:")
    return [re.compile(pattern) for pattern in found]


def _squad_form(text: str, language: str) -> str:
    plain = normalise_answer(text, language)
    kept = "".join(
        char
        for place, char in enumerate(plain)
        if char == DECIMAL_MARK
        or not unicodedata.category(char).startswith("P")
        or (char == "-" and plain[place + 1 : place + 2].isdecimal() and not plain[:place][-1:].isalnum())
    )
    if language_code(language) == "en":
        kept = _ARTICLES.sub(" ", kept)
    return " ".join(kept.split())


def _overlap(written: list[str], gold: list[str]) -> float:
    same = sum((Counter(written) & Counter(gold)).values())
    return 2 * same / (len(written) + len(gold)) if same else 0.0


# ---- IFEval ----


def _prefix(names: list[str]) -> str:
    """Language of M-IFEval's instructions ("es:keywords:existence"); "en" for IFEval's own names."""
    first = names[0].split(":") if names else []
    return first[0] if len(first) == 3 else "en"


def _bare(name: str) -> str:
    """M-IFEval's English instructions are IFEval's with a prefix."""
    return name.removeprefix("en:")


@cache
def _checker(language: str) -> tuple[Mapping[str, Any], Callable[[Any, str], Any]]:
    """The known instructions of a language, and lm-eval's strict check of an answer.

    Raises RamoeError when lm-eval, or what its checkers need, is not installed.
    """
    try:
        if language == "en":
            from lm_eval.tasks.ifeval import instructions_registry, utils
        else:
            from lm_eval.tasks.ifeval.multilingual import instructions_registry, utils
    except Exception as error:  # its import also fetches a model of nltk, which can fail in many ways
        raise RamoeError(
            f"the metric 'ifeval' needs lm-eval with langdetect, immutabledict and nltk's punkt_tab "
            f"({error.__class__.__name__}: {error}); install them with `{INSTALL_IFEVAL}`"
        ) from error
    return (
        instructions_registry.INSTRUCTION_DICT,
        lambda given, text: (
            utils.test_instruction_following_strict(utils.InputExample(**given), text).follow_all_instructions
        ),
    )


def _follows(given: Mapping[str, Any], text: str) -> bool:
    names = [str(name) for name in given["instruction_id_list"]]
    _, follows = _checker(_prefix(names))
    asked = {
        "key": given.get("key", 0),
        "prompt": given["prompt"],
        "instruction_id_list": [_bare(name) for name in names],
        # a column of a table has every key in every row
        "kwargs": [
            {key: value for key, value in (given or {}).items() if value is not None}
            for given in given["kwargs"]
        ],
    }
    return bool(follows(asked, text))
