"""Several anchor languages: each example aligned to the first of them in which the model answers it correctly (our reading).

RA-MoE (arXiv 2605.28306) aligns to the successful English routing. Where English fails and Chinese succeeds, the Chinese routing is the
successful one. A ci row is wrong in its own language, so that language is never the chosen anchor of its example. Rows of another category
may be given their own language: they matter only where the alignment takes in more than ci examples.

N examples, L MoE layers, E routed experts.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.artefacts import digests, load_document, package_version, read_taxonomy, save_document, write_taxonomy
from ramoe_megatron.method.priors import Priors
from ramoe_megatron.method.taxonomy import TaxonomyRow, summarise

OUTPUTS = ("taxonomy.jsonl", "taxonomy.json", "priors.safetensors", "anchors.json")


def outcomes(rows: Sequence[TaxonomyRow], scored: str, anchors: Sequence[str]) -> dict[str, dict[str, bool]]:
    """By example id, whether the model answers it correctly in each of the anchors, in their order.

    Args:
        rows: the taxonomy of one checkpoint.
        scored: the anchor that the taxonomy was scored with: ``english_correct`` speaks of it.
        anchors: the anchor languages; each but ``scored`` is a target language of the taxonomy.

    Raises:
        RamoeError: an anchor without rows, ``scored`` as a target language, an example that lacks a row in an anchor, or rows of one
            example that disagree on its task, split or English outcome.
    """
    languages = sorted({row.language for row in rows})
    absent = [anchor for anchor in anchors if anchor != scored and anchor not in languages]
    if absent:
        raise RamoeError(f"anchors: no rows in {', '.join(absent)}, expected among {', '.join((scored, *languages))}; score them too")
    if scored in languages:
        raise RamoeError(f"anchors: {scored} is a target language here; give the anchor that the taxonomy was scored with")
    facts: dict[str, set[tuple[str, str, bool]]] = {}
    for row in rows:
        facts.setdefault(row.id, set()).add((row.task, row.split, row.english_correct))
    _refuse((id_ for id_, found in facts.items() if len(found) > 1), len(facts), "have rows that differ in task, split or English outcome")
    right = {(row.id, row.language): row.target_correct for row in rows}
    right |= {(row.id, scored): row.english_correct for row in rows}
    for anchor in anchors:
        _refuse((id_ for id_ in facts if (id_, anchor) not in right), len(facts), f"have no row in the anchor {anchor}")
    return {id_: {anchor: right[id_, anchor] for anchor in anchors} for id_ in facts}


def _refuse(ids: Iterable[str], of: int, what: str) -> None:
    if found := list(ids):
        raise RamoeError(
            f"anchors: {len(found)} of {of} examples {what}, first {', '.join(found[:5])}; score the same examples in every anchor"
        )


def choose(right: Mapping[str, bool]) -> str:
    """The first anchor that is right; the first of all when none is."""
    return next((anchor for anchor, correct in right.items() if correct), next(iter(right)))


def anchored(rows: Sequence[TaxonomyRow], outcome: Mapping[str, Mapping[str, bool]]) -> list[TaxonomyRow]:
    """The rows with ``english_correct`` true where some anchor other than the row's own language is right, in the same order.

    More anchors never take a row out of ci.
    """
    return [
        replace(row, english_correct=any(correct for anchor, correct in outcome[row.id].items() if anchor != row.language)) for row in rows
    ]


def best_priors(outcome: Mapping[str, Mapping[str, bool]], priors: Mapping[str, Priors]) -> tuple[list[str], Tensor]:
    """The routing of each example in its chosen anchor.

    Args:
        outcome: of `outcomes`.
        priors: the file of each anchor, in their order.

    Returns:
        Ids, those of the first anchor's file first and in its order, and their rows, float32 [N, L, E]. An example of that file which
        the taxonomy does not have was never scored: it keeps its row.

    Raises:
        RamoeError: files of different model shape, tokens or checkpoint, or without a row that is asked of them.
    """
    first, *others = priors.values()
    for other in others:
        differences = [
            f"{name} is {getattr(first, name)!r} and {getattr(other, name)!r}"
            for name in ("shape", "tokens", "checkpoint")
            if getattr(first, name) != getattr(other, name)
        ]
        if differences:
            raise RamoeError(f"{first.path} and {other.path}: {'; '.join(differences)}. Profile the anchors alike, on one checkpoint")
    default = next(iter(priors))
    chosen = {id_: choose(outcome[id_]) if id_ in outcome else default for id_ in dict.fromkeys((*first.ids, *outcome))}
    ids = list(chosen)
    made = torch.empty(len(ids), first.shape.num_moe_layers, first.shape.num_experts)
    for anchor, file in priors.items():
        places = [place for place, id_ in enumerate(ids) if chosen[id_] == anchor]
        made[places] = file.rows([ids[place] for place in places])
    return ids, made


@dataclass(frozen=True, slots=True)
class AnchorCount:
    """One task and split: an entry of ``rows`` in ``anchors.json``."""

    task: str
    split: str
    n: int
    """Examples."""
    chosen: Mapping[str, int]
    """Examples by chosen anchor, in the order of the anchors; those that no anchor answers stand with the first."""
    none_right: int
    """Examples that no anchor answers."""
    ci_first: int
    """ci rows (an example in a language) with the first anchor alone."""
    ci: int
    """ci rows with all anchors."""
    ci_gained: int
    """Their difference."""


def count(rows: Sequence[TaxonomyRow], outcome: Mapping[str, Mapping[str, bool]]) -> list[AnchorCount]:
    """What the anchors change, for every (task, split) that occurs, in sorted order."""
    alone = {id_: dict([next(iter(right.items()))]) for id_, right in outcome.items()}
    ci_first, ci = (
        Counter((row.task, row.split) for row in anchored(rows, which) if row.category == "ci") for which in (alone, outcome)
    )
    by_group: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        by_group.setdefault((row.task, row.split), set()).add(row.id)
    counts = []
    for key, ids in sorted(by_group.items()):
        chosen = Counter(choose(outcome[id_]) for id_ in ids)
        in_order = {anchor: chosen[anchor] for anchor in next(iter(outcome.values()))}
        none_right = sum(not any(outcome[id_].values()) for id_ in ids)
        counts.append(AnchorCount(*key, len(ids), in_order, none_right, ci_first[key], ci[key], ci[key] - ci_first[key]))
    return counts


def write_anchors(taxonomy: Path, scored: str, files: Mapping[str, Path], out: Path) -> list[AnchorCount]:
    """Write the taxonomy and the priors of several anchors to a folder: `OUTPUTS`, the first three as the jobs write them.

    Args:
        taxonomy: ``taxonomy.jsonl``; a ``taxonomy.json`` beside it must name the same anchor, and the checkpoint of the priors.
        scored: the anchor that it was scored with; one of ``files``.
        files: ``priors.safetensors`` of each anchor, in order of preference.
        out: the folder; what it holds of `OUTPUTS` is never overwritten.

    Raises:
        RamoeError: as `outcomes` and `best_priors`, or an output that exists.
    """
    there = [name for name in OUTPUTS if (out / name).exists()]
    if there:
        raise RamoeError(f"--out {out}: holds {', '.join(there)} already; give another folder, or move them away")
    if scored not in files:
        raise RamoeError(f"--priors: none of {scored}, the anchor of the taxonomy; add --priors {scored}=FILE")
    rows, priors = read_taxonomy(taxonomy), {anchor: Priors.load(path) for anchor, path in files.items()}
    checkpoint, tokens = priors[scored].checkpoint, priors[scored].tokens
    _check_document(taxonomy.with_name("taxonomy.json"), scored, checkpoint)
    try:
        outcome = outcomes(rows, scored, list(files))
    except RamoeError as error:
        raise RamoeError(f"{taxonomy}: {error}") from error
    ids, made = best_priors(outcome, priors)
    best, counts = anchored(rows, outcome), count(rows, outcome)
    read = digests([taxonomy, *files.values()])
    body = {"checkpoint": checkpoint, "data": read, "package_version": package_version()}
    Priors.save(out / "priors.safetensors", ids, made, tokens=tokens, shape=priors[scored].shape, checkpoint=checkpoint, data=read)
    write_taxonomy(out / "taxonomy.jsonl", best)
    pairs = [asdict(pair) for pair in summarise(best)]
    save_document(out / "taxonomy.json", "ramoe-taxonomy", {"anchor": ", ".join(files), **body, "pairs": pairs})
    told = {"anchors": list(files), "tokens": tokens, **body, "rows": [asdict(entry) for entry in counts]}
    save_document(out / "anchors.json", "ramoe-anchors", told)
    return counts


def _check_document(path: Path, scored: str, checkpoint: str) -> None:
    if not path.exists():
        return
    document = load_document(path, "ramoe-taxonomy")
    for key, expected in (("anchor", scored), ("checkpoint", checkpoint)):
        if document[key] != expected:
            raise RamoeError(f"{path}: {key} is {document[key]!r}, expected {expected!r}; give the taxonomy and the priors of one checkpoint")
