"""The gateway as a process: `python -m gateway [--host ADDRESS] [--port PORT] …`."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn
import uvloop

from bus.protocol.errors import ConfigurationError, E2SCIError
from bus.runtime.logs import configure_logging
from gateway.app import build_app
from gateway.connections import bounded, close_dead
from gateway.settings import GatewaySettings

log = logging.getLogger("gateway")

_BACKLOG = 2048
_KEEP_ALIVE_S = 75


class _Server(uvicorn.Server):
    """uvicorn, which leaves with status 0 after a signal; a second one ends it at once."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._leave)
        yield

    def _leave(self) -> None:
        if self.should_exit:
            os._exit(130)
        log.info("leaving: open answers may finish, a second signal ends it at once")
        self.should_exit = True


async def serve(settings: GatewaySettings) -> None:
    """Listen and answer until a signal comes.

    Raises:
        ConfigurationError: a key or an address is missing or wrong.
        E2SCIError: the port is taken.
    """
    settings.check_binding()
    app = build_app(settings)
    listener = _listen(settings.host, settings.port)
    close_dead(listener, settings.client_timeout_s)
    gc.collect()
    gc.freeze()  # imports live as long as the process: nothing to look through there
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        http=bounded(settings.client_timeout_s),
        ws="none",
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(settings.drain_s),
    )
    host, port = listener.getsockname()[:2]
    log.info("OpenAI API at http://%s:%d/v1", f"[{host}]" if ":" in host else host, port)
    await _Server(config).serve(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        raise E2SCIError(
            f"the gateway cannot listen on {host}, port {port}: {error.strerror or error}; stop "
            "what listens there, or set E2SCI_PORT"
        ) from error
    listener.setblocking(False)
    return listener


def main() -> None:
    """Our own errors become one line and exit status 1, or 2 for a wrong configuration."""
    try:
        settings = GatewaySettings.from_cli()
    except ConfigurationError as error:
        sys.exit(_report(error))
    configure_logging(settings.log_level, "gateway", settings.log_format)
    faulthandler.register(signal.SIGUSR1)  # all threads' stacks, to see where it hangs
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    try:
        uvloop.run(serve(settings))
    except E2SCIError as error:
        log.error("%s", error)
        sys.exit(2 if isinstance(error, ConfigurationError) else 1)


def _report(error: ConfigurationError) -> int:
    print(f"error: {error}", file=sys.stderr)  # noqa: T201 - there is no log yet
    return 2


if __name__ == "__main__":
    main()
