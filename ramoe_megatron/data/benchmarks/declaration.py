"""What a benchmark is: one YAML file beside this module for each, read into a `Declaration`.

Texts are Jinja templates over the columns of a published row. The sandbox runs them, because a declaration is
data. A template also sees:

- `number`: place of the row in its split, from 0.
- `split`: the split as published. `code`: the language as published.
- `words`: labels of the language (`data.words`), and the declaration's own `words` of the language.
"""

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml
from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import SandboxedEnvironment
from pydantic import BaseModel, ConfigDict, ValidationError

from ramoe_megatron.errors import RamoeError

ENVIRONMENT = SandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
ENVIRONMENT.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
GIVEN = ("number", "split", "code", "words")
"""What a template sees beside the columns."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Fields(_Part):
    """Templates of a row of parallel data. A form of a source may replace some."""

    id: str = ""
    """Id of the row, the same in every language."""
    prompt: str = ""
    """Input of the model, in the plain form. Empty for general text."""
    user: str = ""
    """The user's message, in the chat form. Default: the prompt."""
    response: str = ""
    """Text to train on, with the answer. Default: the answer."""
    answer: str = ""
    """Gold answer."""
    gold: str = ""
    """Instead of the answer: place of the gold answer among the choices, from 0."""
    choices: list[str] | str = []
    """Templates of the choices, or a Jinja expression with a list."""
    answers: str = ""
    """Jinja expression with the list of all gold answers."""
    agree: str = ""
    """What must be the same in every language of an id, such as the label."""
    keep: str = ""
    """Jinja expression: ids of rows for which it is false are left out."""


class Form(_Part):
    """One form in which a benchmark is published: files below a folder, or a hub data set."""

    files: str = ""
    """Path below the source, with the places {language} and {split}, and * for any text."""
    hub: str = ""
    """Name of the hub data set."""
    config: str = "{language}"
    """Configuration of the hub data set, with the place {language}."""
    read: Literal["rows", "table", "lines", "squad"] = "rows"
    """rows: JSONL, CSV, Parquet or Arrow. table: cells between tabs, without quoting. lines: a text a line.
    squad: SQuAD's JSON."""
    header: list[str] = []
    """Columns of a table whose first line is a row already."""
    splits: dict[str, str] = {}
    """Split as published -> our split."""
    languages: list[str] = []
    """Languages of a form whose files do not have the language in their path."""
    row_language: str = ""
    """Template of a row's language, for files with rows of several languages. Default: a row has all
    languages."""
    fields: Fields = Fields()
    """Templates that differ from the declaration's own."""


class Declaration(_Part):
    """A benchmark."""

    title: str
    """Name in text."""
    paper: str
    """Where the benchmark is described."""
    licence: str
    """Licence of the data."""
    task: str
    """Name of the task in the rows. Benchmarks with the same ids share it."""
    kind: Literal["questions", "text"] = "questions"
    """text: general text without a question."""
    forms: list[Form]
    """Forms of the source, the first that is there."""
    spellings: dict[str, str] = {}
    """Language as published -> its CLDR code, where the two cannot be matched."""
    words: dict[str, dict[str, str]] = {}
    """Language as published -> words for the templates."""
    fields: Fields
    """Templates of a row."""
    borrow: dict[str, list[str]] = {}
    """Column -> languages with correct values. Other languages get the value of the same id from the first of
    them that the source has."""
    disagreement: Literal["refuse", "drop"] = "refuse"
    """What happens to an id whose languages do not agree."""
    parallel: bool = True
    """Whether the rows of an id say the same in every language."""
    shots: list[str] = ["train", "validation"]
    """Our splits that examples for few-shot prompts may come from, the first that is there."""
    metric: Literal["number", "exact", "ifeval"] | None = None
    """How a generated answer is graded (`data.grading`)."""
    stop: list[str] = []
    """Strings that end a generated answer, in the plain form."""
    choice_score: Literal["sum", "token", "byte"] | None = None
    """How choices are scored."""
    traps: list[str] = []
    """What is wrong or unusual in the data, for the user."""


