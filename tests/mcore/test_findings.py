"""What is told of an error: ours whole; another's class, the expression that failed, and the values in it."""

import runpy
from pathlib import Path

import pytest

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.findings import reason

BARE = """
from types import SimpleNamespace
limits, high = SimpleNamespace(low=3, names=["a"]), None
assert limits.low == 2 and (
    high is not None
), limits.names[1:] or ""
"""


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (BARE, "AssertionError: limits.low == 2 and high is not None, where limits.low is 3, high is None"),
        ('raise ValueError("two\\n  lines")', "ValueError: two lines"),
        ("raise KeyError", "KeyError: "),
    ],
)
def test_an_error_is_told_by_its_condition_or_its_text(tmp_path: Path, code: str, told: str) -> None:
    (tmp_path / "code.py").write_text(code)
    with pytest.raises((AssertionError, ValueError, KeyError)) as raised:
        runpy.run_path(str(tmp_path / "code.py"))
    assert reason(raised.value) == told
    assert reason(RamoeError(f"ours: {told}")) == f"ours: {told}".strip()


def test_an_error_in_megatron_has_its_file_and_line() -> None:
    from megatron.core.optimizer_param_scheduler import combine_param_group_overrides

    with pytest.raises(ValueError, match="Conflicting") as raised:
        combine_param_group_overrides([{"max_lr": 1.0}, {"max_lr": 2.0}])
    place = f"megatron/core/optimizer_param_scheduler.py, line {raised.traceback[-1].lineno + 1}"
    assert reason(raised.value) == f"Conflicting overrides for max_lr: 1.0 and 2.0 (ValueError in {place})"
