"""Other text of the embedded world, from CLDR in Babel: code-name pairs and ordered lists."""

from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

from babel import Locale
from babel.units import format_unit

from ramoe_megatron.data.world.facts import facts, territories

_MONTHS, _WEEKDAYS = range(1, 13), range(7)
_UNITS = (
    "duration-minute",
    "duration-hour",
    "duration-day",
    "duration-week",
    "duration-month",
    "duration-year",
    "length-meter",
    "length-kilometer",
    "mass-kilogram",
    "volume-liter",
)


def name_rows(language: str) -> Iterator[dict[str, Any]]:
    """Rows that ask for the name of a code in the language, and rows that ask for the code of a name.

    The name of the language follows the code. Names with more than one code are left out.
    """
    endonym = Locale(language).get_display_name()
    kinds = _names(language)
    owners = Counter(name for names in kinds.values() for name in names.values())
    for kind, names in kinds.items():
        for code, name in names.items():
            if owners[name] == 1:
                yield _row(f"{kind}-{code}#name", language, "names", f"{code} {endonym}:", name)
                yield _row(f"{kind}-{code}#code", language, "names", f"{name}:", code)


def list_rows(language: str) -> Iterator[dict[str, Any]]:
    """Cyclic lists of months, weekdays and counted units. The prompt is the first item."""
    locale = Locale(language)
    # Not "stand-alone", because its content depends on the data that Babel loaded before.
    months, days = locale.months["format"]["wide"], locale.days["format"]["wide"]
    for first in _MONTHS:
        yield _list_row(f"months-{first}", language, [months[(first + i - 1) % 12 + 1] for i in range(4)])
    for first in _WEEKDAYS:
        yield _list_row(f"weekdays-{first}", language, [days[(first + i) % 7] for i in range(4)])
    for unit in _UNITS:
        for first in range(2, 11):
            items = [format_unit(n, unit, "long", locale=locale) for n in range(first, first + 3)]
            yield _list_row(f"{unit}-{first}", language, items)


def codes() -> list[str]:
    """All codes and numbers that are keys or answers, sorted."""
    found = {str(number) for number in _MONTHS}
    for task in ("currency", "language", "continent"):
        found |= {fact.answer for fact in facts(task)} | {fact.key for fact in facts(task)}
    return sorted(found | {code for names in _names("en").values() for code in names})


@cache
def _names(language: str) -> dict[str, dict[str, str]]:
    """kind -> code -> name, in the order of the codes."""
    locale = Locale(language)
    currencies = sorted({fact.answer for fact in facts("currency")})
    # two-letter language codes, and longer codes that are answers
    languages = sorted(
        {str(c) for c in Locale("en").languages if len(str(c)) == 2} | {f.answer for f in facts("language")}
    )
    months = locale.months["format"]["wide"]
    return {
        "territory": {code: locale.territories[code] for code in territories() if code in locale.territories},
        "currency": {code: locale.currencies[code] for code in currencies if code in locale.currencies},
        "language": {code: locale.languages[code] for code in languages if code in locale.languages},
        "month": {str(number): months[number] for number in _MONTHS},
    }


def _list_row(id: str, language: str, items: list[str]) -> dict[str, Any]:
    return _row(id, language, "lists", f"{items[0]},", ", ".join(items[1:]))


def _row(id: str, language: str, task: str, prompt: str, response: str) -> dict[str, Any]:
    return {"id": id, "language": language, "task": task, "prompt": prompt, "response": response}
