"""What `e2sci bench floor` makes of when tokens came, and of answers in pairs."""

from __future__ import annotations

import pytest

from bench.floor import ALONE, FloorRow, rest_speed, summarise
from bus.protocol.errors import ConfigurationError


def test_the_first_two_seconds_do_not_count() -> None:
    came_s = [0.0, 1.0, 2.0, 3.0, 4.0]
    assert rest_speed(came_s, [1, 50, 50, 10, 20]) == pytest.approx(15.0)


def test_too_short_a_rest_says_nothing() -> None:
    assert rest_speed([], []) is None
    assert rest_speed([0.0, 2.5], [1, 1]) is None


def row(prompt_id: int, turn: int, method: str, speed: float) -> FloorRow:
    return FloorRow(40.0, "model", prompt_id, turn, method, 400, speed)


def test_the_ratio_is_of_medians_of_answers_that_both_gave() -> None:
    rows = [row(i, 0, "auto", 9.0 + i) for i in range(3)]
    rows += [row(i, 0, ALONE, 20.0) for i in range(3)]
    rows += [row(7, 0, ALONE, 1.0)]  # the other's was too short
    (cell,) = summarise(rows)
    assert (cell.method, cell.num_pairs) == ("auto", 3)
    assert cell.ratio == pytest.approx(0.5)
    assert cell.low <= cell.ratio <= cell.high
    assert cell.low == pytest.approx(9 / 20)


def test_nothing_to_compare_is_said() -> None:
    with pytest.raises(ConfigurationError, match="too short"):
        summarise([row(0, 0, ALONE, 20.0)])
