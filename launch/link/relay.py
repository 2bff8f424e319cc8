"""The link at work: TCP connections that are passed on.

Every connection to a listening address becomes one to the address behind it, and bytes pass
unchanged and in order, so ZeroMQ's handshake, CURVE and heartbeats do too. What happens to a
connection travels as its bytes do: connecting costs TCP's three packets, and an end, or that
nobody listens behind, reaches the other side a way later.

This module does not know what the bytes mean, nor when they come out.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable

from bus.protocol.errors import ConfigurationError
from launch.link.accuracy import Lateness, LinkReport
from launch.link.ends import End, stamp_arrivals
from launch.link.profiles import Trace
from launch.link.schedule import Lane
from launch.link.streams import Direction, Stream

__all__ = ["Address", "Relay"]

log = logging.getLogger(__name__)

Address = tuple[str, int]


class Relay:
    """All connections of one link; runs on `streams.new_event_loop`.

    Args:
        trace: its conditions; time 0 is the first connection.
        seed: fixes jitter and loss.
    """

    def __init__(self, trace: Trace, seed: int) -> None:
        self._lateness = Lateness()
        self._up = Direction(Lane(trace, f"{seed}/up"), self._lateness)
        self._down = Direction(Lane(trace, f"{seed}/down"), self._lateness)
        self._num_connections = 0
        self._listeners: list[socket.socket] = []
        self._connections: set[Connection] = set()

    def listen(self, address: Address, to: Address) -> Address:
        """Pass connections to `address` (port 0: any free one) on to `to`; the address in use.

        Raises:
            ConfigurationError: nobody may listen there.
        """
        try:
            listener = socket.create_server(address, backlog=128)
        except OSError as error:
            raise ConfigurationError(
                f"the link cannot listen on {address[0]}:{address[1]}: {error.strerror}"
            ) from error
        listener.setblocking(False)
        stamp_arrivals(listener)  # already now, since the kernel takes a moment to begin with it
        self._listeners.append(listener)
        asyncio.get_running_loop().add_reader(listener, self._accept, listener, to)
        host, port = listener.getsockname()[:2]
        return host, port

    def close(self) -> None:
        """Stop listening and drop every connection."""
        for listener in self._listeners:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()
        for connection in list(self._connections):
            connection.close()

    def report(self, realtime: bool) -> LinkReport:
        """What it has done so far."""
        median_ms, p99_ms, max_ms = self._lateness.summary_ms()
        return LinkReport(
            connections=self._num_connections,
            bytes_up=self._up.num_bytes,
            bytes_down=self._down.num_bytes,
            releases=self._lateness.count,
            resent=self._up.lane.num_resent + self._down.lane.num_resent,
            late_median_ms=median_ms,
            late_p99_ms=p99_ms,
            late_max_ms=max_ms,
            realtime=realtime,
        )

    def _accept(self, listener: socket.socket, to: Address) -> None:
        try:
            client, _ = listener.accept()
        except OSError as error:  # it has gone again, or there are too many
            log.warning("a connection was not accepted: %s", error.strerror)
            return
        if not self._num_connections:
            self._up.origin_ns = self._down.origin_ns = time.monotonic_ns()
        self._num_connections += 1
        connection = Connection(client, to, self._up, self._down, self._connections.discard)
        self._connections.add(connection)
        connection.begin()


class Connection:
    """A client's connection and the one behind the link that belongs to it.

    Args:
        client: the accepted socket.
        to: where it leads.
        on_close: told once nothing of it is left.
    """

    def __init__(
        self,
        client: socket.socket,
        to: Address,
        up: Direction,
        down: Direction,
        on_close: Callable[[Connection], None],
    ) -> None:
        self._to = to
        self._on_close = on_close
        self._up = Stream(up, self._client_ended)
        self._down = Stream(down, self._server_ended)
        self._client = End(client, self._down.make_room)
        self._server: End | None = None
        self._down.sink = self._client
        self._num_ended = 0

    def begin(self) -> None:
        """Shake hands: SYN, its answer, and the ACK that lets the server know of us."""
        self._up.signal(lambda: self._down.signal(self._answered))

    def close(self) -> None:
        """Drop both sockets and what is under way."""
        for stream in (self._up, self._down):
            stream.close()
        for end in (self._client, self._server):
            if end is not None:
                end.close()
        self._on_close(self)

    def _answered(self) -> None:
        self._up.signal(self._connect)
        self._up.read_from(self._client)

    def _connect(self) -> None:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._server = End(sock, self._up.make_room)
        self._up.sink = self._server
        # Where it fails, now or later, reading says so.
        sock.connect_ex(self._to)
        self._down.read_from(self._server)

    def _client_ended(self, was_reset: bool) -> None:
        assert self._server is not None  # the ACK came out before
        self._pass_end_to(self._server, was_reset)

    def _server_ended(self, was_reset: bool) -> None:
        self._pass_end_to(self._client, was_reset)

    def _pass_end_to(self, end: End, was_reset: bool) -> None:
        if was_reset:
            self.close()
        else:
            end.end(self._ended)

    def _ended(self) -> None:
        self._num_ended += 1
        if self._num_ended == 2:
            self.close()
