from __future__ import annotations

import socket

import pytest

from bus.protocol.errors import ConfigurationError
from launch import ports
from launch.ports import claim_port


def test_a_claimed_port_is_not_given_twice_and_can_be_listened_on() -> None:
    one = claim_port()
    two = claim_port(one.port)
    assert two.port == one.port + 1 or two.port > one.port
    with socket.create_server(("127.0.0.1", one.port)):
        pass
    one.close()
    two.close()
    again = claim_port(one.port)
    assert again.port == one.port
    again.close()


def test_a_port_somebody_listens_on_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        claim = claim_port(taken)
        assert claim.port > taken
        claim.close()
        monkeypatch.setattr(ports, "_ATTEMPTS", 1)
        with pytest.raises(ConfigurationError, match=f"from {taken} on"):
            claim_port(taken)
