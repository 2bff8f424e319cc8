"""The link's schedule in virtual time: nothing here waits."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.link.profiles import Conditions, Trace
from launch.link.schedule import HEADER_BYTES, JITTER_CUT, Flow, Lane, Packet

MS = 1_000_000
S = 1000 * MS


def constant(
    one_way_ms: float, jitter_ms: float = 0.0, mbps: float | None = None, loss: float = 0.0
) -> Trace:
    return Trace([(0.0, Conditions(one_way_ms, jitter_ms, mbps, loss))])


conditions_drawn = st.builds(
    Conditions,
    one_way_ms=st.sampled_from([0.0, 0.5, 20.0, 150.0]),
    jitter_ms=st.sampled_from([0.0, 3.0]),
    mbps=st.sampled_from([None, 0.5, 20.0]),
    loss=st.sampled_from([0.0, 0.2]),
    outage=st.booleans(),
)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    gaps = draw(st.lists(st.floats(0.001, 0.3), min_size=0, max_size=3))
    starts = [0.0, *(sum(gaps[: n + 1]) for n in range(len(gaps)))]
    steps = [(at_s, draw(conditions_drawn)) for at_s in starts]
    open_again = Conditions(20.0)
    steps.append((starts[-1] + 0.1, open_again))
    period_s = draw(st.none() | st.just(starts[-1] + 0.2))
    return Trace(steps, period_s)


arrivals_drawn = st.lists(
    st.tuples(st.integers(0, 50 * MS), st.integers(0, 2), st.integers(0, 6000)), max_size=30
)
"""Gap since the arrival before, flow, bytes."""


def play(
    trace: Trace, arrivals: list[tuple[int, int, int]], seed: int = 0
) -> list[tuple[int, int, int, list[Packet]]]:
    """What happened: arrival, flow, bytes, packets."""
    lane, flows, now_ns, played = Lane(trace, seed), [Flow(), Flow(), Flow()], 0, []
    for gap_ns, flow, size in arrivals:
        now_ns += gap_ns
        played.append((now_ns, flow, size, lane.send(flows[flow], now_ns, size)))
    return played


@given(traces(), arrivals_drawn)
@settings(max_examples=150, deadline=None)
def test_whatever_the_link_everything_comes_out_in_order_not_early_and_in_no_outage(
    trace: Trace, arrivals: list[tuple[int, int, int]]
) -> None:
    least_ns = round(min(conditions.one_way_ms for _, conditions in trace.steps) * MS)
    last_ns = [0, 0, 0]
    for arrived_ns, flow, size, packets in play(trace, arrivals):
        assert sum(packet.num_bytes for packet in packets) == size
        for packet in packets:
            assert packet.release_ns >= arrived_ns + least_ns
            assert packet.release_ns >= last_ns[flow]
            assert not trace.at(packet.release_ns).outage
            last_ns[flow] = packet.release_ns


@given(traces(), arrivals_drawn, st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_the_same_seed_gives_the_same_releases(
    trace: Trace, arrivals: list[tuple[int, int, int]], seed: int
) -> None:
    assert play(trace, arrivals, seed) == play(trace, arrivals, seed)


@given(
    st.sampled_from([0.5, 20.0, 100.0]), st.sampled_from([0.0, 0.1]), st.sampled_from([0.0, 2.0]),
    arrivals_drawn,
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_no_stretch_of_traffic_is_faster_than_the_line(
    mbps: float, loss: float, jitter_ms: float, arrivals: list[tuple[int, int, int]]
) -> None:
    trace = constant(one_way_ms=10.0, mbps=mbps, loss=loss, jitter_ms=jitter_ms)
    played = play(trace, arrivals)
    for first, (arrived_ns, *_) in enumerate(played):
        num_bytes = 0
        for _, _, size, packets in played[first:]:
            num_bytes += size + HEADER_BYTES  # at least one packet
            line_ns = int(num_bytes * 8 * 1000 / mbps)
            assert packets[-1].release_ns >= arrived_ns + line_ns + 10 * MS


def test_a_constant_link_adds_its_one_way_delay_exactly() -> None:
    lane = Lane(constant(one_way_ms=20.0), 0)
    assert lane.send(Flow(), 5 * MS, 5000) == [Packet(5000, 25 * MS)]


def test_the_line_takes_bits_over_rate_headers_counted_and_connections_share_it() -> None:
    lane = Lane(constant(one_way_ms=20.0, mbps=20.0), 0)  # a full packet takes 0.6 ms
    assert lane.send(Flow(), 0, 1460 + 960) == [
        Packet(1460, 20_600_000),
        Packet(960, 21_000_000),
    ]
    assert lane.send(Flow(), 0, 1460) == [Packet(1460, 21_600_000)]
    assert lane.send(Flow(), 10 * MS, 1460) == [Packet(1460, 30_600_000)]


def test_jitter_is_added_has_the_mean_asked_for_and_a_bound() -> None:
    lane = Lane(constant(one_way_ms=20.0, jitter_ms=4.0), 1)
    added = [lane.send(Flow(), n * S, 100)[0].release_ns - n * S - 20 * MS for n in range(4000)]
    assert min(added) >= 0
    assert max(added) <= JITTER_CUT * 4 * MS
    # An exponential cut off at four times its mean has a mean lower by a factor 1 - e^-4.
    assert statistics.fmean(added) == pytest.approx(3.93 * MS, rel=0.05)


def test_bytes_that_arrive_together_share_their_jitter() -> None:
    lane = Lane(constant(one_way_ms=20.0, jitter_ms=4.0), 1)
    assert all(len(lane.send(Flow(), n * S, 6000)) == 1 for n in range(50))


def test_a_lost_packet_waits_for_timeouts_that_double_and_holds_up_what_follows() -> None:
    lane = Lane(constant(one_way_ms=20.0, loss=0.5), 3)
    waits_ms = [(lane.send(Flow(), n * S, 100)[0].release_ns - n * S) // MS for n in range(200)]
    assert set(waits_ms) >= {20, 20 + 240, 20 + 240 + 480}
    assert set(waits_ms) <= {20 + 240 * (2**lost - 1) for lost in range(7)} | {
        20 + 240 * (2**7 - 1 + 64 * more) for more in range(9)
    }
    assert lane.num_resent >= sum(wait > 20 for wait in waits_ms)

    lane = Lane(constant(one_way_ms=20.0, loss=0.5), 3)
    flow = Flow()
    releases = [lane.send(flow, n * MS, 100)[0].release_ns for n in range(200)]
    assert releases == sorted(releases)
    assert len(set(releases)) < 100  # most waited behind a lost one


def test_the_share_of_lost_packets() -> None:
    lane = Lane(constant(one_way_ms=20.0, loss=0.02), 0)
    for n in range(200):
        lane.send(Flow(), n * S, 1460 * 50)
    assert lane.num_resent == pytest.approx(200, rel=0.2)


def test_an_outage_holds_everything_until_its_end() -> None:
    good, away = Conditions(20.0, mbps=20.0), Conditions(20.0, mbps=20.0, outage=True)
    lane = Lane(Trace([(0.0, good), (0.1, away), (0.5, good)]), 0)
    assert lane.send(Flow(), 50 * MS, 1460)[0].release_ns == 70_600_000
    under_way = lane.send(Flow(), 90 * MS, 1460)[0]
    assert under_way.release_ns == 500 * MS
    in_it = [lane.send(Flow(), at * MS, 1460)[0].release_ns for at in (100, 300, 499)]
    assert in_it == [520_600_000, 521_200_000, 521_800_000]  # the line is free again, one by one
    assert lane.send(Flow(), 600 * MS, 1460)[0].release_ns == 620_600_000


def test_conditions_change_with_the_trace_and_order_is_kept_when_the_way_gets_shorter() -> None:
    trace = Trace([(0.0, Conditions(80.0)), (0.1, Conditions(10.0))], period_s=1.0)
    lane, flow = Lane(trace, 0), Flow()
    assert lane.send(flow, 99 * MS, 1)[0].release_ns == 179 * MS
    assert lane.send(flow, 100 * MS, 1)[0].release_ns == 179 * MS
    assert lane.send(Flow(), 100 * MS, 1)[0].release_ns == 110 * MS
    assert lane.send(flow, 200 * MS, 1)[0].release_ns == 210 * MS
    assert lane.send(flow, 1050 * MS, 1)[0].release_ns == 1130 * MS
