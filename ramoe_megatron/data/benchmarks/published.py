"""The rows of a benchmark as its authors publish them, from a folder, a file or a hub data set."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from babel.core import get_global

from ramoe_megatron.artifacts.files import digests, read_json
from ramoe_megatron.data import sources
from ramoe_megatron.data.answers import language_code
from ramoe_megatron.data.benchmarks.declaration import Declaration, Form
from ramoe_megatron.errors import RamoeError


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """A row as published."""

    place: str
    """File and line, for messages."""
    number: int
    """Place in the split, from 0."""
    columns: dict[str, Any]


class Source:
    """A place of a benchmark: which languages and splits it has, and their rows.

    Raises:
        RamoeError: there is no such folder, file or hub name, or it has no file of any form of the benchmark.
    """

    def __init__(self, name: str, benchmark: str, declaration: Declaration) -> None:
        self.name, self.benchmark, self.declaration = name, benchmark, declaration
        self.form, self.paths = self._find()
        self._read: dict[tuple[str, Path | None], list[PublishedRow]] = {}

    @property
    def on_hub(self) -> bool:
        return bool(self.form.hub)

    def languages(self) -> list[str]:
        """The languages as published, sorted; empty for a hub data set that has any."""
        if self.form.row_language:
            return self.form.languages
        return sorted({code for _, code, _ in self.paths} - {""}) or self.form.languages

    def splits(self) -> list[str]:
        """The splits as published, in the order of the declaration."""
        found = {split for _, _, split in self.paths}
        return [split for split in self.form.splits if self.on_hub or split in found]

    def rows(self, language: str, split: str) -> list[PublishedRow]:
        """The rows of a language and a split, both as published.

        Raises:
            RamoeError: the source lacks them, or a line is malformed.
        """
        if self.on_hub:
            return self._hub_rows(language, split)
        found = [path for path, code, name in self.paths if code in ("", language) and name == split]
        if not found:
            there = sorted(name for _, code, name in self.paths if code in ("", language))
            expected = self.form.files.format(language=language, split=split)
            raise RamoeError(
                f"{self.name}: {self.benchmark} has no split {split!r} in language {language!r}: no file "
                f"{expected}. Splits found in this language: {', '.join(there) or 'none'}."
            )
        rows: list[PublishedRow] = []
        for path in found:
            for row in self._file_rows(path):
                if self._is_of(row, language):
                    rows.append(PublishedRow(row.place, len(rows), row.columns))
        return rows

    def digests(self) -> list[dict[str, str]]:
        """Path and SHA-256 of each file that was read."""
        return digests(sorted({path for _, path in self._read if path is not None}))

    def _is_of(self, row: PublishedRow, language: str) -> bool:
        column = self.form.row_language
        if not column:
            return True
        if column not in row.columns:
            raise RamoeError(
                f"{row.place}: no column {column!r}, which has the row's language. "
                f"Columns found: {', '.join(row.columns)}."
            )
        return row.columns[column] == language

    def _find(self) -> tuple[Form, list[tuple[Path, str, str]]]:
        """The form of the source, and its files, each with language and split."""
        place = Path(self.name)
        local = [form for form in self.declaration.forms if form.files]
        if not place.exists():
            hub = next((form for form in self.declaration.forms if form.hub), None)
            if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.name) and hub is not None:
                return hub, []
            names = [form.hub for form in self.declaration.forms if form.hub]
            raise RamoeError(
                f"{self.name}: no such folder or file. Expected the folder of {self.declaration.title}"
                f"{f', or a name on the hub such as {names[0]}' if names else ''}."
            )
        for form in local:
            if found := _matches(place, form):
                return form, found
        expected = " or ".join(form.files for form in local)
        raise RamoeError(
            f"{self.name}: no file of {self.declaration.title} is there. Expected {expected}. "
            f"Found: {', '.join(_some(place)) or 'nothing'}."
        )

    def _file_rows(self, path: Path) -> list[PublishedRow]:
        if ("", path) not in self._read:
            rows = enumerate(_read(path, self.form))
            self._read["", path] = [PublishedRow(place, number, row) for number, (place, row) in rows]
        return self._read["", path]

    def _hub_rows(self, language: str, split: str) -> list[PublishedRow]:
        config = self.form.config.format(language=language)
        if (config, None) not in self._read:
            name = f"{self.name}:{config}" if config else self.name
            rows = enumerate(sources.read_source(name))
            self._read[config, None] = [PublishedRow(place, number, row) for number, (place, row) in rows]
        read = self._read[config, None]
        found = [row for row in read if row.columns["split"] == split and self._is_of(row, language)]
        if not found:
            there = sorted({row.columns["split"] for row in read})
            raise RamoeError(
                f"{self.name}:{config}: {self.benchmark} has no split {split!r} here. "
                f"Splits found: {', '.join(there) or 'none'}."
            )
        return [PublishedRow(row.place, number, row.columns) for number, row in enumerate(found)]


def match_language(spelling: str, codes: Sequence[str], spellings: dict[str, str]) -> str | None:
    """The published code of a language that the user spells in some way; None without a match.

    "sw", "swh_Latn", "Swahili" and "SW_KE" are one language. Of two scripts, the usual one is meant.

    Args:
        spelling: the user's name of the language.
        codes: the codes as published.
        spellings: code -> CLDR code, for codes that CLDR does not have.
    """
    if spelling in codes:
        return spelling
    wanted = language_code(spelling)
    same = [code for code in codes if wanted and wanted == _cldr(code, spellings)]
    if len(same) < 2:
        return same[0] if same else None
    usual = str(get_global("likely_subtags").get(spelling.replace("-", "_"), "")).split("_")
    return next((code for code in same if set(code.split("_")) & set(usual[1:])), None)


def _cldr(code: str, spellings: dict[str, str]) -> str | None:
    return spellings.get(code) or language_code(code)


def _matches(place: Path, form: Form) -> list[tuple[Path, str, str]]:
    """The files of a form, each with its language ("" when the path has none) and its split."""
    splits = "|".join(map(re.escape, form.splits))
    pattern = re.escape(form.files).replace(r"\*", "[^/]*")
    pattern = pattern.replace(r"\{language\}", r"(?P<language>[^/]+)", 1)
    pattern = pattern.replace(r"\{language\}", r"(?P=language)")
    pattern = pattern.replace(r"\{split\}", f"(?P<split>{splits})", 1).replace(r"\{split\}", "(?P=split)")
    if place.is_file():
        named = {place: place.name} if "/" not in form.files else {}
    else:
        every = place.glob(form.files.format(language="*", split="*"))
        named = {path: path.relative_to(place).as_posix() for path in sorted(every)}
    found = []
    for path, name in named.items():
        if match := re.fullmatch(pattern, name):
            parts = match.groupdict()
            found.append((path, parts.get("language") or "", parts.get("split") or next(iter(form.splits))))
    return found


def _some(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())[:8] if place.is_dir() else [place.name]


def _read(path: Path, form: Form) -> Iterator[tuple[str, dict[str, Any]]]:
    if form.read == "table":
        yield from read_table(path, form.header)
    elif form.read == "lines":
        for number, line in enumerate(text_lines(path), 1):
            yield f"{path}, line {number}", {"text": line}
    elif form.read == "squad":
        yield from _read_squad(path)
    else:
        yield from sources.read_source(str(path))


def read_table(path: Path, header: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of each line of a file with tabs between cells. A quote is text.

    Args:
        path: the file.
        header: the columns; without them the first line has them.

    Raises:
        RamoeError: the file is not UTF-8, or a line has more or fewer cells than there are columns.
    """
    columns = list(header)
    for number, line in enumerate(text_lines(path), 1):
        cells = line.split("\t")
        place = f"{path}, line {number}"
        if not columns:
            columns = cells
        elif len(cells) != len(columns):
            raise RamoeError(
                f"{place}: found {len(cells)} cells between tabs, expected {len(columns)} "
                f"({', '.join(columns)})."
            )
        else:
            yield place, dict(zip(columns, cells, strict=True))


