"""Several anchor languages: each example is pulled to the routing of the first anchor that the model answers correctly (our own).

The paper has one anchor, English (arXiv 2605.28306). Here a second one teaches the examples that the first gets wrong. The results are a
taxonomy and a prior file of the usual formats, so that fine-tuning reads them as they are: its "English" is then any other anchor.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.taxonomy import TaxonomyRow


def answered(rows: Sequence[TaxonomyRow], anchor: str, anchors: Sequence[str]) -> dict[str, dict[str, bool]]:
    """Which anchor languages the model answers each example correctly in: id -> anchor -> right, both in the order given.

    Args:
        rows: a taxonomy whose ``english_correct`` is about the language ``anchor``.
        anchor: that language; the others are target languages of the taxonomy.
        anchors: the anchor languages, the preferred one first.

    Raises:
        RamoeError: an anchor twice or not in the taxonomy, rows of ``anchor`` itself, an example whose rows disagree about it, or one
            without a row in an anchor language (how many, the first five).
    """
    if not anchors or len(set(anchors)) != len(anchors):
        raise RamoeError(f"anchors: found {', '.join(anchors) or 'none'}, expected languages, each once")
    known = {anchor, *(row.language for row in rows)}
    absent = [name for name in anchors if name not in known]
    if absent:
        raise RamoeError(
            f"anchors: {len(absent)} of {len(anchors)} not in the taxonomy: {', '.join(absent[:5])}; it has {', '.join(sorted(known))}. "
            "Score the examples in these languages (ramoe taxonomy)"
        )
    own = [row.id for row in rows if row.language == anchor]
    refuse_examples(
        own,
        f"have rows in {anchor!r} itself, which is no anchor of this taxonomy; give the one that it was scored with",
    )
    right: dict[str, dict[str, bool]] = {}
    by_anchor = {row.id: row.english_correct for row in rows}
    both = [row.id for row in rows if row.english_correct != by_anchor[row.id]]
    refuse_examples(both, f"are right and wrong in {anchor!r}; score them again")
    by_target = {(row.id, row.language): row.target_correct for row in rows}
    for name in anchors:
        lacking = [id_ for id_ in by_anchor if name != anchor and (id_, name) not in by_target]
        refuse_examples(
            lacking, f"have no row in the anchor {name!r}; score them in it (ramoe taxonomy), or leave it out"
        )
        for id_, correct in by_anchor.items():
            right.setdefault(id_, {})[name] = correct if name == anchor else by_target[id_, name]
    return right


def anchored(rows: Sequence[TaxonomyRow], right: Mapping[str, Mapping[str, bool]]) -> list[TaxonomyRow]:
    """The taxonomy against several anchors: ``english_correct`` now says whether an anchor other than the row's own language is right.

    With more anchors the ci rows can only become more. A ci row is wrong in its own language, so the anchor that `choose` gives it is
    right and another language. A row whose own language is chosen is right itself (cc or ic).

    Args:
        rows: the taxonomy.
        right: what `answered` gave for these rows.
    """
    return [
        replace(row, english_correct=any(ok for name, ok in right[row.id].items() if name != row.language))
        for row in rows
    ]


def choose(right: Mapping[str, Mapping[str, bool]]) -> dict[str, str]:
    """The anchor of each example: the first that is right, or the first of all where none is; id -> anchor."""
    return {
        id_: next((name for name, ok in found.items() if ok), next(iter(found)))
        for id_, found in right.items()
    }


def counts(rows: Sequence[TaxonomyRow], right: Mapping[str, Mapping[str, bool]]) -> list[dict[str, Any]]:
    """By task: examples, how many chose each anchor, how many are right in none, ci rows with the first anchor alone and with all."""
    anchors = list(next(iter(right.values())))
    first = {id_: {anchors[0]: found[anchors[0]]} for id_, found in right.items()}
    before, after = _ci(anchored(rows, first)), _ci(anchored(rows, right))
    chosen, task_of = choose(right), {row.id: row.task for row in rows}
    told = []
    for task in sorted(set(task_of.values())):
        ids = [id_ for id_, name in task_of.items() if name == task]
        by_anchor = Counter(chosen[id_] for id_ in ids)
        told.append(
            {
                "task": task,
                "examples": len(ids),
                "chosen": {name: by_anchor[name] for name in anchors},
                "none_right": sum(not any(right[id_].values()) for id_ in ids),
                "ci_first": before[task],
                "ci": after[task],
                "ci_gained": after[task] - before[task],
            }
        )
    return told


def _ci(rows: Sequence[TaxonomyRow]) -> Counter[str]:
    """ci rows by task."""
    return Counter(row.task for row in rows if row.category == "ci")


def refuse_examples(ids: Collection[str], what: str, where: object = "anchors") -> None:
    """Raise RamoeError for these ids, where there are any: how many, and the first five."""
    found = list(dict.fromkeys(ids))
    if found:
        raise RamoeError(f"{where}: {len(found)} examples, first {', '.join(found[:5])}, {what}")
