"""How a number, a share, an interval, a p-value and "no value" are written in all tables, figures and
sentences."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ramoe_megatron.statistics import wilson

Record = Mapping[str, Any]
NONE = "–"
"""No value."""
UNTRAINED = "‡"
"""Mark beside a difference between a method that trains nothing and a method that trains."""
MEANINGS = {
    "base": "the model before fine-tuning",
    "sft": "plain fine-tuning",
    "ra-moe": "fine-tuning with routing alignment as we read RA-MoE",
    "ra-moe-shuffled": "the same with shuffled targets, a control",
}


def anchor_name(anchor: str) -> str:
    """How the anchor language is written in a table: English, or another language's code."""
    return "English" if anchor == "en" else anchor


def number(value: float | None, form: str = ".3g") -> str:
    """The number in this format, with a minus sign instead of a hyphen, at which a line could break."""
    return NONE if value is None else f"{value:{form}}".replace("-", "−")


def interval(
    row: Record | None,
    value: str,
    low: str = "low",
    high: str = "high",
    form: str = ".1f",
    scale: float = 100,
) -> str:
    """``46.2 [43.1, 49.3]`` from the named entries of `row`, without brackets when an end is missing."""
    if row is None or row.get(value) is None:
        return NONE
    middle, ends = number(scale * row[value], form), [row.get(low), row.get(high)]
    if None in ends:
        return middle
    return f"{middle} [{', '.join(number(scale * end, form) for end in ends if end is not None)}]"


def percent(row: Record | None, value: str = "accuracy", low: str = "low", high: str = "high") -> str:
    """A share in per cent: ``46.2 [43.1, 49.3]``."""
    return interval(row, value, low, high)


def points(row: Record | None, value: str = "change", low: str = "low", high: str = "high") -> str:
    """A difference of shares in percentage points: ``+2.0 [+1.8, +2.2]``."""
    return interval(row, value, low, high, "+.1f")


def share(correct: int, n: int) -> str:
    """A proportion in per cent with its Wilson interval."""
    low, high = wilson(correct, n)
    return percent({"accuracy": correct / n if n else None, "low": low, "high": high})


def mass_text(value: float | None) -> str:
    """Routing mass, a share in [0, 1]."""
    return number(value, ".3f")


def mass_change(row: Record | None) -> str:
    """A difference of routing mass: ``+0.0120 [+0.0100, +0.0140]``."""
    return interval(row, "change", form="+.4f", scale=1)


def ratio(row: Record | None) -> str:
    """A ratio: ``1.05 [0.98, 1.12]``."""
    return interval(row, "ratio", form=".2f", scale=1)


def correlation(row: Record) -> str:
    """Pearson's r: ``r = 0.70 [0.34, 0.88], n = 18``, or that r is undefined."""
    if row.get("r") is None:
        return "r undefined"
    return f"r = {interval(row, 'r', form='.2f', scale=1)}, n = {row['n']}"


def p_value(p: float | None) -> str:
    """A p-value in a table cell."""
    return NONE if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def p_phrase(p: float) -> str:
    """A p-value in a sentence: ``p = 0.013``."""
    return f"p {p_value(p)}" if p < 0.001 else f"p = {p_value(p)}"


def seeds_higher(row: Record | None) -> str:
    """``9 of 10``: the number of paired runs with a difference above zero."""
    return NONE if row is None else f"{row['seeds_higher']} of {row['n']}"


def count(n: int, what: str) -> str:
    """``1 seed``, ``2 seeds``."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def listed(names: Iterable[str]) -> str:
    """``a, b and c``."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def legend(methods: Sequence[str]) -> str:
    """The meaning of the methods that have a fixed one, as a sentence; empty without such methods."""
    known = [f"{method} is {MEANINGS[method]}" for method in methods if method in MEANINGS]
    return f"{'; '.join(known)}." if known else ""


def direction(row: Record | None) -> str:
    """A difference's interval: ``above``, ``below`` or ``holds zero``; ``unknown`` without an interval."""
    if row is None or row["low"] is None or row["high"] is None:
        return "unknown"
    return "above" if row["low"] > 0 else "below" if row["high"] < 0 else "holds zero"


def compared(method: str, other: str, row: Record, where: str = "in the target languages") -> str:
    """``ra-moe scored 2.0 points higher than sft in the target languages``, then interval and p."""
    size = number(100 * abs(row["change"]), ".1f")
    word = "higher" if row["change"] > 0 else "lower"
    how = "the same as" if size == "0.0" else f"{size} points {word} than"
    start = f"{method} scored {how} {other}"
    told = []
    if direction(row) != "unknown":
        low, high = (number(100 * row[end], "+.1f") for end in ("low", "high"))
        told.append(f"95 % interval {low} to {high}")
    if row.get("p") is not None:
        told.append(p_phrase(row["p"]))
    if row.get("p_holm") is not None:
        told[-1] += f", {p_value(row['p_holm'])} after Holm's correction"
    return f"{start} {where} ({', '.join(told)})" if told else f"{start} {where}"
