"""What `usage` and telemetry say about an answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from bus.protocol.messages import Ack, CloseSession, DraftWindow, FinishReason, Outcome
from bus.store import PassSpan, Role, WorkerRecord
from decoding import methods
from decoding.edge import SessionSpec
from decoding.edge_events import WindowJudged
from decoding.sampling import SamplingParams
from edge_worker.usage import OWN_PASSES, UsageMeter, within
from tests.sessions import drafted_window

SPEC = SessionSpec(
    "s1", "c1", "edge-1", methods.sd.METHOD, (1, 2, 3), SamplingParams(), 20, "digest"
)
PEER: Any = SimpleNamespace(record=SimpleNamespace(worker_id="cloud-1"))


def window(number: int = 3, start: int = 5) -> DraftWindow:
    """Four tokens."""
    return drafted_window((1, 2, 3), (5, 6, 7, 8), number=number, start=start)


def judged(num_drafted: int, num_accepted: int, rolled_back: bool, **facts: Any) -> WindowJudged:
    """A window after which the target wrote a token."""
    common = {
        "outcome": Outcome.PARTIAL if rolled_back else Outcome.ACCEPTED, "incarnation": 1,
        "number": 3, "num_committed": num_accepted + 1, "length": 9, "threshold": 0.25,
        "window": 4, "credit": 0.5, "budget": 8, "in_flight": 6, "draft_ms": 6.0,
        "verify_ms": 10.0, "queue_ms": 0.5, "pass_tokens": 3, "rtt_ms": 9.0, "at_ms": 1000.0,
    }  # fmt: skip
    return WindowJudged(
        num_drafted=num_drafted, num_accepted=num_accepted, rolled_back=rolled_back,
        **(common | facts),
    )  # fmt: skip


def own(at_ms: float = 1000.0, **facts: Any) -> WindowJudged:
    """A token that the target wrote without a draft."""
    alone = {"number": 0, "outcome": Outcome.OWN, "pass_tokens": 1, "draft_ms": 0.0}
    return judged(0, 0, False, at_ms=at_ms, **(alone | facts))


def test_an_answer_is_added_up() -> None:
    meter = UsageMeter("r1", SPEC, num_committed=0)
    for num_accepted, rolled_back in ((4, False), (1, True)):
        meter.sent(window(), 600)
        meter.bytes_down += 40
        meter.committed(num_accepted + 1)
        meter.judged(judged(4, num_accepted, rolled_back))
    meter.sent(window(), 600)  # sent again: bytes, but no new window
    meter.sent(Ack(1, 2, 3), 60)
    meter.sent(CloseSession("s1", 1, "length"), 40)
    usage = meter.usage()
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, 7)
    assert (usage.drafted_tokens, usage.accepted_tokens, usage.acceptance) == (8, 5, 5 / 8)
    assert (usage.windows, usage.rollbacks) == (2, 1)
    assert (usage.bytes_up, usage.bytes_down) == (1900, 80)
    assert usage.bytes_per_drafted_token == 1860 / 12
    assert usage.seconds > 0
    assert usage.tokens_per_s == pytest.approx(7 / usage.seconds)
    assert usage.lossless


def test_after_a_takeover_speed_counts_new_tokens_only() -> None:
    meter = UsageMeter("r1", SPEC, num_committed=10)
    meter.committed(5)
    usage = meter.usage()
    assert usage.completion_tokens == 15
    assert usage.tokens_per_s == pytest.approx(5 / usage.seconds)


def target(probe: str, bitwise: bool = True) -> WorkerRecord:
    return WorkerRecord(worker_id="cloud-1", role=Role.CLOUD, boot="b", dtype="int8",
                        bitwise=bitwise, probe_digest=probe)  # fmt: skip


@pytest.mark.parametrize(
    ("before", "targets", "probe", "bitwise"),
    [
        ((), [target("aa"), target("aa")], "aa", True),
        ((), [target("aa", bitwise=False)], "aa", False),
        ((), [target("aa"), target("bb")], "bb", False),  # two targets of one answer
        (("aa",), [target("aa")], "aa", True),  # taken over from another edge
        (("aa",), [target("bb")], "bb", False),
        (("bb", "aa"), [target("aa")], "aa", False),
        (("",), [target("aa")], "aa", False),  # what was streamed before does not say
        ((), [target("")], "", False),
    ],
)
def test_an_answer_is_bitwise_where_one_digest_gave_all_of_it(
    before: tuple[str, ...], targets: list[WorkerRecord], probe: str, bitwise: bool
) -> None:
    meter = UsageMeter("r1", SPEC, 3 * len(before), before)
    assert meter.probe == (before[-1] if before else "")
    for record in targets:
        meter.committed(2, record)
    usage = meter.usage()
    assert (usage.dtype, usage.probe_digest, usage.bitwise) == ("int8", probe, bitwise)
    assert meter.probe == probe


def test_a_target_that_gave_no_token_does_not_count() -> None:
    meter = UsageMeter("r1", SPEC, 0)
    meter.committed(1, target("aa"))
    meter.committed(0, target("bb"))
    assert (meter.usage().probe_digest, meter.usage().bitwise) == ("aa", True)


def test_decoding_is_what_comes_after_the_first_pass() -> None:
    """Three windows share the first pass, the fourth is rejected at pre-hit, the fifth runs."""
    meter = UsageMeter("r1", SPEC, num_committed=0)
    shared = Outcome.ACCEPTED
    for at_ms, pass_tokens, committed, outcome in (
        (1000.0, 9, 4, shared), (1000.0, 0, 4, shared), (1000.0, 0, 3, shared),
        (1040.0, 0, 1, Outcome.PREHIT_REJECTED), (1100.0, 5, 2, Outcome.PARTIAL),
    ):  # fmt: skip
        meter.committed(committed)
        meter.judged(
            judged(
                4, committed, outcome is not shared, num_committed=committed, outcome=outcome,
                pass_tokens=pass_tokens, at_ms=at_ms,
            )
        )  # fmt: skip
    told = meter.usage()
    assert told.completion_tokens == 14
    assert (told.passes, told.passes_saved, told.prehit_rejections) == (2, 3, 1)
    assert told.decode_tokens == 3
    assert told.decode_seconds == pytest.approx(0.1)


def test_an_answer_of_one_pass_has_no_decoding_speed() -> None:
    meter = UsageMeter("r1", SPEC, num_committed=10)
    assert (meter.usage().decode_tokens, meter.usage().decode_seconds) == (0, 0.0)
    meter.committed(5)
    meter.judged(judged(4, 4, False))
    assert (meter.usage().decode_tokens, meter.usage().decode_seconds) == (0, 0.0)


def test_before_the_first_window_nothing_is_divided_by_zero() -> None:
    usage = UsageMeter("r1", SPEC, num_committed=0).usage()
    assert (usage.acceptance, usage.bytes_per_drafted_token) == (0.0, 0.0)


def test_a_window_entry_has_the_outcome_and_the_bytes_since_the_entry_before() -> None:
    meter = UsageMeter("r1", SPEC, num_committed=0)
    meter.sent(window(), 600)
    meter.bytes_down += 40
    first = meter.entry(judged(4, 1, True), PEER)
    assert first is not None
    assert (first.request, first.session, first.client) == ("r1", "s1", "c1")
    assert (first.edge, first.cloud, first.method) == ("edge-1", "cloud-1", "sd")
    assert (first.incarnation, first.number, first.outcome) == (1, 3, "partial")
    assert first.rollback
    assert (first.num_drafted, first.num_accepted, first.num_committed) == (4, 1, 2)
    assert (first.threshold, first.window, first.credit) == (0.25, 4, 0.5)
    assert (first.draft_ms, first.verify_ms, first.queue_ms, first.rtt_ms) == (6.0, 10.0, 0.5, 9.0)
    assert (first.bytes_up, first.bytes_down) == (600, 40)
    meter.sent(window(), 500)
    second = meter.entry(judged(4, 1, True), None)
    assert second is not None
    assert (second.bytes_up, second.bytes_down, second.cloud) == (500, 0, "")


def test_the_closing_entry_says_why_and_what_it_took() -> None:
    meter = UsageMeter("r1", SPEC, num_committed=0)
    meter.entry(judged(4, 1, True), PEER)
    meter.committed(2)
    closing = meter.closing(FinishReason.LENGTH)
    assert (closing.finish_reason, closing.cloud) == ("length", "cloud-1")
    assert closing.usage.completion_tokens == 2


def test_a_session_without_a_draft_counts_the_targets_own_passes() -> None:
    meter = UsageMeter("r1", SPEC, num_committed=0)
    for number in range(5):
        meter.committed(1)
        meter.judged(own(1000.0 + 50 * number))
        meter.bytes_up += 20  # acknowledgements
    meter.committed(1)
    meter.judged(own(1250.0, pass_tokens=0))  # text that was lost is sent again
    usage = meter.usage()
    assert (usage.completion_tokens, usage.passes, usage.own_passes) == (6, 5, 5)
    assert (usage.windows, usage.drafted_tokens, usage.accepted_tokens) == (0, 0, 0)
    assert (usage.passes_saved, usage.wasted_tokens, usage.rollbacks) == (0, 0, 0)
    assert (usage.acceptance, usage.bytes_per_drafted_token, usage.bytes_up) == (0.0, 0.0, 100)
    assert usage.decode_tokens == 5
    assert usage.decode_seconds == pytest.approx(0.25)
    assert (usage.edge_idle, usage.hidden) == (1.0, 0.0)
    entries = [meter.entry(own(), PEER) for _ in range(OWN_PASSES)]
    assert entries[:-1] == [None] * (OWN_PASSES - 1)
    (entry,) = [e for e in entries if e is not None]
    assert (entry.outcome, entry.number, entry.num_drafted) == ("own", 0, 0)
    assert entry.num_committed == OWN_PASSES
    assert meter.rest(PEER) == []


def test_passes_without_a_window_are_told_with_the_next_one_or_at_the_end() -> None:
    meter = UsageMeter("r1", SPEC, num_committed=0)
    assert [meter.entry(own(), PEER) for _ in range(3)] == [None] * 3
    entry = meter.entry(judged(4, 2, True), PEER)
    assert entry is not None
    assert (entry.num_drafted, entry.num_accepted, entry.num_committed) == (4, 2, 6)
    assert meter.entry(own(), PEER) is None
    (last,) = meter.rest(PEER)
    assert (last.outcome, last.num_committed) == ("own", 1)
    assert meter.rest(PEER) == []


def test_passes_that_the_target_ran_alone_save_none() -> None:
    """Three windows in two passes, and two passes between them."""
    meter = UsageMeter("r1", SPEC, num_committed=0)
    for fact in (
        judged(4, 4, False, number=1), own(1010.0), own(1020.0),
        judged(4, 4, False, number=2, at_ms=1030.0),
        judged(4, 4, False, number=3, at_ms=1030.0, pass_tokens=0),
    ):  # fmt: skip
        meter.judged(fact)
    usage = meter.usage()
    assert (usage.passes, usage.own_passes, usage.windows, usage.passes_saved) == (4, 2, 3, 1)


@pytest.mark.parametrize(
    ("effect", "num_kept", "num_accepted", "num_committed"),
    [
        (judged(6, 6, False), 7, 6, 7),
        (judged(6, 6, False), 6, 6, 6),  # the target's own token is lost first
        (judged(6, 6, False), 4, 4, 4),
        (judged(4, 2, True), 5, 2, 3),
        (judged(4, 2, True), 1, 1, 1),
        (judged(6, 6, False, num_committed=2), 1, 5, 1),  # four were committed before
        (own(), 1, 0, 1),
        (own(), 0, 0, 0),
    ],
)
def test_what_comes_after_a_stop_string_counts_nowhere(
    effect: WindowJudged, num_kept: int, num_accepted: int, num_committed: int
) -> None:
    kept = within(effect, num_kept)
    assert kept == replace(effect, num_accepted=num_accepted, num_committed=num_committed)
    meter = UsageMeter("r1", SPEC, num_committed=0)
    meter.judged(kept)
    assert meter.usage().accepted_tokens == num_accepted
    entry = meter.entry(kept, PEER) or meter.rest(PEER)[0]
    assert (entry.num_accepted, entry.num_committed) == (num_accepted, num_committed)


def test_trees_count_as_windows_of_their_depth_and_their_tokens_are_added_up() -> None:
    meter = UsageMeter("r1", SPEC, num_committed=0)
    tree = {"number": 0, "proposed": 8, "pass_tokens": 9}
    for num_accepted in (3, 1):
        meter.committed(num_accepted + 1)
        meter.judged(judged(3, num_accepted, False, **tree))
    meter.committed(1)
    meter.judged(own())
    usage = meter.usage()
    assert (usage.proposed, usage.windows, usage.rollbacks) == (16, 2, 0)
    assert (usage.drafted_tokens, usage.accepted_tokens) == (6, 4)
    assert (usage.passes, usage.own_passes, usage.passes_saved) == (3, 1, 0)
    entry = meter.entry(judged(3, 3, False, **tree), None)
    assert entry is not None
    assert (entry.proposed, entry.num_drafted) == (8, 3)
    spans = [event for event in meter.timeline.events() if isinstance(event, PassSpan)]
    facts = [(span.num_tokens, span.proposed, span.depth, span.num_accepted) for span in spans]
    assert facts == [(9, 8, 3, 3), (9, 8, 3, 1), (1, 0, 0, 0)]
