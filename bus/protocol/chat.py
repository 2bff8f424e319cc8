"""Chat messages of a request: who says what. Text in JSON or Python values; both are checked here.

A message's content is plain text: no part of it ever becomes a special token
(`engines.chat`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict

__all__ = ["MAX_MESSAGES", "ChatMessage", "Role", "parse_messages", "read_json"]

MAX_MESSAGES = 1024


class Role(StrEnum):
    """Who says a message."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


class ChatMessage(BaseModel):
    """One message."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Role
    content: str


def read_json(text: str, expected: str) -> Any:
    """The value in a field of JSON text.

    Raises:
        ValueError: it is none; the text names what is expected.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"expected {expected}") from None


def parse_messages(value: Any) -> tuple[ChatMessage, ...]:
    """Messages from JSON text, from mappings or from `ChatMessage`s.

    Raises:
        ValueError: they are none, too many, or the last one is empty or the assistant's.
    """
    if isinstance(value, str):
        value = read_json(value, 'a JSON list such as [{"role": "user", "content": "Hi"}]')
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise ValueError("expected a list of messages with role and content")
    if len(value) > MAX_MESSAGES:
        raise ValueError(f"{len(value)} messages, the limit is {MAX_MESSAGES}")
    messages = tuple(_parse_message(number, item) for number, item in enumerate(value))
    _check_end(messages)
    return messages


def _parse_message(number: int, item: Any) -> ChatMessage:
    if isinstance(item, ChatMessage):
        return item
    if not isinstance(item, Mapping) or set(item) != {"role", "content"}:
        raise ValueError(f"message {number}: expected an object of role and content")
    role, content = item["role"], item["content"]
    if role not in list(Role):
        known = ", ".join(Role)
        raise ValueError(f"message {number}: role must be one of {known}, got {role!r:.40}")
    if not isinstance(content, str):
        raise ValueError(f"message {number}: content must be text, got {type(content).__name__}")
    try:
        content.encode()
    except UnicodeEncodeError:
        raise ValueError(f"message {number}: half of a surrogate pair is not a character") from None
    return ChatMessage(role=Role(role), content=content)


def _check_end(messages: tuple[ChatMessage, ...]) -> None:
    if not messages:
        return
    if messages[-1].role is Role.ASSISTANT:
        raise ValueError(
            "the last message is the assistant's; going on with it is not supported, give a user's"
        )
    if not messages[-1].content.strip():
        raise ValueError("the last message is empty; give some text")
