"""`fr-spec` on real processes with tiny models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.exactness.answers import Asked
from bench.exactness.design import DesignCell, Installation
from bench.exactness.run import measure
from bus.protocol.errors import RequestFailedError
from engines.catalog.ranking import own_rankings, save_ranking
from engines.tokenizer import tokenizer_digest
from tests.engines.tiny import byte_level_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.long]

WHERE = Installation("loopback", "model", 1)
CELLS = (DesignCell("fr-spec", 3, 0.0, WHERE), DesignCell("fr-spec", 5, 0.8, WHERE))


def asked(target: Path, draft: str) -> Asked:
    return Asked(("the cat sat on the mat", "def add(a, b):"), 24, str(target), draft, "float32")


def test_with_half_the_vocabulary_the_text_is_the_targets_own(
    tiny_pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ranked = np.arange(290, dtype=np.int32)
    digest = tokenizer_digest(byte_level_tokenizer())
    save_ranking(own_rankings() / "tiny.safetensors", ranked, digest)
    target, draft = tiny_pair
    assert measure(CELLS, asked(target, f"{draft}@145")).holds


def test_a_draft_with_the_whole_head_is_refused(tiny_pair: tuple[Path, Path]) -> None:
    target, draft = tiny_pair
    with pytest.raises(RequestFailedError, match="start the edge with --draft NAME@16384"):
        measure(CELLS[:1], asked(target, str(draft)))
