"""Fixtures of the recipe's tests."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench import Bench

from ramoe_megatron.recipe import processes


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    found = Bench(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(found.code))
    return found


@pytest.fixture(autouse=True)
def _signals_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reset signals: after a request to end, a run and all later child processes would ignore them."""
    monkeypatch.setattr(processes, "_came", [])
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
