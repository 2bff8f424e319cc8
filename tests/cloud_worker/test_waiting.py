"""Places in the order of asking."""

from __future__ import annotations

from cloud_worker.waiting import MOST_WAITING, WaitingRoom


def test_a_place_is_kept_for_whoever_has_waited_longest() -> None:
    room = WaitingRoom(patience_ms=100.0)
    assert not room.admit("a", 0, 0.0)
    assert not room.admit("b", 0, 1.0)
    assert not room.admit("b", 1, 2.0)
    assert not room.admit("new", 1, 3.0)
    assert room.admit("a", 1, 4.0)
    assert not room.admit("a2", 1, 5.0)
    assert room.admit("b", 1, 6.0)
    assert len(room) == 2


def test_with_more_places_more_of_the_row_come_in() -> None:
    room = WaitingRoom(patience_ms=100.0)
    for name in "abc":
        assert not room.admit(name, 0, 0.0)
    assert not room.admit("c", 2, 1.0)
    assert room.admit("b", 2, 1.0)
    assert room.admit("c", 2, 1.0)


def test_who_does_not_ask_again_or_leaves_is_passed_over() -> None:
    room = WaitingRoom(patience_ms=100.0)
    assert not room.admit("silent", 0, 0.0)
    assert not room.admit("gone", 0, 90.0)
    assert not room.admit("here", 0, 90.0)
    room.leave("gone")
    room.leave("unknown")
    assert room.admit("here", 1, 101.0)


def test_the_row_is_bounded() -> None:
    room = WaitingRoom(patience_ms=100.0)
    for number in range(MOST_WAITING + 10):
        assert not room.admit(str(number), 0, 0.0)
    assert len(room) == MOST_WAITING
