"""The cloud worker with a tiny random model, over real sockets: answers, counters, survival."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bench.reference import generate_alone
from bus.protocol.arrays import pack_tokens
from bus.protocol.bounds import SessionCoupling
from bus.protocol.messages import (
    Ack,
    DraftRows,
    DraftWindow,
    Fault,
    FaultCode,
    Outcome,
    SessionOpened,
    WindowReport,
)
from cloud_worker.costs import FIRST_CHUNK
from decoding.engine import Want
from decoding.sampling import SamplingParams
from engines.torch.target import TargetModel
from tests.cloud_worker.conftest import (
    NEVER,
    PROMPT,
    Start,
    opening,
    own_text,
    window,
)
from tests.engines.tiny import CONTEXT_LENGTH
from tests.sessions import drafted_rows, drafted_window

# --- answers ----------------------------------------------------------------------------------


async def test_a_session_is_opened_and_windows_are_judged_by_the_target(
    start: Start, target: TargetModel
) -> None:
    house = start()
    handle = await house.opens(target)
    alone = own_text(target, 9)
    wrong = (alone[5] + 1) % target.vocab_size
    text: tuple[int, ...] = ()
    for number, drafted in enumerate((alone[:3], (alone[4], wrong, 7), alone[6:8]), 1):
        feedback = await house.judges(window(handle, drafted, text, number=number))
        assert feedback.start == len(PROMPT) + len(text)
        text += feedback.token_ids
        assert len(text) == (4, 6, 9)[number - 1]
    assert text == alone
    assert house.reported(SessionOpened)[0].edge == "edge-1"
    await house.until(lambda: len(house.reported(WindowReport)) == 3)  # they follow a little later
    reports = [(r.number, r.outcome, r.num_accepted) for r in house.reported(WindowReport)]
    assert reports == [(1, Outcome.ACCEPTED, 3), (2, Outcome.PARTIAL, 1), (3, Outcome.ACCEPTED, 2)]


async def test_with_residual_coupling_a_draw_follows_a_rejection(
    start: Start, target: TargetModel
) -> None:
    house = start()
    sampled: dict[str, Any] = {"temperature": 1.0, "coupling": SessionCoupling.RESIDUAL}
    handle = await house.opens(target, **sampled)
    cache = target.open(SamplingParams(temperature=1.0))
    target.forward(cache, PROMPT, [np.arange(3, dtype=np.int32)])
    row = target.row(cache, 0, Want(0, full=True)).full
    assert row is not None
    unlikely = int(row[2:].argmin()) + 2
    message = window(handle, (unlikely, 3), rows=drafted_rows((unlikely, 3)))
    answer = await house.judges(message)
    assert len(answer.token_ids) == 1
    assert answer.token_ids != (unlikely,)
    again = await house.judges(message)
    assert (again.start, again.tokens) == (answer.start, answer.tokens)


async def test_a_session_has_one_handle_for_each_incarnation(
    start: Start, target: TargetModel
) -> None:
    house = start()
    first = await house.opens(target)
    assert await house.opens(target) == first
    other = await house.opens(target, session="s2")
    second = await house.opens(target, incarnation=2)
    assert await house.opens(target, incarnation=2) == second
    assert len({first, other, second}) == 3
    opened = [(m.session, m.incarnation) for m in house.reported(SessionOpened)]
    assert opened == [("s1", 1), ("s2", 1), ("s1", 2)]


async def test_edges_hear_of_their_own_sessions_only(start: Start, target: TargetModel) -> None:
    house = start()
    handle = await house.opens(target)
    other = await house.opens(target, session="s2", edge="edge-2")
    await house.judges(window(handle, (7,)))
    await house.judges(window(other, (7,)), "edge-2")
    assert {message.handle for message in house.heard["edge-1"]} == {handle}
    assert {message.handle for message in house.heard["edge-2"]} == {other}


async def test_a_long_prompt_is_prefilled_in_chunks_and_others_interleave(
    start: Start, target: TargetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    run = target.run

    def counting(batch: Any) -> Any:
        sizes.extend(len(segment.tokens) for segment in batch)
        return run(batch)

    monkeypatch.setattr(target, "run", counting)
    house = start()
    prompt = tuple((7 * i) % 280 + 2 for i in range(400))
    handle = await house.opens(
        target, prompt=pack_tokens(prompt), max_new_tokens=10, session="long"
    )
    alone = tuple(generate_alone(target, list(prompt), SamplingParams(), 2, NEVER))
    message = drafted_window(prompt, alone[:1], len(prompt), handle=handle)
    assert (await house.judges(message)).token_ids == alone
    prefill = sizes[:-1]  # the last is the window
    assert (sum(prefill), max(prefill)) == (399, FIRST_CHUNK)


@pytest.mark.parametrize("message", [window(77, (1, 2)), Ack(77, 3, 9)])
async def test_a_handle_that_it_does_not_know_is_answered_to_everybody(
    start: Start, target: TargetModel, message: DraftWindow | Ack
) -> None:
    house = start()
    for edge in ("edge-1", "edge-2"):
        fault = await house.ask(message, Fault, edge)
        assert (fault.session, fault.code, fault.handle) == ("-", FaultCode.UNKNOWN_SESSION, 77)
    await house.answers_truly(target)


@pytest.mark.parametrize(
    ("changes", "code", "text"),
    [
        ({"tokenizer_digest": "another"}, FaultCode.TOKENIZER_MISMATCH, "draft of the target's"),
        ({"method": "magic"}, FaultCode.UNKNOWN_METHOD, "known are auto, auto-chain, sd"),
        ({"max_new_tokens": CONTEXT_LENGTH}, FaultCode.CONTEXT_OVERFLOW, "context holds 512"),
        ({"prompt": pack_tokens((5, 100_000))}, FaultCode.BAD_TOKENS, "must lie in"),
        ({"prompt": pack_tokens((5, -1))}, FaultCode.BAD_TOKENS, "must lie in"),
        ({"committed": pack_tokens((2**31 - 1,))}, FaultCode.BAD_TOKENS, "must lie in"),
    ],
)
async def test_what_cannot_be_opened_is_refused_and_counted(
    start: Start, target: TargetModel, changes: dict[str, Any], code: FaultCode, text: str
) -> None:
    house = start()
    fault = await house.ask(opening(target, **changes), Fault)
    assert (fault.session, fault.code) == ("s1", code)
    assert text in fault.detail
    assert house.counters["faults"] > 0
    assert house.reported(SessionOpened) == []
    await house.answers_truly(target)


def ids(*tokens: int) -> DraftRows:
    return drafted_rows((7, 9), q_ids=pack_tokens(tokens))


@pytest.mark.parametrize(
    ("tokens", "changes", "code"),
    [
        ((7, 9), {"rows": ids(7, 0, 9, 100_000)}, FaultCode.BAD_TOKENS),
        ((7, 9), {"rows": ids(7, 0, 9, -1)}, FaultCode.BAD_TOKENS),
        ((7, 9), {"rows": ids(8, 0, 9, 1)}, FaultCode.BAD_TOKENS),
        ((-7,), {}, FaultCode.BAD_TOKENS),
        ((100_000,), {}, FaultCode.BAD_TOKENS),
        ((7, 9), {"start": 3}, FaultCode.BAD_TOKENS),
        ((7, 9), {"acknowledged": 3}, FaultCode.BAD_TOKENS),
        ((7, 9), {"acknowledged": 99}, FaultCode.BAD_TOKENS),
        ((7,) * 510, {}, FaultCode.CONTEXT_OVERFLOW),
    ],
)
async def test_windows_that_cannot_be_judged_are_refused(
    start: Start, target: TargetModel, tokens: tuple[int, ...], changes: dict[str, Any],
    code: FaultCode,
) -> None:  # fmt: skip
    house = start()
    handle = await house.opens(target)
    assert (await house.ask(window(handle, tokens, **changes), Fault)).code is code
    await house.answers_truly(target)


async def test_a_window_without_the_probabilities_its_method_needs_is_refused(
    start: Start, target: TargetModel
) -> None:
    house = start()
    handle = await house.opens(target, method="e2sci")
    fault = await house.ask(window(handle, (7, 9)), Fault)
    assert fault.code is FaultCode.BAD_TOKENS
    assert "e2sci needs the draft's probabilities" in fault.detail


@pytest.mark.parametrize("length", [3, 99])
async def test_text_that_there_is_not_cannot_be_acknowledged(
    start: Start, target: TargetModel, length: int
) -> None:
    house = start()
    handle = await house.opens(target)
    fault = await house.ask(Ack(handle, 1, length), Fault)
    assert (fault.session, fault.code) == ("s1", FaultCode.BAD_TOKENS)
    assert f"{length} tokens are acknowledged of 6" in fault.detail
