"""A generation request: its fields, their limits, and what to say when one is wrong.

A request travels as the string fields of a Redis stream entry (docs/architecture.md), written by
our client or by anybody's `XADD`. Both go through the same model here: a field's type says what
it may hold, as text or as a Python value. What only a worker can judge (is the method known, does
the prompt fit the model's context) is not checked here.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import uuid
from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from bus.protocol.bounds import MAX_LOGPROBS, SessionCoupling
from bus.protocol.chat import ChatMessage, parse_messages, read_json
from bus.protocol.errors import RequestError

__all__ = [
    "MAX_PROMPT_BYTES",
    "GenerationRequest",
    "inner_session_id",
    "new_request",
    "new_traceparent",
    "seed_from_id",
    "session_id",
]

MAX_PROMPT_BYTES = 2**20
MIN_TEMPERATURE = 1e-3
"""Least temperature above 0: far below it, logits / temperature leaves the range of a float."""
MAX_TEMPERATURE = 100
MAX_TOKENS = 2**31 - 1
MAX_SEED = 2**63 - 1
MAX_PROMPT_TOKENS = 2**18

_MAX_STOPS = 16
_MAX_STOP_CHARS = 1024
_IDENTIFIER = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_METHOD_NAME = re.compile(r"[A-Za-z0-9_.:+-]{1,64}")
_ENTRY_ID = re.compile(r"[0-9]+-[0-9]+")
_TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-0[01]")
_INTEGER = re.compile(r"[+-]?[0-9]{1,20}")
_REAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)


# --- types of fields: text or a value in, a checked value out; a ValueError says what is wrong ----


def _quote(value: object) -> str:
    text = value if isinstance(value, str) else str(value)
    return repr(text if len(text) <= 40 else text[:40] + "…")


def _identifier(text: str) -> str:
    if not _IDENTIFIER.fullmatch(text):
        raise ValueError(f"expected 1 … 64 of A-Z a-z 0-9 _ . : -, got {_quote(text)}")
    return text


def _method_name(text: str) -> str:
    if not _METHOD_NAME.fullmatch(text):
        raise ValueError(f"expected 1 … 64 of A-Z a-z 0-9 _ . : + -, got {_quote(text)}")
    return text


def _prompt(text: str) -> str:
    if not text.strip():
        raise ValueError("empty; give some text, messages or prompt_ids")
    _check_size(len(text.encode()))
    return text


def _messages(messages: tuple[ChatMessage, ...]) -> tuple[ChatMessage, ...]:
    _check_size(sum(len(message.content.encode()) for message in messages))
    return messages


def _check_size(size: int) -> None:
    if size > MAX_PROMPT_BYTES:
        raise ValueError(f"{size} bytes, the limit is {MAX_PROMPT_BYTES}; shorten it")


def _token_ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, str):
        value = read_json(value, f"a JSON list of token ids, got {_quote(value)}")
    if not isinstance(value, (list, tuple)) or not all(type(item) is int for item in value):
        raise ValueError(f"expected a list of token ids, got {_quote(repr(value))}")
    if len(value) > MAX_PROMPT_TOKENS:
        raise ValueError(f"{len(value)} tokens, the limit is {MAX_PROMPT_TOKENS}; shorten it")
    if not all(0 <= item <= MAX_TOKENS for item in value):
        raise ValueError("a token id is at least 0 and below 2**31")
    return tuple(value)


def _traceparent(text: str) -> str:
    if text and not _TRACEPARENT.fullmatch(text):
        raise ValueError(f"expected a W3C traceparent of version 00, got {_quote(text)}")
    return text


def _whole(value: Any) -> int:
    if isinstance(value, int):
        return int(value)
    if not isinstance(value, str) or not _INTEGER.fullmatch(value):
        raise ValueError(f"expected a whole number, got {_quote(value)}")
    return int(value)


def _real(value: Any) -> float:
    text = str(value)
    if not _NOT_FINITE.fullmatch(text) and not _REAL.fullmatch(text):
        raise ValueError(f"expected a number, got {_quote(text)}")
    if not math.isfinite(float(text)):
        raise ValueError(f"expected a finite number, got {_quote(text)}")
    return float(text)


def _flag(value: Any) -> bool:
    if value not in ("0", "1", True, False):
        raise ValueError(f"expected 0 or 1, got {_quote(value)}")
    return value in ("1", True)


def _strings(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = read_json(value, f'a JSON list such as ["\\n\\n"], got {_quote(value)}')
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"expected a JSON list of strings, got {_quote(repr(value))}")
    return tuple(value)


def _stops(value: tuple[str, ...]) -> tuple[str, ...]:
    if len(value) > _MAX_STOPS:
        raise ValueError(f"{len(value)} strings, the limit is {_MAX_STOPS}")
    if not all(0 < len(item) <= _MAX_STOP_CHARS for item in value):
        raise ValueError(f"each string needs 1 … {_MAX_STOP_CHARS} characters")
    if any("\ud800" <= char <= "\udfff" for item in value for char in item):
        raise ValueError("half of a surrogate pair is not a character")
    return value


def _coupling(value: object) -> SessionCoupling:
    try:
        return SessionCoupling(str(value))
    except ValueError:
        known = " or ".join(f"'{one.value}'" for one in SessionCoupling)
        raise ValueError(f"expected {known}, got {_quote(value)}") from None


def _within(low: int, high: int) -> AfterValidator:
    def check(value: int) -> int:
        if not low <= value <= high:
            raise ValueError(f"expected {low} … {high}, got {value}")
        return value

    return AfterValidator(check)


def _temperature(value: float) -> float:
    if value != 0 and not MIN_TEMPERATURE <= value <= MAX_TEMPERATURE:
        raise ValueError(
            f"expected 0 (greedy) or {MIN_TEMPERATURE} … {MAX_TEMPERATURE}, got {value}"
        )
    return abs(value)  # -0.0


def _share(value: float) -> float:
    if not 0 < value <= 1:
        raise ValueError(f"expected above 0 and at most 1, got {value}")
    return value


_Identifier = Annotated[str, AfterValidator(_identifier)]
_MethodName = Annotated[str, AfterValidator(_method_name)]
_Whole = Annotated[int, BeforeValidator(_whole)]
_Real = Annotated[float, BeforeValidator(_real)]


class GenerationRequest(BaseModel):
    """One prompt and how to answer it: exactly one of `prompt`, `messages` and `prompt_ids`.

    Attributes:
        id: names the result; `[A-Za-z0-9_.:-]{1,64}`.
        prompt: text to answer, 1 byte … 1 MiB of UTF-8.
        messages: a chat to go on with (`bus.protocol.chat`), 1 MiB of UTF-8 in all.
        prompt_ids: token ids that the model continues as they are, without a template.
        method: decoding method, by name; `[A-Za-z0-9_.:+-]{1,64}`.
        max_new_tokens: ≥ 1.
        temperature: 0 is greedy; else 0.001 … 100.
        top_p: 0 < top_p ≤ 1; 1 is off.
        top_k: ≥ 0; 0 is off.
        coupling: how draft and target share the seed, `gumbel` or `residual`.
        seed: 0 … 2**63 − 1; fixes every random choice.
        stop: up to 16 strings that end the answer; they are not part of it.
        raw: True: the prompt goes to the model as it is, without the chat template.
        client: who asks; credit is carried between prompts of one client.
        ignore_eos: write on after the model's end token, up to `max_new_tokens`.
        logprobs: give the target's log-probability of each token of the answer and of so many
            most probable alternatives, 0 … 20; None gives none.
        prompt_logprobs: give those of the prompt's tokens too; needs `logprobs`.
        traceparent: the caller's trace, as W3C's header of that name; "" begins none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: _Identifier
    prompt: Annotated[str, AfterValidator(_prompt)] = ""
    messages: Annotated[
        tuple[ChatMessage, ...], BeforeValidator(parse_messages), AfterValidator(_messages)
    ] = ()
    prompt_ids: Annotated[tuple[int, ...], BeforeValidator(_token_ids)] = ()
    method: _MethodName = "auto"
    max_new_tokens: Annotated[_Whole, _within(1, MAX_TOKENS)] = 256
    temperature: Annotated[_Real, AfterValidator(_temperature)] = 0.0
    top_p: Annotated[_Real, AfterValidator(_share)] = 1.0
    top_k: Annotated[_Whole, _within(0, MAX_TOKENS)] = 0
    coupling: Annotated[SessionCoupling, BeforeValidator(_coupling)] = SessionCoupling.GUMBEL
    seed: Annotated[_Whole, _within(0, MAX_SEED)] = 0
    stop: Annotated[tuple[str, ...], BeforeValidator(_strings), AfterValidator(_stops)] = ()
    raw: Annotated[bool, BeforeValidator(_flag)] = False
    client: _Identifier = "anonymous"
    ignore_eos: Annotated[bool, BeforeValidator(_flag)] = False
    logprobs: Annotated[_Whole, _within(0, MAX_LOGPROBS)] | None = None
    prompt_logprobs: Annotated[bool, BeforeValidator(_flag)] = False
    traceparent: Annotated[str, AfterValidator(_traceparent)] = ""

    @field_validator("*", mode="before")
    @classmethod
    def _decode(cls, value: Any) -> Any:
        """Bytes of a stream entry as text; half a surrogate pair is no text either."""
        try:
            if isinstance(value, str):
                value = value.encode("utf-8", "surrogatepass")
            return value.decode("utf-8") if isinstance(value, bytes) else value
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 (byte {error.start}); encode text as UTF-8") from None

    @field_validator("id")
    @classmethod
    def _not_another_entry(cls, value: str, info: ValidationInfo) -> str:
        entry_id = (info.context or {}).get("entry_id", value)
        if value != entry_id and _ENTRY_ID.fullmatch(value):
            raise ValueError(f"{value} has the form of a stream entry id; choose another")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        given = [name for name in ("prompt", "messages", "prompt_ids") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: give one of them")
        if not given:
            raise ValueError("prompt: empty; give some text, messages or prompt_ids")
        if self.messages and self.raw:
            raise ValueError("raw: messages need the chat template; give a prompt instead")
        if self.prompt_logprobs and self.logprobs is None:
            raise ValueError("prompt_logprobs: give logprobs too, 0 for the tokens' own alone")
        return self

    @property
    def size(self) -> int:
        """About how long it is: characters, or token ids."""
        chat = sum(len(message.content) for message in self.messages)
        return len(self.prompt) + len(self.prompt_ids) + chat

    def again(self, seed: int) -> GenerationRequest:
        """The same under a fresh id; `seed` as the field."""
        return self.model_copy(update={"id": uuid.uuid4().hex, "seed": seed})

    def to_fields(self) -> dict[str, str]:
        """The fields of the stream entry, those left out that are empty."""
        as_text: Mapping[type, Callable[[Any], str]] = {
            float: repr,
            bool: lambda value: "1" if value else "0",
            list: lambda value: json.dumps(value, ensure_ascii=False),
        }
        values = self.model_dump(mode="json", exclude_none=True)
        return {
            name: as_text.get(type(value), str)(value)
            for name, value in values.items()
            if value not in ("", [])
        }

    @classmethod
    def from_fields(cls, entry_id: str, fields: Mapping[bytes, bytes]) -> GenerationRequest:
        """The request in a stream entry.

        Args:
            entry_id: the entry's id, the request's id where the field `id` is missing.
            fields: the entry as Redis gives it.

        Raises:
            RequestError: one or more fields are wrong; the text names all of them.
        """
        given: dict[str, Any] = {
            name.decode("utf-8", "replace"): value for name, value in fields.items()
        }
        return _checked({"id": entry_id, **given}, entry_id)


def new_request(prompt: str = "", **options: Any) -> GenerationRequest:
    """A request with a fresh id and, unless they are given, a random seed and a trace of its own.

    Args:
        prompt: the text; "" where `messages` or `prompt_ids` are given.
        options: any field of `GenerationRequest` but `id`; None stands for the default.

    Raises:
        RequestError: a value is wrong or an option unknown; the text names all problems.
    """
    if "id" in options:
        raise RequestError("id: it is made here and cannot be chosen")
    given = {name: value for name, value in options.items() if value is not None}
    given.setdefault("seed", secrets.randbits(63))
    given.setdefault("traceparent", new_traceparent())
    request_id = uuid.uuid4().hex
    return _checked({"id": request_id, "prompt": prompt, **given}, request_id)


def _checked(values: dict[str, Any], entry_id: str) -> GenerationRequest:
    others = values.get("messages") or values.get("prompt_ids")
    if not others:
        values.setdefault("prompt", "")
    elif values.get("prompt") == "":
        del values["prompt"]
    try:
        request = GenerationRequest.model_validate(values, context={"entry_id": entry_id})
    except ValidationError as error:
        raise RequestError("; ".join(map(_problem, error.errors(include_url=False)))) from None
    if "seed" in values:
        return request
    return request.model_copy(update={"seed": seed_from_id(request.id)})


def _problem(item: Any) -> str:
    """One of pydantic's errors in our words."""
    if not item["loc"]:  # of several fields together; the text names them
        return str(item["msg"]).removeprefix("Value error, ")
    name = str(item["loc"][0])
    if item["type"] == "extra_forbidden":
        known = ", ".join(GenerationRequest.model_fields)
        return f"{_quote(name)}: no such field; known are {known}"
    return f"{name}: {item['msg'].removeprefix('Value error, ')}"


def new_traceparent() -> str:
    """A W3C traceparent that begins a trace."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"


def session_id(request_id: str) -> str:
    """The id a request's session has on the wire: 12 hexadecimal digits, blake2b of the id."""
    return blake2b(request_id.encode(), digest_size=6).hexdigest()


def inner_session_id(session: str) -> str:
    """The id of the session that a middle worker verifies, whose text are `session`'s drafts."""
    return f"{session}.middle"


def seed_from_id(request_id: str) -> int:
    """The seed of a request that came without one: 63 bits, a function of its id."""
    digest = blake2b(request_id.encode(), digest_size=8, person=b"e2sci-seed").digest()
    return int.from_bytes(digest, "big") >> 1
