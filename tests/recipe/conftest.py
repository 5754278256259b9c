"""Fixtures of the recipe's tests."""

from pathlib import Path

import pytest
from bench import Bench


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    found = Bench(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(found.code))
    return found
