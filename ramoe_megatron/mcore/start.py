"""The steps of a job before its model is built. A run stops at the first failure; a check tries all."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ramoe_megatron.mcore.findings import WRITTEN, Finding, State, reason


class Absent(Exception):
    """The input of a step is missing: an earlier step failed, or waits for a file that does not exist yet."""


class Step[Value]:
    """The result of a step."""

    def __init__(self, *value: Value) -> None:
        """Without a value, the step failed or waits for a file."""
        self._value = value

    @property
    def value(self) -> Value:
        """The value. Raises Absent if there is none, which only happens in a check."""
        if not self._value:
            raise Absent
        return self._value[0]


class Start:
    """Runs a job's steps. The job and its check use the same code, so both find the same faults.

    Attributes: `tokenizer` and `config` (the model's `TransformerConfig`) are the steps that every job takes.
    """

    tokenizer: Step[Any]
    config: Step[Any]

    def __init__(
        self,
        checks: bool = False,
        coming: Mapping[str, str] | None = None,
        kept: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            checks: only check. A failed step becomes a finding, and the next steps run.
            coming: in a check, the files that an earlier stage will write, and the name of that stage.
            kept: the cache of `once`. Command lines that are checked in one process share it.
        """
        self.checks, self.coming = checks, coming or {}
        self.kept = {} if kept is None else kept
        self._found: dict[str, Finding] = {}

    @property
    def findings(self) -> list[Finding]:
        """The findings of a check: one for each kind of check, in the order of the steps."""
        return list(self._found.values())

    def step[Value](
        self,
        check: str,
        look: Callable[[], Value],
        told: Callable[[Value], str | None] | None = None,
        advice: str = "",
        needs: Iterable[str | None] = (),
    ) -> Step[Value]:
        """Take a step.

        Args:
            check: the subject of the step, in the words of the doctor. Several steps may have the same
                subject.
            look: the step. In a run, an error of the step is raised.
            told: gives the text of the check for a valid value; None for no text.
            advice: the text of the check for an error.
            needs: files that the step reads. In a check, the step waits for a file that does not exist yet.
        """
        if not self.checks:
            return Step(look())
        if makers := dict.fromkeys(self.coming[path] for path in needs if path and path in self.coming):
            self._record(check, "ok", f"{WRITTEN}{', '.join(makers)}")
            return Step()
        try:
            value = look()
            text = told(value) if told else None
        except Absent:  # the cause has been recorded
            return Step()
        except (Exception, SystemExit) as error:
            self._record(check, "fatal", reason(error), advice)
            return Step()
        if text is not None:
            self._record(check, "ok", text)
        return Step(value)

    def warn(self, check: str, found: str, advice: str) -> None:
        """Record in a check something that does not stop the job but may be a mistake."""
        self._record(check, "warning", found, advice)

    def once[Value](self, key: object, make: Callable[[], Value]) -> Value:
        """The value of `make`, computed once in this process for each key."""
        text = repr(key)
        if text not in self.kept:
            self.kept[text] = make()
        return self.kept[text]

    def _record(self, check: str, state: State, found: str, advice: str = "") -> None:
        earlier = self._found.get(check)
        if earlier is None or earlier.state == "ok":
            self._found[check] = Finding(check, state, found, advice)
