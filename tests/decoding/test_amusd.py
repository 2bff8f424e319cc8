"""`amusd` through both machines: the text, what the target takes, and where the draft stops."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.protocol.bounds import SessionCoupling
from bus.protocol.messages import DraftWindow, FaultCode, OpenSession
from decoding import cloud_events, methods
from decoding.draft_tree import MAX_WINDOWS
from decoding.methods.paces import MOST_UNJUDGED
from decoding.sampling import SamplingParams
from tests.decoding.test_pair import fates, pairs
from tests.decoding.test_plc import Link, Watched
from tests.harness import EdgeCloudPair, Fate
from tests.toy import ToyPair, target_alone

GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.8, seed=11)
AMUSD = methods.amusd.METHOD


def windows_of(run: EdgeCloudPair) -> list[DraftWindow]:
    return [message for message in run.sent if isinstance(message, DraftWindow)]


@settings(max_examples=40, deadline=None)
@given(
    pair=pairs, fates=fates, sampling=st.sampled_from([GREEDY, SAMPLED]),
    busy_ms=st.sampled_from([0.0, 3.0, 70.0]), draft_ms=st.sampled_from([0.01, 2.0, 30.0]),
    forget=st.frozensets(st.integers(0, 40), max_size=3),
)  # fmt: skip
def test_the_text_is_the_targets_own_over_any_link(
    pair: ToyPair, fates: tuple[Fate, ...], sampling: SamplingParams, busy_ms: float,
    draft_ms: float, forget: frozenset[int],
) -> None:  # fmt: skip
    run = Watched(
        pair, sampling, fates=fates, forget_at=forget, prompt=(1, 0), method=AMUSD,
        busy_ms=busy_ms, draft_ms=draft_ms,
    )  # fmt: skip
    assert run.run() == target_alone(pair, (1, 0), sampling, 24, frozenset())
    assert {fault.code for fault in run.faults} <= {FaultCode.UNKNOWN_SESSION}


@pytest.mark.parametrize("window", [1, 8])
def test_every_message_holds_a_token_whatever_the_window(window: int) -> None:
    run = EdgeCloudPair(ToyPair(), GREEDY, method=AMUSD, windows=(window,))
    run.run()
    assert {message.num_tokens for message in windows_of(run)} == {1}


def test_windows_carry_ids_alone() -> None:
    run = EdgeCloudPair(ToyPair(), SAMPLED, method=AMUSD)
    run.run()
    assert all(message.rows is None for message in windows_of(run))
    assert AMUSD.needs_rows(SamplingParams(coupling=SessionCoupling.RESIDUAL))


def test_the_target_takes_all_that_is_pending_and_adds_a_token() -> None:
    """8 tokens are drafted while a pass runs: each pass but the first takes about as many."""
    run = Link(
        ToyPair(agreement=1.0), GREEDY, method=AMUSD, rtt_ms=0.0, draft_ms=1.0, verify_ms=8.0,
        max_new_tokens=60,
    )  # fmt: skip
    run.run()
    passes = [judged.pass_tokens for judged in run.judged if judged.pass_tokens]
    assert len(run.answer) == 60
    assert len(passes) < 12
    assert min(passes[:-1]) >= 6


def test_on_a_mismatch_the_target_waits_until_the_draft_has_answered() -> None:
    """A draft that is always wrong: a token a round trip, and no pass without a draft."""
    run = Link(
        ToyPair(agreement=0.0, vocab_size=9), GREEDY, method=AMUSD, rtt_ms=100.0, draft_ms=1.0,
        verify_ms=5.0, max_new_tokens=12,
    )  # fmt: skip
    run.run()
    wrong = [judged for judged in run.judged if judged.num_accepted < 1]
    assert len(wrong) > 4
    assert run.now_ms > 100.0 * len(wrong)
    assert not any(isinstance(message, OpenSession) for message in run.sent[2:])


@pytest.mark.parametrize("draft_ms", [0.001, 1.0])
class Keeping(Link):
    """No window that follows the text is dropped by the cloud."""

    def _step_cloud(self, event: cloud_events.Event) -> None:
        super()._step_cloud(event)
        if isinstance(event, cloud_events.WindowArrived) and self._cloud is not None:
            ours = [f.number for f in self.edge.in_flight if f.number <= event.message.number]
            kept = {w.source.message.number for w in self._cloud.drafts.windows}
            if self.edge.tokens == self._cloud.tokens:
                assert kept.issuperset(ours)
                self.most_kept = max(self.most_kept, len(ours))

    most_kept = 0


@pytest.mark.parametrize(("draft_ms", "agreement"), [(0.001, 0.8), (1.0, 0.95)])
def test_the_draft_stops_only_where_the_cloud_would_drop_some(
    draft_ms: float, agreement: float
) -> None:
    """A fast draft fills its budget again and again, and all of it is kept."""
    pair = ToyPair(agreement=agreement, vocab_size=9, seed=1)
    run = Keeping(
        pair, GREEDY, method=AMUSD, rtt_ms=40.0,
        draft_ms=draft_ms, verify_ms=90.0, max_new_tokens=200,
    )  # fmt: skip
    assert run.run() == target_alone(pair, (1, 2, 3), GREEDY, 200, frozenset())
    assert run.most_in_flight == run.most_kept == MOST_UNJUDGED == MAX_WINDOWS
    assert any(not judged.num_accepted for judged in run.judged)


def test_it_never_drafts_beyond_the_end_of_the_answer() -> None:
    run = Watched(ToyPair(agreement=1.0), GREEDY, method=AMUSD, max_new_tokens=5, draft_ms=0.01)
    run.run()
    assert run.most_in_flight <= 5
