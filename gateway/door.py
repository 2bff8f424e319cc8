"""What happens to every HTTP request: an id, a key, limits, a line in the log, a count.

Plain ASGI, so that a stream passes through untouched.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import MutableMapping, Sequence
from contextlib import suppress
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bus.runtime.logs import log_context
from gateway.errors import SERVER, ApiError, error_response
from gateway.options import Caller
from gateway.service import CLIENT_GONE, Exchange, Service

__all__ = ["Door"]

log = logging.getLogger(__name__)
access = logging.getLogger("gateway.access")

_API = "/v1/"
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_HOST = re.compile(r"[A-Za-z0-9_.-]+(:[0-9]{1,5})?|\[[0-9a-fA-F:.]+\](:[0-9]{1,5})?")
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
_MAX_LOGGED_IDS = 16
_MAX_DROPPED = 2**24
"""Bytes beyond the limit."""


class Door:
    """Middleware around the routes."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        headers = Headers(scope=scope)
        exchange = Exchange(_request_id(headers), Caller("", headers.get("traceparent", "")))
        scope.setdefault("state", {})["exchange"] = exchange
        sent = _Sent(send, exchange.id)
        try:
            with log_context(exchange.caller.traceparent):
                await self._pass(scope, headers, exchange, receive, sent)
        except Exception:
            log.exception("request %s", exchange.id)
            if not sent.status:
                error = ApiError(500, "internal error in the gateway; see its log", kind=SERVER)
                await error_response(error)(scope, receive, sent)
        finally:
            status = CLIENT_GONE if exchange.gone else sent.status
            self._record(scope, exchange, status, time.monotonic() - began)

    async def _pass(
        self, scope: Scope, headers: Headers, exchange: Exchange, receive: Receive, send: Send
    ) -> None:
        """Let the request in, or answer with why not."""
        try:
            if scope["path"].startswith(_API):
                exchange.caller.key = self._key(headers)
                if scope["method"] == "POST":
                    self._service.rate_limit.take(exchange.caller.key or _address(scope))
            settings = self._service.settings
            if self._service.keys is None:
                _check_origin(headers, settings.cors_origins)
            timed = _timed(receive, settings.client_timeout_s)
            limited = _limited(timed, headers, settings.max_body_bytes)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
        else:
            await self._app(scope, limited, send)

    def _key(self, headers: Headers) -> str:
        """The name of the key, "" where none is asked for. Raises ApiError: 401."""
        if self._service.keys is None:
            return ""
        name = self._service.keys.name_of(headers.get("authorization", ""))
        if name is None:
            raise ApiError(
                401,
                "no valid API key; send Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return name

    def _record(self, scope: Scope, exchange: Exchange, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._service.metrics.http_requests.labels(route, method, str(status)).inc()
        ids = exchange.request_ids
        shown = ids[:_MAX_LOGGED_IDS] + (["…"] if len(ids) > _MAX_LOGGED_IDS else [])
        level = logging.DEBUG if route in ("/metrics", *_HEALTH) else logging.INFO
        with log_context(exchange.caller.traceparent, ids[0] if ids else ""):
            access.log(
                level,
                "%s %s %d %.1f ms id %s key %s requests %s",
                scope["method"],
                scope["path"],
                status,
                1e3 * seconds,
                exchange.id,
                exchange.caller.key or "-",
                ",".join(shown) or "-",
            )


_HEALTH = ("/health", "/health/live", "/health/ready")
"""Probed every few seconds: no news in a log."""


class _Sent:
    """`send`, which adds the request id and remembers the status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self._request_id
        await self._send(message)


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _address(scope: MutableMapping[str, Any]) -> str:
    client = scope.get("client")
    return f"address {client[0]}" if client else "address unknown"


def _check_origin(headers: Headers, allowed: Sequence[str]) -> None:
    """Refuse a page whose host name leads here: its DNS entry may point to this machine so that
    the browser takes our answers for the page's own.

    Raises:
        ApiError: 403; the request comes from such a page.
    """
    origin, host = headers.get("origin", ""), headers.get("host", "")
    if not origin or origin in allowed or "*" in allowed or _is_local(host):
        return
    text = f"pages of {origin[:200]} may not call this API; E2SCI_CORS_ORIGINS allows them"
    raise ApiError(403, text, code="origin_not_allowed")


def _is_local(host: str) -> bool:
    """Whether a Host header has an address or `localhost`, which no DNS entry can redirect."""
    name = urlsplit(f"//{host}").hostname or "" if _HOST.fullmatch(host) else ""
    with suppress(ValueError):
        return bool(ip_address(name))
    return name == "localhost" or name.endswith(".localhost")


def _timed(receive: Receive, timeout_s: float) -> Receive:
    """`receive`, which raises ApiError (408) where the body is not whole after `timeout_s`; what
    comes after the body may take as long as it likes."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    whole = False

    async def timed() -> Message:
        nonlocal whole
        try:
            async with asyncio.timeout_at(None if whole else deadline):
                message = await receive()
        except TimeoutError:
            text = f"the body is not complete after {timeout_s:g} s; send it faster"
            headers = {"Connection": "close"}
            raise ApiError(408, text, code="request_timeout", headers=headers) from None
        whole = whole or not message.get("more_body")
        return message

    return timed


def _limited(receive: Receive, headers: Headers, limit: int) -> Receive:
    """`receive`, which raises ApiError (413) where the body is longer than `limit` bytes.

    What is too long is read and dropped up to a bound: a client that is still sending would lose
    the response with the connection.
    """
    announced = headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > limit + _MAX_DROPPED:
        raise _too_large(limit)
    num_bytes = 0

    async def counted() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes <= limit:
            return message
        while message.get("more_body") and num_bytes <= limit + _MAX_DROPPED:
            message = await receive()
            num_bytes += len(message.get("body", b""))
        raise _too_large(limit)

    return counted


def _too_large(limit: int) -> ApiError:
    text = f"the body is longer than {limit} bytes; shorten it"
    return ApiError(413, text, code="request_too_large", headers={"Connection": "close"})
