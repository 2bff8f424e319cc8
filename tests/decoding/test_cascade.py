"""Three stages in a row: the text is the target's own whatever the links and the models before it
do, and a mismatch cascades upstream."""

from __future__ import annotations

import heapq

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.protocol.messages import FinishReason, OpenSession
from decoding import edge, edge_events
from decoding.cascade import Answer, Asked, Cascade
from decoding.edge_events import Draft
from decoding.methods import pipespec
from decoding.sampling import SamplingParams
from tests.chain import Chain, Middle
from tests.harness import EdgeCloudPair, Fate
from tests.toy import ToyPair, target_alone

PAIR = ToyPair(vocab_size=7, agreement=0.8, seed=1)
NEVER: frozenset[int] = frozenset()


def middle(closeness: float) -> Middle:
    return Middle(vocab_size=7, agreement=0.8, seed=1, closeness=closeness)


def chain(closeness: float = 0.85, temperature: float = 0.0, **changes: object) -> Chain:
    sampling = SamplingParams(temperature, seed=5)
    return Chain(PAIR, sampling, middle=middle(closeness), **changes)  # type: ignore[arg-type]


def alone(pair: Chain) -> tuple[int, ...]:
    return target_alone(PAIR, pair.prompt, pair.sampling, pair.max_new_tokens, pair.eos)


# --- what the outer session is answered -------------------------------------------------------


def test_drafts_are_the_inner_text_beyond_the_position_asked_for() -> None:
    cascade = Cascade((1, 2)).ask(Draft(7, (3,), 2))
    assert not cascade.begins_again((1, 2, 3))
    assert cascade.answer((1, 2, 3), NEVER) == (cascade, None)  # it waits
    after, answer = cascade.answer((1, 2, 3, 4, 5, 6), NEVER)
    assert answer == Answer(Asked(7, 3, 2), (4, 5))
    assert after == Cascade((1, 2, 3, 4))  # the last one is drafted, not read
    assert after.answer((1, 2, 3, 4, 5, 6), NEVER) == (after, None)  # once


@pytest.mark.parametrize("inner", [(1, 2), (1, 9, 3), (1, 9, 3, 4)])
def test_an_inner_text_that_lags_or_has_turned_away_begins_again(inner: tuple[int, ...]) -> None:
    cascade = Cascade((1, 2)).ask(Draft(7, (3,), 2))
    assert cascade.begins_again(inner)
    assert cascade.answer(inner, NEVER) == (cascade, None)


def test_nothing_follows_a_token_that_ends_the_answer() -> None:
    cascade = Cascade().ask(Draft(1, (1,), 4))
    _, answer = cascade.answer((1, 5, 6, 7), frozenset((5,)))
    assert answer is not None
    assert answer.tokens == (5,)


def test_a_crop_below_what_was_read_takes_the_question_back() -> None:
    cascade = Cascade((1, 2)).ask(Draft(7, (3,), 2))
    assert cascade.cropped(3) == cascade
    assert cascade.cropped(2) == Cascade((1, 2))
    assert cascade.dropped().answer((1, 2, 3, 4), NEVER)[1] is None


# --- three stages -----------------------------------------------------------------------------


