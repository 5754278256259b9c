"""The files of ``ramoe anchors``: a taxonomy and priors in which each example has its own anchor.

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
from ramoe_megatron.method.categories import TaxonomyRow, summarise


def gather(priors: Mapping[str, Priors], chosen: Mapping[str, str]) -> tuple[list[str], Tensor]:
    """The routing of each example in its chosen anchor.

    Args:
        priors: the prior file of each anchor, the preferred anchor first.
        chosen: id -> anchor.

    Returns:
        The ids and their rows, float32 [N, L, E]. The ids of the first file come first, in its order. An id
        without a chosen anchor keeps its row of the first file.

    Raises:
        RamoeError: the files differ in tokens, checkpoint or model, or a file lacks examples that chose its
            anchor. The message counts the examples and names the first five.
    """
    first, *others = priors.values()
    for other in others:
        mine, theirs = (
            {**asdict(p.shape), "tokens": p.tokens, "checkpoint": p.checkpoint, "layers": p.layers}
            for p in (first, other)
        )
        differences = [
            f"{key} is {mine[key]!r} and {theirs[key]!r}" for key in mine if mine[key] != theirs[key]
        ]
        if differences:
            raise RamoeError(
                f"{first.path} and {other.path}: {'; '.join(differences)}; "
                "profile both anchors in the same way"
            )
    default = next(iter(priors))
    ids = list(dict.fromkeys([*first.ids, *chosen]))
    rows = torch.empty(len(ids), len(first.layers), first.shape.num_experts)
    for name, file in priors.items():
        places = [place for place, id_ in enumerate(ids) if chosen.get(id_, default) == name]
        wanted, known = [ids[place] for place in places], set(file.ids)
        lacking = [id_ for id_ in wanted if id_ not in known]
        refuse_examples(
            lacking,
            f"have no routing in {name!r}, their chosen anchor; profile these examples (--ramoe-save-priors)",
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
    """Write taxonomy.jsonl, taxonomy.json, priors.safetensors and anchors.json (`ANCHOR_FILES`) to ``out``.

    Args:
        taxonomy: taxonomy.jsonl. A taxonomy.json in the same folder must have the same anchor and checkpoint.
        anchor: the language that the taxonomy was scored against.
        priors: the priors.safetensors of each anchor, the preferred anchor first.
        out: the output folder.
        splits: the splits of the taxonomy to use; all splits when empty. The priors must hold these splits.
        replacing: overwrite existing files in ``out``. By default existing files are an error.

    Returns:
        The `counts` by task.

    Raises:
        RamoeError: as `answered` and `gather`; also when a split has no rows, ``out`` already has one of the
            files, or taxonomy.json disagrees. In these cases no file is written.
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
    made, by_task = anchored(rows, right), counts(rows, right)
    data = tuple(
        {(entry["path"], entry["sha256"]): entry for file in opened.values() for entry in file.data}.values()
    )
    body = {
        "anchor": anchor,
        "anchors": list(priors),
        "checkpoint": first.checkpoint,
        "data": digests([taxonomy, *priors.values()]),
        "package_version": package_version(),
    }
    Priors.save(
        out / "priors.safetensors",
        ids,
        gathered,
        tokens=first.tokens,
        shape=first.shape,
        checkpoint=first.checkpoint,
        data=data,
        layers=first.layers if len(first.layers) < first.shape.num_moe_layers else None,
    )
    write_taxonomy(out / "taxonomy.jsonl", made)
    save_document(
        out / "taxonomy.json", "ramoe-taxonomy", {**body, "pairs": [asdict(pair) for pair in summarise(made)]}
    )
    save_document(out / "anchors.json", "ramoe-anchors", {**body, "tasks": by_task})
    return by_task


def check_anchor(taxonomy: str | os.PathLike[str], anchor: str) -> dict[str, Any] | None:
    """The taxonomy.json in the folder of a taxonomy.jsonl, which records the anchor and the checkpoint.

    Returns:
        The document, or None without a taxonomy.json of our format.

    Raises:
        RamoeError: the document records another anchor than ``anchor``, or several anchors.
    """
    path, kind = Path(taxonomy).with_suffix(".json"), "ramoe-taxonomy"
    document = read_json(path) if path.exists() else None
    if not isinstance(document, dict) or document.get("format") != kind:
        return None  # another program's file of the same name
    check_document(path, document, kind)
    found = document.get("anchors", [document["anchor"]])
    if found != [anchor]:
        names = ", ".join(map(repr, found))
        raise RamoeError(
            f"{path} is of the anchor {names}, expected {anchor!r}; give the taxonomy that ramoe taxonomy "
            f"wrote for {anchor!r}, or give another anchor"
        )
    return document


def _check_beside(taxonomy: Path, anchor: str, priors: Priors) -> None:
    document, path = check_anchor(taxonomy, anchor), taxonomy.with_suffix(".json")
    if document is not None and document["checkpoint"] != priors.checkpoint:
        raise RamoeError(
            f"{path} is of the checkpoint {document['checkpoint']!r}, but {priors.path} is of "
            f"{priors.checkpoint!r}; score and profile the same checkpoint"
        )


def _of_splits(taxonomy: Path, splits: Sequence[str]) -> list[TaxonomyRow]:
    """The rows of these splits; all rows without any split."""
    rows = read_taxonomy(taxonomy)
    known = dict.fromkeys(row.split for row in rows)
    empty = [name for name in splits if name not in known]
    if empty:
        raise RamoeError(
            f"{taxonomy}: no row of the split {empty[0]!r}; it has {', '.join(known)}. "
            f"Name one of these splits, or score {empty[0]!r}"
        )
    return [row for row in rows if row.split in (splits or known)]