def benchmark_names() -> list[str]:
    """Names of all benchmarks: the names of the YAML files."""
    found = (path.name for path in files(__package__).iterdir())
    return sorted(name.removesuffix(".yaml") for name in found if name.endswith(".yaml"))


@cache
def declared(name: str) -> Declaration:
    """The declaration of a benchmark.

    Raises:
        RamoeError: there is no such benchmark, or its file has an unknown key or a malformed template.
    """
    if name not in benchmark_names():
        raise RamoeError(f"benchmark {name!r} is not known; known are {', '.join(benchmark_names())}")
    raw = yaml.safe_load((files(__package__) / f"{name}.yaml").read_text(encoding="utf-8"))
    return check_declaration(raw, f"{name}.yaml")


def check_declaration(raw: Any, where: str) -> Declaration:
    """A declaration from plain data. Raises RamoeError as `declared`."""
    try:
        found = Declaration.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise RamoeError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    for number, form in enumerate(found.forms):
        if bool(form.files) == bool(form.hub) or not form.splits:
            raise RamoeError(f"{where}: forms.{number}: give splits, and either files or hub")
        Renderer(found.fields, form.fields, f"{where}: forms.{number}")
    return found


class Renderer:
    """The templates of one form of a benchmark. Raises RamoeError for a malformed template."""

    def __init__(self, own: Fields, form: Fields, where: str) -> None:
        self.where = where
        self.fields = own.model_copy(update={name: getattr(form, name) for name in form.model_fields_set})
        self._columns = {field: self._read_by(field) for field in Fields.model_fields}

    def _read_by(self, field: str) -> frozenset[str]:
        """The columns that a field reads."""
        value = getattr(self.fields, field)
        if isinstance(value, str) and value and field in ("choices", "answers", "keep"):
            value = [f"{{{{ {value} }}}}"]
        try:
            return frozenset().union(*map(_names, value if isinstance(value, list) else [value]))
        except TemplateError as error:
            raise RamoeError(f"{self.where}: {field}: malformed template: {error}") from error

    def text(self, field: str, values: Mapping[str, Any], place: str) -> str:
        """A field as text, without white space around it. Raises RamoeError for an absent column."""
        return self._render(field, getattr(self.fields, field), values, place)

    def texts(self, field: str, values: Mapping[str, Any], place: str) -> list[str]:
        """A field as a list of texts. Raises RamoeError for an absent column."""
        value = getattr(self.fields, field)
        if isinstance(value, list):
            return [self._render(field, text, values, place) for text in value]
        return [str(text).strip() for text in self.value(field, values, place) or []]

    def value(self, field: str, values: Mapping[str, Any], place: str) -> Any:
        """The value of a field that is an expression. Raises RamoeError for an absent column."""
        self._refuse_absent(field, values, place)
        try:
            return _expression(getattr(self.fields, field))(**values)
        except Exception as error:  # an expression can raise anything on a value of another kind
            raise RamoeError(f"{place}: {self.where}: {field}: {error}") from error

    def _render(self, field: str, text: str, values: Mapping[str, Any], place: str) -> str:
        self._refuse_absent(field, values, place)
        try:
            return _template(text).render(values).strip()
        except Exception as error:  # a template can raise anything on a value of another kind
            raise RamoeError(f"{place}: {self.where}: {field}: {error}") from error

    def _refuse_absent(self, field: str, values: Mapping[str, Any], place: str) -> None:
        if absent := sorted(self._columns[field] - set(values)):
            found = ", ".join(name for name in values if name not in GIVEN) or "none"
            raise RamoeError(
                f"{place}: no column {', '.join(map(repr, absent))}, expected for the benchmark's {field}. "
                f"Columns found: {found}. Give the data as published, or correct {self.where.split(':')[0]}."
            )


@cache
def _names(text: str) -> frozenset[str]:
    return frozenset(meta.find_undeclared_variables(ENVIRONMENT.parse(text))) - frozenset(GIVEN)


@cache
def _template(text: str) -> Any:
    return ENVIRONMENT.from_string(text)


@cache
def _expression(text: str) -> Any:
    return ENVIRONMENT.compile_expression(text, undefined_to_none=False)
