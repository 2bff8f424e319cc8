"""Errors as OpenAI's API has them: an HTTP status and `{"error": {message, type, param, code}}`.

    status  type                   code
    400     invalid_request_error  the request is wrong; `param` names the field where one is
    401     invalid_request_error  invalid_api_key
    403     invalid_request_error  origin_not_allowed
    404     invalid_request_error  model_not_found, or no such route
    408     invalid_request_error  request_timeout
    413     invalid_request_error  request_too_large
    429     rate_limit_error       rate_limit_exceeded, too_many_streams, queue_full
    500     server_error           the answer failed, or a bug here
    503     server_error           no_workers, queue_unavailable
    504     server_error           timeout

429 and 503 carry Retry-After.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from bus.protocol.errors import (
    ConfigurationError,
    E2SCIError,
    QueueFullError,
    RequestError,
    RequestFailedError,
    RequestTimeoutError,
    StoreUnavailableError,
)
from bus.protocol.messages import FaultCode
from bus.store import End

__all__ = [
    "CONTEXT_EXCEEDED",
    "ApiError",
    "api_error_of",
    "end_error",
    "error_object",
    "error_response",
    "invalid",
    "validation_error",
]

CONTEXT_EXCEEDED = "context_length_exceeded"
INVALID = "invalid_request_error"
RATE = "rate_limit_error"
SERVER = "server_error"
RETRY_S = 1.0

_REFUSALS: dict[str, str | None] = {
    FaultCode.CONTEXT_OVERFLOW: CONTEXT_EXCEEDED,
    FaultCode.UNKNOWN_METHOD: None,
    FaultCode.BAD_TOKENS: None,
}
"""A cloud worker's reasons to refuse a request for what it asks, each with OpenAI's code."""
_OWN_FAULT = ("internal error", "given up after")
"""How the end of an answer begins that failed before its first token by no fault of its author."""
_MAX_PROBLEMS = 8
"""Named in one error."""
_NO_OBJECT = ("missing", "model_attributes_type", "model_type", "dict_type")
"""pydantic's words for a body that is absent, or no object."""
_OPENAI_NAMES = {
    "max_new_tokens": "max_tokens",
    "client": "user",
    "prompt_ids": "prompt",
    "prompt_logprobs": "echo",
    "method": "e2sci.method",
    "coupling": "e2sci.coupling",
    "raw": "e2sci.raw",
}
"""The API's names of the queue's fields, where they differ."""


class ApiError(HTTPException):
    """An answer other than 200.

    Args:
        status: of the response.
        message: sentences for the person who wrote the request.
        kind: OpenAI's `type`.
        code: OpenAI's `code`, for programs.
        param: the field that is wrong.
        retry_after_s: when another try may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        headers = dict(headers or {})
        if retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
        super().__init__(status, message, headers)
        self.message, self.kind, self.code, self.param = message, kind, code, param


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that is wrong: 400."""
    return ApiError(400, message, param=param, code=code)


def error_object(error: ApiError) -> dict[str, Any]:
    """The body of the response, and of the event in a stream that has begun."""
    return {
        "error": {
            "message": _encodable(error.message),
            "type": error.kind,
            "param": None if error.param is None else _encodable(error.param),
            "code": error.code,
        }
    }


def error_response(error: ApiError) -> Response:
    """The response to a request that fails before its answer begins."""
    body = msgspec.json.encode(error_object(error))
    return Response(body, error.status_code, error.headers, "application/json")


def api_error_of(error: Exception) -> ApiError:
    """What an error of the queue is to an HTTP client."""
    match error:
        case ApiError():
            return error
        case QueueFullError():
            return ApiError(429, str(error), kind=RATE, code="queue_full", retry_after_s=RETRY_S)
        case RequestFailedError():
            return ApiError(500, str(error), kind=SERVER)
        case RequestError():
            return _refused(str(error))
        case RequestTimeoutError():
            return ApiError(504, str(error), kind=SERVER, code="timeout")
        case StoreUnavailableError():
            text = "the queue does not answer; try again in a moment"
            return _unavailable(text)
        case ConfigurationError():
            return _unavailable("the queue refuses the gateway's password; its operator must act")
        case E2SCIError():
            return ApiError(500, "the queue holds something unreadable", kind=SERVER)
        case _:
            return ApiError(500, "internal error in the gateway; see its log", kind=SERVER)


def end_error(end: End, started: bool) -> ApiError:
    """What an answer is to an HTTP client that ended with an error or was cancelled elsewhere.

    A request that ended before anything ran was refused by its edge: then the request is wrong.

    Args:
        started: whether tokens have come.
    """
    if not end.error:
        return ApiError(500, "the request was cancelled", kind=SERVER, code="cancelled")
    code, _, why = end.error.partition(": ")
    if code in _REFUSALS and not started:
        return invalid(_in_api_words(why), code=_REFUSALS[code])
    ran = started or end.usage.seconds > 0
    if ran or end.error.startswith(_OWN_FAULT):
        return ApiError(500, end.error, kind=SERVER)
    return _refused(end.error)


def validation_error(problems: Sequence[Any]) -> ApiError:
    """400 from pydantic's list of problems: the first few are named, `param` is the first."""
    if any(item["type"] == "json_invalid" for item in problems):
        return invalid("the body is not JSON")
    if any(tuple(item["loc"]) == ("body",) and item["type"] in _NO_OBJECT for item in problems):
        return invalid("expected a JSON object, sent with Content-Type: application/json")
    found = [(_place(item["loc"]), _reason(item)) for item in problems]
    named = [f"{place}: {why}" if place else why for place, why in found[:_MAX_PROBLEMS]]
    more = len(found) - len(named)
    text = "; ".join(named) + (f"; and {more} more" if more else "")
    return invalid(text, found[0][0] or None)


def _reason(problem: Any) -> str:
    return str(problem["msg"]).removeprefix("Value error, ")


def _place(location: Sequence[str | int]) -> str:
    """`messages[0].role` of ("body", "messages", 0, "role")."""
    parts = [part for part in location if part not in ("body", "query", "path")]
    text = ""
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier():
            text += f".{part}" if text else part
    return text


def _refused(text: str) -> ApiError:
    field, colon, rest = text.partition(": ")
    rest = _in_api_words(rest)
    if not colon or not field.isidentifier():
        return invalid(_in_api_words(text))
    name = _OPENAI_NAMES.get(field, field)
    return invalid(f"{name}: {rest}", name)


def _in_api_words(text: str) -> str:
    return text.replace("max_new_tokens", "max_tokens")


def _unavailable(text: str) -> ApiError:
    return ApiError(503, text, kind=SERVER, code="queue_unavailable", retry_after_s=RETRY_S)


def _encodable(text: str) -> str:
    """`text` without lone surrogates, which UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode()
