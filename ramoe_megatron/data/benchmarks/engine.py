"""From a published benchmark to rows of parallel data."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ramoe_megatron.artifacts.files import atomic_write_text, package_version, save_document
from ramoe_megatron.data.answers import language_code
from ramoe_megatron.data.benchmarks.declaration import Declaration, Renderer, declared
from ramoe_megatron.data.benchmarks.published import PublishedRow, Source, match_language
from ramoe_megatron.data.grading import grade, ungradable
from ramoe_megatron.data.parallel import Example, write_rows
from ramoe_megatron.data.sampler import named_rng
from ramoe_megatron.data.words import words_of
from ramoe_megatron.data.world.text import list_rows, name_rows
from ramoe_megatron.errors import RamoeError

TEXT_TASK = "general"
BETWEEN = {"line": ("\n", ""), "space": ("", " "), "none": ("", "")}
"""What is between prompt and response: the end of the prompt, and the start of the response."""
APART = "\n\n"
"""Between the examples of a few-shot prompt."""


@dataclass(frozen=True)
class BenchmarkConfig:
    """Options of a benchmark."""

    benchmark: str = ""
    """Name of the benchmark; `ramoe data --list` has them."""
    source: str = ""
    """Folder or file of the benchmark as its authors publish it, or its name on the Hugging Face hub."""
    languages: tuple[str, ...] = ()
    """Languages to write, by any of their names; the rows have them as they are given here. Default: all that
    the source has, as published."""
    anchor: str = ""
    """Language that has every id. Default: English, if it is there."""
    split: tuple[str, ...] = ()
    """Splits to write. Default: all."""
    splits: dict[str, float | str] = field(default_factory=dict)
    """Split of the rows -> where its ids come from, for benchmarks without such a split: the share of the ids
    of split "test", or the name of another split, whose ids move there."""
    shots: int = 0
    """Number of answered examples before each question, the same ids in every language. They come from
    another split than "test"."""
    chat: bool = False
    """Write `messages` instead of prompt and response."""
    between: Literal["line", "space", "none"] = "line"
    """Between prompt and response: a line break ends the prompt, a space begins the response, or nothing."""
    limit: int | None = None
    """Maximum number of ids in each split, drawn by the seed. Default: all."""
    seed: int = 1
    """Seed of the ids that `splits` moves, of `shots` and of `limit`."""

    def __post_init__(self) -> None:
        if self.shots < 0 or (self.limit is not None and self.limit < 1):
            raise RamoeError(f"shots is {self.shots} and limit is {self.limit}, expected 0 and 1 or more")
        for name, part in self.splits.items():
            if not isinstance(part, str) and not 0 < part < 1:
                raise RamoeError(f"splits: {name} is {part}, expected a share between 0 and 1 or a split")


@dataclass(frozen=True)
class BenchmarkStats:
    """Counts of a converted benchmark."""

    benchmark: str
    languages: dict[str, str]
    """Language of the rows -> language as published."""
    rows: dict[str, dict[str, int]]
    """split -> language -> number of rows"""
    left_out: dict[str, int]
    """Reason -> number of ids that are left out in every language."""


@dataclass(frozen=True, slots=True)
class _View:
    """A published row in one language, with its rendered fields."""

    id: str
    language: str
    split: str
    place: str
    prompt: str
    user: str
    response: str
    answer: str
    choices: tuple[str, ...]
    answers: tuple[str, ...]
    agree: str
    kept: bool


def read_benchmark(config: BenchmarkConfig) -> tuple[list[dict[str, Any]], BenchmarkStats, dict[str, Any]]:
    """The rows of a benchmark, their counts, and where they come from.

    Raises:
        RamoeError: the benchmark or a language is unknown, the source lacks a split, a column or the parallel
            id of a language, languages disagree where they must not, no split can give the shots, or a
            response is not a right answer by the benchmark's own metric.
    """
    if not config.source:
        raise RamoeError(f"{config.benchmark}: no source: give the folder, or the name on the hub")
    declaration = declared(config.benchmark)
    source = Source(config.source, config.benchmark, declaration)
    languages = _languages(config, source)
    anchor = _anchor(config, languages)
    views = _views(config, source, declaration, languages)
    languages = _found_languages(config, languages, views)
    left_out: Counter[str] = Counter()
    if declaration.parallel:
        _refuse_unmatched(views, anchor, config.benchmark)
    views = _agreeing(views, declaration, left_out)
    views = _limited(_moved(views, config, declaration), config)
    shots = _shots(views, config, declaration)
    rows = [
        _row(view, shots.get(view.language, []), config, declaration)
        for view in views
        if not config.split or view.split in config.split
    ]
    _refuse_empty(rows, views, config)
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        by_language = counts.setdefault(row["split"], {})
        by_language[row["language"]] = by_language.get(row["language"], 0) + 1
    stats = BenchmarkStats(config.benchmark, languages, counts, dict(left_out))
    origin = {
        "benchmark": config.benchmark,
        "paper": declaration.paper,
        "licence": declaration.licence,
        "source": config.source,
        "files": source.digests(),
    }
    return rows, stats, origin


def write_benchmark(config: BenchmarkConfig, out: Path) -> BenchmarkStats:
    """Writes the rows to the file ``out``, and where they come from to the same name with ``.json``.

    Raises:
        RamoeError: as `read_benchmark`.
    """
    rows, stats, origin = read_benchmark(config)
    atomic_write_text(out, write_rows(rows))
    save_origins(out.with_suffix(".json"), [config], [stats], [origin])
    return stats


def save_origins(
    path: Path,
    configs: Sequence[BenchmarkConfig],
    stats: Sequence[BenchmarkStats],
    origins: Sequence[Mapping[str, Any]],
) -> None:
    """Write where the rows of some benchmarks come from, with their options and counts."""
    entries = [
        {
            **origin,
            "options": {
                "split": list(config.split),
                "splits": config.splits,
                "shots": config.shots,
                "chat": config.chat,
                "between": config.between,
                "limit": config.limit,
                "seed": config.seed,
            },
            "languages": found.languages,
            "rows": found.rows,
            "left_out": found.left_out,
        }
        for config, found, origin in zip(configs, stats, origins, strict=True)
    ]
    save_document(path, "ramoe-data", {"benchmarks": entries, "package_version": package_version()})


# ---- languages ----


def _languages(config: BenchmarkConfig, source: Source) -> dict[str, str]:
    """Language of the rows -> language as published."""
    codes, spellings = source.languages(), source.declaration.spellings
    if not config.languages:
        if not codes:
            raise RamoeError(
                f"{config.source}: name the languages of {config.benchmark}: the hub does not list them here"
            )
        anchor = match_language(config.anchor, codes, spellings) if config.anchor else None
        return {config.anchor if code == anchor else code: code for code in codes}
    found: dict[str, str] = {}
    for name in dict.fromkeys(config.languages):
        # a data set on the hub has the codes as its configurations, and refuses a wrong one itself
        code = match_language(name, codes, spellings) if codes else name
        if code is None:
            raise RamoeError(
                f"{config.source}: {config.benchmark} has no language {name!r}. "
                f"Languages found: {', '.join(codes) or 'none'}.{_traps(source.declaration)}"
            )
        if code in found.values():
            raise RamoeError(f"languages: {name!r} is {code!r}, which is named twice; name each once")
        found[name] = code
    return found


def _found_languages(
    config: BenchmarkConfig, languages: dict[str, str], views: Sequence[_View]
) -> dict[str, str]:
    """The languages that have rows. A file with several languages shows only then which it has."""
    there = {view.language for view in views}
    absent = [language for language in languages if language not in there]
    if absent and config.languages:
        raise RamoeError(
            f"{config.source}: {config.benchmark} has no row in {', '.join(map(repr, absent))}; "
            "leave the languages out, or give their rows"
        )
    return {language: code for language, code in languages.items() if language in there}


def _anchor(config: BenchmarkConfig, languages: Mapping[str, str]) -> str | None:
    if not config.anchor:
        return match_language("en", list(languages), {})
    if config.anchor not in languages:
        raise RamoeError(
            f"anchor: {config.anchor!r} is not among the languages {', '.join(languages)}; add it there, or "
            "choose another"
        )
    return config.anchor


def _traps(declaration: Declaration) -> str:
    return f" {' '.join(declaration.traps)}" if declaration.traps else ""


# ---- rows as published, and what must hold between languages ----


def _views(
    config: BenchmarkConfig, source: Source, declaration: Declaration, languages: Mapping[str, str]
) -> list[_View]:
    views: list[_View] = []
    seen: dict[tuple[str, str], str] = {}
    for published in source.splits():
        split = source.form.splits[published]
        renderer = Renderer(declaration.fields, source.form.fields, f"{config.benchmark}.yaml: forms")
        borrowed = _borrowed(source, declaration, renderer, published)
        for language, code in languages.items():
            for row in source.rows(code, published):
                values = _values(row, published, code, declaration)
                _replace_borrowed(values, borrowed, renderer, row.place)
                view = _view(row, values, language, split, renderer, declaration.metric)
                if (key := (view.id, language)) in seen:
                    raise RamoeError(
                        f"{row.place}: id {view.id!r} occurs again in {language!r}; the first row is at "
                        f"{seen[key]}. Each id has one row in a language."
                    )
                seen[key] = row.place
                views.append(view)
    if not views:
        raise RamoeError(f"{config.source}: no rows of {config.benchmark}")
    return views


def _values(row: PublishedRow, split: str, code: str, declaration: Declaration) -> dict[str, Any]:
    words = words_of(declaration.spellings.get(code, code))
    own = declaration.words.get(code, declaration.words.get("default", {}))
    return {
        **row.columns,
        "number": row.number,
        "split": split,
        "code": code,
        "words": {"question": words.question, "answer": words.answer, **own},
    }


def _borrowed(
    source: Source, declaration: Declaration, renderer: Renderer, split: str
) -> dict[str, dict[str, Any]]:
    """Column -> id -> its value in a language that has it right.

    Raises RamoeError when the source has none of those languages.
    """
    found: dict[str, dict[str, Any]] = {}
    for column, lenders in declaration.borrow.items():
        there = [code for code in lenders if source.on_hub or code in source.languages()]
        if not there:
            raise RamoeError(
                f"{source.name}: column {column!r} of {declaration.title} is right only in the languages "
                f"{', '.join(lenders)}, and none of them is there; add the files of one"
            )
        found[column] = {}
        for row in source.rows(there[0], split):
            values = _values(row, split, there[0], declaration)
            id = renderer.text("id", values, row.place)
            if column not in row.columns:
                raise RamoeError(
                    f"{row.place}: no column {column!r}. Columns found: {', '.join(row.columns)}."
                )
            found[column][id] = row.columns[column]
    return found


def _replace_borrowed(
    values: dict[str, Any], borrowed: Mapping[str, Mapping[str, Any]], renderer: Renderer, place: str
) -> None:
    if borrowed:
        id = renderer.text("id", values, place)
        for column, by_id in borrowed.items():
            if id not in by_id:
                raise RamoeError(
                    f"{place}: id {id!r} has no row in the language that gives {column!r}; add the row there"
                )
            values[column] = by_id[id]


def _view(
    row: PublishedRow,
    values: Mapping[str, Any],
    language: str,
    split: str,
    renderer: Renderer,
    metric: str | None,
) -> _View:
    def text(field: str) -> str:
        return renderer.text(field, values, row.place)

    kept = not renderer.fields.keep or bool(renderer.value("keep", values, row.place))
    choices, answer, answers, response = [], "", [], ""
    if kept:
        choices, answer = renderer.texts("choices", values, row.place), text("answer")
        if renderer.fields.gold:
            answer = _gold(text("gold"), choices, row.place)
        if renderer.fields.answers:
            answers = list(dict.fromkeys(filter(None, renderer.texts("answers", values, row.place))))
            answer = answer or next(iter(answers), "")
        response = answer if renderer.fields.response == "" and metric != "ifeval" else text("response")
    prompt = text("prompt") if kept else ""
    return _View(
        text("id"),
        language,
        split,
        row.place,
        prompt,
        text("user") if kept and renderer.fields.user else prompt,
        response,
        answer,
        tuple(choices),
        tuple(answers),
        text("agree"),
        kept,
    )


def _gold(text: str, choices: Sequence[str], place: str) -> str:
    if not text.isdecimal() or int(text) >= len(choices):
        raise RamoeError(
            f"{place}: the label gives choice {text!r} counted from 0, expected 0 to {len(choices) - 1}; "
            "a test set without labels cannot be used"
        )
    return choices[int(text)]


def _refuse_unmatched(views: Sequence[_View], anchor: str | None, benchmark: str) -> None:
    """Raise RamoeError for ids that a language has and the anchor lacks."""
    if anchor is None:
        return
    known = {(view.split, view.id) for view in views if view.language == anchor}
    lost = [view for view in views if (view.split, view.id) not in known]
    if lost:
        first = lost[0]
        raise RamoeError(
            f"{first.place}: {benchmark} has id {first.id!r} in {first.language!r}, and no row of {anchor!r} "
            f"has this id in split {first.split!r}; so {len(lost)} rows have no parallel row. "
            f"Give the same release of each language, or leave {first.language!r} out."
        )


def _agreeing(views: list[_View], declaration: Declaration, left_out: Counter[str]) -> list[_View]:
    """The views whose ids agree in all languages, and have an answer in all languages."""
    firsts: dict[tuple[str, str], _View] = {}
    wrong: dict[tuple[str, str], str] = {}
    for view in views:
        key = (view.split, view.id)
        first = firsts.setdefault(key, view) if declaration.parallel else view
        if not view.kept:
            wrong[key] = "no answer"
        elif view.agree != first.agree and first.kept:
            if declaration.disagreement == "refuse":
                raise RamoeError(
                    f"{view.place}: id {view.id!r} has {view.agree!r} in {view.language!r}, but "
                    f"{first.agree!r} in {first.language!r} ({first.place}); correct one of the two rows"
                )
            wrong.setdefault(key, "languages disagree")
    left_out.update(wrong.values())
    return [view for view in views if (view.split, view.id) not in wrong]


# ---- splits and shots ----


def _moved(views: list[_View], config: BenchmarkConfig, declaration: Declaration) -> list[_View]:
    """The views with the splits of `BenchmarkConfig.splits`."""
    if not config.splits or declaration.kind == "text":
        return views
    if declaration.metric == "ifeval":
        raise RamoeError(f"splits: {config.benchmark} has no gold responses, so it has no rows to train on")
    there = list(dict.fromkeys(view.split for view in views))
    target: dict[tuple[str, str], str] = {}
    test = _ids(views, "test")
    shuffled = [test[i] for i in named_rng(config.seed, "splits").permutation(len(test))]
    for name, part in config.splits.items():
        if isinstance(part, str):
            if part not in there:
                raise RamoeError(
                    f"splits: {config.benchmark} has no split {part!r} to use as {name!r}; "
                    f"it has {', '.join(there)}"
                )
            target |= {(part, id): name for id in _ids(views, part)}
            continue
        if name in there:
            raise RamoeError(
                f"splits: {config.benchmark} has a split {name!r} already; a share of 'test' is for splits "
                "that it lacks"
            )
        count = max(1, round(part * len(test)))
        if count >= len(shuffled):
            raise RamoeError(f"splits: the shares leave no id of split 'test' ({len(test)} ids); lower them")
        target |= {("test", id): name for id in shuffled[:count]}
        shuffled = shuffled[count:]
    return [replace(view, split=target.get((view.split, view.id), view.split)) for view in views]


def _limited(views: list[_View], config: BenchmarkConfig) -> list[_View]:
    if config.limit is None:
        return views
    kept: set[tuple[str, str]] = set()
    for split in dict.fromkeys(view.split for view in views):
        ids = _ids(views, split)
        drawn = named_rng(config.seed, f"limit/{split}").permutation(len(ids))[: config.limit]
        kept |= {(split, ids[i]) for i in drawn}
    return [view for view in views if (view.split, view.id) in kept]


def _shots(
    views: Sequence[_View], config: BenchmarkConfig, declaration: Declaration
) -> dict[str, list[_View]]:
    """Language -> one example more than the shots, so that none has to show its own answer."""
    if not config.shots or declaration.kind == "text":
        return {}
    if declaration.metric == "ifeval":
        raise RamoeError(f"shots: {config.benchmark} has no gold responses; set shots to 0")
    there = dict.fromkeys(view.split for view in views)
    split = next((name for name in declaration.shots if name in there), None)
    if split is None:
        raise RamoeError(
            f"shots: {config.benchmark} has the splits {', '.join(there)}, and few-shot examples come from "
            f"{' or '.join(declaration.shots)}, never from 'test'. Set shots to 0, or move ids of 'test' "
            "with splits, such as train: 0.2."
        )
    by_id: dict[str, dict[str, _View]] = {}
    languages = dict.fromkeys(view.language for view in views)
    for view in views:
        if view.split == split:
            by_id.setdefault(view.id, {})[view.language] = view
    whole = [id for id, found in by_id.items() if len(found) == len(languages)] or list(by_id)
    if len(whole) <= config.shots:
        raise RamoeError(
            f"shots: {config.shots} examples and one to spare are needed, and split {split!r} of "
            f"{config.benchmark} has {len(whole)} ids; lower shots"
        )
    order = [whole[i] for i in named_rng(config.seed, "shots").permutation(len(whole))]
    found = {
        language: [by_id[id][language] for id in order if language in by_id[id]][: config.shots + 1]
        for language in languages
    }
    if poor := [language for language, shown in found.items() if len(shown) <= config.shots]:
        raise RamoeError(
            f"shots: {config.benchmark} has fewer than {config.shots + 1} rows of split {split!r} in "
            f"{', '.join(poor)}; lower shots, or leave the languages out"
        )
    return found


def _ids(views: Sequence[_View], split: str) -> list[str]:
    return list(dict.fromkeys(view.id for view in views if view.split == split))


def _refuse_empty(rows: Sequence[Any], views: Sequence[_View], config: BenchmarkConfig) -> None:
    found = {row["split"] for row in rows}
    missing = [name for name in config.split if name not in found]
    if missing or not rows:
        there = ", ".join(dict.fromkeys(view.split for view in views)) or "none"
        raise RamoeError(
            f"{config.source}: {config.benchmark} has no split {', '.join(map(repr, missing)) or 'at all'}; "
            f"splits found: {there}"
        )


# ---- rows of parallel data ----


def _row(
    view: _View, shown: Sequence[_View], config: BenchmarkConfig, declaration: Declaration
) -> dict[str, Any]:
    same = {"id": view.id, "language": view.language}
    if declaration.kind == "text":
        return {**same, "task": TEXT_TASK, "prompt": "", "response": view.response, "split": view.split}
    end, start = ("", "") if config.chat else BETWEEN[config.between]
    shots = [shot for shot in shown if shot.id != view.id][: config.shots]
    row: dict[str, Any] = {**same, "task": declaration.task}
    if config.chat:
        turns = [text for shot in shots for text in (shot.user, shot.response)] + [view.user, view.response]
        roles = ("user", "assistant")
        row["messages"] = [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]
    else:
        blocks = [f"{shot.prompt}{end}{start}{shot.response}" for shot in shots]
        row |= {"prompt": APART.join([*blocks, view.prompt + end])}
        row |= {"response": start + view.response if view.response else ""}
    row["answer"] = start + view.answer
    if view.choices:
        row["choices"] = [start + choice for choice in view.choices]
    row["split"] = view.split
    if declaration.metric:
        row["metric"] = declaration.metric
    if view.answers:
        row["answers"] = list(view.answers)
    if declaration.stop and not config.chat and not view.choices:
        row["stop"] = declaration.stop
    if declaration.choice_score and view.choices:
        row["choice_score"] = declaration.choice_score
    _refuse_wrong(view, declaration)
    return row


def _refuse_wrong(view: _View, declaration: Declaration) -> None:
    """Raise RamoeError for a response that is no right answer by the benchmark's own metric."""
    if not view.prompt or not view.answer or (not view.response and declaration.metric != "ifeval"):
        empty = next(name for name in ("prompt", "answer", "response") if not getattr(view, name))
        raise RamoeError(f"{view.place}: the {empty} of id {view.id!r} is empty, expected text")
    if view.choices and view.answer not in view.choices:
        raise RamoeError(
            f"{view.place}: answer {view.answer!r} of id {view.id!r} is none of the choices "
            f"{', '.join(map(repr, view.choices))}; correct the row"
        )
    if declaration.metric in (None, "ifeval"):
        return
    example = Example(
        view.id, view.language, declaration.task, view.prompt, view.response, view.answer, None, view.split,
        place=view.place, metric=declaration.metric, answers=view.answers or None,
    )  # fmt: skip
    reason = ungradable(example)
    if reason or not grade(example, view.response):
        raise RamoeError(
            f"{view.place}: id {view.id!r}: "
            f"{reason or f'the response does not give its own answer {view.answer!r}'}; correct the row"
        )


