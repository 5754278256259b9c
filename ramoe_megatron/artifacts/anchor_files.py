"""The files of several anchors: a taxonomy and priors in which each example has its own anchor.

Shape suffixes: N examples, L MoE layers, E routed experts.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ramoe_megatron.artifacts.files import (
    ANCHOR_FILES,
    check_document,
    digests,
    package_version,
    read_json,
    save_document,
)
from ramoe_megatron.artifacts.priors import Priors
from ramoe_megatron.artifacts.records import read_taxonomy, write_taxonomy
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.anchors import anchored, answered, choose, counts, refuse_examples
from ramoe_megatron.method.taxonomy import TaxonomyRow, summarise


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
        mine, theirs = (
            {**asdict(p.shape), "tokens": p.tokens, "checkpoint": p.checkpoint} for p in (first, other)
        )
        differences = [
            f"{key} is {mine[key]!r} and {theirs[key]!r}" for key in mine if mine[key] != theirs[key]
        ]
        if differences:
            raise RamoeError(
                f"{first.path} and {other.path}: {'; '.join(differences)}; profile both anchors alike"
            )
    default = next(iter(priors))
    ids = list(dict.fromkeys([*first.ids, *chosen]))
    rows = torch.empty(len(ids), first.shape.num_moe_layers, first.shape.num_experts)
    for name, file in priors.items():
        places = [place for place, id_ in enumerate(ids) if chosen.get(id_, default) == name]
        wanted, known = [ids[place] for place in places], set(file.ids)
        lacking = [id_ for id_ in wanted if id_ not in known]
        refuse_examples(
            lacking,
            f"have no routing in {name!r}, their chosen anchor; profile them (--ramoe-save-priors)",
            file.path,
        )
        if places:
            rows[places] = file.rows(wanted)
    return ids, rows


def write_anchors(
    taxonomy: Path,
    anchor: str,
    priors: Mapping[str, Path],
    out: Path,
    splits: Sequence[str] = (),
    replacing: bool = False,
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
        raise RamoeError(
            f"--out {out}: {', '.join(standing)} exist already; give another folder, or --replace"
        )
    rows = _of_splits(taxonomy, splits)
    right = answered(rows, anchor, list(priors))
    opened = {name: Priors(path) for name, path in priors.items()}
    ids, gathered = gather(opened, choose(right))
    first = next(iter(opened.values()))
    _check_beside(taxonomy, anchor, first)
    made, told = anchored(rows, right), counts(rows, right)
    data = tuple(
        {(entry["path"], entry["sha256"]): entry for file in opened.values() for entry in file.data}.values()
    )
    body = {
        "anchor": anchor, "anchors": list(priors), "checkpoint": first.checkpoint, "data": digests([taxonomy, *priors.values()]),
        "package_version": package_version(),
    }  # fmt: skip
    Priors.save(
        out / "priors.safetensors",
        ids,
        gathered,
        tokens=first.tokens,
        shape=first.shape,
        checkpoint=first.checkpoint,
        data=data,
    )
    write_taxonomy(out / "taxonomy.jsonl", made)
    save_document(
        out / "taxonomy.json", "ramoe-taxonomy", {**body, "pairs": [asdict(pair) for pair in summarise(made)]}
    )
    save_document(out / "anchors.json", "ramoe-anchors", {**body, "tasks": told})
    return told


def check_anchor(taxonomy: str | os.PathLike[str], anchor: str) -> dict[str, Any] | None:
    """The taxonomy.json beside a taxonomy.jsonl, which knows what the lines do not; None where there is none of this format.

    Raises:
        RamoeError: it says that the lines are against another anchor than ``anchor``, or against several.
    """
    path, kind = Path(taxonomy).with_suffix(".json"), "ramoe-taxonomy"
    document = read_json(path) if path.exists() else None
    if (
        not isinstance(document, dict) or document.get("format") != kind
    ):  # a file of that name that is none of ours tells nothing
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
        raise RamoeError(
            f"{taxonomy}: no row of the split {empty[0]!r}; it has {', '.join(known)}. Name one of these, or score that one"
        )
    return [row for row in rows if row.split in (splits or known)]
