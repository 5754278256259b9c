"""The steps of a job before its model is built: a run dies of the first that fails, a check tries them all."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ramoe_megatron.mcore.findings import WRITTEN, Finding, State, reason


class Absent(Exception):
    """What a step reads was not made: an earlier step failed, or waits for a file that is still to be written."""


class Step[Value]:
    """What a step gave."""

    def __init__(self, *value: Value) -> None:
        """Without a value the step failed, or waits for a file."""
        self._value = value

    @property
    def value(self) -> Value:
        """What the step gave. Raises Absent where it gave nothing, which only happens in a check."""
        if not self._value:
            raise Absent
        return self._value[0]


class Start:
    """Runs a job's steps. One code path serves the job and its check, so both find the same faults.

    Attributes: `tokenizer` and `config` (the model's `TransformerConfig`), the steps that every job takes.
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
            checks: nothing is started; a step that fails becomes a finding, and the next steps go on.
            coming: in a check, the files that an earlier stage is going to write, and the name of that stage.
            kept: what `once` keeps; command lines that are checked in one process share it.
        """
        self.checks, self.coming = checks, coming or {}
        self.kept = {} if kept is None else kept
        self._found: dict[str, Finding] = {}

    @property
    def findings(self) -> list[Finding]:
        """What a check has found: one for each kind of check, in the order of the steps."""
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
            check: what the step looks at, in the words of the doctor; several steps may look at one thing.
            look: the step. In a run its error passes.
            told: what the check says about a value that is in order; None says nothing.
            advice: what the check says about an error.
            needs: files that the step reads. In a check, those that are still to come make the step wait.
        """
        if not self.checks:
            return Step(look())
        if makers := dict.fromkeys(self.coming[path] for path in needs if path and path in self.coming):
            self._record(check, "ok", f"{WRITTEN}{', '.join(makers)}")
            return Step()
        try:
            value = look()
            text = told(value) if told else None
        except Absent:  # its cause has been recorded
            return Step()
        except (Exception, SystemExit) as error:
            self._record(check, "fatal", reason(error), advice)
            return Step()
        if text is not None:
            self._record(check, "ok", text)
        return Step(value)

    def warn(self, check: str, found: str, advice: str) -> None:
        """Record in a check what does not end the job, but may not be meant."""
        self._record(check, "warning", found, advice)

    def once[Value](self, key: object, make: Callable[[], Value]) -> Value:
        """What `make` gives: made once for all command lines of this process that ask with the same key."""
        text = repr(key)
        if text not in self.kept:
            self.kept[text] = make()
        return self.kept[text]

    def _record(self, check: str, state: State, found: str, advice: str = "") -> None:
        earlier = self._found.get(check)
        if earlier is None or earlier.state == "ok":
            self._found[check] = Finding(check, state, found, advice)
