"""Who may connect and listen: CURVE keys, loopback, addresses."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial
from typing import Any

import pytest
import zmq
import zmq.asyncio

import bus.transport.sockets
from bus.protocol.errors import ConfigurationError, InsecureBindError
from bus.transport.sockets import (
    Sockets,
    advertised,
    is_loopback,
)
from tests.bus.wire import (
    LOOPBACK,
    MakeSockets,
    close,
    heard,
    soon,
    strange,
    take,
)

# --- CURVE ------------------------------------------------------------------------------------


def keys() -> dict[str, str]:
    public, secret = zmq.curve_keypair()
    return {"curve_public_key": public.decode(), "curve_secret_key": secret.decode()}


async def test_holders_of_the_key_pair_talk(make_sockets: MakeSockets) -> None:
    pair = keys()
    server, client = make_sockets(**pair), make_sockets(**pair)
    inbox, publisher = server.inbox(LOOPBACK), server.publisher(LOOPBACK)
    client.outbox(inbox.endpoint).send(close(5))
    assert await take(inbox, 1) == [close(5)]
    listener = client.listener(publisher.endpoint, "edge-1")
    assert await heard(lambda: publisher.publish("edge-1", close(6)), listener) == close(6)


async def test_a_peer_that_is_silent_for_longer_than_a_heartbeat_ends_nobody(
    make_sockets: MakeSockets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With CURVE, libzmq reports such a peer as input although there is nothing to receive."""
    monkeypatch.setattr(bus.transport.sockets, "HEARTBEAT_MS", 50)
    pair = keys()
    inbox = make_sockets(**pair).inbox(LOOPBACK)
    outbox = make_sockets(**pair).outbox(inbox.endpoint)
    waiting = asyncio.ensure_future(take(inbox, 1))
    await asyncio.sleep(0.5)
    outbox.send(close(8))
    assert await waiting == [close(8)]


async def refused_on(server: Sockets, endpoint: str, client: Sockets) -> Counter[str]:
    """Send from `client`, wait until libzmq has told it what it thinks of that."""
    outbox = client.outbox(endpoint)
    monitor: Any = outbox._socket.get_monitor_socket(
        zmq.EVENT_HANDSHAKE_FAILED_AUTH
        | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        | zmq.EVENT_HANDSHAKE_SUCCEEDED
        | zmq.EVENT_DISCONNECTED
    )
    outbox.send(close(666))
    event = int.from_bytes((await soon(monitor.recv_multipart()))[0][:2], "little")
    assert event != zmq.EVENT_HANDSHAKE_SUCCEEDED
    return server.counters


@pytest.mark.parametrize("kind", ["other keys", "no keys", "right server key only"])
async def test_nobody_else_is_let_in(make_sockets: MakeSockets, kind: str) -> None:
    pair = keys()
    server, honest = make_sockets(**pair), make_sockets(**pair)
    inbox = server.inbox(LOOPBACK)
    if kind == "right server key only":
        with strange(zmq.PUSH) as stranger:
            public, secret = zmq.curve_keypair()
            stranger.curve_serverkey = pair["curve_public_key"].encode()
            stranger.curve_publickey, stranger.curve_secretkey = public, secret
            monitor = stranger.get_monitor_socket(
                zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_SUCCEEDED
            )
            stranger.connect(inbox.endpoint)
            event = int.from_bytes((await soon(monitor.recv_multipart()))[0][:2], "little")
            assert event == zmq.EVENT_HANDSHAKE_FAILED_AUTH
            stranger.disable_monitor()
    else:
        stranger_sockets = make_sockets(**(keys() if kind == "other keys" else {}))
        await refused_on(server, inbox.endpoint, stranger_sockets)
    honest.outbox(inbox.endpoint).send(close(5))
    assert await take(inbox, 1) == [close(5)]


async def test_a_listener_without_keys_hears_nothing(make_sockets: MakeSockets) -> None:
    pair = keys()
    server, honest, stranger = make_sockets(**pair), make_sockets(**pair), make_sockets()
    publisher = server.publisher(LOOPBACK)
    eavesdropper = stranger.listener(publisher.endpoint, "edge-1")
    listener = honest.listener(publisher.endpoint, "edge-1")
    stolen = asyncio.ensure_future(take(eavesdropper, 1))
    for number in range(20):
        await heard(partial(publisher.publish, "edge-1", close(number)), listener)
    assert not stolen.done()
    stolen.cancel()


# --- binding ----------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["tcp://0.0.0.0:*", "tcp://*:*", "tcp://[::]:*"])
async def test_beyond_loopback_only_with_keys_or_leave(
    make_sockets: MakeSockets, endpoint: str
) -> None:
    bare = make_sockets()
    for bind in (bare.inbox, bare.publisher):
        with pytest.raises(InsecureBindError, match="E2SCI_INSECURE=1"):
            bind(endpoint)
    if "::" not in endpoint:  # the machine may have no IPv6
        make_sockets(insecure=True).inbox(endpoint)
        make_sockets(**keys()).publisher(endpoint)


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("tcp://127.0.0.1:5555", True),
        ("tcp://127.9.9.9:*", True),
        ("tcp://[::1]:5555", True),
        ("tcp://localhost:5555", True),
        ("ipc:///tmp/socket", True),
        ("inproc://name", True),
        ("tcp://0.0.0.0:5555", False),
        ("tcp://*:5555", False),
        ("tcp://[::]:5555", False),
        ("tcp://10.0.0.7:5555", False),
        ("tcp://localhost.evil.org:5555", False),
        ("tcp://eth0:5555", False),
        ("udp://127.0.0.1:5555", False),
    ],
)
def test_what_counts_as_loopback(endpoint: str, expected: bool) -> None:
    assert is_loopback(endpoint) is expected


async def test_an_address_in_use_and_nonsense_are_configuration_errors(sockets: Sockets) -> None:
    inbox = sockets.inbox(LOOPBACK)
    with pytest.raises(ConfigurationError, match="cannot listen on"):
        sockets.inbox(inbox.endpoint)
    for endpoint in ("tcp://127.0.0.1:port", "nonsense"):
        with pytest.raises(ConfigurationError, match="cannot connect to"):
            sockets.outbox(endpoint)
        with pytest.raises(ConfigurationError, match="cannot connect to"):
            sockets.listener(endpoint, "edge-1")


def test_others_reach_the_bound_port_under_the_advertised_host() -> None:
    assert advertised("tcp://0.0.0.0:5555", "cloud.lan") == "tcp://cloud.lan:5555"
    assert advertised("tcp://[::]:5555", "10.0.0.7") == "tcp://10.0.0.7:5555"
    assert advertised("tcp://127.0.0.1:5555", "127.0.0.1", 6666) == "tcp://127.0.0.1:6666"


async def test_the_real_port_is_known(sockets: Sockets) -> None:
    for endpoint in (sockets.inbox(LOOPBACK).endpoint, sockets.publisher(LOOPBACK).endpoint):
        assert int(endpoint.rpartition(":")[2]) > 0
