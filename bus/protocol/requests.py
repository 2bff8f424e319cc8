"""A generation request: its fields, their limits, and what to say when one is wrong.

A request travels as the string fields of a Redis stream entry (docs/architecture.md), written by
our client or by anybody's `XADD`. Both go through the same validation here. What only a worker
can judge (is the method known, does the prompt fit the model's context) is not checked here.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from bus.protocol.errors import RequestError

__all__ = [
    "MAX_PROMPT_BYTES",
    "GenerationRequest",
    "new_request",
    "seed_from_id",
    "session_id",
]

MAX_PROMPT_BYTES = 2**20
MIN_TEMPERATURE = 1e-3
"""Least temperature above 0: far below it, logits / temperature leaves the range of a float."""

_MAX_STOPS = 16
_MAX_STOP_CHARS = 1024
_IDENTIFIER = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_ENTRY_ID = re.compile(r"[0-9]+-[0-9]+")
_INTEGER = re.compile(r"[+-]?[0-9]{1,20}")
_REAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt and how to answer it.

    Attributes:
        id: names the result; `[A-Za-z0-9_.:-]{1,64}`.
        prompt: what to answer, 1 byte … 1 MiB of UTF-8.
        method: decoding method, by name.
        max_new_tokens: ≥ 1.
        temperature: 0 is greedy; else 0.001 … 100.
        top_p: 0 < top_p ≤ 1; 1 is off.
        top_k: ≥ 0; 0 is off.
        seed: 0 … 2**63 − 1; fixes every random choice.
        stop: up to 16 strings that end the answer; they are not part of it.
        raw: True: the prompt goes to the model as it is, without the chat template.
        client: who asks; credit is carried between prompts of one client.
    """

    id: str
    prompt: str
    method: str = "sd"
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    raw: bool = False
    client: str = "anonymous"

    def to_fields(self) -> dict[str, str]:
        """The fields of the stream entry."""
        return {
            "id": self.id,
            "prompt": self.prompt,
            "method": self.method,
            "max_new_tokens": str(self.max_new_tokens),
            "temperature": repr(self.temperature),
            "top_p": repr(self.top_p),
            "top_k": str(self.top_k),
            "seed": str(self.seed),
            "stop": json.dumps(list(self.stop), ensure_ascii=False),
            "raw": "1" if self.raw else "0",
            "client": self.client,
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
        reader = _FieldReader(fields)
        request_id = reader.take("id", _read_id(entry_id), entry_id)
        request = cls(
            id=request_id,
            prompt=reader.take("prompt", _read_prompt, None),
            method=reader.take("method", _read_identifier, "sd"),
            max_new_tokens=reader.take("max_new_tokens", _integer(1, 2**31 - 1), 256),
            temperature=reader.take("temperature", _read_temperature, 0.0),
            top_p=reader.take("top_p", _read_top_p, 1.0),
            top_k=reader.take("top_k", _integer(0, 2**31 - 1), 0),
            seed=reader.take("seed", _integer(0, 2**63 - 1), seed_from_id(request_id)),
            stop=reader.take("stop", _read_stop, ()),
            raw=reader.take("raw", _read_flag, False),
            client=reader.take("client", _read_identifier, "anonymous"),
        )
        reader.finish()
        return request


def new_request(prompt: str, **options: Any) -> GenerationRequest:
    """A request with a fresh id and, unless one is given, a random seed.

    Args:
        prompt: the text.
        options: any field of `GenerationRequest` but `id`; None stands for the default.

    Raises:
        RequestError: a value is wrong or an option unknown; the text names all problems.
    """
    if "id" in options:
        raise RequestError("id: it is made here and cannot be chosen")
    given = {name: value for name, value in options.items() if value is not None}
    given.setdefault("seed", secrets.randbits(63))
    fields = {"id": uuid.uuid4().hex, "prompt": prompt}
    fields |= {name: _as_field(value) for name, value in given.items()}
    encoded = {name.encode(): _encode(value) for name, value in fields.items()}
    return GenerationRequest.from_fields(fields["id"], encoded)


def session_id(request_id: str) -> str:
    """The id a request's session has on the wire: 12 hexadecimal digits, blake2b of the id."""
    return blake2b(request_id.encode(), digest_size=6).hexdigest()


def seed_from_id(request_id: str) -> int:
    """The seed of a request that came without one: 63 bits, a function of its id."""
    digest = blake2b(request_id.encode(), digest_size=8, person=b"e2sci-seed").digest()
    return int.from_bytes(digest, "big") >> 1


class _FieldReader:
    """Reads fields one by one and gathers what is wrong, to say it all at once."""

    def __init__(self, fields: Mapping[bytes, bytes]) -> None:
        self._fields = dict(fields)
        self._known: list[str] = []
        self._problems: list[str] = []

    def take(self, name: str, read: Callable[[str], Any], default: Any) -> Any:
        """The field's value, or the default where it is missing or wrong (`finish` then raises)."""
        self._known.append(name)
        data = self._fields.pop(name.encode(), None)
        if data is None and default is not None:
            return default
        try:
            return read("" if data is None else data.decode("utf-8"))
        except UnicodeDecodeError as error:
            self._problems.append(f"{name}: not UTF-8 (byte {error.start}); encode text as UTF-8")
        except ValueError as error:
            self._problems.append(f"{name}: {error}")
        return default

    def finish(self) -> None:
        for name in self._fields:
            self._problems.append(
                f"{_quote(name.decode('utf-8', 'replace'))}: no such field; "
                f"known are {', '.join(self._known)}"
            )
        if self._problems:
            raise RequestError("; ".join(self._problems))


def _quote(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")


def _encode(value: str) -> bytes:
    # A lone surrogate is no UTF-8: let it reach the validation as the bad byte it is.
    return value.encode("utf-8", "surrogatepass")


def _as_field(value: Any) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return json.dumps(list(value), ensure_ascii=False)
    return str(value)


def _read_id(entry_id: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if not _IDENTIFIER.fullmatch(text):
            raise ValueError(f"expected 1 … 64 of A-Z a-z 0-9 _ . : -, got {_quote(text)}")
        if _ENTRY_ID.fullmatch(text) and text != entry_id:
            raise ValueError(f"{text} has the form of a stream entry id; choose another")
        return text

    return read


def _read_prompt(text: str) -> str:
    if not text.strip():
        raise ValueError("empty; give some text")
    size = len(text.encode())
    if size > MAX_PROMPT_BYTES:
        raise ValueError(f"{size} bytes, the limit is {MAX_PROMPT_BYTES}; shorten it")
    return text


def _read_identifier(text: str) -> str:
    if not _IDENTIFIER.fullmatch(text):
        raise ValueError(f"expected 1 … 64 of A-Z a-z 0-9 _ . : -, got {_quote(text)}")
    return text


def _integer(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not _INTEGER.fullmatch(text):
            raise ValueError(f"expected a whole number, got {_quote(text)}")
        value = int(text)
        if not low <= value <= high:
            raise ValueError(f"expected {low} … {high}, got {value}")
        return value

    return read


def _read_real(text: str) -> float:
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"expected a finite number, got {_quote(text)}")
    if not _REAL.fullmatch(text):
        raise ValueError(f"expected a number, got {_quote(text)}")
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {_quote(text)}")
    return value


def _read_temperature(text: str) -> float:
    value = _read_real(text)
    if value != 0 and not MIN_TEMPERATURE <= value <= 100:
        raise ValueError(f"expected 0 (greedy) or {MIN_TEMPERATURE} … 100, got {value}")
    return abs(value)  # -0.0


def _read_top_p(text: str) -> float:
    value = _read_real(text)
    if not 0 < value <= 1:
        raise ValueError(f"expected above 0 and at most 1, got {value}")
    return value


def _read_flag(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError(f"expected 0 or 1, got {_quote(text)}")
    return text == "1"


def _read_stop(text: str) -> tuple[str, ...]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f'expected a JSON list such as ["\\n\\n"], got {_quote(text)}') from None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"expected a JSON list of strings, got {_quote(text)}")
    if len(value) > _MAX_STOPS:
        raise ValueError(f"{len(value)} strings, the limit is {_MAX_STOPS}")
    if not all(0 < len(item) <= _MAX_STOP_CHARS for item in value):
        raise ValueError(f"each string needs 1 … {_MAX_STOP_CHARS} characters")
    if any("\ud800" <= char <= "\udfff" for item in value for char in item):
        raise ValueError("half of a surrogate pair is not a character")
    return tuple(value)
