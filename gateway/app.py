"""The application: routes, middleware, and all errors as OpenAI's objects."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from bus.protocol.errors import E2SCIError
from gateway import chat, completions, info
from gateway.door import Door
from gateway.errors import ApiError, api_error_of, error_response, validation_error
from gateway.service import Service
from gateway.settings import GatewaySettings

__all__ = ["build_app"]

_UNREADABLE = 400
_NO_ROUTE = 404
_NO_METHOD = 405


def build_app(settings: GatewaySettings) -> FastAPI:
    """The gateway as an ASGI application.

    Raises:
        ConfigurationError: the file of keys cannot be used.
    """
    service = Service(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = _Documented(
        title="E²-SCI gateway",
        version="1",
        description="OpenAI's API over speculative decoding between edge and cloud.",
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = service
    keyed = [Security(HTTPBearer(auto_error=False))] if service.keys is not None else []
    for router in (chat.router, completions.router, info.models):
        app.include_router(router, dependencies=keyed)
    app.include_router(info.monitoring)
    app.add_middleware(Door, service=service)
    if settings.cors_origins:  # outermost: a browser's preflight carries no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(E2SCIError, _on_ours)
    return app


class _Documented(FastAPI):
    """FastAPI documents a 422 for each route; here a wrong body is answered with 400."""

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        return document


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        return error_response(error)
    words = str(error.detail)
    if error.status_code == _NO_ROUTE:
        words = f"there is no {request.method} {request.url.path} here"
    elif error.status_code == _NO_METHOD:
        words = f"{request.url.path} takes no {request.method}"
    elif error.status_code == _UNREADABLE:  # FastAPI's own, where its parser fails otherwise
        words = (
            "the body is not JSON: not UTF-8, nested too deeply, or a number has too many digits"
        )
    headers = dict(error.headers or {})
    return error_response(ApiError(error.status_code, words, headers=headers))


async def _on_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(validation_error(error.errors()))


async def _on_ours(_: Request, error: Exception) -> Response:
    return error_response(api_error_of(error))
