"""When each packet comes out at the other end of the link: pure, in whole nanoseconds.

Bytes that arrive are cut into packets. A packet of one direction goes through

    arrival ─► queue for the line ─► on the line ─► under way ─► in order ─► out
               until it is free      size ÷ rate    one way +    not before
               and no outage                        jitter +     the one ahead
                                                    resending    nor in an outage

The line is shared by all connections of a direction; order is kept within a connection, since
TCP hands its bytes over in order. This module knows no clock, no sockets and no global random
numbers: the same arrivals and the same seed give the same releases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from launch.link.profiles import NS_PER_MS, Conditions, Trace

__all__ = ["MAX_SEGMENT_BYTES", "Flow", "Lane", "Packet"]

MAX_SEGMENT_BYTES = 1460
"""Payload of a full Ethernet packet of TCP over IPv4."""
HEADER_BYTES = 40
MIN_RTO_MS = 200
"""Linux' TCP_RTO_MIN. It waits for the smoothed round trip plus this before it sends a lone packet
again; windows and feedback are too few packets for the duplicate ACKs of a fast retransmission."""
MAX_BACKOFF = 6
JITTER_CUT = 4


@dataclass(slots=True)
class Flow:
    """One direction of one connection: when its last packet comes out."""

    last_release_ns: int = 0


@dataclass(frozen=True, slots=True)
class Packet:
    """Bytes that come out together."""

    num_bytes: int
    release_ns: int


class Lane:
    """One direction of a link.

    Args:
        trace: the conditions over time.
        seed: fixes jitter and loss.
    """

    def __init__(self, trace: Trace, seed: int | str) -> None:
        self.num_resent = 0
        """Packets lost so far, each counted as often as it was lost."""
        self._trace = trace
        self._random = Random(seed)
        self._free_ns = 0

    def send(self, flow: Flow, arrived_ns: int, num_bytes: int) -> list[Packet]:
        """When the bytes that arrived together come out, packet by packet.

        They share one draw of jitter, as a burst shares one slot of a radio's schedule; loss is
        drawn for each packet. Packets that come out at the same time are one `Packet`.

        Args:
            num_bytes: payload; 0 is a packet without any, such as a SYN or FIN.
        """
        jitter_ns = self._jitter_ns(self._trace.at(self._trace.open_from(arrived_ns)))
        packets: list[Packet] = []
        for size in _segments(num_bytes):
            release_ns = self._release_ns(flow, arrived_ns, size, jitter_ns)
            if packets and packets[-1].release_ns == release_ns:
                packets[-1] = Packet(packets[-1].num_bytes + size, release_ns)
            else:
                packets.append(Packet(size, release_ns))
        return packets

    def _release_ns(self, flow: Flow, arrived_ns: int, size: int, jitter_ns: int) -> int:
        start_ns = self._trace.open_from(max(arrived_ns, self._free_ns))
        conditions = self._trace.at(start_ns)
        self._free_ns = start_ns + _line_ns(conditions, size)
        way_ns = round(conditions.one_way_ms * NS_PER_MS) + jitter_ns + self._resend_ns(conditions)
        release_ns = max(self._free_ns + way_ns, flow.last_release_ns)
        flow.last_release_ns = self._trace.open_from(release_ns)
        return flow.last_release_ns

    def _jitter_ns(self, conditions: Conditions) -> int:
        if not conditions.jitter_ms:
            return 0
        drawn_ms = self._random.expovariate(1 / conditions.jitter_ms)
        return round(min(drawn_ms, JITTER_CUT * conditions.jitter_ms) * NS_PER_MS)

    def _resend_ns(self, conditions: Conditions) -> int:
        """What it costs that a packet is lost, perhaps again and again: timeouts that double."""
        rto_ns = round((2 * conditions.one_way_ms + MIN_RTO_MS) * NS_PER_MS)
        total_ns = num_lost = 0
        while conditions.loss and self._random.random() < conditions.loss:
            total_ns += rto_ns << min(num_lost, MAX_BACKOFF)
            num_lost += 1
        self.num_resent += num_lost
        return total_ns


def _segments(num_bytes: int) -> list[int]:
    full, rest = divmod(num_bytes, MAX_SEGMENT_BYTES)
    return [MAX_SEGMENT_BYTES] * full + ([rest] if rest or not full else [])


def _line_ns(conditions: Conditions, size: int) -> int:
    """How long a packet takes the line."""
    if conditions.mbps is None:
        return 0
    return math.ceil((size + HEADER_BYTES) * 8 * 1000 / conditions.mbps)
