"""From a body to requests of the queue."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from bus.protocol.requests import (
    MAX_SEED,
    MAX_TOKENS,
    GenerationRequest,
    new_request,
    new_traceparent,
)
from bus.store import WorkerRecord
from gateway.errors import invalid
from gateway.schemas import Extension, GenerationBody

__all__ = ["Caller", "chat_tokens", "client_name", "common_options", "requests_of", "trace_of"]

_IDENTIFIER = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_TRACE = re.compile(r"00-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})-0[01]")
_OPENAI_TEMPERATURE = 1.0
_LOSSY = "e2sci"


class Caller:
    """Who asks and within which trace.

    Args:
        key: name of the API key, "" without one.
        traceparent: W3C's header; one that is not valid begins a trace of its own, as W3C says.
    """

    def __init__(self, key: str = "", traceparent: str = "") -> None:
        self.key = key
        self.traceparent = trace_of(traceparent)


def trace_of(header: str) -> str:
    """The header where it is valid, else a new trace."""
    found = _TRACE.fullmatch(header.strip())
    if found is None or not (found["trace"].strip("0") and found["span"].strip("0")):
        return new_traceparent()
    return found[0]


def client_name(user: str | None, key: str) -> str | None:
    """`user` as the queue's client, hashed where it is no identifier; else the key's name."""
    if not user:
        return key or None
    if _IDENTIFIER.fullmatch(user):
        return user
    return "u-" + blake2b(user.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def common_options(body: GenerationBody, caller: Caller) -> dict[str, Any]:
    """The queue's options (`bus.protocol.requests`) that both ways to generate share."""
    own = body.e2sci
    temperature = _OPENAI_TEMPERATURE if body.temperature is None else body.temperature
    return {
        "method": own and _method(own),
        "coupling": own and own.coupling,
        "raw": own and own.raw,
        "temperature": temperature,
        "top_p": body.top_p,
        "top_k": None if body.top_k is None else max(0, body.top_k),
        "stop": [body.stop] if isinstance(body.stop, str) else body.stop,
        "client": client_name(body.user, caller.key),
        "traceparent": caller.traceparent,
        "ignore_eos": body.ignore_eos,
    }


def _method(own: Extension) -> str | None:
    """The method's name, with its threshold where one is given."""
    if own.threshold is None:
        return own.method
    return f"{own.method or _LOSSY}:{own.threshold:g}"


def chat_tokens(given: int | None, default: int, target: WorkerRecord) -> int:
    """Longest answer to a chat: as given, else the setting, at most half the target's context."""
    if given is not None:
        return given
    return max(1, min(default, (target.context_length or 2 * default) // 2))


def requests_of(
    body: GenerationBody, inputs: list[Mapping[str, Any]], options: Mapping[str, Any]
) -> list[GenerationRequest]:
    """`n` requests for each input, all of an input one after the other; choice i of an input has
    seed + i.

    Raises:
        ApiError: the seed or `max_tokens` is wrong. RequestError: as `new_request`.
    """
    first = secrets.randbits(62) if body.seed is None else body.seed
    if not 0 <= first <= MAX_SEED:
        raise invalid(f"seed: expected 0 … 2**63 - 1, got {first}", "seed")
    tokens = options["max_new_tokens"]
    if not 1 <= tokens <= MAX_TOKENS:
        raise invalid(f"max_tokens: expected 1 … {MAX_TOKENS}, got {tokens}", "max_tokens")
    found = [new_request(**{**options, **given, "seed": first}) for given in inputs]
    return [
        request.again((first + number) % (MAX_SEED + 1)) if number else request
        for request in found
        for number in range(body.n or 1)
    ]
