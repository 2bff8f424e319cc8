"""The edge worker with toy engines, over real sockets and a real Valkey: whatever goes wrong ends
one session with an error its user can read; the worker and its other sessions go on."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from bus.protocol.messages import (
    Ack,
    CloseSession,
    ControlUpdate,
    DraftWindow,
    Fault,
    FaultCode,
    Feedback,
    FinishReason,
    SessionReady,
)
from bus.protocol.requests import session_id
from bus.store import (
    Keys,
    PassSpan,
    SessionEntry,
    TelemetryEntry,
    TimelineEntry,
    WindowEntry,
    stories,
)
from decoding import edge
from decoding.engine import DrafterCapabilities
from decoding.sampling import SamplingParams
from edge_worker import server
from edge_worker.session import EdgeSession
from edge_worker.specs import HOW_TO_GET, spec_of
from tests.edge_worker.shell import NEVER, PAIR, PATIENCE_S, Drafter, House, ToyTokenizer
from tests.toy import likely_tree, target_alone


@pytest.mark.parametrize("method", ["sd", "plc", "auto"])
async def test_answers_are_the_targets_own(house: House, method: str) -> None:
    house.cloud()
    house.start()
    await asyncio.gather(*(house.answers(f"r{i}", method=method) for i in range(5)))


async def told(house: House, name: str) -> list[TelemetryEntry]:
    """Telemetry of a request with its timeline, which comes last and after the answer's end."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            entries = [e for _, e in await house.store.telemetry.read() if e.request == name]
            if any(isinstance(entry, TimelineEntry) for entry in entries):
                return entries
            await asyncio.sleep(0.005)


