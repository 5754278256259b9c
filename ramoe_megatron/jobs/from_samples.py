"""The taxonomy from lm-eval's sample files in place of our own scoring. One process, without Megatron.

    python -m ramoe_megatron.jobs.from_samples --from-samples en=FILE sw=FILE ... --ramoe-output DIR

`ramoe taxonomy --from-samples ...` starts it. The two files are those of `ramoe taxonomy`.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ramoe_megatron.artifacts.files import package_version, refuse_unwritable, save_document, sha256
from ramoe_megatron.artifacts.records import write_taxonomy
from ramoe_megatron.artifacts.samples import (
    DOC_ID,
    Sample,
    SampleFile,
    check_form,
    read_samples,
    samples_by_id,
)
from ramoe_megatron.data.parallel import Example, load_examples
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.jobs.offline_job import data_digests
from ramoe_megatron.mcore.arguments import DataOptions
from ramoe_megatron.method.categories import TaxonomyRow, summarise

ROW_NUMBER = f"{{{DOC_ID}}}"
NAMED = 5
"""How many ids a message names."""
Outcomes = Mapping[str, Mapping[str, Sample]]
"""Language -> id -> sample."""


@dataclass(frozen=True)
class Unmatched:
    """Ids that one side has and the other lacks."""

    what: str
    ids: list[str]

    def __str__(self) -> str:
        named = ", ".join(self.ids[:NAMED])
        return f"{len(self.ids)} {self.what}: {named}{', ...' if len(self.ids) > NAMED else ''}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write `taxonomy.jsonl` and `taxonomy.json`, and print what was matched.

    Returns:
        Exit status: 0, or 2 after an error in the user's input. Such an error is printed without a traceback.
    """
    options = _parser().parse_args(arguments)
    try:
        for line in write_from_samples(options):
            print(f"ramoe: {line}")
    except RamoeError as error:
        print(f"ramoe: error: {error}", file=sys.stderr)
        return 2
    return 0


def write_from_samples(options: Any) -> list[str]:
    """Write the taxonomy of the parsed arguments. Returns what was matched, a line each.

    Raises:
        RamoeError: a file or an option is wrong, the languages have different metrics, or no row of a
            language is matched.
    """
    check_form(options.id)
    if not options.ramoe_data and not (options.task and options.ramoe_split):
        raise RamoeError(
            "--from-samples: a sample file does not say the task and the split of the taxonomy's rows. Give "
            "--ramoe-data with the parallel rows, or both --task and --ramoe-split"
        )
    anchor, files = options.ramoe_anchor, _files(options)
    found = {language: samples_by_id(group) for language, group in files.items()}
    examples = _examples(options)
    views = list(_views(options, found, examples))
    rows = [
        TaxonomyRow(
            id_,
            task,
            language,
            split,
            english_correct=found[anchor][id_].correct,
            target_correct=found[language][id_].correct,
        )
        for id_, language, task, split in views
        if id_ in found[anchor] and id_ in found[language]
    ]
    unmatched = list(_unmatched(found, anchor, examples))
    for language in found:
        if language != anchor and not any(row.language == language for row in rows):
            raise RamoeError(
                f"--from-samples: no row of {language!r} is matched; correct --id, the files or the data. "
                f"Found: {'; '.join(map(str, unmatched))}"
            )
    write_taxonomy(options.ramoe_output / "taxonomy.jsonl", rows)
    body = {
        "anchor": anchor,
        "checkpoint": options.checkpoint,
        "data": data_digests(options.ramoe_data),
        "package_version": package_version(),
        "pairs": [asdict(pair) for pair in summarise(rows)],
        "samples": [
            {"language": language, "path": file.path, "sha256": sha256(file.path), "filter": file.filter}
            | {"metric": file.metric, "rows": len(file.samples)}
            for language, group in files.items()
            for file in group
        ],
        "id": options.id,
        "unmatched": [asdict(entry) for entry in unmatched],
    }
    save_document(options.ramoe_output / "taxonomy.json", "ramoe-taxonomy", body)
    return [
        *(
            f"{language}: {file.path}, {len(file.samples)} rows, filter {file.filter}, metric {file.metric}"
            for language, group in files.items()
            for file in group
        ),
        *_same_targets(options, found, rows),
        *(map(str, unmatched) if unmatched else ["every row is matched"]),
        f"wrote {options.ramoe_output / 'taxonomy.jsonl'}, {len(rows)} rows",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ramoe taxonomy",
        allow_abbrev=False,
        description="The taxonomy from sample files of lm-evaluation-harness (lm_eval --log_samples).",
    )
    flags: dict[str, dict[str, Any]] = {
        "from-samples": {
            "nargs": "+",
            "required": True,
            "metavar": "LANGUAGE=FILE",
            "help": "sample files; a language may have several",
        },
        "ramoe-output": {"type": Path, "required": True, "metavar": "DIR", "help": "folder to write to"},
        "ramoe-anchor": {"default": "en", "metavar": "LANGUAGE", "help": "reference language (default: en)"},
        "id": {
            "default": ROW_NUMBER,
            "metavar": "FORM",
            "help": "form of an id, with doc_id or columns of `doc` in braces (default: {doc_id})",
        },
        "metric": {"help": "metric that says correct (default: the only one whose values are 0 or 1)"},
        "filter": {"help": "filter of the answers (default: the only one)"},
        "ramoe-data": {
            "nargs": "+",
            "default": [],
            "metavar": "FILE",
            "help": "parallel data: ids, tasks, splits and order of the taxonomy's rows",
        },
        "ramoe-columns": {"nargs": "+", "metavar": "FIELD=COLUMN", "help": "columns of the data"},
        "ramoe-split": {"metavar": "SPLIT", "help": "splits of the data; without data: the rows' split"},
        "task": {"help": "without data: the rows' task"},
        "checkpoint": {"default": "not recorded", "metavar": "NAME", "help": "name of the model, to record"},
    }
    for name, settings in flags.items():
        parser.add_argument(f"--{name}", **settings)
    return parser


