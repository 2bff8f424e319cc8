"""The end of an edge session, whatever ends it: its cache goes to the prefix cache, once."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from msgspec.structs import replace

from bus.protocol.messages import FinishReason
from decoding import edge, methods
from decoding.edge_events import Commit, Ended, StopMatched, Tick
from decoding.sampling import SamplingParams
from edge_worker.answer import AnswerOutput
from edge_worker.context import SessionContext
from edge_worker.memory import PathMemory
from edge_worker.session import EdgeSession
from edge_worker.text import AnswerText
from edge_worker.usage import UsageMeter
from engines.thread import ModelThread
from tests.edge_worker.shell import ToyTokenizer
from tests.edge_worker.test_usage import judged


def spec() -> edge.SessionSpec:
    method = methods.find("sd")
    assert method is not None
    return edge.SessionSpec(
        session="s1", client="c", edge="edge-1", method=method, prompt=(1, 2, 3),
        sampling=SamplingParams(), max_new_tokens=8, tokenizer_digest="t",
    )  # fmt: skip


@pytest.mark.parametrize("reason", [None, FinishReason.STOP, FinishReason.CANCELLED])
async def test_a_session_gives_its_cache_back_once(reason: FinishReason | None) -> None:
    cache, given_back = object(), []
    model: Any = SimpleNamespace(
        open=lambda *_: cache,
        close=lambda held: given_back.append((held, threading.current_thread().name)),
    )
    peers: Any = SimpleNamespace(find=lambda _: asyncio.Event().wait())
    answer: Any = SimpleNamespace(stopped=False, num_tokens=0, flush=lambda: "")
    thread = ModelThread(1)
    try:
        session = EdgeSession(
            SessionContext(model, thread, peers, 1.0, PathMemory()),
            AnswerOutput(answer, MagicMock(), MagicMock()),
        )
        session.begin(spec(), edge.Control(0.1, 4, 0.1, ttl_ms=1e3), (), 1)
        await asyncio.sleep(0)  # it begins to look for a cloud worker
        if reason is not None:
            session.handle(Ended(reason))
        session.close()
        session.close()
        await thread.call(lambda: None)
        assert given_back == [(cache, "model")]
    finally:
        thread.close()


ANSWER: Any = SimpleNamespace(stopped=False, num_tokens=0, flush=lambda: "")


def session_with(answer: Any, writer: Any, thread: ModelThread, meter: Any = None) -> EdgeSession:
    model: Any = SimpleNamespace(open=lambda *_: object(), close=lambda _: None)
    peers: Any = SimpleNamespace(find=lambda *_: asyncio.Event().wait())
    context = SessionContext(model, thread, peers, 1.0, PathMemory())
    session = EdgeSession(context, AnswerOutput(answer, meter or MagicMock(), writer))
    session.begin(spec(), edge.Control(0.1, 4, 0.1, ttl_ms=1e3), (), 1)
    return session


COMMIT = Commit(0, tuple(range(9)), (True,) * 8 + (False,))
FACTS = (
    judged(4, 4, False, number=1, num_committed=4),
    judged(3, 3, False, number=2, num_committed=3, pass_tokens=0),
    judged(4, 1, True, number=3, num_committed=2, pass_tokens=0),
)


@pytest.mark.parametrize(
    ("stops", "pieces", "usage"),
    [
        (
            (),
            [(0, (0, 1, 2, 3), "abcd", 1, 4), (4, (4, 5, 6), "efg", 2, 3), (7, (7, 8), "hi", 3, 1)],
            (9, 8, 3, 1),
        ),
        (  # in the middle of the second window: the rest is not the user's
            ("ef",),
            [(0, (0, 1, 2, 3), "abcd", 1, 4), (4, (4, 5), "", 2, 2)],
            (6, 6, 2, 0),
        ),
        (("d",), [(0, (0, 1, 2, 3), "abc", 1, 4)], (4, 4, 1, 0)),  # its last token
    ],
)  # fmt: skip
async def test_windows_judged_by_one_feedback_are_a_piece_and_an_entry_each(
    stops: tuple[str, ...], pieces: list[tuple[Any, ...]], usage: tuple[int, ...]
) -> None:
    thread, writer = ModelThread(1), MagicMock()
    answer, meter = AnswerText(ToyTokenizer(), stops), UsageMeter("r1", spec(), 0)
    session = session_with(answer, writer, thread, meter)
    try:
        session.state = replace(session.state, tokens=(1, 2, 3, *COMMIT.tokens))
        session._notify([COMMIT, *FACTS])
        await asyncio.sleep(0)  # where it has stopped, it ends
        put = [call.args[0] for call in writer.put.call_args_list]
        assert [
            (p.start, p.tokens, p.text, p.entry.number, p.entry.num_accepted) for p in put
        ] == pieces
        assert all(sum(p.lengths) == len(p.text) for p in put)
        assert [sum(p.accepted) for p in put] == [p.entry.num_accepted for p in put]
        told = meter.usage()
        assert usage == (
            told.completion_tokens, told.accepted_tokens, told.windows, told.rollbacks,
        )  # fmt: skip
        assert told.passes == 1
        ends = [call.args[0] for call in writer.end.call_args_list]
        assert ends == ([FinishReason.STOP] if stops else [])
    finally:
        session.close()
        thread.close()


async def test_an_event_that_cannot_happen_is_counted_logged_with_the_story_and_survived(
    caplog: pytest.LogCaptureFixture,
) -> None:
    thread = ModelThread(1)
    try:
        session = session_with(ANSWER, MagicMock(), thread)
        session.handle(StopMatched(99))
        assert isinstance(session.state.stage, edge.Seeking)
        assert "a stop string ends in token 99 of 0; ignored" in caplog.text
        assert "resumes the request" in caplog.text
        session.handle(StopMatched(99))
        assert caplog.text.count("ignored. Before:") == 2
    finally:
        session.close()
        thread.close()


async def test_where_even_the_end_fails_the_author_is_told_why() -> None:
    """The tokenizer fails while the rest of the text is flushed."""

    def flush() -> str:
        raise RuntimeError("no such letter")

    thread, writer = ModelThread(1), MagicMock()
    try:
        session = session_with(
            SimpleNamespace(stopped=False, num_tokens=0, flush=flush), writer, thread
        )
        session.handle(Ended(FinishReason.LENGTH))
        await asyncio.sleep(0)
        (call,) = writer.end.call_args_list
        assert call.args[:2] == (FinishReason.ERROR, "the draft failed: no such letter")
    finally:
        session.close()
        thread.close()


async def test_where_the_machine_itself_fails_the_author_is_told_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    thread, writer = ModelThread(1), MagicMock()
    try:
        session = session_with(ANSWER, writer, thread)
        with monkeypatch.context() as broken:

            def step(*_: Any) -> Any:
                raise ZeroDivisionError("a bug")

            broken.setattr(edge, "step", step)
            session.handle(Tick(0.0))
        (call,) = writer.end.call_args_list
        assert call.args[:2] == (FinishReason.ERROR, "the draft failed: a bug")
    finally:
        session.close()
        thread.close()
