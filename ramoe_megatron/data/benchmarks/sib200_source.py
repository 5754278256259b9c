"""Reading SIB-200: one folder per language, with train.tsv, dev.tsv and test.tsv (index_id, category, text).

The sentences are translations from FLORES-200, so rows with the same ``index_id`` are parallel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ramoe_megatron.data.benchmarks.declaration import declared
from ramoe_megatron.data.benchmarks.published import text_lines
from ramoe_megatron.errors import RamoeError

CATEGORIES = tuple(declared("sib200").fields.choices)
_COLUMNS = ["index_id", "category", "text"]


@dataclass(frozen=True, slots=True)
class Sentence:
    """One sentence in every language (language -> text), and its topic."""

    category: str
    texts: dict[str, str]


def find_languages(folder: str, languages: Sequence[str], anchor: str) -> list[str]:
    """The languages to read: the anchor, then the others in sorted order. Without names, all languages in the
    folder.

    Raises:
        RamoeError: the folder or a language is missing, or there is no anchor or no target language.
    """
    source = Path(folder)
    if not folder or not source.is_dir():
        raise RamoeError(
            f"SIB-200 source {folder!r}: no such folder. Expected a folder with one folder per language."
        )
    found = sorted(path.name for path in source.iterdir() if (path / "train.tsv").is_file())
    wanted = list(languages) or found
    for language in dict.fromkeys([*wanted, anchor]):
        if language not in found:
            raise RamoeError(
                f"{source}: no folder of language {language!r} with a train.tsv. Found: {found or 'none'}."
            )
    if anchor not in wanted:
        raise RamoeError(
            f"languages: the anchor {anchor!r} is missing from {wanted}. Add the anchor, or choose another."
        )
    if len(set(wanted)) < 2:
        raise RamoeError(f"languages: {wanted} has no target language beside the anchor {anchor!r}.")
    return [anchor, *sorted(set(wanted) - {anchor})]


def read_split(folder: str, languages: Sequence[str], name: str) -> dict[str, Sentence]:
    """id -> sentence of NAME.tsv in all languages, sorted by id. The first language is the anchor.

    Raises:
        RamoeError: a file is missing, a line is malformed (the message has the file and line), or an id has
            no row in the anchor language or has two categories.
    """
    anchor = languages[0]
    sentences: dict[str, Sentence] = {}
    orphans: dict[str, None] = {}
    for language in languages:
        path = Path(folder) / language / f"{name}.tsv"
        for id, (category, text, line) in _read_tsv(path).items():
            if language == anchor:
                sentences[id] = Sentence(category, {language: text})
            elif id not in sentences:
                orphans[id] = None
            elif sentences[id].category != category:
                raise RamoeError(
                    f"{path}, line {line}: index_id {id} has category {category!r}, but "
                    f"{sentences[id].category!r} in {anchor}."
                )
            else:
                sentences[id].texts[language] = text
    if orphans:
        raise RamoeError(
            f"{folder}, {name}.tsv: {len(orphans)} ids have no row in the anchor language {anchor!r}: "
            f"{', '.join(list(orphans)[:5])}{', ...' if len(orphans) > 5 else ''}. "
            "Add these rows, or choose another anchor."
        )
    if not sentences:
        raise RamoeError(f"{folder}/{anchor}/{name}.tsv: no rows.")
    return {id: sentences[id] for id in sorted(sentences, key=lambda id: (len(id), id))}


def _read_tsv(path: Path) -> dict[str, tuple[str, str, int]]:
    """id -> (category, text, line number)."""
    if not path.is_file():
        raise RamoeError(f"{path}: no such file.")
    rows: dict[str, tuple[str, str, int]] = {}
    for number, line in enumerate(text_lines(path) or [""], 1):
        cells = line.split("\t")
        if number == 1:
            if cells != _COLUMNS:
                raise RamoeError(f"{path}, line 1: columns {cells}, expected {_COLUMNS}, separated by tabs.")
            continue
        if cells == [""]:
            continue
        if len(cells) != 3 or not all(cell.strip() for cell in cells):
            raise RamoeError(
                f"{path}, line {number}: found {cells}, expected three cells with text "
                f"({', '.join(_COLUMNS)})."
            )
        id, category, text = cells
        if category not in CATEGORIES:
            raise RamoeError(
                f"{path}, line {number}: category {category!r}, expected one of {', '.join(CATEGORIES)}."
            )
        if id in rows:
            raise RamoeError(
                f"{path}, line {number}: index_id {id} occurs again; the first row is on line {rows[id][2]}."
            )
        rows[id] = (category, text.strip(), number)
    return rows
