"""The cloud worker with a tiny random model, over real sockets: answers, counters, survival."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bench.reference import generate_alone
from bus.protocol.arrays import pack_tokens
from bus.protocol.messages import (
    DraftWindow,
    Fault,
    FaultCode,
    Feedback,
    Outcome,
    SessionOpened,
    SessionReady,
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
    window,
)
from tests.engines.tiny import CONTEXT_LENGTH

# --- answers ----------------------------------------------------------------------------------


async def test_a_session_is_opened_and_windows_are_judged_by_the_target(
    start: Start, target: TargetModel
) -> None:
    house = start()
    assert await house.ask(opening(target), SessionReady) == SessionReady("s1", 1, "cloud-1")
    alone = list(generate_alone(target, list(PROMPT), SamplingParams(), 8, NEVER))
    answer = await house.ask(window(alone[:3]), Feedback)
    assert (answer.outcome, answer.num_accepted, answer.next_token, answer.committed_length) == (
        Outcome.ACCEPTED, 3, alone[3], len(PROMPT) + 4,
    )  # fmt: skip
    wrong = (alone[5] + 1) % target.vocab_size
    second = window((alone[4], wrong, 7), seq=1, start=len(PROMPT) + 4)
    answer = await house.ask(second, Feedback, seq=1)
    assert (answer.outcome, answer.num_accepted, answer.next_token) == (
        Outcome.PARTIAL, 1, alone[5],
    )  # fmt: skip
    third = window(alone[6:8], seq=2, epoch=1, start=len(PROMPT) + 6)
    answer = await house.ask(third, Feedback, seq=2)
    assert (answer.outcome, answer.num_accepted) == (Outcome.ACCEPTED, 2)
    assert house.reported(SessionOpened)[0].edge == "edge-1"
    await house.until(lambda: len(house.reported(WindowReport)) == 3)  # they follow a little later
    assert [report.num_drafted for report in house.reported(WindowReport)] == [3, 3, 2]


async def test_sampled_windows_end_in_a_recovered_token(start: Start, target: TargetModel) -> None:
    house = start()
    await house.ask(opening(target, temperature=1.0), SessionReady)
    cache = target.open(SamplingParams(temperature=1.0))
    target.forward(cache, PROMPT, [np.arange(3, dtype=np.int32)])
    row = target.row(cache, 0, Want(0, full=True)).full
    assert row is not None
    unlikely = int(row[2:].argmin()) + 2
    answer = await house.ask(window((unlikely, 3)), Feedback)
    assert (answer.outcome, answer.num_accepted) == (Outcome.PARTIAL, 0)
    assert answer.next_token not in (unlikely, None)
    again = await house.ask(window((unlikely, 3)), Feedback)
    assert again == answer  # from its last feedback


async def test_edges_hear_of_their_own_sessions_only(start: Start, target: TargetModel) -> None:
    house = start()
    await house.ask(opening(target), SessionReady)
    await house.ask(opening(target, session="s2", edge="edge-2"), SessionReady, "edge-2")
    assert all(message.session == "s1" for message in house.heard["edge-1"])
    assert all(message.session == "s2" for message in house.heard["edge-2"])


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
    await house.ask(
        opening(target, prompt=pack_tokens(prompt), max_new_tokens=10, session="long"), SessionReady
    )
    alone = list(generate_alone(target, list(prompt), SamplingParams(), 2, NEVER))
    answer = await house.ask(window(alone[:1], session="long", start=400), Feedback)
    assert (answer.num_accepted, answer.next_token) == (1, alone[1])
    prefill = sizes[:-1]  # the last is the window
    assert (sum(prefill), max(prefill)) == (399, FIRST_CHUNK)


async def test_a_window_of_a_session_it_does_not_know_is_answered_to_everybody(
    start: Start, target: TargetModel
) -> None:
    house = start()
    for edge in ("edge-1", "edge-2"):
        answer = await house.ask(window((1, 2), session="gone", epoch=3, seq=4), Feedback, edge)
        assert answer.outcome is Outcome.UNKNOWN_SESSION
        assert (answer.session, answer.incarnation, answer.epoch, answer.seq) == ("gone", 1, 3, 4)


@pytest.mark.parametrize(
    ("changes", "code", "text"),
    [
        ({"tokenizer_digest": "another"}, FaultCode.TOKENIZER_MISMATCH, "draft of the target's"),
        ({"method": "magic"}, FaultCode.UNKNOWN_METHOD, "known: sd"),
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


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (window((7, 9), q_ids=pack_tokens((7, 0, 9, 100_000))), FaultCode.BAD_TOKENS),
        (window((7, 9), q_ids=pack_tokens((7, 0, 9, -1))), FaultCode.BAD_TOKENS),
        (window((7, 9), q_ids=pack_tokens((8, 0, 9, 1))), FaultCode.BAD_TOKENS),
        (window((-7,), q_ids=pack_tokens((8, 0))), FaultCode.BAD_TOKENS),
        (window((7, 9), start=3), FaultCode.OUT_OF_ORDER),
        (window((7, 9), epoch=5), FaultCode.OUT_OF_ORDER),
        (window((7,) * 510), FaultCode.CONTEXT_OVERFLOW),
    ],
)
async def test_windows_that_cannot_be_judged_are_refused(
    start: Start, target: TargetModel, message: DraftWindow, code: FaultCode
) -> None:
    house = start()
    await house.ask(opening(target), SessionReady)
    assert (await house.ask(message, Fault)).code is code
    await house.answers_truly(target)
