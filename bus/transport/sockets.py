"""ZeroMQ sockets that carry messages of `bus.protocol.messages`, and nothing else.

    Inbox      PULL, binds        cloud: windows · controller: reports
    Outbox     PUSH, connects     edge → cloud · cloud → controller
    Publisher  PUB,  binds        cloud: feedback · controller: updates; topic "<edge>/"
    Listener   SUB,  connects     edge ← cloud · edge, cloud ← controller

Sends never wait: where a queue is full the message is dropped and counted, and the state machines
repeat what matters. Frames over `MAX_FRAME_BYTES` are cut off by libzmq, which drops the peer's
connection; a socket monitor counts that. What arrives and is not a message is counted and logged: a
PULL socket does not know the sender, and lives on.

With CURVE keys every socket is encrypted, and servers admit only peers that hold the same key
pair. Without keys a server refuses to bind beyond loopback, unless told that the network is
private. This module does not know sessions.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import zmq
import zmq.asyncio
import zmq.auth.asyncio

from bus.protocol.codec import MAX_FRAME_BYTES, AnyMessage, decode, encode
from bus.protocol.errors import ConfigurationError, DecodeError, InsecureBindError
from bus.protocol.messages import Message
from bus.settings import BusSettings

log = logging.getLogger(__name__)

HIGH_WATER_MARK = 1000
LINGER_MS = 200
HEARTBEAT_MS = 2000

EVERYBODY = "*"
"""Topic all edges hear. A window of an unknown session does not say whose it is; its owner does."""

AnyReceiver = TypeVar("AnyReceiver", "Inbox", "Listener")
Handler = Callable[[AnyMessage, int], None]
OnFailure = Callable[[AnyMessage, Exception], None]

_BURST = 64
"""Messages taken from a socket before the event loop does something else."""


PlainSocket = zmq.Socket[bytes]
"""Not zmq.asyncio's: its futures cost a quarter of a window's time outside the models."""


class Traffic:
    """Bytes of frames that have been sent and received, topics included."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.sent = 0
        self.received = 0

    def add_sent(self, num_bytes: int) -> None:
        """From any thread; `received` is the event loop's alone."""
        with self._lock:
            self.sent += num_bytes