async def test_a_session_that_drafts_nothing_reads_what_the_target_writes(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def thin(*args: Any) -> edge.SessionSpec:
        return replace(spec_of(*args), drafts=False)

    monkeypatch.setattr(server, "spec_of", thin)
    house.cloud(pass_s=0.002)
    house.start(timeline=True)
    await house.answers("r0", method="auto")  # the listener hears from now on
    await house.answers("r1", method="auto")
    entries = await told(house, "r1")
    windows = [entry for entry in entries if isinstance(entry, WindowEntry)]
    assert {(w.outcome, w.number, w.num_drafted) for w in windows} == {("own", 0, 0)}
    assert sum(w.num_committed for w in windows) == 24
    (usage,) = [entry.usage for entry in entries if isinstance(entry, SessionEntry)]
    assert usage.own_passes == usage.passes == 24
    assert (usage.drafted_tokens, usage.windows, usage.wasted_tokens) == (0, 0, 0)
    assert usage.edge_idle == 1.0
    (timeline,) = [entry for entry in entries if isinstance(entry, TimelineEntry)]
    assert [type(event) for event in timeline.events] == [PassSpan] * 24
    assert not [message for message in house.sent if isinstance(message, DraftWindow)]


@pytest.mark.parametrize("method", ["medusa", "eagle3"])
async def test_where_the_target_proposes_trees_the_edge_reads(house: House, method: str) -> None:
    house.cloud(pass_s=0.002, pair=dataclasses.replace(PAIR, speculator=likely_tree))
    house.start(timeline=True)
    await house.answers("r0", method=method)  # the listener hears from now on
    await house.answers("r1", method=method)
    entries = await told(house, "r1")
    (usage,) = [entry.usage for entry in entries if isinstance(entry, SessionEntry)]
    assert usage.lossless
    assert usage.proposed > usage.drafted_tokens >= usage.accepted_tokens > 0
    assert usage.accepted_tokens + usage.passes == usage.completion_tokens == 24
    assert usage.rollbacks == usage.wasted_tokens == 0
    (timeline,) = [entry for entry in entries if isinstance(entry, TimelineEntry)]
    spans = [event for event in timeline.events if isinstance(event, PassSpan)]
    assert sum(span.proposed for span in spans) == usage.proposed
    assert sum(span.num_accepted for span in spans) == usage.accepted_tokens
    assert not [message for message in house.sent if isinstance(message, DraftWindow)]
    assert house.drafter.open_caches == 0


async def test_credit_s_threshold_reaches_the_cloud_and_is_in_telemetry(house: House) -> None:
    house.cloud(pair=dataclasses.replace(PAIR, speculator=likely_tree), tree_tokens=1)
    house.start(timeline=True)
    await house.answers("r0", method="medusa")  # the listener hears from now on
    house.sent.clear()
    await house.submit("r1", method="e2sci+medusa")
    _, _, end = await house.answer("r1")
    assert (end.end.error, end.end.usage.lossless) == ("", False)
    acks = [message for message in house.sent if isinstance(message, Ack)]
    conservative = house.settings.conservative_threshold
    assert acks
    assert all(ack.threshold == pytest.approx(conservative) for ack in acks)
    trees = [e for e in await told(house, "r1") if isinstance(e, WindowEntry) and e.proposed]
    assert trees
    assert all(tree.threshold == pytest.approx(conservative) for tree in trees)


async def test_a_method_whose_speculator_no_cloud_has_is_refused_with_what_to_do(
    house: House,
) -> None:
    house.cloud()
    house.start(peer_wait_s=0.1)
    why = "no cloud worker has the speculator 'medusa'; live ones: cloud-1 (toy)"
    await house.fails("r1", why, method="medusa")
    assert house.opens() == []  # no cloud worker is asked
    await house.answers("r2")


async def test_a_method_that_needs_more_of_the_draft_is_refused_with_what_to_do(
    house: House,
) -> None:
    house.cloud()
    house.start()
    await house.fails(
        "r1",
        "method 'fr-spec' needs a draft with a head of frequent tokens alone; this edge drafts "
        "with toy and has none: start the edge with --draft NAME@16384, or use another method",
        method="fr-spec",
    )
    assert house.opens() == []  # no cloud worker is asked
    await house.answers("r2")


async def test_a_draft_that_can_what_the_method_needs_answers(house: House) -> None:
    house.cloud()
    house.start(Drafter(capabilities=DrafterCapabilities(ranked_head=True)))
    await house.answers("r1", method="fr-spec")


def test_of_everything_a_draft_can_be_asked_for_it_is_known_how_to_get_it() -> None:
    assert set(HOW_TO_GET) == set(DrafterCapabilities.__struct_fields__)


def broken(drafter: Drafter, name: str, text: str) -> Callable[[], None]:
    """One method of the drafter raises, until the returned function is called."""

    def raises(*_: Any, **__: Any) -> Any:
        raise RuntimeError(text)

    setattr(drafter, name, raises)
    return lambda: delattr(drafter, name)


@pytest.mark.parametrize(
    ("method", "why"),
    [("open", "internal error in the edge worker"), ("draft", "the draft failed: no memory")],
)
async def test_an_engine_that_raises_ends_its_session_only(
    house: House, method: str, why: str
) -> None:
    house.cloud()
    house.start()
    mend = broken(house.drafter, method, "no memory")
    await house.fails("r1", why)
    mend()
    await house.answers("r2")


async def test_a_tokenizer_that_raises_while_it_streams_ends_its_session_only(
    house: House,
) -> None:
    """It is called a turn of the loop after the feedback, where nobody waits for it."""
    house.cloud()
    house.start()

    class Broken(ToyTokenizer):
        def decode(self, tokens: Any, **_: Any) -> str:
            raise RuntimeError("no such letter")

    whole, house.drafter.tokenizer = house.drafter.tokenizer, Broken()
    await house.fails("r1", "no such letter")
    house.drafter.tokenizer = whole
    await house.answers("r2")


async def test_a_message_that_cannot_be_handled_silences_nobody_else(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions share a peer's listener: what one of them raises there must not end it."""
    house.cloud(pass_s=0.01)
    house.start()
    poisoned = session_id("r1")
    hand_over = house.edge._hand_over

    def poison(session: EdgeSession, message: Any) -> None:
        if session.state.spec.session == poisoned and isinstance(message, Feedback):
            raise LookupError("a bug")
        hand_over(session, message)

    monkeypatch.setattr(house.edge, "_hand_over", poison)
    await asyncio.gather(
        house.fails("r1", "a Feedback could not be handled: a bug"),
        *(house.answers(f"other-{i}") for i in range(3)),
    )
    assert house.sockets.counters["failed_messages"] >= 1


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"method": "magic"}, "known are auto, "),
        ({"method": "e2sci+e2sci-fixed"}, "is refused: e2sci-fixed is e2sci with one part changed"),
        ({"max_new_tokens": 5000, "method": "sd"}, "the context of the draft"),
        ({"method": "medusa", "coupling": "residual"}, "method 'medusa' needs coupling 'gumbel'"),
    ],
)
async def test_a_request_that_cannot_be_answered_is_refused(
    house: House, fields: dict[str, Any], why: str
) -> None:
    house.cloud()
    house.start()
    await house.fails("r1", why, **fields)
    assert house.sockets.counters["refused_requests"] == 1
    await house.answers("r2")


