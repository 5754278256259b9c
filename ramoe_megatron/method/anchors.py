"""Several anchor languages: an example is aligned to the first anchor that the model answers correctly.

Our own extension. The paper has one anchor, English (arXiv 2605.28306). Here a second anchor serves the
examples that the model answers wrongly in the first anchor. The results are a taxonomy and a prior file in
the usual formats, so fine-tuning reads them without any change. In these files "English" means any other
anchor.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.categories import TaxonomyRow


def answered(rows: Sequence[TaxonomyRow], anchor: str, anchors: Sequence[str]) -> dict[str, dict[str, bool]]:
    """For each example, in which anchor languages the model answers correctly.

    Args:
        rows: a taxonomy whose ``english_correct`` describes answers in the language ``anchor``.
        anchor: the language that the taxonomy was scored against.
        anchors: the anchor languages, the preferred anchor first. All except ``anchor`` are target languages
            of the taxonomy.

    Returns:
        id -> anchor language -> whether the answer is correct. Ids keep the order of the rows, anchors the
        order of ``anchors``.

    Raises:
        RamoeError: an anchor is repeated or not in the taxonomy, the taxonomy has rows in ``anchor`` itself,
            the rows of an example disagree about ``anchor``, or an example has no row in an anchor language.
            The message counts the examples and names the first five.
    """
    if not anchors or len(set(anchors)) != len(anchors):
        raise RamoeError(f"anchors: found {', '.join(anchors) or 'none'}, expected languages, each once")
    known = {anchor, *(row.language for row in rows)}
    absent = [name for name in anchors if name not in known]
    if absent:
        raise RamoeError(
            f"anchors: {len(absent)} of {len(anchors)} not in the taxonomy: {', '.join(absent[:5])}; "
            f"the taxonomy has {', '.join(sorted(known))}. Score the examples in the missing languages "
            "(ramoe taxonomy)"
        )
    own = [row.id for row in rows if row.language == anchor]
    refuse_examples(
        own,
        f"have rows in {anchor!r}, so {anchor!r} is not the anchor of this taxonomy; "
        "give the anchor that the taxonomy was scored against",
    )
    right: dict[str, dict[str, bool]] = {}
    by_anchor = {row.id: row.english_correct for row in rows}
    both = [row.id for row in rows if row.english_correct != by_anchor[row.id]]
    refuse_examples(both, f"are both right and wrong in {anchor!r}; score these examples again")
    by_target = {(row.id, row.language): row.target_correct for row in rows}
    for name in anchors:
        lacking = [id_ for id_ in by_anchor if name != anchor and (id_, name) not in by_target]
        refuse_examples(
            lacking,
            f"have no row in the anchor {name!r}; score these examples in {name!r} (ramoe taxonomy), "
            "or leave out this anchor",
        )
        for id_, correct in by_anchor.items():
            right.setdefault(id_, {})[name] = correct if name == anchor else by_target[id_, name]
    return right


def anchored(rows: Sequence[TaxonomyRow], right: Mapping[str, Mapping[str, bool]]) -> list[TaxonomyRow]:
    """The taxonomy against several anchors.

    ``english_correct`` becomes true when the model is correct in some anchor other than the row's language.
    More anchors never reduce the number of ci rows. A ci row is wrong in its own language, so the anchor that
    `choose` gives it is correct and a different language. A row whose own language is chosen is correct there
    (cc or ic).

    Args:
        rows: the taxonomy.
        right: the result of `answered` for these rows.
    """
    return [
        replace(row, english_correct=any(ok for name, ok in right[row.id].items() if name != row.language))
        for row in rows
    ]


def choose(right: Mapping[str, Mapping[str, bool]]) -> dict[str, str]:
    """id -> anchor: the first anchor with a correct answer, or the first anchor when no answer is correct."""
    return {
        id_: next((name for name, ok in found.items() if ok), next(iter(found)))
        for id_, found in right.items()
    }


def counts(rows: Sequence[TaxonomyRow], right: Mapping[str, Mapping[str, bool]]) -> list[dict[str, Any]]:
    """Counts by task, the ``tasks`` entry of anchors.json.

    Each entry has the number of examples, the examples for each chosen anchor, the examples without a correct
    anchor, and the ci rows with the first anchor alone (``ci_first``) and with all anchors (``ci``).
    """
    anchors = list(next(iter(right.values())))
    first = {id_: {anchors[0]: found[anchors[0]]} for id_, found in right.items()}
    before, after = _ci(anchored(rows, first)), _ci(anchored(rows, right))
    chosen, task_of = choose(right), {row.id: row.task for row in rows}
    by_task = []
    for task in sorted(set(task_of.values())):
        ids = [id_ for id_, name in task_of.items() if name == task]
        by_anchor = Counter(chosen[id_] for id_ in ids)
        by_task.append(
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
    return by_task


def _ci(rows: Sequence[TaxonomyRow]) -> Counter[str]:
    """ci rows by task."""
    return Counter(row.task for row in rows if row.category == "ci")


def refuse_examples(ids: Collection[str], what: str, where: object = "anchors") -> None:
    """Raise RamoeError when ``ids`` is not empty. The message counts the ids and names the first five."""
    found = list(dict.fromkeys(ids))
    if found:
        raise RamoeError(f"{where}: {len(found)} examples, first {', '.join(found[:5])}, {what}")
