"""Several anchor languages: each example is pulled to the routing of the first anchor that the model answers correctly (our own).

The paper has one anchor, English (arXiv 2605.28306). Here a second one teaches the examples that the first gets wrong. The results are a
taxonomy and a prior file of the usual formats, so that fine-tuning reads them as they are: its "English" is then any other anchor.

N examples, L MoE layers, E routed experts.
"""

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ramoe_megatron.artifacts.files import ANCHOR_FILES, check_document, read_json
from ramoe_megatron.artifacts.tables import (
    Priors,
    digests,
    package_version,
    read_taxonomy,
    save_document,
    write_taxonomy,
)
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.taxonomy import TaxonomyRow, summarise


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
    _refuse(own, f"have rows in {anchor!r} itself, which is no anchor of this taxonomy; give the one that it was scored with")
    right: dict[str, dict[str, bool]] = {}
    by_anchor = {row.id: row.english_correct for row in rows}
    _refuse([row.id for row in rows if row.english_correct != by_anchor[row.id]], f"are right and wrong in {anchor!r}; score them again")
    by_target = {(row.id, row.language): row.target_correct for row in rows}
    for name in anchors:
        lacking = [id_ for id_ in by_anchor if name != anchor and (id_, name) not in by_target]
        _refuse(lacking, f"have no row in the anchor {name!r}; score them in it (ramoe taxonomy), or leave it out")
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
    return [replace(row, english_correct=any(ok for name, ok in right[row.id].items() if name != row.language)) for row in rows]


def choose(right: Mapping[str, Mapping[str, bool]]) -> dict[str, str]:
    """The anchor of each example: the first that is right, or the first of all where none is; id -> anchor."""
    return {id_: next((name for name, ok in found.items() if ok), next(iter(found))) for id_, found in right.items()}


def gather(priors: Mapping[str, Priors], chosen: Mapping[str, str]) -> tuple[list[str], Tensor]:
    """The routing of each example in its chosen anchor.

    Args:
        priors: each anchor's file, the preferred one first.
        chosen: id -> anchor.

    Returns:
        The ids, those of the first file in its order and then the others, and their rows, float32 [N, L, E]. An id that nothing is chosen
        for keeps the row of the first file.

    Raises:
        RamoeError: files of different tokens, checkpoint or model, or without the examples chosen for them (how many, the first five).
    """
    first, *others = priors.values()
    for other in others:
        mine, theirs = ({**asdict(p.shape), "tokens": p.tokens, "checkpoint": p.checkpoint} for p in (first, other))
        differences = [f"{key} is {mine[key]!r} and {theirs[key]!r}" for key in mine if mine[key] != theirs[key]]
        if differences:
            raise RamoeError(f"{first.path} and {other.path}: {'; '.join(differences)}; profile both anchors alike")
    default = next(iter(priors))
    ids = list(dict.fromkeys([*first.ids, *chosen]))
    rows = torch.empty(len(ids), first.shape.num_moe_layers, first.shape.num_experts)
    for name, file in priors.items():
        places = [place for place, id_ in enumerate(ids) if chosen.get(id_, default) == name]
        wanted, known = [ids[place] for place in places], set(file.ids)
        lacking = [id_ for id_ in wanted if id_ not in known]
        _refuse(lacking, f"have no routing in {name!r}, their chosen anchor; profile them (--ramoe-save-priors)", file.path)
        if places:
            rows[places] = file.rows(wanted)
    return ids, rows


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


