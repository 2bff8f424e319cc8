"""Messages ⇄ bytes: MessagePack arrays `[version, tag, field, …]`, validated on arrival."""

from __future__ import annotations

from typing import Any, get_args

import msgpack
import msgspec

from bus.protocol.errors import DecodeError, MessageTooLargeError
from bus.protocol.messages import (
    PROTOCOL_VERSION,
    Ack,
    CloseSession,
    ControlUpdate,
    DraftWindow,
    Fault,
    Feedback,
    Message,
    OpenSession,
    SessionClosed,
    SessionOpened,
    SessionReady,
    WindowReport,
)

MAX_FRAME_BYTES = 4 * 2**20
"""Largest frame a socket takes; libzmq drops a peer that sends more (ZMQ_MAXMSGSIZE)."""

AnyMessage = (
    OpenSession
    | DraftWindow
    | Ack
    | CloseSession
    | SessionReady
    | Feedback
    | WindowReport
    | SessionOpened
    | SessionClosed
    | ControlUpdate
    | Fault
)


_BY_TAG: dict[int | None, Any] = {kind.__struct_config__.tag: kind for kind in get_args(AnyMessage)}


class VersionError(DecodeError):
    """The frame is MessagePack of another protocol version."""


def encode(message: Message, max_bytes: int = MAX_FRAME_BYTES) -> bytes:
    """Encode `message` as one frame.

    Raises:
        MessageTooLargeError: the frame would be over `max_bytes`; nothing is sent.
    """
    fields = msgspec.to_builtins(message, builtin_types=(bytes,))
    frame: bytes = msgpack.packb(
        [PROTOCOL_VERSION, *fields], use_single_float=type(message).single_float
    )
    if len(frame) > max_bytes:
        raise MessageTooLargeError(
            f"{type(message).__name__} takes {len(frame)} bytes, the limit is {max_bytes}; "
            "send fewer tokens at a time or a shorter prompt"
        )
    return frame


def decode(frame: bytes, max_bytes: int = MAX_FRAME_BYTES) -> AnyMessage:
    """Decode and validate one frame.

    Raises:
        VersionError: a MessagePack array whose first element is another version number.
        DecodeError: anything else that is not a valid message; the text says which field.
    """
    if len(frame) > max_bytes:
        raise DecodeError(f"frame of {len(frame)} bytes, the limit is {max_bytes}")
    try:
        array: Any = msgpack.unpackb(frame, strict_map_key=True)
    except Exception as error:  # msgpack raises ValueError, its own types and UnicodeDecodeError
        raise DecodeError(f"not MessagePack: {error}") from error
    if not isinstance(array, list) or not array:
        raise DecodeError(f"expected an array [version, tag, …], got {type(array).__name__}")
    version = array[0]
    if type(version) is not int:  # not shown: the repr of a deep nest raises RecursionError
        raise DecodeError(f"expected a protocol version first, got {type(version).__name__}")
    if version != PROTOCOL_VERSION:
        raise VersionError(
            f"protocol version {version}, this side speaks {PROTOCOL_VERSION}; "
            "run the same release on both sides"
        )
    # The tag's own class where it has one: the union of all is worked out anew at each call.
    tag = array[1] if len(array) > 1 and type(array[1]) is int else None
    try:
        message: AnyMessage = msgspec.convert(
            array[1:], _BY_TAG.get(tag, AnyMessage), builtin_types=(bytes,)
        )
    except msgspec.ValidationError as error:
        raise DecodeError(str(error)[:500]) from error
    return message
