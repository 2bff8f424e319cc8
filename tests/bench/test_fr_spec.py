"""`bench/fr_spec` on tiny models: heads of one draft, and what is measured of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bench import fr_spec
from bench.fr_spec import Plan, agreements, step_times, with_heads
from bench.passes import GREEDY
from bus.protocol.errors import ModelError
from cli.main import app
from engines.catalog.ranking import own_rankings, save_ranking
from engines.tokenizer import tokenizer_digest
from engines.torch.cache import KVCache
from engines.torch.draft import DRAFT_WEIGHTS, load_draft
from engines.torch.heads import load_wide
from engines.torch.loading import load_causal_lm
from engines.torch.oracle import RecordedAnswer
from engines.torch.parts import Part
from tests.engines.tiny import byte_level_tokenizer, random_model, save_tiny
from training.distill.student import make_student, prune_depth, save_directory, save_weights

NUM_TOKENS = 290
RANKED = np.random.default_rng(1).permutation(NUM_TOKENS).astype(np.int32)
IDS = torch.arange(20, 60)
ANSWERS = [
    RecordedAnswer((3, 4, 5), (6, 7, 8, 9)), RecordedAnswer((40,), tuple(range(100, 130)))
]  # fmt: skip


def last_four() -> Part:
    """Of `IDS`, the last four rows wanted."""
    return Part.of(IDS.tolist(), KVCache(), 4)


@pytest.fixture(autouse=True)
def ranking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    digest = tokenizer_digest(byte_level_tokenizer())
    save_ranking(own_rankings() / "tiny.safetensors", RANKED, digest)


def plan(target: Path, draft: str, **changes: Any) -> Plan:
    common: dict[str, Any] = {
        "sizes": (64,), "prompts": ("the cat", "a dog"), "max_new_tokens": 12, "window": 2,
        "repeats": 1,
    }  # fmt: skip
    return Plan(str(target), draft, **(common | changes))


@torch.inference_mode()
def test_each_head_has_the_bits_of_a_draft_loaded_with_it(tmp_path: Path) -> None:
    model = str(save_tiny(tmp_path / "tiny"))
    wide = load_wide(f"{model}@100")
    rows = load_draft(model, "int8", "cpu").network.run([last_four()])[1]
    assert rows is not None
    for size in (64, 100):
        loaded = load_draft(f"{model}@{size}", "int8", "cpu").network
        assert loaded.vocab is not None
        vocab = wide.ranked(size)
        np.testing.assert_array_equal(vocab, loaded.vocab)
        assert torch.equal(wide.head(vocab)(rows), loaded.logits(IDS, KVCache(), 4))
    np.testing.assert_array_equal(wide.own, wide.ranked(100))
    assert len(wide.widest) == NUM_TOKENS  # rows beyond the tokens are padding


def test_heads_wider_than_the_vocabulary_and_equal_ones_are_left_out(tmp_path: Path) -> None:
    model = str(save_tiny(tmp_path / "tiny"))
    found = with_heads(load_wide(f"{model}@64"), (64, 128, 8192))
    assert [(draft.head_name, len(draft.vocab)) for draft in found] == [
        ("full", NUM_TOKENS), ("64", 64), ("128", 128)
    ]  # fmt: skip
    own = with_heads(load_wide(f"{model}@100"), (64,))[-1]
    assert (own.head_name, len(own.vocab)) == ("own", 100)


def distilled(folder: Path, tied: bool) -> Path:
    """A trimmed draft of all the target's layers, with a head of every third token."""
    random_model(
        vocab_size=NUM_TOKENS, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1,
        pad_token_id=None,
    ).save_pretrained(folder / "target")  # fmt: skip
    byte_level_tokenizer().save_pretrained(folder / "target")
    target = load_causal_lm(str(folder / "target"), "float32", "cpu")
    vocab = torch.arange(0, NUM_TOKENS, 3, dtype=torch.int32)
    student = make_student(prune_depth(target.model, (0, 1)), target.model, vocab)
    out = folder / "draft"
    out.mkdir()
    save_directory(student, target, out)
    save_weights(student, out / DRAFT_WEIGHTS)
    return out


