"""What all routes share: the store, the limits, and how a generation is run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from weakref import WeakSet

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from bus.protocol.requests import GenerationRequest
from bus.runtime.metrics import measure_loop_lag
from bus.store import Store, WorkerRecord
from gateway.answers import Answers, Canceller
from gateway.errors import ApiError
from gateway.fleet import Roster
from gateway.keys import Keys
from gateway.limits import RateLimit, Slots
from gateway.metrics import GatewayMetrics
from gateway.options import Caller
from gateway.replies import Reply, Shape
from gateway.schemas import GenerationBody
from gateway.settings import GatewaySettings
from gateway.sse import ClientGoneError, EventStream, or_gone

__all__ = ["CLIENT_GONE", "Exchange", "Service", "exchange_of", "generate", "service_of"]

CLIENT_GONE = 499
"""What the log has for a client that closed the connection [nginx]."""
_HOLD_S = 5.0
"""A stream's headers wait so long for the first piece: until then an error is an HTTP status."""


@dataclass
class Exchange:
    """One HTTP request, as the log has it.

    Attributes:
        id: the client's `x-request-id`, or made here.
        caller: who asks, and within which trace.
        request_ids: of the queue.
        gone: the client closed the connection before the end.
    """

    id: str
    caller: Caller
    request_ids: list[str] = field(default_factory=list)
    gone: bool = False

    def leave(self) -> None:
        self.gone = True


class Service:
    """One gateway. It holds nothing beyond its open connections.

    Raises (from the constructor):
        ConfigurationError: the file of keys cannot be used.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        self.settings = settings
        self.keys = None if settings.api_keys_file is None else Keys(settings.api_keys_file)
        self.store = Store(settings)
        self.roster = Roster(self.store)
        self.metrics = GatewayMetrics()
        self.rate_limit = RateLimit(settings.requests_per_minute)
        self.slots = Slots(settings.max_streams)
        self.canceller = Canceller(self.store)
        self._watching: asyncio.Task[None] | None = None
        self._open: WeakSet[Answers] = WeakSet()

    def start(self) -> None:
        """Begin what runs beside the requests."""
        self._watching = asyncio.create_task(measure_loop_lag(self.metrics.loop_lag.observe))

    async def stop(self) -> None:
        """Cancel what is still being answered, and close the connections to Redis."""
        for answers in list(self._open):
            answers.close()
        if self._watching is not None:
            self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching
        await self.canceller.finish()
        await self.store.close()

    def answers(self, requests: Sequence[GenerationRequest]) -> Answers:
        """These requests, not submitted yet."""
        answers = Answers(
            requests,
            store=self.store,
            slots=self.slots,
            metrics=self.metrics,
            canceller=self.canceller,
            timeout_s=self.settings.request_timeout_s,
        )
        self._open.add(answers)
        return answers


def service_of(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


def exchange_of(request: Request) -> Exchange:
    exchange = request.state.exchange
    assert isinstance(exchange, Exchange)
    return exchange


async def generate(
    request: Request,
    shape: Shape,
    body: GenerationBody,
    requests: Sequence[GenerationRequest],
    target: WorkerRecord,
) -> Response:
    """Submit `requests` and answer with the object, or with the stream that the body asks for.

    A client that goes away cancels what has not ended.

    Raises:
        ApiError, E2SCIError: nothing has been sent yet.
    """
    exchange = exchange_of(request)
    answers = service_of(request).answers(requests)
    exchange.request_ids = answers.ids
    reply = Reply(shape, answers, body, target)
    try:
        await answers.submit()
        if not body.stream:
            whole = await or_gone(request.receive, reply.whole())
            answers.close()
            return Response(msgspec.json.encode(whole), media_type="application/json")
        await or_gone(request.receive, answers.started(_HOLD_S))
    except ClientGoneError:
        exchange.leave()
        answers.close()
        raise ApiError(CLIENT_GONE, "the client has closed the connection") from None
    except BaseException:
        answers.close()
        raise
    return EventStream(reply.events(), answers.close, exchange.leave)
