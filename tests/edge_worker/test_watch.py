"""What answers add to an edge worker's metrics and traces."""

from __future__ import annotations

import logging
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
from msgspec.structs import replace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from bus.protocol.messages import FinishReason, Outcome
from bus.protocol.requests import GenerationRequest
from bus.runtime.metrics import Metrics
from bus.runtime.tracing import Tracing, recording
from bus.runtime.worker import WorkerSettings, new_record
from bus.store import Claim, SessionEntry, Usage
from decoding.edge_events import WindowJudged
from edge_worker.watch import EdgeTally, RequestWatch, why_not_ready
from tests.bus.test_metrics import shown
from tests.edge_worker.shell import House

TRACE_ID = "a" * 32
TRACEPARENT = f"00-{TRACE_ID}-{'b' * 16}-01"
JUDGED = WindowJudged(
    incarnation=1, number=1, outcome=Outcome.PARTIAL, num_drafted=4, num_accepted=2,
    num_committed=3, rolled_back=True, length=10, threshold=0.1, window=4, credit=0.0, budget=4,
    in_flight=4, draft_ms=1.0, verify_ms=2.0, queue_ms=0.0, pass_tokens=4, rtt_ms=5.0, at_ms=1.0,
)  # fmt: skip


def claim(deliveries: int = 1, age_s: float = 0.0) -> Claim:
    entry = f"{int((time.time() - age_s) * 1e3)}-0"
    request = GenerationRequest(id="r1", prompt="a", method="sd", traceparent=TRACEPARENT)
    return Claim(entry, "r1", request, None, False, deliveries, deliveries)


@pytest.fixture
def tally() -> EdgeTally:
    return EdgeTally(Metrics())


def test_accepted_tokens_are_counted_by_position(tally: EdgeTally) -> None:
    for accepted in (0, 1, 3, 16, 18):
        tally.judged(replace(JUDGED, num_drafted=20, num_accepted=accepted))
    counts = tally.accepted_per_position()
    assert list(counts) == [*map(str, range(16)), "16+"]
    assert [counts[p] for p in ("0", "1", "2", "3", "15", "16+")] == [4, 3, 3, 2, 2, 2]
    assert sum(counts.values()) == tally.accepted_tokens == 38


def test_passes_without_a_window_are_no_drafts(tally: EdgeTally) -> None:
    tally.judged(replace(JUDGED, outcome=Outcome.OWN, num_drafted=0, num_accepted=0))
    assert (tally.drafts, tally.rollbacks, tally.generation_tokens) == (0, 0, 3)


def test_times_begin_with_the_submission(tally: EdgeTally) -> None:
    watch = RequestWatch(tally, Tracing(), claim(age_s=100.0))
    watch.judged(JUDGED)
    watch.judged(JUDGED)
    watch.ended(FinishReason.LENGTH, Usage())
    watch.ended(FinishReason.ERROR, Usage())
    for histogram in (tally.queue_s, tally.first_token_s, tally.request_s):
        assert histogram.count == 1
        assert histogram.sum == pytest.approx(100.0, abs=10.0)
    assert tally.inter_token_s.count == 3, "the first tokens wait for none before them"
    assert +tally.finished == Counter(length=1)


def test_a_request_taken_over_has_no_first_token(tally: EdgeTally) -> None:
    watch = RequestWatch(tally, Tracing(), claim(deliveries=2, age_s=100.0))
    watch.judged(JUDGED)
    watch.ended(FinishReason.STOP, Usage())
    assert tally.queue_s.count == tally.first_token_s.count == tally.request_s.count == 0
    assert tally.generation_tokens == 3


def test_what_another_edge_answers_has_not_ended_here(tally: EdgeTally) -> None:
    watch = RequestWatch(tally, Tracing(), claim())
    watch.disowned()
    watch.ended(FinishReason.CANCELLED, Usage())
    assert not +tally.finished


def test_ready_means_a_cloud_worker_of_the_same_tokenizer() -> None:
    thread = cast(Any, SimpleNamespace(alive=True))
    settings = WorkerSettings.load(worker_id="w1")
    cloud = replace(new_record(settings, "cloud"), tokenizer_digest="d1")
    assert why_not_ready(thread, "d1", [cloud]) == ""
    assert "tokenizer" in why_not_ready(thread, "d2", [cloud])
    assert "tokenizer" in why_not_ready(thread, "d1", [replace(cloud, role="middle")])
    assert "thread" in why_not_ready(cast(Any, SimpleNamespace(alive=False)), "d1", [cloud])


async def test_an_answer_is_counted_as_its_usage_says(house: House) -> None:
    house.cloud()
    house.start(window=4)
    await house.answers("one")
    (session,) = [e for e in await house.telemetry(1) if isinstance(e, SessionEntry)]
    usage, values = session.usage, shown(house.monitor.metrics)
    assert values["e2sci:generation_tokens_total"] == usage.completion_tokens == 24
    assert values["e2sci:prompt_tokens_total"] == usage.prompt_tokens
    assert values["e2sci:spec_decode_num_drafts_total"] == usage.windows > 0
    assert values["e2sci:spec_decode_num_draft_tokens_total"] == usage.drafted_tokens
    assert values["e2sci:spec_decode_num_accepted_tokens_total"] == usage.accepted_tokens
    assert values["e2sci:rollbacks_total"] == usage.rollbacks
    assert values["e2sci:request_success_total{finished_reason=length}"] == 1
    assert values["e2sci:bytes_sent_total"] >= usage.bytes_up
    assert values["e2sci:bytes_received_total"] >= usage.bytes_down
    assert values["e2sci:num_requests_running"] == 0


async def test_a_refused_request_has_ended_with_an_error(house: House) -> None:
    house.cloud()
    house.start()
    await house.fails("one", "unknown", method="unknown")
    assert shown(house.monitor.metrics)["e2sci:request_success_total{finished_reason=error}"] == 1


async def test_one_trace_from_the_request_to_the_cloud(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    kept = InMemorySpanExporter()
    house.tracing = recording(kept, "e2sci-edge", "edge-1")
    house.cloud()
    house.start(window=4)
    await house.answers("one", traceparent=TRACEPARENT)
    await house.telemetry(1)
    await house.until(lambda: any(" closes: " in r.getMessage() for r in caplog.records))
    spans = {span.name: span for span in kept.get_finished_spans()}
    request, prefill = spans["request"], spans["prefill"]
    assert request.context is not None
    assert prefill.parent is not None
    assert f"{request.context.trace_id:032x}" == TRACE_ID
    assert prefill.parent.span_id == request.context.span_id
    attributes = dict(request.attributes or {})
    assert (attributes["method"], attributes["finish_reason"]) == ("sd", "length")
    assert attributes["completion_tokens"] == 24
    windows = [dict(event.attributes or {}) for event in request.events]
    assert sum(window["committed"] for window in windows) == 24  # type: ignore[misc]
    assert {*windows[0]} == {"drafted", "accepted", "committed", "rtt_ms", "verify_ms"}
    (opened,) = {message.traceparent for message in house.opens()}
    assert opened == f"00-{TRACE_ID}-{request.context.span_id:016x}-01"
