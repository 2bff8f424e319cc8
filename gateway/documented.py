"""What the responses look like, for the OpenAPI document. Nothing is checked against it at run
time: the objects are built in `replies`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

__all__ = [
    "ERRORS",
    "GENERATION",
    "ChatCompletion",
    "Completion",
    "Health",
    "Live",
    "Model",
    "ModelList",
]


class _Documented(BaseModel):
    model_config = ConfigDict(extra="allow")


class Error(_Documented):
    """What went wrong, what was expected, and what to do."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Documented):
    """An answer other than 200."""

    error: Error


class TokenDetails(_Documented):
    """Drafted tokens that the target accepted, and those it did not."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class UsageBody(_Documented):
    """Tokens of all choices; a prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: TokenDetails


class OwnBody(_Documented):
    """The queue's requests by choice; drafted and accepted tokens and rollbacks of all; whether
    the method promises the target's own text."""

    request_ids: list[str]
    drafted: int
    accepted: int
    rollbacks: int
    lossless: bool


class _Generation(_Documented):
    id: str
    created: int
    model: str
    system_fingerprint: str | None
    usage: UsageBody
    e2sci: OwnBody


class Reply(_Documented):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Documented):
    """One answer to a chat."""

    index: int
    message: Reply
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(_Generation):
    """An answer to a chat."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextChoice(_Documented):
    """One continuation."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class Completion(_Generation):
    """Continuations, `n` for each prompt."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class Model(_Documented):
    """A target model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(_Documented):
    """All of them."""

    object: Literal["list"]
    data: list[Model]


class Live(_Documented):
    """Whether the process serves."""

    status: Literal["ok", "unavailable"]
    live: bool


class Health(Live):
    """Whether it can have answers made too, and why not."""

    ready: bool
    reasons: list[str]


_WORDS = {
    400: "The request is wrong; `param` names the field.",
    401: "No valid API key.",
    403: "A page of this origin may not call the API.",
    404: "There is no such model.",
    408: "The body did not come whole in time.",
    413: "The body is too long.",
    429: "Too many requests of this key, too many streams, or the queue is full.",
    500: "The answer failed.",
    503: "Workers are missing, or the queue does not answer.",
    504: "The answer took too long and was cancelled.",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": words} for status, words in _WORDS.items()
}
"""Of the routes under /v1."""

_EVENT = {
    "type": "object",
    "description": "A server-sent event; its data is a chunk as JSON, an error object, or [DONE].",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}
GENERATION: dict[int | str, dict[str, Any]] = ERRORS | {
    200: {
        "description": "The object, or with `stream` events of chunks that end with [DONE].",
        "content": {"text/event-stream": {"schema": _EVENT}},
    }
}
