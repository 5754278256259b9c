"""The taxonomy, stage 1 of RA-MoE (arXiv 2605.28306): parallel examples by English and target outcome."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ramoe_megatron.statistics import wilson

CATEGORIES = ("cc", "ci", "ic", "ii")
"""The English outcome, then the target-language outcome: c for correct, i for incorrect."""


def category(english_correct: bool, target_correct: bool) -> str:
    """``cc``: both correct; ``ci``: only English correct; ``ic``: only target correct; ``ii``: both wrong."""
    return ("c" if english_correct else "i") + ("c" if target_correct else "i")


@dataclass(frozen=True, slots=True)
class TaxonomyRow:
    """One parallel example in one target language, scored by one checkpoint: a line of taxonomy.jsonl."""

    id: str
    task: str
    language: str
    """Target language."""
    split: str
    english_correct: bool
    target_correct: bool

    @property
    def category(self) -> str:
        """``cc``, ``ci``, ``ic`` or ``ii``."""
        return category(self.english_correct, self.target_correct)


@dataclass(frozen=True, slots=True)
class TaxonomyPair:
    """The counts of one task, target language and split: an entry of ``pairs`` in ``taxonomy.json``."""

    task: str
    language: str
    split: str
    n: int
    cc: int
    ci: int
    ic: int
    ii: int
    ci_share: float
    """ci / n, in [0, 1]. The paper correlates this share with the gain."""
    ci_low: float
    """Lower end of the 95 % Wilson interval of the share."""
    ci_high: float
    """Upper end of the 95 % Wilson interval of the share."""


def summarise(rows: Iterable[TaxonomyRow]) -> list[TaxonomyPair]:
    """Counts and ci share of every (task, language, split) in the rows, in sorted order."""
    groups: dict[tuple[str, str, str], Counter[str]] = {}
    for row in rows:
        groups.setdefault((row.task, row.language, row.split), Counter())[row.category] += 1
    pairs = []
    for (task, language, split), counts in sorted(groups.items()):
        n = counts.total()
        low, high = wilson(counts["ci"], n)
        by_category = {name: counts[name] for name in CATEGORIES}
        pairs.append(
            TaxonomyPair(
                task, language, split, n, **by_category, ci_share=counts["ci"] / n, ci_low=low, ci_high=high
            )
        )
    return pairs
