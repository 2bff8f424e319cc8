"""When the controller forgets a session, and that it stays forgotten."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from bus.protocol.messages import (
    Message,
    SessionClosed,
)
from controller import server
from decoding.control import ControlState, FixedPolicy
from tests.controller.house import (
    OPENED,
    REPORT,
    Counting,
    Start,
    eventually,
)


async def test_a_closed_session_is_forgotten_but_not_on_the_word_of_the_worker_it_has_left(
    start: Start,
) -> None:
    house = await start()
    house.send(OPENED, msgspec.structs.replace(OPENED, cloud="cloud-2", incarnation=2))
    house.send(SessionClosed("s1", "cloud-1", 1, "expired"))
    house.send(SessionClosed("unknown", "cloud-1", 1, "expired"))
    await house.saved("s1", cloud="cloud-2")
    await house.update("s1")
    house.send(SessionClosed("s1", "cloud-2", 2, "length"))

    async def gone() -> bool:
        return await house.store.sessions.load("s1") is None

    await eventually(gone)
    assert house.controller._sessions == {}


@pytest.mark.parametrize("late", [REPORT, OPENED], ids=["report", "opened"])
async def test_a_message_that_comes_after_the_end_does_not_open_the_session_anew(
    start: Start, late: Message
) -> None:
    house = await start(Counting())
    house.send(OPENED, REPORT, SessionClosed("s1", "cloud-1", 1, "length"), late)
    house.send(msgspec.structs.replace(OPENED, session="s2"))
    await house.saved("s2")
    assert set(house.controller._sessions) == {"s2"}
    assert await house.store.sessions.load("s1") is None
    house.heard["edge-1"].clear()
    await house.update("s2")
    await house.update("s2")
    assert {update.session for update in house.heard["edge-1"]} == {"s2"}


async def test_a_late_report_still_reaches_the_clients_credit(start: Start) -> None:
    house = await start(Counting(), carry_credit=True, reports=True)
    house.send(OPENED, REPORT, SessionClosed("s1", "cloud-1", 1, "length"), REPORT)
    house.send(msgspec.structs.replace(OPENED, session="s2"))
    assert (await house.saved("s2")).history == (0.25, 0.25)

    async def traced() -> bool:
        return len(await house.store.telemetry.read()) == 2

    await eventually(traced)


async def test_an_ended_session_that_is_opened_again_keeps_its_version(start: Start) -> None:
    """Its edge would ignore updates of a lower one."""
    house = await start(Counting())
    house.send(OPENED, REPORT, SessionClosed("s1", "cloud-1", 1, "evicted"))
    house.send(msgspec.structs.replace(OPENED, cloud="cloud-2", incarnation=2))
    assert (await house.saved("s1", cloud="cloud-2")).version == 2


async def test_a_session_nobody_speaks_of_is_forgotten_and_one_reported_about_is_not(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its version would begin again at 1, and its edge ignore the updates."""
    house = await start(FixedPolicy(0.125, 4))
    house.send(OPENED, msgspec.structs.replace(OPENED, session="silent"))
    await house.update("s1")
    await house.update("silent")
    sessions = house.controller._sessions
    changed = ControlState(0.125, 4, version=7)
    for name, session in list(sessions.items()):
        sessions[name] = replace(session, control=changed, updated_at=session.updated_at - 9)
    house.send(REPORT)

    async def heard() -> bool:
        return sessions["s1"].updated_at > sessions["silent"].updated_at + 5

    await eventually(heard)
    monkeypatch.setattr(server, "FORGET_AFTER_S", 5.0)

    async def forgotten() -> bool:
        return "silent" not in sessions

    await eventually(forgotten)
    assert (await house.update("s1")).version == 7


async def test_a_restarted_controller_opens_no_ended_session_anew(start: Start) -> None:
    first = await start(Counting(), carry_credit=True)
    first.send(OPENED, REPORT)
    await first.saved("s1", version=2)
    first.send(SessionClosed("s1", "cloud-1", 1, "length"))

    async def gone() -> bool:
        return await first.store.sessions.load("s1") is None

    await eventually(gone)
    await first.stop()
    second = await start(Counting(), carry_credit=True)
    second.send(REPORT, OPENED, msgspec.structs.replace(OPENED, session="s2"))
    assert (await second.saved("s2")).history == (0.25, 0.25)  # the late report counts as credit
    assert {record.session for record in await second.store.sessions.all()} == {"s2"}
    assert second.sockets.counters["late_messages"] == 2


async def test_an_ended_session_that_was_opened_again_survives_a_restart(start: Start) -> None:
    first = await start(Counting())
    first.send(OPENED, REPORT, SessionClosed("s1", "cloud-1", 1, "evicted"))
    first.send(msgspec.structs.replace(OPENED, cloud="cloud-2", incarnation=2))
    await first.saved("s1", cloud="cloud-2", incarnation=2)
    await first.stop()
    second = await start(Counting())
    assert (await second.update("s1")).version == 2
    second.send(SessionClosed("s1", "cloud-2", 2, "length"))

    async def gone() -> bool:
        return await second.store.sessions.load("s1") is None

    await eventually(gone)


async def test_a_session_that_moves_without_another_decision_is_saved_where_it_is(
    start: Start,
) -> None:
    """A restarted controller would ignore the end of it, told by a worker it does not know."""
    house = await start()
    house.send(OPENED)
    await house.saved("s1")
    house.send(msgspec.structs.replace(OPENED, cloud="cloud-2", incarnation=2))
    assert (await house.saved("s1", cloud="cloud-2")).version == 1
