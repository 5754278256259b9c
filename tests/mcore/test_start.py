"""The steps of a start: a run dies of the first error; a check reports each cause once."""

from typing import Any

import pytest

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.findings import Finding
from ramoe_megatron.mcore.start import Start, Step


def steps(start: Start, faults: set[str], seen: list[str]) -> None:
    """Two steps without a condition, and one that reads both."""

    def look(name: str, *needed: Step[str]) -> str:
        _ = [step.value for step in needed]
        seen.append(name)
        if name in faults:
            raise RamoeError(f"{name} is wrong")
        return name

    one = start.step("one", lambda: look("one"), str.upper, "mend one", ["a.file"])
    two = start.step("two", lambda: look("two"), None, "mend two")
    start.step("both", lambda: look("both", one, two), str, "mend both")


@pytest.mark.parametrize("faults", [set(), {"one"}, {"two"}, {"one", "two"}, {"both"}])
def test_a_run_dies_of_what_a_check_finds_first(faults: set[str]) -> None:
    run: list[str] = []
    check: list[str] = []
    start = Start(checks=True)
    steps(start, faults, check)
    fatal = [finding.found for finding in start.findings if finding.state == "fatal"]
    assert fatal == [f"{name} is wrong" for name in ("one", "two", "both") if name in faults]
    if not faults:
        steps(Start(), faults, run)
        assert run == check == ["one", "two", "both"]
        return
    with pytest.raises(RamoeError) as error:
        steps(Start(), faults, run)
    assert str(error.value) == fatal[0]
    assert check[: len(run)] == run


def test_what_waits_for_a_file_is_told_once() -> None:
    start = Start(checks=True, coming={"a.file": "data", "b.file": "profile"})
    steps(start, set(), [])
    assert start.findings == [Finding("one", "ok", "written by stage data")]


def test_a_fault_outlives_what_is_found_later_of_the_same_check() -> None:
    def fails() -> Any:
        raise KeyError("gone")

    start = Start(checks=True)
    start.step("data", lambda: 1, str)
    start.step("data", fails, None, "look")
    start.step("data", lambda: 3, str)
    start.warn("data", "slow", "hurry")
    (found,) = start.findings
    assert (found.state, found.advice) == ("fatal", "look")
    assert "gone" in found.found
    assert start.once("key", lambda: 1) == start.once("key", lambda: 2) == 1