def text_lines(path: Path) -> list[str]:
    """The lines of a file, without empty lines at its end. Raises RamoeError when the file is not UTF-8."""
    # Not str.splitlines, which also splits at characters inside sentences.
    lines = [line.rstrip("\r") for line in sources.decode_text(path.read_bytes(), str(path)).split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _read_squad(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The questions of SQuAD's JSON, with the columns that SQuAD has on the hub."""
    for n, article in enumerate(_list(read_json(path), "data", str(path))):
        for m, paragraph in enumerate(_list(article, "paragraphs", f"{path}: data[{n}]")):
            where = f"{path}: data[{n}].paragraphs[{m}]"
            for k, question in enumerate(_list(paragraph, "qas", where)):
                place = f"{where}.qas[{k}]"
                answers = _list(question, "answers", place)
                yield (
                    place,
                    {
                        **{key: value for key, value in question.items() if key != "answers"},
                        "context": paragraph.get("context", ""),
                        "title": article.get("title", ""),
                        "answers": {"text": [answer.get("text", "") for answer in answers]},
                    },
                )


def _list(holder: Any, key: str, where: str) -> list[dict[str, Any]]:
    found = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        keys = ", ".join(holder) if isinstance(holder, dict) else json.dumps(holder)[:40]
        raise RamoeError(f"{where}: expected {key!r}, a list of objects, as in SQuAD's JSON; found {keys}")
    return found
