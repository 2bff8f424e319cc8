"""Two tiny models, for what compares a draft with its target."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.torch.target import TargetModel
from tests.engines.tiny import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `target` and `stranger`, which seldom agree."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "target")
    save_tiny(folder / "stranger", seed=7)
    return folder


@pytest.fixture(scope="module")
def target(folder: Path) -> TargetModel:
    return TargetModel.load(str(folder / "target"), "float32", "cpu")