@torch.inference_mode()
def test_a_trimmed_draft_is_widened_by_the_rows_of_its_embedding(tmp_path: Path) -> None:
    out = str(distilled(tmp_path, tied=True))
    wide, draft = load_wide(out), load_draft(out, "int8", "cpu").network
    assert draft.vocab is not None
    np.testing.assert_array_equal(wide.own, draft.vocab)
    assert len(wide.widest) == NUM_TOKENS
    states = draft.run([last_four()])[1]
    assert states is not None
    assert torch.equal(wide.head(wide.own)(states), draft.logits(IDS, KVCache(), 4))


def test_a_trimmed_draft_with_rows_of_its_own_has_no_others(tmp_path: Path) -> None:
    wide = load_wide(str(distilled(tmp_path, tied=False)))
    np.testing.assert_array_equal(wide.widest, wide.own)
    with pytest.raises(ModelError, match="has head rows of 97 tokens alone, and a head of 64"):
        with_heads(wide, (64,))


def test_agreement_is_that_of_the_tokens_it_drafts(tmp_path: Path) -> None:
    """Against drafting a token after each prefix; a token outside a head is never right."""
    wide = load_wide(str(save_tiny(tmp_path / "tiny")))
    drafts = with_heads(wide, (64,))
    for draft, found in zip(drafts, agreements(wide, drafts, ANSWERS), strict=True):
        for recorded, agrees in zip(ANSWERS, found, strict=True):
            cache, feed, expected = draft.open(GREEDY), recorded.prompt, list[bool]()
            for token in recorded.answer:
                window = draft.draft(cache, feed, 1, frozenset(), stop=lambda: False)
                expected.append(window.tokens[0] == token)
                assert set(window.tokens) <= set(draft.vocab.tolist())
                feed = (token,)
            assert agrees == expected


def test_parts_of_a_step_are_within_it(tmp_path: Path) -> None:
    drafts = with_heads(load_wide(str(save_tiny(tmp_path / "tiny"))), (64,))
    for times in step_times(drafts, repeats=2):
        assert 0.0 < times.head_ms < times.step_ms
        assert 0.0 < times.choosing_ms < times.step_ms
        assert times.head_ms + times.choosing_ms < times.step_ms


def test_a_draft_that_is_the_target_is_right_wherever_its_head_reaches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny(tmp_path / "tiny")
    full, narrow = fr_spec.run(plan(model, str(model)), as_json=False)
    assert (full.head, full.head_size, full.covered) == ("full", NUM_TOKENS, 1.0)
    assert (full.agreement, full.error, full.acceptance) == (1.0, 0.0, 1.0)
    assert full.accepted_per_ms == pytest.approx(1.0 / full.step_ms)
    assert (narrow.head, narrow.head_size) == ("64", 64)
    assert narrow.covered == narrow.agreement < 1.0
    assert narrow.head_bytes < full.head_bytes
    assert "(measured)" in capsys.readouterr().out


def test_the_command_gives_a_line_for_each_head(tmp_path: Path) -> None:
    model = str(save_tiny(tmp_path / "tiny"))
    done = CliRunner().invoke(
        app,
        ["bench", "fr-spec", "--target", model, "--draft", f"{model}@100", "--heads", "64,9999",
         "--prompts", "2", "--max-new-tokens", "6", "--repeats", "1", "--json"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["head"], row["head_size"]) for row in rows] == [
        ("full", NUM_TOKENS), ("64", 64), ("own", 100)
    ]  # fmt: skip
    assert {(row["source"], row["dtype"], row["window"]) for row in rows} == {
        ("measured", "int8", 4)
    }
    for row in rows:
        assert row["head_share"] == pytest.approx(row["head_ms"] / row["step_ms"])


@pytest.mark.parametrize("heads", ["8k", "0", "64,", "-1"])
def test_a_wrong_head_is_one_clear_line(heads: str) -> None:
    done = CliRunner().invoke(app, ["bench", "fr-spec", "--heads", heads])
    assert done.exit_code == 2
    assert "is no number of tokens; expected e.g. 8192,16384" in done.stderr