def write_anchors(
    taxonomy: Path, anchor: str, priors: Mapping[str, Path], out: Path, splits: Sequence[str] = (), replacing: bool = False
) -> list[dict[str, Any]]:
    """Write taxonomy.jsonl, taxonomy.json, priors.safetensors and anchors.json (`ANCHOR_FILES`) to ``out``, and give the `counts`.

    Args:
        taxonomy: taxonomy.jsonl; a taxonomy.json beside it has to be of the same anchor and checkpoint.
        anchor: the language that its ``english_correct`` is about.
        priors: each anchor's priors.safetensors, the preferred one first.
        out: a folder.
        splits: splits of the taxonomy to take, those that the priors hold; all when empty.
        replacing: overwrite what stands in ``out``, which is else refused.

    Raises:
        RamoeError: as `answered` and `gather`, a split without rows, files that stand in ``out``, or a taxonomy.json that disagrees.
            Nothing is written then.
    """
    standing = [] if replacing else [str(out / name) for name in ANCHOR_FILES if (out / name).exists()]
    if standing:
        raise RamoeError(f"--out {out}: {', '.join(standing)} exist already; give another folder, or --replace")
    rows = _of_splits(taxonomy, splits)
    right = answered(rows, anchor, list(priors))
    opened = {name: Priors(path) for name, path in priors.items()}
    ids, gathered = gather(opened, choose(right))
    first = next(iter(opened.values()))
    _check_beside(taxonomy, anchor, first)
    made, told = anchored(rows, right), counts(rows, right)
    data = tuple({(entry["path"], entry["sha256"]): entry for file in opened.values() for entry in file.data}.values())
    body = {
        "anchor": anchor, "anchors": list(priors), "checkpoint": first.checkpoint, "data": digests([taxonomy, *priors.values()]),
        "package_version": package_version(),
    }  # fmt: skip
    Priors.save(
        out / "priors.safetensors", ids, gathered, tokens=first.tokens, shape=first.shape, checkpoint=first.checkpoint, data=data
    )
    write_taxonomy(out / "taxonomy.jsonl", made)
    save_document(out / "taxonomy.json", "ramoe-taxonomy", {**body, "pairs": [asdict(pair) for pair in summarise(made)]})
    save_document(out / "anchors.json", "ramoe-anchors", {**body, "tasks": told})
    return told


def check_anchor(taxonomy: str | os.PathLike[str], anchor: str) -> dict[str, Any] | None:
    """The taxonomy.json beside a taxonomy.jsonl, which knows what the lines do not; None where there is none of this format.

    Raises:
        RamoeError: it says that the lines are against another anchor than ``anchor``, or against several.
    """
    path, kind = Path(taxonomy).with_suffix(".json"), "ramoe-taxonomy"
    document = read_json(path) if path.exists() else None
    if not isinstance(document, dict) or document.get("format") != kind:  # a file of that name that is none of ours tells nothing
        return None
    check_document(path, document, kind)
    found = document.get("anchors", [document["anchor"]])
    if found != [anchor]:
        told = ", ".join(map(repr, found))
        raise RamoeError(
            f"{path} is of the anchor {told}, expected {anchor!r}: give the taxonomy against {anchor!r} alone (ramoe taxonomy writes it), "
            "or another anchor"
        )
    return document


def _check_beside(taxonomy: Path, anchor: str, priors: Priors) -> None:
    document, path = check_anchor(taxonomy, anchor), taxonomy.with_suffix(".json")
    if document is not None and document["checkpoint"] != priors.checkpoint:
        raise RamoeError(
            f"{path} is of the checkpoint {document['checkpoint']!r}, {priors.path} of {priors.checkpoint!r}; score and profile one"
        )


def _of_splits(taxonomy: Path, splits: Sequence[str]) -> list[TaxonomyRow]:
    """The rows of these splits, all of them when none is named."""
    rows = read_taxonomy(taxonomy)
    known = dict.fromkeys(row.split for row in rows)
    empty = [name for name in splits if name not in known]
    if empty:
        raise RamoeError(f"{taxonomy}: no row of the split {empty[0]!r}; it has {', '.join(known)}. Name one of these, or score that one")
    return [row for row in rows if row.split in (splits or known)]


def _ci(rows: Sequence[TaxonomyRow]) -> Counter[str]:
    """ci rows by task."""
    return Counter(row.task for row in rows if row.category == "ci")


def _refuse(ids: Collection[str], what: str, where: Path | str = "anchors") -> None:
    found = list(dict.fromkeys(ids))
    if found:
        raise RamoeError(f"{where}: {len(found)} examples, first {', '.join(found[:5])}, {what}")
