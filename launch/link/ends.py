"""One socket of a relayed connection: reads with the time of arrival, writes that never wait."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Callable

__all__ = ["End", "stamp_arrivals"]

READ_BYTES = 2**18
SO_TIMESTAMPNS = 35
"""Linux: reads tell when the kernel received the bytes. Python has no name for it."""
_TIMESPEC = struct.Struct("@qq")
_ANCILLARY_BYTES = socket.CMSG_SPACE(_TIMESPEC.size)


def stamp_arrivals(sock: socket.socket) -> None:
    """Have the kernel note when bytes arrive."""
    sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)


class End:
    """A connected TCP socket, or one about to be.

    Args:
        on_sent: called when bytes that had to wait for the peer have been sent.
    """

    def __init__(self, sock: socket.socket, on_sent: Callable[[], None]) -> None:
        self.broken = False
        """The connection was reset, or never came about."""
        self._sock = sock
        self._on_sent = on_sent
        self._loop = asyncio.get_running_loop()
        self._unsent = bytearray()
        self._on_end: Callable[[], None] | None = None
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stamp_arrivals(sock)

    @property
    def num_unsent(self) -> int:
        """Bytes that wait for the peer to make room."""
        return len(self._unsent)

    def resume(self, on_readable: Callable[[], None]) -> None:
        """Have `on_readable` called whenever `read` may have something."""
        self._loop.add_reader(self._sock, on_readable)

    def pause(self) -> None:
        """Leave what arrives with the kernel."""
        self._loop.remove_reader(self._sock)

    def read(self) -> tuple[bytes, int] | None:
        """What has arrived and when (monotonic ns); no bytes: the end. None: nothing yet."""
        try:
            data, ancillary, _, _ = self._sock.recvmsg(READ_BYTES, _ANCILLARY_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            self.broken = True
            return b"", time.monotonic_ns()
        return data, _arrived_ns(ancillary)

    def write(self, data: bytes) -> None:
        """Send, or keep what the peer has no room for; after a reset it is lost."""
        if not self._unsent:
            data = data[self._send(data) :]
            if not data:
                return
            self._loop.add_writer(self._sock, self._flush)
        self._unsent += data

    def end(self, on_end: Callable[[], None]) -> None:
        """Tell the peer that no more follows, once all is sent; then call `on_end`."""
        self._on_end = on_end
        if not self._unsent:
            self._shut_down()

    def close(self) -> None:
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()

    def _send(self, data: bytes | bytearray) -> int:
        if self.broken:
            return len(data)
        try:
            return self._sock.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            self.broken = True
            return len(data)

    def _flush(self) -> None:
        del self._unsent[: self._send(self._unsent)]
        if not self._unsent:
            self._loop.remove_writer(self._sock)
            if self._on_end is not None:
                self._shut_down()
                return
        self._on_sent()

    def _shut_down(self) -> None:
        assert self._on_end is not None
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:  # there is nobody left to tell
            self.broken = True
        self._on_end()


def _arrived_ns(ancillary: list[tuple[int, int, bytes]]) -> int:
    """The kernel's time stamp on the monotonic clock; now, where it gave none."""
    now_ns = time.monotonic_ns()
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPNS) and len(data) == _TIMESPEC.size:
            seconds, nanoseconds = _TIMESPEC.unpack(data)
            ago_ns: int = time.time_ns() - (seconds * 1_000_000_000 + nanoseconds)
            return now_ns - max(ago_ns, 0)
    return now_ns
