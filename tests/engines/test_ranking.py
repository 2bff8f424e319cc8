from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bus.protocol.errors import ModelError
from engines.catalog.ranking import most_frequent, own_rankings, rank, save_ranking
from engines.tokenizer import tokenizer_digest
from engines.torch.cache import KVCache
from engines.torch.draft import load_draft
from engines.torch.drafter import ModelDrafter
from tests.engines.tiny import byte_level_tokenizer, save_tiny


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def tokenizer() -> Any:
    return byte_level_tokenizer()


def test_tokens_are_ranked_by_how_often_texts_hold_them(tokenizer: Any) -> None:
    ranked = rank(tokenizer, ["zzz", "z", "yy"], len(tokenizer), 20).ids
    (z,), (y,) = tokenizer.encode("z"), tokenizer.encode("y")
    assert ranked[:2].tolist() == [z, y]
    rest = [token for token in range(len(tokenizer)) if token not in (z, y)]
    assert ranked[2:].tolist() == rest[:18]  # not seen: by id
    assert ranked.dtype == np.int32


def test_a_head_has_the_special_tokens_and_the_most_frequent(tokenizer: Any) -> None:
    digest = tokenizer_digest(tokenizer)
    save_ranking(own_rankings() / "other.safetensors", np.arange(5, dtype=np.int32), "another")
    save_ranking(
        own_rankings() / "x.safetensors", np.array([200, 1, 50, 100], dtype=np.int32), digest
    )
    assert most_frequent(tokenizer, digest, 3).tolist() == [0, 1, 200]
    assert most_frequent(tokenizer, digest, 5).tolist() == [0, 1, 50, 100, 200]
    for size in (0, 2, 6):  # 1 is special and ranked: with it there are five
        with pytest.raises(ModelError, match=f"a head of {size} tokens was asked for; expected"):
            most_frequent(tokenizer, digest, size)


def test_without_a_ranking_the_error_says_how_to_make_one(tokenizer: Any) -> None:
    with pytest.raises(ModelError, match="e2sci rank"):
        most_frequent(tokenizer, "no such digest", 10)


@pytest.mark.parametrize("dtype", ["int8", "float32"])
@torch.inference_mode()
def test_a_draft_with_a_cut_head_has_those_rows_of_the_whole(
    dtype: str, tokenizer: Any, tmp_path: Path
) -> None:
    directory = str(save_tiny(tmp_path / "tiny", tokenizer))
    digest = tokenizer_digest(tokenizer)
    ranked = rank(tokenizer, ["the cat sat"], len(tokenizer), 50).ids
    save_ranking(own_rankings() / "mine.safetensors", ranked, digest)
    whole, cut = load_draft(directory, dtype, "cpu"), load_draft(f"{directory}@20", dtype, "cpu")
    assert cut.network.head_size == 20
    assert cut.network.vocab is not None
    assert cut.network.vocab.tolist() == most_frequent(tokenizer, digest, 20).tolist()
    assert cut.vocab_size == whole.vocab_size
    ids = torch.arange(3, 20)
    wanted = whole.network.logits(ids, KVCache(), 4)[:, torch.from_numpy(cut.network.vocab).long()]
    found = cut.network.logits(ids, KVCache(), 4)
    if dtype == "int8":
        assert torch.equal(found, wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert load_draft(f"{directory}@9999", dtype, "cpu").network.vocab is None
    assert ModelDrafter(cut).capabilities.ranked_head
    assert not ModelDrafter(whole).capabilities.ranked_head
