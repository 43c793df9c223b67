"""That `make test` runs what stands under tests/."""

import fnmatch
from pathlib import Path

import pytest


def test_no_folder_of_tests_is_one_that_pytest_leaves_out(pytestconfig: pytest.Config) -> None:
    root = Path(__file__).parent
    left_out = pytestconfig.getini("norecursedirs")
    folders = {folder.name for file in root.rglob("test_*.py") for folder in file.relative_to(root).parents if folder.name}
    assert "dist" in folders
    assert not [name for name in folders if any(fnmatch.fnmatch(name, pattern) for pattern in left_out)]
