"""`POST /v1/completions`: texts and token ids that the model continues as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from bus.protocol.requests import GenerationRequest
from bus.store import TokensEntry
from gateway.documented import GENERATION, Completion
from gateway.errors import CONTEXT_EXCEEDED, invalid
from gateway.fleet import Fleet
from gateway.logprobs import legacy_logprobs, prompt_lengths, prompt_text
from gateway.options import Caller, common_options, requests_of
from gateway.replies import Choice
from gateway.schemas import MAX_PROMPTS, CompletionRequest
from gateway.service import exchange_of, generate, service_of

__all__ = ["router"]

_DEFAULT_TOKENS = 16
"""OpenAI's."""
_LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")

router = APIRouter()


@router.post(
    "/v1/completions",
    summary="Continue a text",
    response_class=Response,
    responses=GENERATION | {200: {**GENERATION[200], "model": Completion}},
)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """The prompt goes to the model as it is, without the chat template, unless `e2sci.raw` is
    false."""
    fleet = await service_of(request).roster.fleet()
    fleet.require()
    target = fleet.target(body.model)
    _check_size(body, fleet)
    requests = _requests(body, exchange_of(request).caller)
    shape = CompletionShape(body)
    return await generate(request, shape, body, requests, target)


def _check_size(body: CompletionRequest, fleet: Fleet) -> None:
    """Refuse what cannot fit before it is copied for each choice."""
    if len(body.prompt) * (body.n or 1) > MAX_PROMPTS:
        raise invalid(f"n: prompts and n together ask for more than {MAX_PROMPTS} choices", "n")
    longest = max(record.context_length for record in fleet.clouds)
    for prompt in body.prompt:
        if isinstance(prompt, list) and 0 < longest < len(prompt):
            raise invalid(
                f"prompt: {len(prompt)} tokens, the target's context holds {longest}",
                "prompt",
                CONTEXT_EXCEEDED,
            )


def _requests(body: CompletionRequest, caller: Caller) -> list[GenerationRequest]:
    options = common_options(body, caller)
    tokens = _DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    if tokens == 0 and body.echo:
        tokens = 1  # an answer has at least one token; it is left out of the reply
    scored = body.logprobs is not None
    raw = True if options["raw"] is None else options["raw"]
    if body.echo and not raw:
        raise invalid("echo: it needs a raw prompt; leave e2sci.raw out", "echo")
    options |= {"max_new_tokens": tokens, "logprobs": body.logprobs, "raw": None}
    inputs: list[dict[str, Any]] = []
    for prompt in body.prompt:
        given: dict[str, Any] = (
            {"prompt": prompt, "raw": raw} if isinstance(prompt, str) else {"prompt_ids": prompt}
        )
        if body.echo and (scored or not isinstance(prompt, str)):  # ids: their text comes so
            given |= {"logprobs": body.logprobs or 0, "prompt_logprobs": True}
        inputs.append(given)
    return requests_of(body, list(inputs), options)


class CompletionShape:
    """Completions, with the prompt before the answer where `echo` asks for it."""

    id_prefix = "cmpl-"
    whole_object = chunk_object = "text_completion"

    def __init__(self, body: CompletionRequest) -> None:
        self._prompts = body.prompt
        self._num_each = body.n or 1
        self._echo = bool(body.echo)
        self._scored = body.logprobs is not None
        self.returns_tokens = body.max_tokens != 0
        self._offsets = [0] * (len(body.prompt) * self._num_each)
        self._begun = [False] * len(self._offsets)

    def opening(self, index: int) -> Choice | None:  # noqa: ARG002 - see `Shape`
        return None

    def piece(self, index: int, entry: TokensEntry) -> Choice | None:
        text, logprobs = "", None
        if not self._begun[index]:
            text, logprobs = self._prompt(index, entry)
            self._begun[index] = True
            self._offsets[index] = len(text)
        if self.returns_tokens:
            if self._scored and entry.scores:
                logprobs = _joined([logprobs, self._of_tokens(index, entry)])
            text += entry.text
            self._offsets[index] += len(entry.text)
        return _choice(index, text, logprobs) if text or logprobs else None

    def ending(self, index: int, reason: str) -> Choice:
        return _choice(index, self._unsaid(index), None, reason)

    def whole(self, index: int, chunks: list[Choice], reason: str) -> Choice:
        text = "".join(chunk["text"] for chunk in chunks) + self._unsaid(index)
        empty: Choice = {name: [] for name in _LISTS}
        found = _joined([empty, *(chunk["logprobs"] for chunk in chunks)]) if self._scored else None
        return _choice(index, text, found, reason)

    def _prompt(self, index: int, entry: TokensEntry) -> tuple[str, Choice | None]:
        if not self._echo:
            return "", None
        given = self._prompts[index // self._num_each]
        scores = entry.prompt_scores
        text = given if isinstance(given, str) else prompt_text(scores)
        if not self._scored:
            return text, None
        return text, legacy_logprobs(scores, prompt_lengths(scores), 0, begins=True)

    def _of_tokens(self, index: int, entry: TokensEntry) -> Choice:
        lengths = entry.lengths or [len(score.chosen.text) for score in entry.scores]
        return legacy_logprobs(entry.scores, lengths, self._offsets[index])

    def _unsaid(self, index: int) -> str:
        """The prompt, where an answer ended before its first piece."""
        given = self._prompts[index // self._num_each]
        if self._begun[index] or not self._echo or not isinstance(given, str):
            return ""
        return given


def _joined(parts: Sequence[Choice | None]) -> Choice:
    return {name: [one for part in parts if part for one in part[name]] for name in _LISTS}


def _choice(index: int, text: str, logprobs: Choice | None, reason: str | None = None) -> Choice:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