class Sockets:
    """All sockets of one process: one context, one security policy, one set of counters.

    `counters` holds `bad_frames`, `failed_messages`, `dropped_sends` and `disconnects`; workers
    publish it. `traffic` counts bytes.
    """

    def __init__(self, settings: BusSettings) -> None:
        self.counters: Counter[str] = Counter()
        self.traffic = Traffic()
        self._settings = settings
        self._context = zmq.asyncio.Context()
        self._auth: zmq.auth.asyncio.AsyncioAuthenticator | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._receivers: list[Inbox | Listener] = []

    def inbox(self, endpoint: str) -> Inbox:
        """A PULL socket bound to `endpoint` ("tcp://127.0.0.1:*" takes a free port).

        Raises:
            InsecureBindError, ConfigurationError: see `_bind`.
        """
        socket = self._socket(zmq.PULL)
        self._bind(socket, endpoint)
        self._count_disconnects(socket)
        return self._kept(Inbox(socket, self.counters, self.traffic))

    def publisher(self, endpoint: str) -> Publisher:
        """A PUB socket bound to `endpoint`. Raises as `inbox`."""
        socket = self._socket(zmq.PUB)
        self._bind(socket, endpoint)
        return Publisher(socket, self.counters, self.traffic)

    def outbox(self, endpoint: str) -> Outbox:
        """A PUSH socket connected to `endpoint`."""
        socket = self._socket(zmq.PUSH)
        self._connect(socket, endpoint)
        return Outbox(socket, self.counters, self.traffic)

    def listener(self, endpoint: str, edge: str) -> Listener:
        """A SUB socket connected to `endpoint`, for messages to `edge` and to everybody."""
        socket = self._socket(zmq.SUB)
        socket.setsockopt(zmq.SUBSCRIBE, topic_of(edge))
        socket.setsockopt(zmq.SUBSCRIBE, topic_of(EVERYBODY))
        self._connect(socket, endpoint)
        return self._kept(Listener(socket, self.counters, self.traffic))

    def close(self) -> None:
        """Close all sockets; unsent messages get `LINGER_MS`."""
        for task in self._tasks:
            task.cancel()
        for receiver in self._receivers:
            receiver.close()
        if self._auth is not None:
            self._auth.stop()
        self._context.destroy(linger=LINGER_MS)

    def _kept(self, receiver: AnyReceiver) -> AnyReceiver:
        self._receivers = [kept for kept in self._receivers if not kept.closed]
        self._receivers.append(receiver)
        return receiver

    def _socket(self, kind: int) -> PlainSocket:
        context: zmq.Context[Any] = self._context
        socket: PlainSocket = context.socket(kind, socket_class=zmq.Socket)
        socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        socket.setsockopt(zmq.LINGER, LINGER_MS)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        socket.setsockopt(zmq.RECONNECT_IVL, 50)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 3 * HEARTBEAT_MS)
        socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        return socket

    def _bind(self, socket: PlainSocket, endpoint: str) -> None:
        if self._settings.curve_public_key:
            self._serve_curve(socket)
        elif not (self._settings.insecure or is_loopback(endpoint)):
            raise InsecureBindError(
                f"{endpoint} is reachable from other machines and no CURVE keys are set; set "
                "E2SCI_CURVE_PUBLIC_KEY and E2SCI_CURVE_SECRET_KEY, or E2SCI_INSECURE=1 on a "
                "private network"
            )
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise ConfigurationError(f"cannot listen on {endpoint}: {error}") from error

    def _serve_curve(self, socket: PlainSocket) -> None:
        public, secret = self._settings.curve_public_key, self._settings.curve_secret_key
        assert public is not None
        assert secret is not None
        if self._auth is None:
            self._auth = zmq.auth.asyncio.AsyncioAuthenticator(self._context)
            self._auth.start()
            self._auth.configure_curve_callback("*", _OnlyKey(public))
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, public.encode())
        socket.setsockopt(zmq.CURVE_SECRETKEY, secret.encode())

    def _connect(self, socket: PlainSocket, endpoint: str) -> None:
        public, secret = self._settings.curve_public_key, self._settings.curve_secret_key
        if public is not None and secret is not None:
            socket.setsockopt(zmq.CURVE_SERVERKEY, public.encode())
            socket.setsockopt(zmq.CURVE_PUBLICKEY, public.encode())
            socket.setsockopt(zmq.CURVE_SECRETKEY, secret.encode())
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            socket.close()
            raise ConfigurationError(f"cannot connect to {endpoint!r}: {error}") from error

    def _count_disconnects(self, socket: PlainSocket) -> None:
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        task = asyncio.get_running_loop().create_task(self._watch(monitor))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch(self, monitor: Any) -> None:
        while True:
            await monitor.recv_multipart()
            self.counters["disconnects"] += 1


class _OnlyKey:
    """Admits the holders of one CURVE key pair; pyzmq hands over the client's key as Z85."""

    def __init__(self, public_key: str) -> None:
        self._public_key = public_key.encode()

    def callback(self, _domain: str, key: bytes) -> bool:
        return key == self._public_key


def is_loopback(endpoint: str) -> bool:
    """Whether `endpoint` can be reached from this machine only."""
    transport, _, address = endpoint.partition("://")
    if transport != "tcp":
        return transport in ("ipc", "inproc")
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def advertised(bound: str, host: str, port: int = 0) -> str:
    """The bound endpoint as others reach it: on `host`, at `port` or, where 0, the same port."""
    return f"tcp://{host}:{port or bound.rpartition(':')[2]}"


