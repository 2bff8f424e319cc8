"""A draft as a target: rows of the whole vocabulary from a head of part of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cloud_worker.settings import CloudSettings, MiddleSettings
from decoding.engine import Segment, Want
from decoding.sampling import SamplingParams
from engines.torch.cache import KVCache
from engines.torch.draft import load_draft
from engines.torch.narrow_target import NarrowTarget, WidenedNetwork, load_as_target
from engines.torch.target import TargetModel
from tests.engines.tiny import save_tiny

TOKENS = (5, 9, 100, 7)


def test_a_whole_draft_is_an_ordinary_target(tmp_path: Path) -> None:
    path = str(save_tiny(tmp_path / "draft"))
    model = load_as_target(path, "float32")
    assert type(model) is TargetModel
    assert model.capabilities.trees


@pytest.fixture(scope="module")
def shipped() -> NarrowTarget:
    model = load_as_target("default", "float32")
    assert isinstance(model, NarrowTarget)
    return model


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(0.8, 0.9, seed=3)])
def test_a_narrow_head_never_chooses_a_token_that_it_lacks(
    shipped: NarrowTarget, sampling: SamplingParams
) -> None:
    draft = load_draft("default", "float32")
    vocab = draft.network.vocab
    assert vocab is not None
    assert shipped.vocab_size == draft.vocab_size > vocab.size
    cache = shipped.open(sampling)
    want = Want(3, choice_at=None if sampling.greedy else 4, full=True)
    ((row,),) = shipped.run([Segment(cache, TOKENS, (want,))])
    assert row.full is not None
    assert row.full.size == shipped.vocab_size
    missing = np.setdiff1d(np.arange(shipped.vocab_size), vocab)
    assert missing.size
    assert row.full[missing].sum() == 0
    assert row.full.sum() == pytest.approx(1.0)
    with torch.inference_mode():
        logits = draft.network.logits(torch.tensor(TOKENS), KVCache(), 1)[0]
    assert row.argmax == vocab[int(logits.argmax())]
    if row.choice is not None:
        assert row.choice.token in vocab


def test_what_was_kept_is_run_no_more(shipped: NarrowTarget) -> None:
    cache = shipped.open(SamplingParams())
    shipped.run([Segment(cache, TOKENS)])
    shipped.keep(cache, 2)
    assert shipped.length(cache) == 2
    shipped.close(cache)


def test_a_network_of_the_whole_vocabulary_is_not_widened(tmp_path: Path) -> None:
    draft = load_draft(str(save_tiny(tmp_path / "draft")), "float32")
    wide = WidenedNetwork(draft.network, draft.vocab_size)
    with torch.inference_mode():
        ours = wide.logits(torch.tensor(TOKENS), KVCache(), 2)
        theirs = draft.network.logits(torch.tensor(TOKENS), KVCache(), 2)
    assert torch.equal(ours, theirs[:, : draft.vocab_size])


def test_a_middle_worker_runs_the_pairs_draft(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert MiddleSettings.load(pair="qwen2.5-coder").target.startswith("qwen2.5-coder-0.5b")
    assert CloudSettings.load(pair="qwen2.5-coder").target.startswith("qwen2.5-coder-1.5b")
    assert MiddleSettings.load(target="else").target == "else"
    Path("e2sci.toml").write_text("[middle]\nmax_sessions = 3\n[cloud]\nmax_sessions = 5\n")
    assert MiddleSettings.load().max_sessions == 3
    assert CloudSettings.load().max_sessions == 5
    assert MiddleSettings.load().id_for(MiddleSettings.role).startswith("middle-")
