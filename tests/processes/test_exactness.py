"""`bench.exactness` on real processes with tiny models: exact methods pass, a lossy one is found
out."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.exactness.answers import Asked
from bench.exactness.design import DesignCell, Disturbance, Installation
from bench.exactness.run import measure

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

PROMPTS = ("the cat sat on the mat", "def add(a, b):", "Grüße aus Köln")


def test_exact_methods_give_the_targets_text_and_a_lossy_one_does_not(
    tiny_pair: tuple[Path, Path],
) -> None:
    target, draft = map(str, tiny_pair)
    where = Installation("loopback", "lookup+model", 1)
    exact = (
        DesignCell("sd", 3, 0.0, where), DesignCell("plc", 7, 0.0, where),
        DesignCell("plc-literal", 2, 0.0, where),
        DesignCell("e2sci-no-threshold", None, 0.0, where), DesignCell("sd", 5, 0.8, where),
        DesignCell("plc", 1, 0.8, where),
        DesignCell("e2sci-no-threshold", None, 1.2, where), DesignCell("plc", 4, 1.2, where),
        DesignCell("auto", 4, 0.0, where, Disturbance.PAUSE_EDGE),
        DesignCell("auto", 4, 1.2, where, Disturbance.KILL_CLOUD),
        DesignCell("auto", 4, 0.8, where, Disturbance.KILL_EDGE),
    )  # fmt: skip
    verdict = measure(
        [*exact, DesignCell("fsd:0.3", 4, 0.0, where)], Asked(PROMPTS, 24, target, draft, "float32")
    )
    assert [cell.holds for cell in verdict.cells] == [True] * len(exact) + [False]
    assert not verdict.holds
    difference = verdict.cells[-1].difference
    assert difference is not None
    assert difference.expected != difference.got
    assert difference.lead is not None
