"""Each model family as tiny target and draft: the same rows however they are run, transformers' own
logits, or a refusal that says what is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bus.protocol.errors import ModelError
from decoding.engine import Drafter, Segment, Target
from decoding.sampling import SamplingParams
from engines.torch.cache import KVCache
from engines.torch.drafter import ModelDrafter
from engines.torch.precision import NumberFormat
from engines.torch.target import TargetModel
from tests.engines.conformance import (
    GREEDY,
    PLAIN,
    PROMPT,
    TEXT,
    TargetConformance,
    wants,
)
from tests.engines.drafter_conformance import DrafterConformance
from tests.engines.families import (
    BFLOAT16,
    FAMILIES,
    FLOAT32,
    INT8,
    NUM_TOKENS,
    OTHERS,
    WINDOW,
    Pairs,
    saved_pairs,
)

ALL = {**FAMILIES, **OTHERS}
EXACT = [
    pytest.param(name, number_format, id=f"{name} {number_format}")
    for name, family in ALL.items()
    for number_format in family.exact
]
NOT_IN_INT8 = [name for name, family in ALL.items() if INT8 not in family.exact]
SLIDING = ("gemma-2", "qwen2-sliding", "mistral")
IDS = torch.randint(NUM_TOKENS, (60,), generator=torch.Generator().manual_seed(3))
CUTS = ([60], [1] * 60, [7] * 8 + [4], [13, 1, 30, 1, 15])

LoadTarget = Callable[[str, NumberFormat], TargetModel]
LoadDraft = Callable[[str, NumberFormat], ModelDrafter]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pairs]:
    """Saved at first use; int8 copies land in a cache of the tests' own."""
    folder = tmp_path_factory.mktemp("families")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield saved_pairs(folder)


@pytest.fixture(scope="module")
def load_target(pairs: Pairs) -> LoadTarget:
    return cache(lambda name, dtype: TargetModel.load(str(pairs(name) / "target"), dtype, "cpu"))


@pytest.fixture(scope="module")
def load_draft(pairs: Pairs) -> LoadDraft:
    return cache(lambda name, dtype: ModelDrafter.load(str(pairs(name) / "draft"), dtype, "cpu"))


