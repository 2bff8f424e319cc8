"""What passes and sessions add to a cloud worker's metrics, logs and traces."""

from __future__ import annotations

import json
import logging

import pytest
from msgspec.structs import replace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from bus.protocol.messages import CloseSession, Fault, FaultCode
from bus.runtime.logs import configure_logging
from bus.runtime.tracing import recording
from engines.torch.target import TargetModel
from tests.bus.test_metrics import shown
from tests.cloud_worker.conftest import Start, opening, own_text, window

TRACE_ID = "a" * 32
TRACEPARENT = f"00-{TRACE_ID}-{'b' * 16}-01"


async def test_passes_are_counted(start: Start, target: TargetModel) -> None:
    house = start()
    handle = await house.opens(target)
    await house.judges(window(handle, own_text(target, 4)[:3]))
    values = shown(house.metrics)
    passes = values["e2sci:verify_time_seconds_count"]
    assert passes == values["e2sci:pass_tokens_count"] == values["e2sci:pass_sessions_count"] > 0
    assert values["e2sci:pass_tokens_sum"] > passes
    assert values["e2sci:verify_time_seconds_sum"] > 0
    assert values["e2sci:energy_joules_total{source=modelled}"] == pytest.approx(
        5.6 * values["e2sci:verify_time_seconds_sum"]
    )
    assert values["e2sci:num_requests_running"] == 1
    assert values["e2sci:num_requests_waiting"] == 0


async def test_tokens_that_the_target_writes_by_itself_are_counted(
    start: Start, target: TargetModel
) -> None:
    house = start()
    handle = await house.opens(target, method="auto", max_new_tokens=8)
    assert len(await house.reads(handle, 8)) == 8
    house.outbox.send(CloseSession("s1", 1, "over"))
    await house.until(lambda: not house.worker._sessions)
    assert shown(house.metrics)["e2sci:own_tokens_total"] == 8


async def test_faults_are_counted_by_code(start: Start, target: TargetModel) -> None:
    house = start()
    message = replace(opening(target), tokenizer_digest="another")
    await house.ask(message, Fault, code=FaultCode.TOKENIZER_MISMATCH)
    values = shown(house.metrics)
    assert values["e2sci:faults_total{code=tokenizer_mismatch}"] >= 1
    assert values["e2sci:events_total{event=faults}"] >= 1


async def test_a_session_is_logged_with_its_trace(
    start: Start, target: TargetModel, capsys: pytest.CaptureFixture[str]
) -> None:
    house = start()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    configure_logging("info", "cloud-1", "json")
    try:
        await house.opens(target, traceparent=TRACEPARENT)
        house.outbox.send(CloseSession("s1", 1, "over"))
        await house.until(lambda: not house.worker._sessions)
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    records = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    about = [record for record in records if record.get("session") == "s1"]
    assert [record["message"] for record in about] == [
        "session s1 opens: sd of edge-1", "session s1 closes: over",
    ]  # fmt: skip
    assert {record["trace_id"] for record in about} == {TRACE_ID}


async def test_a_session_is_a_span_with_its_passes(start: Start, target: TargetModel) -> None:
    house = start()
    kept = InMemorySpanExporter()
    house.worker._tracing = recording(kept, "e2sci-cloud", "cloud-1")
    handle = await house.opens(target, traceparent=TRACEPARENT)
    await house.judges(window(handle, own_text(target, 4)[:3]))
    house.outbox.send(CloseSession("s1", 1, "over"))
    await house.until(lambda: not house.worker._sessions)
    (span,) = kept.get_finished_spans()
    assert span.context is not None
    assert span.parent is not None
    assert span.name == "session"
    assert f"{span.context.trace_id:032x}" == TRACE_ID
    assert f"{span.parent.span_id:016x}" == "b" * 16
    attributes = dict(span.attributes or {})
    assert (attributes["method"], attributes["reason"]) == ("sd", "over")
    events = [dict(event.attributes or {}) for event in span.events]
    assert {event.name for event in span.events} == {"pass"}
    assert [(event["drafted"], event["accepted"]) for event in events] == [(3, 3)]
