"""What runs of several processes start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples import packed_model
from vl_dist.run.checkpoint import save_adapter
from vl_dist.settings import ShapesConfig
from vl_dist.shapes import make_shapes


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with drawings, a tiny model, and an adapter that is random on both sides, so that no gradient is zero."""
    home = tmp_path_factory.mktemp("ranks")
    make_shapes(ShapesConfig(dir=home / "data", num_train=8, num_eval=1))
    save_adapter(packed_model(home / "data" / "model").peft_model, home / "adapter")
    return home
