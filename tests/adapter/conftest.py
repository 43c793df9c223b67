from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.adapter.made import export


@pytest.fixture(scope="session")
def exported(tiny_model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole adapter that nobody may change."""
    return export(tiny_model, photos, tmp_path_factory.mktemp("exported"))[0]


@pytest.fixture
def adapter(exported: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(exported, tmp_path / "adapter"))


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the small model's precision is known."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
