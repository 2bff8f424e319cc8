"""Who is up, who is down, who has said goodbye."""

from __future__ import annotations

import msgspec

from bus.store import TIME_TO_LIVE_S, Role, WorkerRecord
from dashboard.roster import REMEMBER_DOWN_S, Roster
from tests.dashboard.conftest import worker


def stored(worker_id: str, expires_at: float, role: Role = Role.EDGE) -> list[WorkerRecord]:
    return [msgspec.structs.replace(worker(worker_id, role), expires_at=expires_at)]


def status(roster: Roster, now_s: float) -> dict[str, str]:
    frame = roster.frame(now_s)
    return dict(zip(frame["worker"], frame["status"], strict=True))


def test_an_expired_record_is_down_and_its_age_grows() -> None:
    roster = Roster()
    roster.update(stored("edge-1", expires_at=105), unreadable=0, now_s=100)
    assert status(roster, 100) == {"edge-1": "up"}
    roster.update(stored("edge-1", expires_at=105), unreadable=0, now_s=112)
    assert status(roster, 112) == {"edge-1": "down"}
    assert roster.frame(112)["heartbeat_age_s"].tolist() == [7 + TIME_TO_LIVE_S]


def test_a_dead_record_that_others_deleted_is_still_shown_as_down() -> None:
    roster = Roster()
    roster.update(stored("edge-1", expires_at=105), unreadable=0, now_s=100)
    roster.update([], unreadable=0, now_s=106)
    assert status(roster, 106) == {"edge-1": "down"}
    roster.update([], unreadable=0, now_s=105 + REMEMBER_DOWN_S)
    assert status(roster, 105 + REMEMBER_DOWN_S) == {}


def test_a_worker_that_stopped_in_order_is_gone_at_once() -> None:
    roster = Roster()
    roster.update(stored("edge-1", expires_at=105), unreadable=0, now_s=100)
    roster.update([], unreadable=0, now_s=102)
    assert status(roster, 102) == {}


def test_a_worker_that_comes_back_is_up() -> None:
    roster = Roster()
    roster.update(stored("edge-1", expires_at=105), unreadable=0, now_s=100)
    roster.update([], unreadable=0, now_s=110)
    roster.update(stored("edge-1", expires_at=125), unreadable=0, now_s=120)
    assert status(roster, 120) == {"edge-1": "up"}


def test_order_is_controller_cloud_middle_edge_and_by_number() -> None:
    roster = Roster()
    roster.update(
        stored("edge-10", 9)
        + stored("edge-2", 9)
        + stored("b-middle", 9, Role.MIDDLE)
        + stored("c-cloud", 9, Role.CLOUD)
        + stored("z-controller", 9, Role.CONTROLLER)
        + stored("7", 9),
        unreadable=0,
        now_s=1,
    )
    expected = ["z-controller", "c-cloud", "b-middle", "7", "edge-2", "edge-10"]
    assert list(status(roster, 1)) == expected
