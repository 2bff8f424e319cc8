"""`bench.exactness` on real processes with tiny models: exact methods pass, a lossy one is found
out."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.exactness.answers import Asked
from bench.exactness.design import DesignCell, Disturbance, Installation
from bench.exactness.run import measure

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROMPTS = ("the cat sat on the mat", "def add(a, b):", "Grüße aus Köln")


WHERE = Installation("loopback", "lookup+model", 1)
FEW = (
    DesignCell("sd", 3, 0.0, WHERE), DesignCell("plc", 7, 0.0, WHERE),
    DesignCell("e2sci-no-threshold", None, 1.2, WHERE),
    DesignCell("auto", 4, 0.8, WHERE, Disturbance.KILL_CLOUD),
)  # fmt: skip
MORE = (
    DesignCell("plc-literal", 2, 0.0, WHERE), DesignCell("e2sci-no-threshold", None, 0.0, WHERE),
    DesignCell("sd", 5, 0.8, WHERE), DesignCell("plc", 1, 0.8, WHERE),
    DesignCell("plc", 4, 1.2, WHERE), DesignCell("auto", 4, 0.0, WHERE, Disturbance.PAUSE_EDGE),
    DesignCell("auto", 4, 1.2, WHERE, Disturbance.KILL_CLOUD),
    DesignCell("auto", 4, 0.8, WHERE, Disturbance.KILL_EDGE),
    DesignCell("pipespec", None, 0.8, WHERE, Disturbance.KILL_MIDDLE),
    DesignCell("pipespec", None, 0.0, WHERE, Disturbance.PAUSE_MIDDLE),
)  # fmt: skip


@pytest.mark.parametrize("exact", [FEW, pytest.param(MORE, marks=pytest.mark.long)])
def test_exact_methods_give_the_targets_text_and_a_lossy_one_does_not(
    tiny_pair: tuple[Path, Path], exact: tuple[DesignCell, ...]
) -> None:
    target, draft = map(str, tiny_pair)
    asked = Asked(PROMPTS, 24, target, draft, "float32")
    result = measure([*exact, DesignCell("fsd:0.3", 4, 0.0, WHERE)], asked)
    assert [cell.holds for cell in result.cells] == [True] * len(exact) + [False]
    assert not result.holds
    difference = result.cells[-1].difference
    assert difference is not None
    assert difference.expected != difference.got
    assert difference.lead is not None
