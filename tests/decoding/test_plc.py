"""`plc` through both machines: the text, the budget, and how the pace follows the link."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from bus.protocol.bounds import SessionCoupling
from bus.protocol.messages import DraftWindow, FaultCode, Feedback, OpenSession
from decoding import edge_events, methods
from decoding.edge_events import Draft, Started
from decoding.methods import Method
from decoding.methods.base import Flow
from decoding.pacing import Measures
from decoding.sampling import SamplingParams
from tests.decoding.edge_session import (
    ALL_ACCEPTED,
    SPEC,
    TOKENS,
    UNKNOWN,
    Edge,
    drafted,
    running,
    says,
    three_in_flight,
)
from tests.decoding.test_pacing import measured
from tests.decoding.test_pair import fates, pairs, windows
from tests.harness import EdgeCloudPair, Fate
from tests.toy import ToyPair, target_alone

GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.8, seed=11)
PLC, LITERAL = methods.plc.METHOD, methods.plc_literal.METHOD


class Watched(EdgeCloudPair):
    """Checks at every draft that tokens in flight stay within the budget."""

    most_in_flight = 0

    def _run_draft(self, job: int, feed: tuple[int, ...], count: int) -> None:
        ahead = len(self.edge.drafted) + count
        assert ahead <= self.edge.flow.budget
        self.most_in_flight = max(self.most_in_flight, ahead)
        super()._run_draft(job, feed, count)


# --- the text ---------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    pair=pairs, fates=fates, windows=windows, method=st.sampled_from([PLC, LITERAL]),
    sampling=st.sampled_from([GREEDY, SAMPLED]), busy_ms=st.sampled_from([0.0, 3.0, 70.0]),
    forget=st.frozensets(st.integers(0, 40), max_size=3), draft_ms=st.sampled_from([0.5, 2.0, 9.0]),
)  # fmt: skip
def test_the_text_is_the_targets_own_over_any_link(
    pair: ToyPair, fates: tuple[Fate, ...], windows: tuple[int, ...], method: Method,
    sampling: SamplingParams, busy_ms: float, forget: frozenset[int], draft_ms: float,
) -> None:  # fmt: skip
    run = Watched(
        pair, sampling, windows=windows, fates=fates, forget_at=forget, prompt=(1, 0),
        method=method, busy_ms=busy_ms, draft_ms=draft_ms,
    )  # fmt: skip
    assert run.run() == target_alone(pair, (1, 0), sampling, 24, frozenset())
    assert {fault.code for fault in run.faults} <= {FaultCode.UNKNOWN_SESSION}


@pytest.mark.parametrize("method", [PLC, LITERAL])
def test_a_greedy_answer_is_the_targets_own(method: Method) -> None:
    pair = ToyPair(agreement=0.9)
    got = EdgeCloudPair(pair, GREEDY, method=method, max_new_tokens=60).run()
    assert got == target_alone(pair, (1, 2, 3), GREEDY, 60, frozenset())


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_over_a_good_link_nothing_is_sent_twice(sampling: SamplingParams) -> None:
    run = EdgeCloudPair(ToyPair(agreement=0.9), sampling, method=PLC, max_new_tokens=60)
    run.run()
    numbers = [m.number for m in run.sent if isinstance(m, DraftWindow)]
    assert len(set(numbers)) == len(numbers)
    assert len([m for m in run.sent if isinstance(m, OpenSession)]) == 1


# --- the pace ---------------------------------------------------------------------------------


class Link(Watched):
    """A link of constant delay, which may change once."""

    def __init__(
        self, *args: Any, rtt_ms: float, changes: tuple[float, float] = (1e18, 0.0), **kwargs: Any
    ) -> None:
        self.rtt_ms = rtt_ms
        self.changes = changes  # from when on the round trip is another, and which
        super().__init__(*args, **kwargs)

    def _transmit(self, message: Any, arrive: Any) -> None:
        at_ms, changed_ms = self.changes
        self.sent.append(message)
        delay_ms = (changed_ms if self.now_ms >= at_ms else self.rtt_ms) / 2
        self._at(delay_ms, lambda: arrive(message))

    @property
    def tokens_per_ms(self) -> float:
        return len(self.answer) / self.now_ms


def over(
    rtt_ms: float, method: Method, window: int = 4, kind: type[Link] = Link, **kwargs: Any
) -> Link:
    """A draft that mostly agrees: 20 ms a step, 60 ms a pass."""
    run = kind(
        ToyPair(agreement=kwargs.pop("agreement", 0.9), vocab_size=9),
        kwargs.pop("sampling", GREEDY), method=method,
        rtt_ms=rtt_ms, windows=(window,), draft_ms=20.0, verify_ms=60.0, max_new_tokens=150,
        **kwargs,
    )  # fmt: skip
    run.run()
    return run


@pytest.mark.parametrize(("rtt_ms", "factor"), [(0.0, 1.05), (80.0, 1.25)])
def test_plc_outruns_the_best_static_window(rtt_ms: float, factor: float) -> None:
    """On a virtual clock: what both would take if models took exactly this long."""
    best = max(over(rtt_ms, methods.sd.METHOD, w).tokens_per_ms for w in (2, 3, 4, 6, 8))
    assert over(rtt_ms, PLC).tokens_per_ms > factor * best


@pytest.mark.parametrize("rtt_ms", [0.0, 80.0])
def test_where_the_draft_is_poor_plc_does_not_lose_to_lockstep(rtt_ms: float) -> None:
    static = [over(rtt_ms, methods.sd.METHOD, w, agreement=0.4) for w in (1, 2)]
    plc = over(rtt_ms, PLC, agreement=0.4)
    assert plc.tokens_per_ms > 0.97 * max(run.tokens_per_ms for run in static)


def test_it_adapts_when_the_link_changes_in_mid_session() -> None:
    budgets: list[tuple[float, int]] = []

    class Changing(Link):
        def _step_edge(self, event: edge_events.Event) -> None:
            super()._step_edge(event)
            budgets.append((self.now_ms, self.edge.flow.budget))

    run = over(10.0, PLC, agreement=1.0, changes=(1500.0, 400.0), kind=Changing)
    before = max(budget for at_ms, budget in budgets if 800 < at_ms < 1500)
    after = min(budget for at_ms, budget in budgets if at_ms > 3000)
    assert after > 1.5 * before
    assert run.tokens_per_ms * 20 > 0.7, "the draft goes on though the round trip is 20 steps"


def test_when_the_cloud_is_busy_others_wait_is_known_and_more_is_kept_in_flight() -> None:
    calm, busy = over(10.0, PLC), over(10.0, PLC, busy_ms=150.0)
    assert calm.edge.measures.queue_ms < 20
    assert busy.edge.measures.queue_ms > 100
    assert busy.most_in_flight > calm.most_in_flight


def test_the_cloud_shares_passes_between_windows() -> None:
    run = over(80.0, PLC, agreement=0.9)
    shared = [j for j in run.judged if not j.pass_tokens and j.verify_ms]
    assert shared
    assert all(judged.rows for judged in shared)


def test_the_cloud_saves_passes_by_pre_hit() -> None:
    """Where the kept row rejects the first token, with residual coupling, nothing runs."""
    residual = SamplingParams(temperature=0.8, seed=11, coupling=SessionCoupling.RESIDUAL)
    run = over(80.0, PLC, agreement=0.6, sampling=residual)
    feedback = [m for m in run.sent if isinstance(m, Feedback)]
    assert any(message.prehit for message in feedback)
    assert all(not m.verify_ms and not m.pass_tokens for m in feedback if m.prehit)


# --- what the edge measures -------------------------------------------------------------------


def test_a_session_begins_with_what_earlier_ones_have_learnt() -> None:
    spec = replace(SPEC, method=PLC)
    fresh, taught = Edge(spec), Edge(spec)
    assert Draft(1, (1, 2, 3), 4) in fresh.tell(Started(frozenset(), 0.0))
    taught.tell(Started(frozenset(), 0.0, measured(rtt_ms=200.0, acceptance=0.95)))
    assert not taught.state.flow.awaits
    assert taught.state.flow.budget > 8


def test_drafts_after_a_prompt_are_no_measure_of_a_step() -> None:
    session = running()
    session.tell(drafted(1, 3, (10, 11, 12, 13)))
    assert session.state.measures == Measures()
    session.tell(ALL_ACCEPTED)
    session.tell(drafted(2, 8, (20, 21, 22), now_ms=37.5))
    assert session.state.measures.alone.step_ms == 2.0
    assert session.state.measures.gap_ms == 1.5


def test_a_window_sent_twice_is_no_measure_of_the_path() -> None:
    session = running().is_told(drafted(1, 3, (10, 11, 12, 13)))
    session.tell(edge_events.Tick(2000.0))
    session.tell(says(3, (10, 11, 12, 13, 50), 2030.0))
    assert session.state.measures.round_trips == ()
    assert session.state.measures.alone.passes.known


def test_the_growth_starts_over_at_a_rollback_with_the_window_that_caused_it() -> None:
    session = running().is_told(drafted(1, 3, (10, 11, 12, 13)))
    session.tell(ALL_ACCEPTED)
    assert session.state.growth == 1.125
    session.tell(drafted(2, 8, (20, 21, 22, 23), now_ms=40.0))
    session.tell(says(8, (20, 60), 60.0, number=2))
    assert session.state.growth == 1 + (2 * 0.25 - 1) / 8


def test_an_answer_restarts_the_timer_of_the_windows_after_it() -> None:
    """They wait at the cloud, not on the way."""
    session = three_in_flight()
    session.tell(says(3, TOKENS, 1500.0))
    assert session.tell(edge_events.Tick(1510.0)) == ()


def test_nothing_is_drafted_after_a_window_that_is_awaited_though_the_pace_says_so_since() -> None:
    session = running().is_told(drafted(1, 3, TOKENS))
    session.state = replace(session.state, flow=Flow(message=2, budget=9, awaits=True))
    effects = session.tell(UNKNOWN)
    assert [type(effect) for effect in effects] == [edge_events.Send]
