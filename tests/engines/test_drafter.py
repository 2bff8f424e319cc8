from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.protocol.arrays import Float64Array, Int32Array
from bus.protocol.bounds import SessionCoupling
from bus.protocol.errors import LocalError
from decoding.coupling import noise_at
from decoding.sampling import SamplingParams, from_wire, warp
from decoding.uniforms import Purpose, uniform
from engines.kinds import DrafterKind, drafter_of
from engines.lookup import SuffixIndex
from engines.padding import LeastTimes, Padding, Tally, read_tally
from engines.row import DrafterRow
from engines.torch.cache import KVCache
from engines.torch.draft import LoadedDraft, load_draft
from engines.torch.drafter import ModelDrafter
from engines.torch.network import Network
from engines.torch.parts import Part
from tests.engines.tiny import save_tiny
from tests.sessions import drafted_rows, drafted_window

GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.8, top_p=0.9, top_k=20, seed=7)
PROMPT = [5, 17, 99, 42, 7, 120]
NEVER: frozenset[int] = frozenset()


def go_on() -> bool:
    return False


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedDraft:
    return load_draft(str(save_tiny(tmp_path_factory.mktemp("draft"))), "float32", "cpu")


@pytest.fixture(scope="module")
def model(loaded: LoadedDraft) -> ModelDrafter:
    return ModelDrafter(loaded)


def logits_after(loaded: LoadedDraft, tokens: list[int]) -> Float64Array:
    """The network without cache or sampling, as a reference."""
    with torch.inference_mode():
        return loaded.network.logits(torch.tensor(tokens), KVCache(), 1)[0].double().numpy()


def test_a_window_carries_the_top_k_of_the_softmax(
    loaded: LoadedDraft, model: ModelDrafter
) -> None:
    window = model.draft(model.open(GREEDY), PROMPT, 3, NEVER, go_on)
    assert window.start == len(PROMPT)
    assert window.q_ids.shape == window.q_probs.shape == (3, 48)
    assert (window.q_ids.dtype.str, window.q_probs.dtype.str) == ("<i4", "<f2")
    for index in range(3):
        logits = logits_after(loaded, PROMPT + list(window.tokens[:index]))
        probs = np.exp(logits - logits.max())
        probs /= probs.sum()
        top = np.argsort(-probs)[:48]
        assert set(window.q_ids[index]) == set(top)
        np.testing.assert_allclose(window.q_probs[index], probs[top], rtol=2e-3, atol=1e-6)
        assert (np.diff(window.q_probs[index].astype(float)) <= 0).all()


def test_what_is_sent_has_the_same_bits_on_any_number_of_threads(model: ModelDrafter) -> None:
    logits = 4 * torch.randn(151_665, generator=torch.Generator().manual_seed(0))
    before, sent = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            ids, probs = model._top_probabilities(logits.clone())
            sent.add((ids.tobytes(), probs.tobytes()))
    finally:
        torch.set_num_threads(before)
    assert len(sent) == 1


def test_greedy_tokens_are_the_most_probable(loaded: LoadedDraft, model: ModelDrafter) -> None:
    window = model.draft(model.open(GREEDY), PROMPT, 4, NEVER, go_on)
    for index, token in enumerate(window.tokens):
        assert token == logits_after(loaded, PROMPT + list(window.tokens[:index])).argmax()


@settings(max_examples=20, deadline=None)
@given(
    temperature=st.floats(0.1, 3.0),
    top_p=st.floats(0.05, 1.0),
    top_k=st.integers(0, 60),
    seed=st.integers(0, 2**63 - 1),
    coupling=st.sampled_from(SessionCoupling),
)
def test_tokens_are_drawn_from_exactly_what_is_sent(
    model: ModelDrafter,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    coupling: SessionCoupling,
) -> None:
    sampling = SamplingParams(temperature, top_p, top_k, seed, coupling)
    window = model.draft(model.open(sampling), PROMPT, 4, NEVER, go_on)
    for index, token in enumerate(window.tokens):
        q = warp(from_wire(window.q_ids[index], window.q_probs[index]), sampling)
        position = window.start + index
        if coupling is SessionCoupling.GUMBEL:
            scores = np.log(q.probs) - np.log(-np.log(noise_at(seed, position, q.ids)))
            assert token == q.ids[int(np.argmax(scores))]
        else:
            assert token == q.draw(uniform(seed, position, Purpose.DRAFT))


def test_windows_of_any_size_give_the_same_tokens(model: ModelDrafter) -> None:
    """Uniforms belong to positions: the split into windows changes nothing."""
    whole = model.draft(model.open(SAMPLED), PROMPT, 9, NEVER, go_on).tokens
    cache, tokens = model.open(SAMPLED), list(PROMPT)
    for size in (2, 1, 4, 2):
        window = model.draft(cache, tokens[cache.length :], size, NEVER, go_on)
        assert window.start == len(tokens)
        tokens += window.tokens
    assert tuple(tokens[len(PROMPT) :]) == whole


def test_the_last_token_is_drawn_and_not_run(model: ModelDrafter) -> None:
    cache = model.open(GREEDY)
    window = model.draft(cache, PROMPT, 5, NEVER, go_on)
    assert cache.length == window.start + 5 - 1


