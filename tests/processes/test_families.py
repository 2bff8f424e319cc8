"""Model families on real processes: `bench.exactness` finds their answers exact."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.exactness.answers import Asked
from bench.exactness.design import DesignCell, Installation
from bench.exactness.run import measure
from tests.engines.families import FAMILIES

pytestmark = [pytest.mark.slow, pytest.mark.long]

PROMPTS = ("the cat sat on the mat", "def add(a, b):")
WHERE = Installation("loopback", "model", 1)
CELLS = (
    DesignCell("sd", 4, 0.0, WHERE), DesignCell("auto", 4, 0.0, WHERE),
    DesignCell("auto", 4, 0.8, WHERE),
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("gemma-2", "float32"), ("llama-3.1", "int8"), ("deepseek-r1-distill-qwen", "int8")],
)
def test_exact_methods_give_the_targets_text(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    FAMILIES[name].save(tmp_path)
    asked = Asked(PROMPTS, 32, str(tmp_path / "target"), str(tmp_path / "draft"), dtype)
    result = measure(CELLS, asked)
    assert [cell.holds for cell in result.cells] == [True] * len(CELLS)
    assert result.holds
