"""`POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from bus.protocol.requests import GenerationRequest
from bus.store import TokensEntry, WorkerRecord
from gateway.documented import GENERATION, ChatCompletion
from gateway.errors import invalid
from gateway.logprobs import chat_logprobs
from gateway.options import Caller, chat_tokens, common_options, requests_of
from gateway.replies import Choice
from gateway.schemas import ChatRequest
from gateway.service import exchange_of, generate, service_of
from gateway.settings import GatewaySettings

__all__ = ["router"]

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    summary="Go on with a chat",
    response_class=Response,
    responses=GENERATION | {200: {**GENERATION[200], "model": ChatCompletion}},
)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Text only; the roles are system (developer), user and assistant."""
    service = service_of(request)
    fleet = await service.roster.fleet()
    fleet.require()
    target = fleet.target(body.model)
    requests = _requests(body, exchange_of(request).caller, service.settings, target)
    return await generate(request, ChatShape(body.logprobs or False), body, requests, target)


def _requests(
    body: ChatRequest, caller: Caller, settings: GatewaySettings, target: WorkerRecord
) -> list[GenerationRequest]:
    given = body.max_completion_tokens
    if None not in (given, body.max_tokens) and given != body.max_tokens:
        raise invalid("max_tokens and max_completion_tokens differ; give one", "max_tokens")
    given = body.max_tokens if given is None else given
    messages = [
        {"role": "system" if one.role == "developer" else one.role, "content": one.text}
        for one in body.messages
    ]
    options: dict[str, Any] = {
        **common_options(body, caller),
        "max_new_tokens": chat_tokens(given, settings.default_max_tokens, target),
        "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
    }
    return requests_of(body, [{"messages": messages}], options)


class ChatShape:
    """Chat completions."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    returns_tokens = True

    def __init__(self, scored: bool) -> None:
        self._scored = scored

    def opening(self, index: int) -> Choice:
        return _delta(index, {"role": "assistant", "content": "", "refusal": None})

    def piece(self, index: int, entry: TokensEntry) -> Choice | None:
        if self._scored and entry.scores:
            logprobs = chat_logprobs(entry.scores)
            return _delta(index, {"content": entry.text}, logprobs)
        return _delta(index, {"content": entry.text}) if entry.text else None

    def ending(self, index: int, reason: str) -> Choice:
        return _delta(index, {}, reason=reason)

    def whole(self, index: int, chunks: list[Choice], reason: str) -> Choice:
        text = "".join(chunk["delta"]["content"] for chunk in chunks)
        scores = [one for chunk in chunks for one in (chunk["logprobs"] or {}).get("content", ())]
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": {"content": scores, "refusal": None} if self._scored else None,
            "finish_reason": reason,
        }


def _delta(
    index: int,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    reason: str | None = None,
) -> Choice:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