def test_drafting_stops_behind_an_end_token(model: ModelDrafter) -> None:
    free = model.draft(model.open(SAMPLED), PROMPT, 8, NEVER, go_on).tokens
    third = free[2]
    window = model.draft(model.open(SAMPLED), PROMPT, 8, frozenset({third}), go_on)
    stopped_at = free.index(third) + 1
    assert window.tokens == free[:stopped_at]
    assert window.q_ids.shape == window.q_probs.shape == (stopped_at, 48)


@pytest.mark.parametrize("allowed", [1, 3])
def test_drafting_stops_between_tokens_when_told(model: ModelDrafter, allowed: int) -> None:
    asked: list[None] = []

    def stop() -> bool:
        asked.append(None)
        return len(asked) > allowed

    cache = model.open(SAMPLED)
    window = model.draft(cache, PROMPT, 8, NEVER, stop)
    assert len(window.tokens) == allowed
    assert cache.length == window.start + allowed - 1
    assert window.tokens == model.draft(model.open(SAMPLED), PROMPT, allowed, NEVER, go_on).tokens


def test_a_stop_before_the_first_token_changes_nothing(model: ModelDrafter) -> None:
    cache = model.open(SAMPLED)
    model.prefill(cache, PROMPT[:3])
    window = model.draft(cache, PROMPT[3:], 8, NEVER, lambda: True)
    assert (window.tokens, window.q_ids.shape, cache.length) == ((), (0, 48), 3)
    assert window.start == len(PROMPT)


def test_after_a_rollback_drafting_equals_a_fresh_run(model: ModelDrafter) -> None:
    cache = model.open(SAMPLED)
    first = model.draft(cache, PROMPT, 8, NEVER, go_on)
    kept = PROMPT + list(first.tokens[:3])
    model.keep(cache, len(kept))
    again = model.draft(cache, [77], 5, NEVER, go_on)
    fresh = model.draft(model.open(SAMPLED), [*kept, 77], 5, NEVER, go_on)
    assert (again.start, again.tokens) == (fresh.start, fresh.tokens)
    np.testing.assert_array_equal(again.q_ids[:, :5], fresh.q_ids[:, :5])


def test_prefill_in_chunks_equals_one_pass(model: ModelDrafter) -> None:
    prompt = [(7 * i) % 280 + 2 for i in range(90)]
    cache = model.open(GREEDY)
    for begin in range(0, 80, 32):
        model.prefill(cache, prompt[begin : min(begin + 32, 80)])
    model.prefill(cache, [])
    assert cache.length == 80
    chunked = model.draft(cache, prompt[80:], 4, NEVER, go_on)
    whole = model.draft(model.open(GREEDY), prompt, 4, NEVER, go_on)
    assert (chunked.start, chunked.tokens) == (whole.start, whole.tokens)
    np.testing.assert_allclose(chunked.q_probs, whole.q_probs, rtol=2e-3, atol=1e-6)


def test_rows_of_a_trimmed_head_stand_for_the_targets_ids(loaded: LoadedDraft) -> None:
    class Trimmed(Network):
        """The whole network cut to every third token."""

        vocab: Int32Array | None = np.arange(0, 290, 3, dtype=np.int32)
        head_size = 97
        weight_bytes = loaded.network.weight_bytes

        def run(self, parts: Sequence[Part]) -> tuple[torch.Tensor, torch.Tensor | None]:
            logits, states = loaded.network.run(parts)
            return logits[:, ::3], states

    from dataclasses import replace

    model = ModelDrafter(replace(loaded, network=Trimmed()), num_sparse=500)
    assert model.capabilities.ranked_head
    assert drafter_of(DrafterKind.LOOKUP_MODEL, model).capabilities.ranked_head
    assert not drafter_of(DrafterKind.LOOKUP, model).capabilities.ranked_head
    assert model.num_sparse == 97  # cut to the head
    window = model.draft(model.open(GREEDY), PROMPT, 4, NEVER, go_on)
    assert (window.q_ids % 3 == 0).all()
    logits = logits_after(loaded, PROMPT)
    assert window.tokens[0] == 3 * logits[::3].argmax()
    assert sorted(window.q_ids[0]) == list(range(0, 290, 3))
    assert window.q_probs[0].astype(float).sum() == pytest.approx(1.0, abs=1e-2)


# --- lookup -----------------------------------------------------------------------------------

REPEATING = [7, 8, 9, 10, 11, 12, 13, 14, 40, 41, 7, 8, 9, 10, 11]


@pytest.fixture
def searching(loaded: LoadedDraft) -> DrafterRow:
    row = drafter_of(DrafterKind.LOOKUP_MODEL, ModelDrafter(loaded))
    assert isinstance(row, DrafterRow)
    return row


def test_lookup_in_front_proposes_what_followed_and_runs_nothing(searching: DrafterRow) -> None:
    cache = searching.open(SAMPLED)
    window = searching.draft(cache, REPEATING, 3, NEVER, go_on)
    assert window.tokens == (12, 13, 14)
    assert (window.start, window.num_cached, searching.length(cache)) == (len(REPEATING), 0, 0)
    assert (window.q_ids.tolist(), window.q_probs.tolist()) == ([[12], [13], [14]], [[1.0]] * 3)


