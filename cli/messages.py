"""Chat messages from the command line: a file of them, a system message, a last prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from bus.protocol.chat import ChatMessage, Role, parse_messages
from bus.protocol.errors import RequestError
from cli.options import STDIN, read_prompt, read_text

__all__ = ["read_messages", "with_prompt"]


def read_messages(path: Path) -> tuple[Any, ...]:
    """Messages of a JSON file, as they are there: a list, or an object with the list `messages`.

    Args:
        path: `-` is standard input.

    Raises:
        RequestError: it cannot be read, or holds neither.
    """
    text = read_prompt(STDIN) if str(path) == STDIN else read_text(path)
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(f"{_name(path)}: expected JSON, {error}") from None
    if isinstance(value, dict):
        value = value.get("messages")
    if not isinstance(value, list):
        raise RequestError(
            f"{_name(path)}: expected a JSON list of messages, or an object with a list `messages`"
        )
    return tuple(value)


def with_prompt(
    messages: tuple[Any, ...], system: str | None, prompt: str | None
) -> tuple[ChatMessage, ...]:
    """The chat: a system message at its beginning and a user's at its end, where they are given.

    Raises:
        RequestError: a message is wrong, or the chat has a system message already.
    """
    before = [] if system is None else [ChatMessage(role=Role.SYSTEM, content=system)]
    after = [] if prompt is None else [ChatMessage(role=Role.USER, content=prompt)]
    try:
        chat = parse_messages([*before, *messages, *after])
    except ValueError as error:
        raise RequestError(f"messages: {error}") from None
    if before and any(message.role is Role.SYSTEM for message in chat[1:]):
        raise RequestError("the chat has a system message already; leave out --system")
    return chat


def _name(path: Path) -> str:
    return "standard input" if str(path) == STDIN else str(path)
