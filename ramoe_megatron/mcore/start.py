"""The steps of a job before its model is built. A run stops at the first error; a check tries every step."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ramoe_megatron.mcore.findings import WRITTEN, Finding, State, reason


class Absent(Exception):
    """An input of a step is missing: an earlier step failed, or it needs a file that is not written yet."""


class Step[Value]:
    """The result of a step."""

    def __init__(self, *value: Value) -> None:
        """A step without a value failed, or needs a file that is not written yet."""
        self._value = value

    @property
    def value(self) -> Value:
        """The value of the step. Raises Absent if the step has no value, which happens only in a check."""
        if not self._value:
            raise Absent
        return self._value[0]


class Start:
    """Runs a job's steps. A job and its check share this code, so both find the same errors.

    Attributes:
        tokenizer: the step that makes the tokenizer.
        config: the step that makes the model's `TransformerConfig`.
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
            checks: whether this is a check. In a check, an error becomes a finding and the next steps still
                run.
            coming: in a check, files that an earlier stage will write, and the name of that stage.
            kept: the cache of `once`. All command lines that one process checks share it.
        """
        self.checks, self.coming = checks, coming or {}
        self.kept = {} if kept is None else kept
        self._found: dict[str, Finding] = {}

    @property
    def findings(self) -> list[Finding]:
        """The findings of a check, one for each name of a check, in the order of the steps."""
        return list(self._found.values())

    def step[Value](
        self,
        check: str,
        look: Callable[[], Value],
        told: Callable[[Value], str | None] | None = None,
        advice: str = "",
        needs: Iterable[str | None] = (),
    ) -> Step[Value]:
        """Run a step.

        Args:
            check: name of the check in the list of findings. Several steps may share a name.
            look: the step. In a run its errors pass through.
            told: makes the text of the finding from a valid value; None makes no finding.
            advice: what to do about an error.
            needs: files that the step reads. A check skips the step if an earlier stage will write one of
                them.
        """
        if not self.checks:
            return Step(look())
        if makers := dict.fromkeys(self.coming[path] for path in needs if path and path in self.coming):
            self._record(check, "ok", f"{WRITTEN}{', '.join(makers)}")
            return Step()
        try:
            value = look()
            text = told(value) if told else None
        except Absent:  # the earlier step has recorded the cause
            return Step()
        except (Exception, SystemExit) as error:
            self._record(check, "fatal", reason(error), advice)
            return Step()
        if text is not None:
            self._record(check, "ok", text)
        return Step(value)

    def warn(self, check: str, found: str, advice: str) -> None:
        """Record a warning: the job would run, but perhaps not as the user intends."""
        self._record(check, "warning", found, advice)

    def once[Value](self, key: object, make: Callable[[], Value]) -> Value:
        """The result of `make`, called once per key for all command lines of this process."""
        text = repr(key)
        if text not in self.kept:
            self.kept[text] = make()
        return self.kept[text]

    def _record(self, check: str, state: State, found: str, advice: str = "") -> None:
        earlier = self._found.get(check)
        if earlier is None or earlier.state == "ok":
            self._found[check] = Finding(check, state, found, advice)