@pytest.mark.parametrize("closeness", [0.0, 0.6, 0.85, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("middle_ms", [2.0, 9.0, 40.0])  # the target takes 10
def test_the_text_is_the_targets_own(
    closeness: float, temperature: float, middle_ms: float
) -> None:
    pair = chain(closeness, temperature, middle_ms=middle_ms, max_new_tokens=60)
    assert pair.run() == alone(pair)
    assert pair.finished is not None
    assert pair.finished.error == ""


def test_a_good_middle_model_drafts_and_a_mismatch_cascades() -> None:
    pair = chain(0.9, max_new_tokens=80, silent=4)
    assert pair.run() == alone(pair)
    assert pair.inner is not None
    assert sum(pair.accepted) > 40, "the middle's tokens are the target's drafts"
    assert sum(pair.inner.accepted) > 5, "and the edge's drafts are the middle's"
    assert 0 < pair.restarts < 40
    opened = [message for message in pair.inner.sent if isinstance(message, OpenSession)]
    incarnations = [message.incarnation for message in opened]
    assert incarnations == sorted(incarnations)
    assert incarnations[-1] >= pair.restarts


def test_an_equal_middle_model_never_begins_again() -> None:
    pair = chain(1.0, max_new_tokens=60)
    assert pair.run() == alone(pair)
    assert pair.restarts <= 1  # where the target is first at the prompt's end
    assert sum(pair.accepted) > 50


@pytest.mark.parametrize("lease", [8, 24])
def test_the_middle_model_stays_within_its_lease_of_what_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, lease: int
) -> None:
    """What the target has not asked for is not acknowledged, so that a fast middle model waits;
    drafts alone take it further."""
    monkeypatch.setattr(pipespec, "BUFFER", 12)
    pair = chain(1.0, max_new_tokens=300, middle_ms=0.2, inner_lease=lease)
    ahead, answer_draft = [0], pair.answer_draft

    def watched() -> None:
        assert pair.inner is not None
        ahead.append(len(pair.inner.edge.tokens) - len(pair.edge.tokens))
        answer_draft()

    pair.answer_draft = watched  # type: ignore[method-assign]
    assert pair.run() == alone(pair)
    assert lease // 2 < max(ahead) <= 12 + lease + 12


@pytest.mark.parametrize("eos", [frozenset((3,)), frozenset((0, 6))])
@pytest.mark.parametrize("closeness", [0.5, 0.9])
def test_an_inner_text_that_has_ended_goes_on_where_the_target_does(
    eos: frozenset[int], closeness: float
) -> None:
    pair = chain(closeness, max_new_tokens=60, eos=eos)
    assert pair.run() == alone(pair)


DELAYS = st.lists(st.sampled_from((1.0, 5.0, 30.0, 120.0)), max_size=2)
FATES = st.lists(DELAYS, max_size=40).map(lambda all_of: tuple(Fate(tuple(d)) for d in all_of))
FORGET = st.frozensets(st.integers(2, 40), max_size=3)


@settings(max_examples=40, deadline=None)
@given(
    fates=FATES, inner_fates=FATES, forget=FORGET, inner_forget=FORGET,
    closeness=st.sampled_from((0.5, 0.85, 1.0)), silent=st.sampled_from((0, 5, 10)),
    temperature=st.sampled_from((0.0, 0.8)), middle_ms=st.sampled_from((1.0, 4.0, 15.0)),
)  # fmt: skip
def test_no_loss_repeat_delay_or_restart_anywhere_changes_a_token(
    fates: tuple[Fate, ...], inner_fates: tuple[Fate, ...], forget: frozenset[int],
    inner_forget: frozenset[int], closeness: float, silent: int, temperature: float,
    middle_ms: float,
) -> None:  # fmt: skip
    pair = chain(
        closeness, temperature, fates=fates, inner_fates=inner_fates, forget_at=forget,
        inner_forget_at=inner_forget, silent=silent, middle_ms=middle_ms,
    )  # fmt: skip
    assert pair.run() == alone(pair)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_chain_of_two_is_exact_too(temperature: float) -> None:
    sampling = SamplingParams(temperature, seed=5)
    pair = EdgeCloudPair(PAIR, sampling, method=pipespec.TWO, max_new_tokens=60)
    expected = target_alone(PAIR, pair.prompt, sampling, 60, NEVER)
    assert pair.run() == expected
    assert sum(pair.accepted) > 10


# --- the machine's new events -----------------------------------------------------------------


def test_a_session_rebased_in_the_middle_opens_again_from_the_other_text() -> None:
    pair = chain(1.0, max_new_tokens=40)
    while pair.inner is None or len(pair.inner.edge.tokens) < 12:
        pair.now_ms, _, action = heapq.heappop(pair._queue)
        action()
    inner = pair.inner
    text = (*inner.edge.tokens[:8], (inner.edge.tokens[8] + 1) % 7)
    before = inner.edge.incarnation
    state, effects = edge.step(inner.edge, edge_events.Rebased(text, pair.now_ms))
    assert state.tokens == text
    assert not any((state.drafted, state.in_flight, state.branches))
    assert state.incarnation == before + 1
    assert isinstance(effects[0], edge_events.Crop)
    assert effects[0].length <= 8
    (opened,) = [e.message for e in effects if isinstance(e, edge_events.Send)]
    assert isinstance(opened, OpenSession)
    assert opened.incarnation == before + 1


def test_a_finished_session_is_opened_again_by_another_text_but_not_at_its_end() -> None:
    pair = chain(1.0, max_new_tokens=4)
    pair.run()
    assert pair.inner is not None
    inner = pair.inner.edge
    inner, _ = edge.step(inner, edge_events.Ended(FinishReason.LENGTH))
    whole, effects = edge.step(inner, edge_events.Rebased((*inner.spec.prompt, 1, 2, 3, 4), 0.0))
    assert isinstance(whole.stage, edge.Finished)
    assert not [e for e in effects if isinstance(e, edge_events.Send)]
    part, effects = edge.step(inner, edge_events.Rebased((*inner.spec.prompt, 1, 2), 0.0))
    assert isinstance(part.stage, edge.Opening)
    (sent,) = [e.message for e in effects if isinstance(e, edge_events.Send)]
    assert isinstance(sent, OpenSession)
