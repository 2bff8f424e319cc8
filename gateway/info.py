"""`/v1/models`, `/health` and `/metrics`."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from bus.protocol.errors import E2SCIError
from bus.runtime.metrics import exposition
from bus.store import WorkerRecord
from gateway.documented import ERRORS, Health, Live, Model, ModelList
from gateway.service import Service, service_of

__all__ = ["models", "monitoring"]

models = APIRouter()
monitoring = APIRouter()

_HEALTH: dict[int | str, dict[str, Any]] = {
    200: {"model": Health, "description": "It is."},
    503: {"model": Health, "description": "It is not; `reasons` lists why."},
}
_LIVE: dict[int | str, dict[str, Any]] = {200: {"model": Live, "description": "It does."}}


@models.get(
    "/v1/models",
    summary="The target models that are served",
    response_class=Response,
    responses={**ERRORS, 200: {"model": ModelList}},
)
async def list_models(request: Request) -> Response:
    """As the registry has them now; empty without a cloud worker."""
    fleet = await service_of(request).roster.fleet()
    data = [_model(record) for record in fleet.targets.values()]
    return _json({"object": "list", "data": data})


@models.get(
    "/v1/models/{model:path}",
    summary="One of them",
    response_class=Response,
    responses={**ERRORS, 200: {"model": Model}},
)
async def get_model(request: Request, model: str) -> Response:
    """`default` is the first one."""
    fleet = await service_of(request).roster.fleet()
    return _json(_model(fleet.target(model)))


@monitoring.get("/health", response_class=Response, responses=_HEALTH)
@monitoring.get("/health/ready", response_class=Response, responses=_HEALTH)
async def ready(request: Request) -> Response:
    """Whether Redis answers and workers are registered."""
    reasons = await _missing(service_of(request))
    return _health(reasons)


@monitoring.get("/health/live", response_class=Response, responses=_LIVE)
async def live() -> Response:
    """Whether the process serves at all."""
    return _json({"status": "ok", "live": True})


@monitoring.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {
            "description": "Prometheus' exposition format.",
            "content": {
                kind: {"schema": {"type": "string"}}
                for kind in ("text/plain", "application/openmetrics-text")
            },
        }
    },
)
async def metrics(request: Request, prefix: str = "") -> Response:
    """All metrics of this process. With `prefix` `e2sci_` names are without a colon."""
    registry = service_of(request).metrics.registry
    text, content_type = exposition(registry, request.headers.get("accept", ""), prefix)
    return Response(text, headers={"Content-Type": content_type})


async def _missing(service: Service) -> list[str]:
    try:
        return (await service.roster.fleet()).missing
    except E2SCIError:
        return ["the queue (Redis) does not answer"]


def _health(reasons: list[str]) -> Response:
    status = "unavailable" if reasons else "ok"
    body = {"status": status, "live": True, "ready": not reasons, "reasons": reasons}
    return _json(body, 503 if reasons else 200)


def _model(record: WorkerRecord) -> dict[str, Any]:
    return {
        "id": record.model,
        "object": "model",
        "created": int(record.started_at),
        "owned_by": "e2sci",
        "max_model_len": record.context_length,
    }


def _json(body: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")