@torch.inference_mode()
def own_logits(folder: Path, ids: Tensor = IDS) -> Tensor:
    """transformers' forward pass over the whole text, without a cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits: Tensor = model(ids[None], use_cache=False).logits[0, :, :NUM_TOKENS]
    return logits


@torch.inference_mode()
def in_passes(network: Any, sizes: list[int], ids: Tensor = IDS) -> Tensor:
    held = KVCache()
    return torch.cat([network.logits(part, held, len(part)) for part in torch.split(ids, sizes)])


def divergence(expected: Tensor, got: Tensor) -> float:
    """Mean KL(expected ‖ got), nats."""
    p, q = expected.double().log_softmax(1), got.double().log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


# --- the suite --------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(("name", "dtype"), EXACT)
class TestTargets(TargetConformance):
    @pytest.fixture
    def target(self, name: str, dtype: NumberFormat, load_target: LoadTarget) -> Target[Any]:
        target = load_target(name, dtype)
        own_body = name not in SLIDING
        assert target.capabilities.trees == target.capabilities.hidden_states == own_body
        assert target.capabilities.bitwise or dtype is not INT8
        return target


@pytest.mark.long
@pytest.mark.parametrize("dtype", [FLOAT32, INT8])
@pytest.mark.parametrize("name", FAMILIES)
class TestDrafts(DrafterConformance):
    @pytest.fixture
    def drafter(self, name: str, dtype: NumberFormat, load_draft: LoadDraft) -> Drafter[Any]:
        return load_draft(name, dtype)


# --- against transformers ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_float32_logits_are_transformers_own(
    name: str, pairs: Pairs, load_target: LoadTarget
) -> None:
    expected = own_logits(pairs(name) / "target")
    for sizes in CUTS:
        got = in_passes(load_target(name, FLOAT32).network, sizes)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NOT_IN_INT8])
def test_int8_logits_are_near_and_the_same_however_they_are_cut(
    name: str, pairs: Pairs, load_target: LoadTarget
) -> None:
    expected = own_logits(pairs(name) / "target")
    first, *others = (in_passes(load_target(name, INT8).network, sizes) for sizes in CUTS)
    assert all(torch.equal(other, first) for other in others)
    assert 0 < divergence(expected, first) < 0.02


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_logits_are_near(name: str, pairs: Pairs, load_target: LoadTarget) -> None:
    expected = own_logits(pairs(name) / "target")
    for sizes in CUTS:
        got = in_passes(load_target(name, BFLOAT16).network, sizes)
        assert 0 < divergence(expected, got) < 0.1


@pytest.mark.parametrize("name", FAMILIES)
def test_what_makes_a_family_special_changes_its_logits(name: str, pairs: Pairs) -> None:
    """The tiny models show whether it is computed."""
    folder = pairs(name) / "target"
    expected = own_logits(folder)
    changes: dict[str, list[dict[str, Any]]] = {
        "llama-3.1": [{"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}],
        "gemma-2": [
            {"attn_logit_softcapping": None}, {"final_logit_softcapping": None},
            {"query_pre_attn_scalar": 24}, {"sliding_window": 4096},
        ],
    }  # fmt: skip
    for change in changes.get(name, []):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **change)
        with torch.inference_mode():
            got = model(IDS[None]).logits[0, :, :NUM_TOKENS]
        assert divergence(expected, got) > 0.01, change


# --- a sliding window -------------------------------------------------------------------------


@pytest.mark.parametrize("length", [3, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 41])
@pytest.mark.parametrize("name", SLIDING)
def test_a_rollback_across_the_windows_border_leaves_what_a_fresh_session_has(
    name: str, length: int, pairs: Pairs, load_target: LoadTarget
) -> None:
    """Positions that had left the window are in it again after a rollback."""
    target = load_target(name, FLOAT32)
    held = target.open(PLAIN)
    text = IDS.tolist()
    for begin in range(0, 45, 9):
        target.run([Segment(held, tuple(text[begin : begin + 9]))])
    target.keep(held, length)
    other = torch.tensor([*text[:length], *reversed(text)])
    parts = torch.split(other[length:], [1, 5, 20, 34])
    got = torch.cat([target.network.logits(x, held.prefix.keys_values, len(x)) for x in parts])
    expected = own_logits(pairs(name) / "target", other)[length:]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# --- what cannot take part --------------------------------------------------------------------

LACKING = {
    "gemma-2": "soft-capped attention, soft-capped logits, sliding attention, the layers of gemma2",
    "qwen2-sliding": "sliding attention",
    "mistral": "the layers of mistral",
}


@pytest.mark.parametrize("name", NOT_IN_INT8)
def test_a_target_that_int8_passes_cannot_compute_is_refused_before_its_weights_are_read(
    name: str, pairs: Pairs, tmp_path: Path
) -> None:
    config = (pairs(name) / "target/config.json").read_text("utf-8")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/config.json").write_text(config, "utf-8")
    with pytest.raises(ModelError) as refused:
        TargetModel.load(str(tmp_path / "tiny"), "int8", "cpu")
    assert str(refused.value) == (
        f"'tiny' cannot be a target in int8: the int8 engine lacks {LACKING[name]}; use --dtype "
        "float32 or bfloat16"
    )


# --- vocabularies -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FLOAT32, INT8])
def test_vocabularies_that_differ_only_in_padding_are_cut_to_their_real_tokens(
    dtype: NumberFormat, load_target: LoadTarget, load_draft: LoadDraft
) -> None:
    family = FAMILIES["deepseek-r1-distill-qwen"]
    assert NUM_TOKENS < family.draft_rows < family.rows
    target = load_target("deepseek-r1-distill-qwen", dtype)
    drafter = load_draft("deepseek-r1-distill-qwen", dtype)
    assert target.vocab_size == drafter.vocab_size == NUM_TOKENS
    assert target.tokenizer_digest == drafter.tokenizer_digest
    assert in_passes(target.network, [60]).shape == (60, NUM_TOKENS)
    held = drafter.open(SamplingParams(temperature=2.0, seed=1))
    window = drafter.draft(held, PROMPT, 8, frozenset(), lambda: False)
    assert window.q_ids.max() < NUM_TOKENS


# --- sessions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), EXACT)
def test_sessions_of_unequal_length_share_a_pass(
    name: str, dtype: NumberFormat, load_target: LoadTarget
) -> None:
    target = load_target(name, dtype)
    long, short = target.open(GREEDY), target.open(GREEDY)
    target.run([Segment(long, tuple(IDS.tolist()))])
    target.run([Segment(short, PROMPT)])
    together = target.run([Segment(long, TEXT[:5], wants(5)), Segment(short, TEXT[:3], wants(3))])
    for before, rows in ((tuple(IDS.tolist()), together[0]), (PROMPT, together[1])):
        alone = target.open(GREEDY)
        target.run([Segment(alone, before)])
        for token, row in zip(TEXT, rows, strict=False):
            (own,) = target.run([Segment(alone, (token,), wants(1))])[0]
            assert own.argmax == row.argmax
            np.testing.assert_allclose(row.p1_at_q, own.p1_at_q, rtol=1e-3, atol=1e-6)
            assert dtype is not INT8 or np.array_equal(row.p1_at_q, own.p1_at_q)
