"""The facts of the embedded world: four tasks with language-neutral keys and answers, from CLDR in Babel."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml
from babel import Locale
from babel.core import get_global

TASKS = ("currency", "language", "continent", "month")
_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Fact:
    """One language-neutral question of a task: ``key`` identifies it, ``slots`` fill the question frames."""

    task: str
    key: str
    slots: tuple[tuple[str, str], ...]
    answer: str


def facts(task: str) -> list[Fact]:
    """All facts of a task, sorted by key. A territory without a unique answer in CLDR is left out.

    - currency: code of the only legal tender of a territory.
    - language: code, without script, of the official language with the most speakers in a territory.
    - continent: UN M49 code of the continent of a territory.
    - month: number of the month n months after month m.
    """
    if task == "month":
        return [
            Fact(task, f"{m:02}+{n:02}", (("m", str(m)), ("n", str(n))), str((m + n - 1) % 12 + 1))
            for m in range(1, 13)
            for n in range(2, 13)  # from 2, because every question uses a plural
        ]
    answer_of: dict[str, Callable[[str], str | None]] = {
        "currency": _currency,
        "language": _language,
        "continent": continents().get,
    }
    found = [(territory, answer_of[task](territory)) for territory in territories()]
    return [Fact(task, key, (("key", key),), answer) for key, answer in found if answer is not None]


@cache
def questions() -> dict[str, dict[str, list[str]]]:
    """task -> language -> question frames. Frame k of a task means the same in every language."""
    return yaml.safe_load((_HERE / "questions.yaml").read_text(encoding="utf-8"))


@cache
def continents() -> dict[str, str]:
    """territory code -> UN M49 code of its continent."""
    table = yaml.safe_load((_HERE / "continents.yaml").read_text(encoding="utf-8"))
    return {territory: continent for continent, members in table.items() for territory in members}


def territories() -> list[str]:
    """Sorted two-letter codes of the territories that have a continent and an English name in CLDR."""
    named = Locale("en").territories
    return sorted(code for code in continents() if code in named)


def _currency(territory: str) -> str | None:
    # Babel's helper depends on today's date; an open end date does not.
    rows = get_global("territory_currencies").get(territory, ())
    current = {code for code, _start, end, tender in rows if end is None and tender}
    return current.pop() if len(current) == 1 else None


def _language(territory: str) -> str | None:
    speakers: dict[str, float] = {}
    for code, facts_ in get_global("territory_languages").get(territory, {}).items():
        if facts_["official_status"] in ("official", "de_facto_official"):
            language = code.split("_")[0]
            speakers[language] = max(speakers.get(language, 0.0), facts_["population_percent"])
    most = [language for language, share in speakers.items() if share == max(speakers.values())]
    return most[0] if len(most) == 1 else None
