"""PipeSpec in the shell: an inner session at a middle worker writes the drafts of the outer one,
and nothing that becomes of the middle changes a token."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from bus.protocol.bounds import SessionCoupling
from bus.protocol.messages import CloseSession, DraftWindow, OpenSession
from bus.protocol.requests import inner_session_id, session_id
from bus.store import SessionEntry, StageSpan, TimelineEntry, Usage, WindowEntry
from decoding import edge, methods
from decoding.sampling import SamplingParams
from edge_worker.stages import inner_spec
from tests.edge_worker.shell import PATIENCE_S, House

SLOW_S = 0.05
"""A pass of a target that leaves the middle worker time to take part, on a busy machine too."""


async def usage_of(house: House, name: str) -> Usage:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            for _, entry in await house.store.telemetry.read():
                if isinstance(entry, SessionEntry) and entry.request == name:
                    return entry.usage
            await asyncio.sleep(0.01)


async def meets_the_middle(house: House) -> None:
    """An answer, during which the edge subscribes to the middle worker's feedback: the first
    message to a new subscriber may be lost, and is repeated only after a timeout."""
    await house.answers("r9", method="pipespec")


def opens(house: House, name: str) -> list[OpenSession]:
    return [opened for opened in house.opens() if opened.session == name]


async def test_the_middle_workers_text_are_the_drafts(house: House) -> None:
    house.cloud(pass_s=SLOW_S)
    house.middle(closeness=0.95)
    house.start()
    await meets_the_middle(house)
    await asyncio.gather(*(house.answers(f"r{i}", method="pipespec") for i in range(3)))
    usage = await usage_of(house, "r0")
    assert usage.lossless
    assert usage.accepted_tokens > 0  # how many depends on who is given the processor
    assert usage.middle_tokens >= usage.accepted_tokens
    assert usage.middle_passes > 0
    assert usage.middle_bytes > 0
    names = {opened.session for opened in house.opens()}
    assert {inner_session_id(session_id("r0")), session_id("r0")} <= names
    inner = opens(house, inner_session_id(session_id("r0")))
    assert {opened.method for opened in inner} == {"pipespec-2"}
    closed = {message.session for message in house.closes()}
    assert names <= closed, "whoever was opened is closed"


async def test_a_mismatch_opens_the_inner_session_again(house: House) -> None:
    house.cloud(pass_s=SLOW_S)
    house.middle(closeness=0.6)
    house.start()
    await meets_the_middle(house)
    await house.answers("r1", method="pipespec")
    usage = await usage_of(house, "r1")
    inner = opens(house, inner_session_id(session_id("r1")))
    assert usage.middle_restarts > 0
    assert len({opened.incarnation for opened in inner}) > usage.middle_restarts
    assert all(o.session != session_id("r1") or o.incarnation < 2**18 for o in house.opens())


async def test_an_edge_looks_for_targets_among_cloud_workers_only(house: House) -> None:
    """The middle worker is there first and less loaded; without a cloud worker nothing begins."""
    house.middle()
    house.start()
    await house.submit("r1", method="pipespec")
    await asyncio.sleep(0.6)
    assert not house.opens()
    house.cloud()
    assert (await house.answer("r1"))[0] == house.expected("r1")


async def test_without_a_middle_worker_the_target_writes_by_itself(house: House) -> None:
    house.cloud()
    house.start()
    await house.answers("r0", method="pipespec")  # the listener hears from now on
    await house.answers("r1", method="pipespec")
    usage = await usage_of(house, "r1")
    assert (usage.drafted_tokens, usage.middle_passes) == (0, 0)
    assert usage.own_passes == usage.passes == 24


async def test_a_middle_worker_that_comes_later_drafts_from_then_on(house: House) -> None:
    house.cloud(pass_s=0.02)
    house.start()
    await house.submit("r1", method="pipespec", max_new_tokens=200)
    await house.until(lambda: opens(house, session_id("r1")))
    house.middle(closeness=1.0)
    tokens, _, _ = await house.answer("r1")
    assert tokens == house.expected("r1", 200)
    assert (await usage_of(house, "r1")).accepted_tokens > 0


async def test_a_middle_worker_that_goes_away_takes_no_token_with_it(house: House) -> None:
    house.cloud(pass_s=0.01)
    middle = house.middle(closeness=1.0)
    house.start()
    await house.submit("r1", method="pipespec", max_new_tokens=3000)

    def drafts_are_sent() -> bool:
        return any(isinstance(message, DraftWindow) for message in house.sent)

    await house.until(drafts_are_sent)
    house.clouds.remove(middle)
    await middle.lapse()
    await middle.stop()
    other = house.middle("middle-2", closeness=0.9)
    await house.until(lambda: other.worker._sessions)
    house.sent.clear()
    await house.until(drafts_are_sent)
    await house.store.queue.cancel("r1")
    tokens, _, _ = await house.answer("r1")
    assert len(tokens) > 20
    assert tokens == house.expected("r1", len(tokens))


async def test_a_middle_worker_of_another_tokenizer_is_none(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    house.cloud(pass_s=0.05)
    middle = house.middle()
    middle.lifecycle.update(tokenizer_digest="another")
    house.start(peer_wait_s=0.3)
    await house.answers("r1", method="pipespec")
    assert "no middle worker shares the draft's tokenizer" in caplog.text
    assert "the target writes by itself" in caplog.text
    await house.answers("r2", method="auto")


async def test_a_stop_string_and_a_cancellation_end_both_sessions(house: House) -> None:
    house.cloud(pass_s=0.01)
    house.middle(closeness=0.95)
    house.start()
    text = "".join(chr(ord("a") + token) for token in house.expected("r1", 24))
    await house.submit("r1", method="pipespec", stop=(text[6:9],))
    _, shown, _ = await house.answer("r1")
    assert shown == text[: text.index(text[6:9])]
    await house.submit("r2", method="pipespec", max_new_tokens=4000)
    await house.until(lambda: opens(house, inner_session_id(session_id("r2"))))
    await house.store.queue.cancel("r2")
    await house.answer("r2")
    await house.until(
        lambda: inner_session_id(session_id("r2")) in {m.session for m in house.closes()}
    )
    assert not list(house.edge._context.addresses)


async def test_the_timeline_has_the_middles_passes_and_the_story_its_own_name(house: House) -> None:
    house.cloud(pass_s=SLOW_S)
    house.middle(pass_s=0.002, closeness=0.95)
    house.start(timeline=True)
    await meets_the_middle(house)
    await house.answers("r1", method="pipespec")
    async with asyncio.timeout(PATIENCE_S):
        while True:
            entries = [entry for _, entry in await house.store.telemetry.read()]
            timelines = [entry for entry in entries if isinstance(entry, TimelineEntry)]
            if len(timelines) == 2:
                break
            await asyncio.sleep(0.01)
    spans = [event for event in timelines[1].events if isinstance(event, StageSpan)]
    assert spans
    assert {span.worker for span in spans} == {"middle-1"}
    assert all(0 <= span.at_ms <= span.end_ms for span in spans)
    assert {w.cloud for w in entries if isinstance(w, WindowEntry)} == {"cloud-1"}
    inner, tellers = inner_session_id(session_id("r1")), set[str]()
    async with asyncio.timeout(PATIENCE_S):
        while tellers != {"edge-1", "middle-1"}:
            tellers = set(await house.store.stories.load(inner))
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_residual_coupling_is_answered_too(house: House, temperature: float) -> None:
    house.cloud()
    house.middle()
    house.start()
    await house.submit(
        "r1", method="pipespec", temperature=temperature, coupling=SessionCoupling.RESIDUAL, seed=3
    )
    tokens, _, end = await house.answer("r1")
    assert end.end.error == ""
    assert len(tokens) == 24
    if temperature == 0:
        assert tokens == house.expected("r1")


def test_with_residual_coupling_the_middle_chooses_by_other_numbers() -> None:
    def inner(sampling: SamplingParams) -> SamplingParams:
        method: Any = methods.find("pipespec")
        outer = edge.SessionSpec("s", "c", "e", method, (1,), sampling, 8, "t", drafts=False)
        spec = inner_spec(outer, methods.pipespec.TWO)
        assert (spec.session, spec.method, spec.drafts) == ("s.middle", methods.pipespec.TWO, True)
        return spec.sampling

    coupled = SamplingParams(0.8, seed=3)
    assert inner(coupled) == coupled
    residual = SamplingParams(0.8, seed=3, coupling=SessionCoupling.RESIDUAL)
    other = inner(residual)
    assert other.coupling is SessionCoupling.GUMBEL
    assert other.seed != residual.seed


async def test_e2sci_over_it_judges_by_the_middles_distributions(house: House) -> None:
    house.cloud(pass_s=SLOW_S)
    house.middle(closeness=0.95)
    house.start()
    await meets_the_middle(house)
    await house.submit("r1", method="e2sci+pipespec", max_new_tokens=60)
    tokens, _, end = await house.answer("r1")
    assert (len(tokens), end.end.error) == (60, "")
    assert not (await usage_of(house, "r1")).lossless
    inner = opens(house, inner_session_id(session_id("r1")))
    assert inner
    assert all(opened.rows and opened.method == "pipespec-2" for opened in inner)
    assert not any(opened.rows for opened in opens(house, session_id("r1")))
    windows = [message for message in house.sent if isinstance(message, DraftWindow)]
    outer = [window for window in windows if window.rows is not None]
    uncertain = [probs for w in outer for probs in w.q_prob_rows if np.count_nonzero(probs) > 1]
    assert uncertain


async def test_closing_before_the_first_draft_closes_nothing(house: House) -> None:
    house.start()
    await house.submit("r1", method="pipespec")
    await house.until(lambda: list(house.edge._context.addresses))
    await house.store.queue.cancel("r1")
    await house.answer("r1")
    assert not [m for m in house.sent if isinstance(m, CloseSession)]
