"""Fixtures of the tests of Megatron's binding."""

import pytest


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from label_files import write_files  # Megatron is slow to import

    return write_files(tmp_path_factory.mktemp("labels"))
