"""What a message may contain: limits, array shapes, and the views on them."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from bus.protocol.arrays import pack_tokens, unpack_tokens
from bus.protocol.codec import decode, encode
from bus.protocol.errors import DecodeError
from bus.protocol.messages import (
    MAX_SPARSE,
    Ack,
    CloseSession,
    ControlUpdate,
    DraftRows,
    DraftWindow,
    Feedback,
)
from tests.sessions import OPENING, REPORT

ROWS = DraftRows(
    q_ids=pack_tokens((7, 1, 2, 9, 5, 6)),
    q_probs=np.array([0.5, 0.25, 0.125, 1.0, 0.0, 0.0], dtype="<f2").tobytes(),
    threshold=0.5,
    control_version=6,
    edge_ms=2.5,
    rework_ms=0.5,
)
BARE = DraftWindow(
    handle=1,
    number=3,
    acknowledged=4,
    start=4,
    follows=bytes(range(8)),
    tokens=pack_tokens((7, 9)),
)
WINDOW = msgspec.structs.replace(BARE, rows=ROWS)
ACK = Ack(1, 3, 5)
OPEN = msgspec.structs.replace(
    OPENING, max_new_tokens=16, temperature=0.1, top_p=0.9, top_k=40, tokenizer_digest="d" * 64
)
FEEDBACK = Feedback(1, 5, pack_tokens((8,)), 3, 1.5, 10.0, 0.5, 3)
UPDATE = ControlUpdate("s1", 1, 2, 0.25, 4, 0.5, -0.25)


def rows_with(**changes: Any) -> dict[str, Any]:
    return {"rows": msgspec.structs.replace(ROWS, **changes)}


def probs(*values: float) -> bytes:
    return np.array(values, dtype="<f2").tobytes()


def roundtrip(message: Any) -> Any:
    return decode(encode(message))


def test_tokens_are_little_endian_int32() -> None:
    assert pack_tokens((1, 258, -1)) == b"\x01\0\0\0\x02\x01\0\0\xff\xff\xff\xff"
    assert unpack_tokens(pack_tokens((1, 258, 2**31 - 1))) == (1, 258, 2**31 - 1)
    assert pack_tokens(()) == b""
    assert unpack_tokens(b"") == ()


def test_a_window_shows_its_rows() -> None:
    window = roundtrip(WINDOW)
    assert window.num_tokens == 2
    assert window.token_ids == (7, 9)
    np.testing.assert_array_equal(window.q_id_rows, [[7, 1, 2], [9, 5, 6]])
    np.testing.assert_array_equal(window.q_prob_rows, [[0.5, 0.25, 0.125], [1.0, 0.0, 0.0]])
    assert (window.q_id_rows.dtype.str, window.q_prob_rows.dtype.str) == ("<i4", "<f2")
    assert not window.q_id_rows.flags.writeable


def test_a_window_of_ids_alone_has_empty_rows() -> None:
    window = roundtrip(BARE)
    assert window.rows is None
    assert window.q_id_rows.shape == window.q_prob_rows.shape == (2, 0)


LARGE = {"handle": 2**31 - 1, "number": 9999, "acknowledged": 9999, "start": 9999}


@pytest.mark.parametrize("num_tokens", [1, 2, 8, 32, 256])
def test_a_window_of_ids_takes_72_bytes_and_4_a_token(num_tokens: int) -> None:
    tokens = np.full(num_tokens, 151_000, "<i4").tobytes()
    window = msgspec.structs.replace(BARE, tokens=tokens, **LARGE)
    assert len(encode(window)) <= 72 + 4 * num_tokens


@pytest.mark.parametrize("again", [True, False])
def test_an_acknowledgement_takes_72_bytes(again: bool) -> None:
    assert len(encode(Ack(2**31 - 1, 9999, 9999, again))) <= 72


def test_identifiers_of_the_longest_allowed_form_pass() -> None:
    name = "aZ09_.:-" * 8
    assert roundtrip(CloseSession(name, 0, "")).session == name


@pytest.mark.parametrize("name", ["", "a" * 65, "a b", "a/b", "a+b", "ä", "a\n", "\na", "a\0"])
def test_identifiers_with_anything_else_are_refused(name: str) -> None:
    with pytest.raises(DecodeError):
        roundtrip(CloseSession(name, 0, ""))


@pytest.mark.parametrize(
    ("message", "changes", "text"),
    [
        (WINDOW, {"tokens": b""}, "at least one token"),
        (BARE, {"tokens": b""}, "at least one token"),
        (BARE, {"follows": b""}, "follows: expected 8 bytes, got 0"),
        (BARE, {"follows": bytes(7)}, "follows: expected 8 bytes, got 7"),
        (BARE, {"follows": bytes(9)}, "follows: expected 8 bytes, got 9"),
        (WINDOW, {"tokens": pack_tokens((7, 9, 11, 13))}, "q_ids: expected"),
        (BARE, {"handle": -1}, "int"),
        (BARE, {"start": 2**31}, "int"),
        (ACK, {"length": -1}, "int"),
        (WINDOW, {"tokens": b"123"}, "whole number of int32"),
        (WINDOW, rows_with(q_ids=b""), "q_ids: expected"),
        (WINDOW, rows_with(q_ids=ROWS.q_ids[:-1]), "q_ids: expected"),
        (WINDOW, rows_with(q_ids=ROWS.q_ids[:-4]), "q_ids: expected"),
        (WINDOW, rows_with(q_ids=bytes(8 * (MAX_SPARSE + 1))), "q_ids: expected"),
        (WINDOW, rows_with(q_probs=ROWS.q_probs[:-2]), "q_probs: expected"),
        (WINDOW, rows_with(q_probs=ROWS.q_probs * 2), "q_probs: expected"),
        (WINDOW, rows_with(q_probs=probs(0.5, -0.1, 0, 1, 0, 0)), "falling"),
        (WINDOW, rows_with(q_probs=probs(1.01, 0.5, 0, 1, 0, 0)), "must begin with"),
        (WINDOW, rows_with(q_probs=probs(np.nan, 0.5, 0, 1, 0, 0)), "must begin with"),
        (WINDOW, rows_with(q_probs=probs(np.inf, 0.5, 0, 1, 0, 0)), "must begin with"),
        (
            WINDOW,
            rows_with(q_ids=pack_tokens((7, 1, 2, 5, 6, 9)), q_probs=probs(0.5, 0, 0, 0, 0, 0)),
            "must begin with",
        ),
        (WINDOW, rows_with(q_probs=probs(0.25, 0.5, 0, 1, 0, 0)), "falling"),
        (WINDOW, rows_with(q_probs=probs(0.5, 0.5, 0.5, 1, 0, 0)), "rising id"),
        (WINDOW, rows_with(q_ids=pack_tokens((7, 1, 2, 9, 6, 5))), "rising id"),
        (OPEN, {"prompt": b""}, "at least one token"),
        (OPEN, {"prompt": b"12345"}, "prompt: 5 bytes"),
        (OPEN, {"committed": b"1"}, "committed: 1 bytes"),
        (OPEN, {"temperature": -0.1}, "float"),
        (OPEN, {"temperature": 101.0}, "float"),
        (OPEN, {"top_p": 0.0}, "float"),
        (OPEN, {"top_p": 1.1}, "float"),
        (OPEN, {"top_k": -1}, "int"),
        (OPEN, {"seed": -1}, "int"),
        (OPEN, {"seed": 2**63}, "int"),
        (OPEN, {"max_new_tokens": 0}, "int"),
        (OPEN, {"tokenizer_digest": ""}, "str"),
        (FEEDBACK, {"start": -1}, "int"),
        (FEEDBACK, {"tokens": b"123"}, "whole number of int32"),
        (FEEDBACK, {"number": -1}, "int"),
        (FEEDBACK, {"held_ms": -1.0}, "float"),
        (WINDOW, rows_with(threshold=1.5), "float"),
        (FEEDBACK, {"verify_ms": -1.0}, "float"),
        (REPORT, {"mean_jsd": 1.5}, "float"),
        (REPORT, {"expected_accepted": -0.5}, "float"),
        (REPORT, {"energy_j": -1.0}, "float"),
        (UPDATE, {"window": 0}, "int"),
        (UPDATE, {"window": 1025}, "int"),
        (UPDATE, {"credit": 1.5}, "float"),
        (UPDATE, {"credit_delta": -1.5}, "float"),
    ],
)
def test_values_out_of_range_are_refused(message: Any, changes: dict[str, Any], text: str) -> None:
    frame = encode(_unchecked(message, changes))
    with pytest.raises(DecodeError, match=text):
        decode(frame)


@pytest.mark.parametrize(
    ("message", "changes"),
    [(WINDOW, {"tokens": b"123"}), (BARE, {"follows": b"1"}), (OPEN, {"prompt": b""})],
)
def test_arrays_are_checked_where_a_message_is_made_too(
    message: Any, changes: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        msgspec.structs.replace(message, **changes)


def _unchecked(message: Any, changes: dict[str, Any]) -> Any:
    """A message as a program without these checks would send it."""
    fields = msgspec.structs.asdict(message) | changes
    twin: Any = msgspec.defstruct(
        "Twin", [(name, Any) for name in fields], array_like=True,
        tag=message.__struct_config__.tag, namespace={"single_float": message.single_float},
    )  # fmt: skip
    assert encode(twin(**msgspec.structs.asdict(message))) == encode(message)
    return twin(**fields)
