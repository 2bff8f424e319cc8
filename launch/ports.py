"""Free TCP ports on loopback that two of our processes never choose at the same time.

Testing a port by binding it and letting it go again leaves a gap until the server listens there;
the claim covers that gap among processes of this project.
"""

from __future__ import annotations

import random
import socket
import sys
from typing import TYPE_CHECKING

from bus.protocol.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable

_SERVER_PORTS = range(20_000, 32_000)
"""Below Linux' ephemeral ports: a client's own connection can never sit on the port of a server
that is being restarted."""
_ATTEMPTS = 100


class PortClaim:
    """A free port, ours until `close` (or until this process ends, however it ends)."""

    def __init__(self, port: int, token: socket.socket | None) -> None:
        self.port = port
        self._token = token

    def close(self) -> None:
        if self._token is not None:
            self._token.close()


def claim_port(first: int | None = None) -> PortClaim:
    """A free port on 127.0.0.1: `first` or the next free one after it, or any when None.

    Raises:
        ConfigurationError: none of a hundred ports is free.
    """
    for port in _candidates(first):
        token = _claim(port)
        if token is None and _has_abstract_sockets():
            continue
        if is_free(port):
            return PortClaim(port, token)
        if token is not None:
            token.close()
    wanted = "" if first is None else f" from {first} on"
    raise ConfigurationError(
        f"none of {_ATTEMPTS} ports{wanted} is free on 127.0.0.1; stop what listens there"
    )


def _candidates(first: int | None) -> Iterable[int]:
    if first is None:
        return random.sample(_SERVER_PORTS, _ATTEMPTS)
    return range(first, min(first + _ATTEMPTS, 2**16))


def _has_abstract_sockets() -> bool:
    return sys.platform == "linux"


def _claim(port: int) -> socket.socket | None:
    """An abstract Unix socket named after the port: exclusive, without a file, gone with us, and
    of the same network namespace as the port. None where it is taken or there are none."""
    if not _has_abstract_sockets():
        return None
    token = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        token.bind(f"\0e2sci-port-{port}")
    except OSError:
        token.close()
        return None
    return token


def is_free(port: int) -> bool:
    """Whether a server could listen on this port of 127.0.0.1 now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As the servers do it: connections of an earlier server in TIME_WAIT are no hindrance.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