@pytest.mark.parametrize("method", ["sd:8", "plc", "auto"])
async def test_a_stop_string_inside_an_accepted_window_ends_what_counts_too(
    house: House, method: str
) -> None:
    house.cloud()
    house.start()
    names = [f"r{number}" for number in range(12)]
    for name in names:
        text = ToyTokenizer().decode(house.expected(name))
        await house.submit(name, stop=(text[3:5],), method=method)
    for name in names:
        text = ToyTokenizer().decode(house.expected(name))
        tokens, shown, end = await house.answer(name)
        assert end.end.finish_reason is FinishReason.STOP
        assert shown == text[: text.index(text[3:5])]
        assert tokens == house.expected(name)[: len(tokens)]
        assert end.end.usage.accepted_tokens <= end.end.usage.completion_tokens == len(tokens)
    entries = await house.telemetry(num_sessions=len(names))
    windows = [entry for entry in entries if isinstance(entry, WindowEntry)]
    assert windows
    for name in names:
        committed = sum(entry.num_committed for entry in windows if entry.request == name)
        assert committed == len((await house.answer(name))[0])


async def test_messages_that_belong_nowhere_are_counted(house: House) -> None:
    house.cloud(pass_s=0.05)
    house.start()
    await house.submit("r1")
    await house.until(house.opens)
    house.edge.on_message(SessionReady("another", 1, "cloud-1", 7))
    house.edge.on_message(CloseSession(session_id("r1"), 1, "?"))
    house.edge.on_message(ControlUpdate(session_id("r1"), 1, 1, 0.1, 5, 0.5, 0.0))
    house.edge.on_message(Fault(session_id("r1"), FaultCode.UNKNOWN_SESSION, "once", 2**31 - 1))
    assert house.sockets.counters["unexpected_messages"] == 1
    assert house.sockets.counters["faults"] == 1
    assert (await house.answer("r1"))[0] == house.expected("r1")


async def test_long_texts_are_worked_on_beside_the_event_loop(house: House) -> None:
    """Tokenizing a prompt of 0.8 MB takes a second; the answers beside it must not wait."""
    house.cloud()
    house.start()
    threads = set[str]()

    class Watched(ToyTokenizer):
        def encode(self, text: str) -> list[int]:
            threads.add(threading.current_thread().name)
            return super().encode(text)

    house.drafter.tokenizer = Watched()
    await house.fails("r1", "the context of the draft", prompt="x" * 100_000, method="sd")
    assert threads == {"text_0"}


async def test_the_story_of_a_session_is_there_while_it_runs_and_afterwards(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stories, "INTERVAL_S", 0.02)
    cloud = house.cloud(pass_s=0.02)
    house.start()
    await house.submit("r1", max_new_tokens=60)

    async def told(text: str) -> None:
        async with asyncio.timeout(20.0):
            while True:
                story = await house.store.stories.load(session_id("r1"))
                if set(story) == {"edge-1", "cloud-1"} and any(text in s for s in story["edge-1"]):
                    break
                await asyncio.sleep(0.01)

    await told("FeedbackArrived")
    await house.answer("r1")
    await told("running → finished")
    assert cloud.sockets.counters["impossible_events"] == 0


async def test_a_request_that_cannot_be_read_is_refused(
    house: House, redis: Any, key_prefix: str
) -> None:
    house.cloud()
    house.start()
    fields = {"id": "r1", "prompt": "x", "temperature": "warm"}
    await redis.xadd(Keys(key_prefix).prompts, fields)
    assert "temperature" in (await house.answer("r1"))[2].end.error


async def test_a_chat_and_token_ids_are_answered_as_the_target_alone_would(
    house: House, redis: Any, key_prefix: str
) -> None:
    house.cloud()
    house.start()
    chat = [{"role": "system", "content": "abc"}, {"role": "user", "content": "xyz"}]
    prompt = ToyTokenizer().encode("abcxyz")
    alone = target_alone(PAIR, tuple(prompt), SamplingParams(), 24, NEVER)
    for name, field, value in (("r1", "messages", chat), ("r2", "prompt_ids", prompt)):
        fields = {"id": name, field: json.dumps(value), "method": "sd", "max_new_tokens": "24"}
        await redis.xadd(Keys(key_prefix).prompts, fields)
        tokens, _, end = await house.answer(name)
        assert end.end.error == ""
        assert tokens == alone
    fields = {"id": "r3", "prompt_ids": f"[0, {PAIR.vocab_size}]"}
    await redis.xadd(Keys(key_prefix).prompts, fields)
    error = (await house.answer("r3"))[2].end.error
    assert f"id {PAIR.vocab_size} at index 1 is not a token of this model" in error
