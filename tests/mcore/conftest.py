"""Fixtures of the tests of Megatron's binding."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from label_files import write_files  # Megatron is slow to import

    return write_files(tmp_path_factory.mktemp("labels"))


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with a checkpoint of each tiny model, and what transformers computes with each."""
    from family_models import write_checkpoint
    from small_run import write_world
    from tiny_models import MODELS

    folder = tmp_path_factory.mktemp("families")
    write_world(folder)
    return folder, {name: write_checkpoint(name, folder) for name in MODELS}