# ---- several benchmarks in one run ----


@dataclass(frozen=True)
class BenchmarksConfig:
    """The benchmarks of a run."""

    benchmarks: tuple[BenchmarkConfig, ...] = ()
    """Benchmarks. Questions go to parallel.jsonl, general text in the anchor language to general.jsonl."""
    general: bool = True
    """Write general.jsonl. Without a benchmark of general text, it has names and lists from CLDR in the
    anchor language."""
    anchor: str = "en"
    """Anchor language."""


@dataclass(frozen=True)
class BenchmarksStats:
    """Counts of the benchmarks of a run."""

    benchmarks: list[BenchmarkStats]
    general: int
    """Number of rows of general.jsonl."""


def write_benchmarks(config: BenchmarksConfig, out: Path) -> BenchmarksStats:
    """Writes parallel.jsonl, benchmarks.json and, if asked for, general.jsonl into ``out``.

    Raises:
        RamoeError: as `read_benchmark`; two benchmarks have the same id and language; or no benchmark has
            questions.
    """
    read = [read_benchmark(one) for one in config.benchmarks]
    rows = [row for found, _, _ in read for row in found]
    questions = [row for row in rows if row["task"] != TEXT_TASK]
    if not questions:
        raise RamoeError("the benchmarks have general text alone; add one with questions")
    seen: set[tuple[str, str]] = set()
    for row in questions:
        key = (row["id"], row["language"])
        if key in seen:
            raise RamoeError(
                f"id {row['id']!r} in {row['language']!r} comes from two benchmarks; "
                "give each benchmark its own languages"
            )
        seen.add(key)
    atomic_write_text(out / "parallel.jsonl", write_rows(questions))
    general: list[dict[str, Any]] = []
    if config.general:
        text = [row for row in rows if row["task"] == TEXT_TASK and row["language"] == config.anchor]
        general = [{**row, "split": "train"} for row in text] or list(_cldr_text(config.anchor))
        atomic_write_text(out / "general.jsonl", write_rows(general))
    stats = [found for _, found, _ in read]
    save_origins(out / "benchmarks.json", config.benchmarks, stats, [origin for *_, origin in read])
    return BenchmarksStats(stats, len(general))


def _cldr_text(language: str) -> Iterator[dict[str, Any]]:
    """Names and lists of the embedded world as general text."""
    code = language_code(language) or "en"
    for row in (*name_rows(code), *list_rows(code)):
        text = f"{row['prompt']} {row['response']}"
        same = {"id": row["id"], "language": language, "task": TEXT_TASK}
        yield {**same, "prompt": "", "response": text, "split": "train"}