class _Receiver:
    """What Inbox and Listener share: valid messages, as they come."""

    def __init__(self, socket: PlainSocket, counters: Counter[str], traffic: Traffic) -> None:
        self._socket = socket
        self._counters = counters
        self._traffic = traffic
        self._loop = asyncio.get_running_loop()
        self._file = int(socket.getsockopt(zmq.FD))

    @property
    def endpoint(self) -> str:
        """The endpoint in use, with the real port."""
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    async def deliver(self, handle: Handler, failed: OnFailure | None = None) -> None:
        """Call `handle` with every message and the size of its frame in bytes, until cancelled.

        It is called from the loop's reader: to wake a task first takes longer than to decode. What
        it raises is logged and counted, `failed` gets it, and delivery goes on: many sessions share
        a socket, and what one of them does must not silence the others.

        Raises:
            Exception: what `failed` raises, or the socket itself.
        """
        over: asyncio.Future[None] = self._loop.create_future()

        def drain() -> None:
            if over.done() or self.closed:
                return
            try:
                if self._take(handle, failed):
                    self._loop.call_soon(drain)
            except Exception as error:  # noqa: BLE001 - raised where `deliver` is awaited
                over.set_exception(error)

        self._loop.add_reader(self._file, drain)
        drain()  # the descriptor tells of changes only: what came before is waiting
        try:
            await over
        finally:
            if not self.closed:
                self._loop.remove_reader(self._file)

    def _take(self, handle: Handler, failed: OnFailure | None) -> bool:
        """Handle what has come, up to a burst; whether more may be there."""
        for _ in range(_BURST):
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:  # the descriptor tells of commands too, not of messages alone
                return False
            self._traffic.received += sum(map(len, parts))
            for frame in self._frames(parts):
                try:
                    message = decode(frame)
                except DecodeError as error:
                    self._counters["bad_frames"] += 1
                    log.warning("refused a frame of %d bytes: %s", len(frame), error)
                    continue
                try:
                    handle(message, len(frame))
                except Exception as error:
                    self._counters["failed_messages"] += 1
                    log.exception("a %s could not be handled", type(message).__name__)
                    if failed is not None:
                        failed(message, error)
        return True

    def _frames(self, parts: list[bytes]) -> list[bytes]:
        """Those that hold messages."""
        return parts[-1:]

    @property
    def closed(self) -> bool:
        return self._socket.closed

    def close(self) -> None:
        if not self.closed:
            self._loop.remove_reader(self._file)
            self._socket.close()


class Inbox(_Receiver):
    """PULL: messages from many peers."""


class Listener(_Receiver):
    """SUB: messages published under one topic; those published together are handled together."""

    def _frames(self, parts: list[bytes]) -> list[bytes]:
        return parts[1:]


class _Sender:
    """What Outbox and Publisher share: sends that never wait."""

    def __init__(self, socket: PlainSocket, counters: Counter[str], traffic: Traffic) -> None:
        self._socket = socket
        self._counters = counters
        self._traffic = traffic

    @property
    def endpoint(self) -> str:
        """The endpoint in use, with the real port."""
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def _send(self, parts: list[bytes]) -> None:
        if self._socket.closed:  # sessions share a peer; another may have given it up
            self._counters["dropped_sends"] += 1
            return
        try:
            self._socket.send_multipart(parts, zmq.NOBLOCK)
        except zmq.Again:
            self._counters["dropped_sends"] += 1
        else:
            self._traffic.add_sent(sum(map(len, parts)))

    def close(self) -> None:
        self._socket.close(LINGER_MS)


class Outbox(_Sender):
    """PUSH to one peer."""

    def send(self, message: Message) -> int:
        """Queue `message`, or drop and count it; returns the size of its frame in bytes.

        Raises:
            MessageTooLargeError: see `bus.protocol.codec.encode`.
        """
        frame = encode(message)
        self._send([frame])
        return len(frame)


class Publisher(_Sender):
    """PUB to all who listen to a topic, from any thread: one at a time (libzmq asks for a full
    memory barrier between two threads that use a socket, which a lock is)."""

    def __init__(self, socket: PlainSocket, counters: Counter[str], traffic: Traffic) -> None:
        super().__init__(socket, counters, traffic)
        self._lock = threading.Lock()

    def publish(self, edge: str, *messages: Message) -> None:
        """Publish to one edge: `[topic, message, …]`, which arrive together. Raises as
        `Outbox.send`."""
        parts = [topic_of(edge), *map(encode, messages)]
        with self._lock:
            self._send(parts)

    def close(self) -> None:
        with self._lock:
            super().close()


def topic_of(edge: str) -> bytes:
    """The edge's topic. It ends in a slash, so that edge-1 is no prefix of edge-10."""
    return f"{edge}/".encode()
