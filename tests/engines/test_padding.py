"""Least times by the length of a pass, and the counts of passes that overran."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.protocol.errors import ConfigurationError
from engines.padding import NO_PADDING, LeastTimes, Padding, Tally, read_tally

POINTS = "1:130,2:135,4:150,8:190,16:300"


def test_one_number_holds_for_passes_of_any_length() -> None:
    least = LeastTimes.parse("130")
    assert [least.of(n) for n in (1, 7, 300)] == [130.0, 130.0, 130.0]
    assert not LeastTimes.parse("0")
    assert LeastTimes.parse("0") == NO_PADDING
    assert NO_PADDING.of(5) == 0.0


@pytest.mark.parametrize(
    ("num_tokens", "ms"),
    [(1, 130), (2, 135), (3, 142.5), (4, 150), (6, 170), (8, 190), (12, 245), (16, 300), (24, 410)],
)
def test_times_are_linear_between_points_and_go_on_with_the_last_slope(
    num_tokens: int, ms: float
) -> None:
    assert LeastTimes.parse(POINTS).of(num_tokens) == pytest.approx(ms)


def test_before_the_first_point_times_are_constant_and_beyond_the_last_never_shorter() -> None:
    least = LeastTimes.parse("4:50,8:40")
    assert least.of(1) == 50.0
    assert least.of(6) == pytest.approx(45.0)
    assert least.of(100) == 40.0


@given(
    st.lists(
        st.tuples(st.integers(1, 512), st.integers(0, 100_000).map(lambda n: n / 10)),
        min_size=1, max_size=6, unique_by=lambda point: point[0],
    )
)  # fmt: skip
def test_what_is_written_reads_the_same(points: list[tuple[int, float]]) -> None:
    least = LeastTimes(tuple(sorted(points)))
    again = LeastTimes.parse(str(least))
    assert [again.of(n) for n in range(1, 600, 7)] == [least.of(n) for n in range(1, 600, 7)]


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "1:2,1:3", "2:1,1:3", "0:5", "1:2,3", "60001", "nan"]
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="expected ms such as 130, or TOKENS:MS"):
        LeastTimes.parse(text)


def test_passes_last_their_least_time_and_overruns_are_counted(tmp_path: Path) -> None:
    """Not how long exactly; a pass that began long ago has overrun."""
    path = tmp_path / "counts"
    assert read_tally(path) == Tally()
    padding = Padding(LeastTimes.parse("1:1,2:30"), path)
    began = time.perf_counter()
    padding.wait(began, 2)
    assert time.perf_counter() - began >= 0.03
    padding.wait(began - 100.0, 2)
    tally = read_tally(path)
    assert (tally.count, tally.long) == (2, 1)
    assert tally.least_s == pytest.approx(0.06)
    assert tally.excess_s >= 99.9
    Padding(LeastTimes.parse("1"), path).wait(began - 100.0)  # a worker that was restarted
    again = read_tally(path) - tally
    assert (again.count, again.long) == (1, 1)
    assert tally + again == read_tally(path)


def test_without_padding_nothing_is_counted(tmp_path: Path) -> None:
    Padding(NO_PADDING, tmp_path / "counts").wait(time.perf_counter() - 1.0)
    assert not (tmp_path / "counts").exists()