def _files(options: Any) -> dict[str, list[SampleFile]]:
    """The sample files of each language, the anchor among at least two languages; all by one metric."""
    files: dict[str, list[SampleFile]] = {}
    for given in options.from_samples:
        refuse_unwritable(given, "--from-samples")
        language, _, path = given.partition("=")
        if not language or not path:
            raise RamoeError(f"--from-samples {given}: expected LANGUAGE=FILE, such as sw={path or given}")
        file = read_samples(path, options.metric, options.filter, options.id)
        files.setdefault(language, []).append(file)
    anchor = options.ramoe_anchor
    if anchor not in files or len(files) < 2:
        raise RamoeError(
            f"--from-samples: found the languages {', '.join(files)}, expected the anchor {anchor!r} and at "
            "least one other; add its file, or give another --ramoe-anchor"
        )
    first, *others = [file for group in files.values() for file in group]
    for file in others:
        if file.metric != first.metric:
            raise RamoeError(
                f"{file.path}: metric {file.metric!r}, but {first.metric!r} in {first.path}; "
                "choose one for all files with --metric"
            )
    return files


def _examples(options: Any) -> list[Example] | None:
    """The parallel rows; None without --ramoe-data."""
    if not options.ramoe_data:
        return None
    columns = DataOptions(columns=options.ramoe_columns).column_mapping()
    return load_examples(options.ramoe_data, columns, options.ramoe_split)


def _views(
    options: Any, found: Outcomes, examples: Sequence[Example] | None
) -> Iterator[tuple[str, str, str, str]]:
    """(id, language, task, split) of the rows in the other languages, in the order of the data."""
    if examples is not None:
        for e in examples:
            if e.language != options.ramoe_anchor and e.language in found:
                yield e.id, e.language, e.task, e.split
        return
    for language, samples in found.items():
        if language != options.ramoe_anchor:
            for id_ in samples:
                yield id_, language, options.task, options.ramoe_split


def _unmatched(found: Outcomes, anchor: str, examples: Sequence[Example] | None) -> Iterator[Unmatched]:
    """What has no partner: samples in one language alone, samples outside the data, data without a sample."""
    rows: dict[str, dict[str, None]] = {}
    for example in examples or ():
        rows.setdefault(example.language, {})[example.id] = None
    for language, samples in found.items():
        others: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = []
        if language != anchor:
            others += [
                (f"samples in {language} without one in {anchor}", samples, found[anchor]),
                (f"samples in {anchor} without one in {language}", found[anchor], samples),
            ]
        if examples is not None:
            others += [
                (f"samples in {language} that the data do not have", samples, rows.get(language, {})),
                (f"rows of the data in {language} without a sample", rows.get(language, {}), samples),
            ]
        for what, these, those in others:
            if missing := [id_ for id_ in these if id_ not in those]:
                yield Unmatched(what, missing)
    for language in sorted(rows.keys() - found.keys()):
        yield Unmatched(f"rows of the data in {language}, which has no sample file", list(rows[language]))


def _same_targets(options: Any, found: Outcomes, rows: Sequence[TaxonomyRow]) -> Iterator[str]:
    """A sign of whether row numbers are parallel ids."""
    if options.id == ROW_NUMBER:
        pairs = [(found[options.ramoe_anchor][row.id], found[row.language][row.id]) for row in rows]
        same = sum(one.target == other.target for one, other in pairs)
        yield (
            f"rows are matched by their number: {same} of {len(rows)} pairs have the same target; expect all "
            "where a target is a number or a choice's number"
        )


if __name__ == "__main__":
    sys.exit(main())