def test_where_lookup_has_nothing_the_model_catches_up_and_speaks(
    searching: DrafterRow, model: ModelDrafter
) -> None:
    """After 14 comes 40 again, and then 41 ends what was seen before: all is the prefix's doing."""
    text = [*REPEATING, 12, 13, 14, 40, 41, 99]
    cache = searching.open(SAMPLED)
    first = searching.draft(cache, REPEATING, 5, NEVER, go_on)
    assert first.tokens == (12, 13, 14, 40, 41)
    window = searching.draft(cache, [*REPEATING, *first.tokens, 99], 2, NEVER, go_on)
    alone = model.draft(model.open(SAMPLED), text, 1, NEVER, go_on)
    assert window.tokens[0] == alone.tokens[0]
    np.testing.assert_array_equal(window.q_ids[0], alone.q_ids[0])
    assert searching.length(cache) == window.num_cached >= len(text)


def test_a_window_of_both_is_sent_in_canonical_order(
    searching: DrafterRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, proposals = searching.open(SAMPLED), iter((None, 41, None))
    monkeypatch.setattr(SuffixIndex, "propose", lambda _: next(proposals))
    window = searching.draft(cache, PROMPT, 3, NEVER, go_on)
    assert window.tokens[1] == 41
    assert window.q_ids.shape == (3, 48)
    assert window.num_cached == window.start + 2
    rows = drafted_rows(
        window.tokens, q_ids=window.q_ids.tobytes(), q_probs=window.q_probs.tobytes()
    )
    message = drafted_window((1, 2, 3), window.tokens, rows=rows)
    sent = zip(message.q_id_rows, message.q_prob_rows, strict=True)
    assert [from_wire(*row).ids.size for row in sent] == [48, 1, 48]


def test_a_rollback_takes_what_lookup_read_with_it(searching: DrafterRow) -> None:
    cache = searching.open(GREEDY)
    searching.prefill(cache, REPEATING)
    wrong = searching.draft(cache, [12], 2, NEVER, go_on)
    searching.keep(cache, len(REPEATING))
    assert wrong.tokens == (13, 14)
    again = searching.draft(cache, [50, 7, 8, 9, 10, 11], 1, NEVER, go_on)
    assert again.tokens == (50,)  # the latest place that reads 7 … 11 goes on with 50


def test_lookup_alone_always_has_a_word_and_never_runs_the_model(loaded: LoadedDraft) -> None:
    alone = drafter_of(DrafterKind.LOOKUP, ModelDrafter(loaded))
    cache, tokens = alone.open(SAMPLED), [3, 4, 5]
    for size in (2, 3, 1):
        window = alone.draft(cache, tokens[alone.length(cache) :], size, NEVER, go_on)
        assert (window.start, window.num_cached) == (len(tokens), len(tokens) + size - 1)
        tokens += window.tokens
    assert tokens == [3, 4, 5] + [5] * 6
    assert isinstance(cache, SuffixIndex)


def test_windows_cut_anywhere_are_drafted_alike_with_lookup(searching: DrafterRow) -> None:
    whole = searching.draft(searching.open(SAMPLED), REPEATING, 12, NEVER, go_on).tokens
    cache, tokens = searching.open(SAMPLED), list(REPEATING)
    for size in (2, 1, 4, 5):
        window = searching.draft(cache, tokens[searching.length(cache) :], size, NEVER, go_on)
        assert window.start == len(tokens)
        tokens += window.tokens
    assert tuple(tokens[len(REPEATING) :]) == whole


@pytest.mark.parametrize(("feed", "count"), [([], 3), (PROMPT, 0)])
def test_nothing_to_run_or_to_draw_is_an_error_of_the_caller(
    model: ModelDrafter, feed: list[int], count: int
) -> None:
    with pytest.raises(LocalError):
        model.draft(model.open(GREEDY), feed, count, NEVER, go_on)


def test_a_draft_sends_at_least_one_probability(loaded: LoadedDraft) -> None:
    with pytest.raises(LocalError, match="at least one probability"):
        ModelDrafter(loaded, num_sparse=0)


def test_a_step_takes_its_least_time_and_the_prompt_does_not(
    loaded: LoadedDraft, tmp_path: Path
) -> None:
    """Not how long exactly: a step that needs 1 ms takes at least 20."""
    model = ModelDrafter(loaded)
    model.padding = Padding(LeastTimes.parse("20"), tmp_path / "counts")
    cache = model.open(GREEDY)
    model.prefill(cache, PROMPT)
    assert read_tally(tmp_path / "counts") == Tally()
    window = model.draft(cache, [3], 3, NEVER, go_on)
    assert window.draft_ms >= 60.0
    assert read_tally(tmp_path / "counts").count == 3
    model.draft(model.open(GREEDY), [3] * 17, 2, NEVER, go_on)
    assert read_tally(tmp_path / "counts").count == 4
