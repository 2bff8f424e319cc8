"""The wire: golden bytes of every message, round trips, and every kind of garbage."""

from __future__ import annotations

import contextlib
import math
from typing import Any, get_args

import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.protocol.arrays import pack_tokens
from bus.protocol.bounds import SessionCoupling
from bus.protocol.codec import MAX_FRAME_BYTES, AnyMessage, VersionError, decode, encode
from bus.protocol.errors import DecodeError, MessageTooLargeError
from bus.protocol.messages import (
    MAX_SPARSE,
    PROTOCOL_VERSION,
    CloseSession,
    ControlUpdate,
    DraftWindow,
    Fault,
    FaultCode,
    Feedback,
    Message,
    OpenSession,
    Outcome,
    SessionClosed,
    SessionOpened,
    SessionReady,
    WindowReport,
)

OPEN = OpenSession(
    "s1", "c1", "edge-1", 1, 2, 3, "sd", pack_tokens((1, 300)), pack_tokens((8,)), 2**62, 16,
    0.1, 0.9, 40, SessionCoupling.GUMBEL, "digest",
)  # fmt: skip
FEEDBACK = Feedback("s1", 1, 2, 3, 7, Outcome.PARTIAL, 1, 300, 0.15, 10.5, 0.25, 3)
WINDOW = DraftWindow(
    "s1", 1, 2, 3, 4, pack_tokens((7, 9)), pack_tokens((7, 1, 9, 5)),
    np.array([0.5, 0.25, 1.0, 0.0], dtype="<f2").tobytes(), 0.15, 6, 1.5, 2.5, 0.5, 4.5, True,
)  # fmt: skip
GOLDEN: list[tuple[Message, str]] = [
    (
        OPEN,
        ("dc00120401a27331a26331a6656467652d31010203a27364c408010000002c010000c40408000000"
         "cf400000000000000010cb3fb999999999999acb3feccccccccccccd28a667756d62656ca6646967"
         "657374"),
    ),
    (
        WINDOW,
        ("dc00110402a2733101020304c4080700000009000000c41007000000010000000900000005000000"
         "c40800380034003c0000ca3e19999a06ca3fc00000ca40200000ca3f000000ca40900000c3"),
    ),
    (
        CloseSession("s1", 1, "length"),
        ("950403a2733101a66c656e677468"),
    ),
    (
        SessionReady("s1", 1, "cloud-1"),
        ("950404a2733101a7636c6f75642d31"),
    ),
    (
        FEEDBACK,
        ("9e0405a2733101020307a77061727469616c01cd012cca3e19999aca41280000ca3e80000003"),
    ),
    (
        WindowReport(
            FEEDBACK, "edge-1", "c1", "sd", 1.5, 0.125, 2, 20.5, 12.25, 3.5, None, 2, -0.5, 1, 0.25
        ),
        ("dc001104069d05a2733101020307a77061727469616c01cd012cca3e19999aca41280000ca3e8000"
         "0003a6656467652d31a26331a27364ca3fc00000ca3e00000002ca41a40000ca41440000ca406000"
         "00c002cabf00000001ca3e800000"),
    ),
    (
        SessionOpened("s1", "c1", "edge-1", "cloud-1", "sd", 1),
        ("980407a27331a26331a6656467652d31a7636c6f75642d31a2736401"),
    ),
    (
        SessionClosed("s1", "cloud-1", 1, "expired"),
        ("96040aa27331a7636c6f75642d3101a765787069726564"),
    ),
    (
        ControlUpdate("s1", 1, 2, 0.15, 4, 0.5, -0.25),
        ("990408a273310102cb3fc333333333333304cb3fe0000000000000cbbfd0000000000000"),
    ),
    (
        Fault("-", FaultCode.BAD_TOKENS, "why"),
        ("950409a12daa6261645f746f6b656e73a3776879"),
    ),
]  # fmt: skip
"""Bytes that other versions of this code, and other programs, read. A change here is a change of
the protocol: raise PROTOCOL_VERSION."""


def array_of(message: Message) -> list[Any]:
    return [PROTOCOL_VERSION, *msgspec.to_builtins(message, builtin_types=(bytes,))]


@pytest.mark.parametrize(
    ("message", "frame"), GOLDEN, ids=[type(message).__name__ for message, _ in GOLDEN]
)
def test_golden_bytes(message: Message, frame: str) -> None:
    assert encode(message).hex() == frame
    assert encode(decode(bytes.fromhex(frame))).hex() == frame


def test_every_message_has_golden_bytes_and_a_tag_of_its_own() -> None:
    kinds = set(get_args(AnyMessage))
    assert {type(message) for message, _ in GOLDEN} == kinds
    assert len({kind.__struct_config__.tag for kind in kinds}) == len(kinds)


# --- round trips ------------------------------------------------------------------------------

names = st.text("abcXYZ019_.:-", min_size=1, max_size=64)
counters = st.integers(0, 2**31 - 1)
millis = st.floats(0, 1e9, width=32)
units = st.floats(0, 1, width=32)
thresholds = st.floats(-1, 1, width=32)
token_bytes = st.lists(st.integers(0, 2**31 - 1), max_size=20).map(pack_tokens)


@st.composite
def draft_windows(draw: st.DrawFn) -> DraftWindow:
    num_tokens, num_sparse = draw(st.integers(1, 8)), draw(st.integers(1, 50))
    probs = draw(
        st.lists(
            st.floats(0, 1, width=16), min_size=num_tokens * num_sparse,
            max_size=num_tokens * num_sparse,
        )
    )  # fmt: skip
    rows = np.array(probs, dtype="<f2").reshape(num_tokens, num_sparse)
    rows[:, 0] = 1.0
    rows = -np.sort(-rows, axis=1)
    ids = np.arange(rows.size, dtype="<i4")
    return DraftWindow(
        draw(names), draw(counters), draw(counters), draw(counters), draw(counters),
        pack_tokens(range(num_tokens)), ids.tobytes(), rows.tobytes(), draw(thresholds),
        draw(counters), draw(millis), draw(millis), draw(millis), draw(millis),
        draw(st.booleans()),
    )  # fmt: skip


feedbacks = st.builds(
    Feedback, names, counters, counters, counters, counters, st.sampled_from(Outcome), counters,
    st.none() | counters, thresholds, millis, millis, counters,
)  # fmt: skip
messages = st.one_of(
    st.builds(
        OpenSession, names, names, names, counters, counters, counters, names,
        token_bytes.filter(bool), token_bytes, st.integers(0, 2**63 - 1),
        st.integers(1, 2**31 - 1), st.floats(0, 100), st.floats(0, 1, exclude_min=True), counters,
        st.sampled_from(SessionCoupling),
        st.text(min_size=1, max_size=128),
    ),
    draft_windows(),
    st.builds(CloseSession, names, counters, st.text(max_size=200)),
    st.builds(SessionReady, names, counters, names),
    feedbacks,
    st.builds(
        WindowReport, feedbacks, names, names, names, st.floats(0, 1e6, width=32), units, counters,
        millis, millis, millis, st.none() | st.floats(0, 1e9, width=32), counters,
        st.floats(-1e9, 0, width=32), counters, st.floats(0, 1e9, width=32),
    ),
    st.builds(SessionOpened, names, names, names, names, names, counters),
    st.builds(SessionClosed, names, names, counters, st.text(max_size=200)),
    st.builds(
        ControlUpdate, names, counters, counters, st.floats(-1, 1), st.integers(1, 1024),
        st.floats(0, 1), st.floats(-1, 1),
    ),
    st.builds(Fault, names, st.sampled_from(FaultCode), st.text(max_size=500)),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(messages)
def test_what_is_decoded_is_what_was_encoded(message: Message) -> None:
    assert decode(encode(message)) == message


def test_sampling_parameters_travel_as_float64_and_measurements_as_float32() -> None:
    """Both ends must warp the very same distribution; a duration may be rounded."""
    opened = decode(encode(OPEN))
    assert isinstance(opened, OpenSession)
    assert (opened.temperature, opened.top_p) == (0.1, 0.9)
    feedback = decode(encode(FEEDBACK))
    assert isinstance(feedback, Feedback)
    assert feedback.threshold == float(np.float32(0.15))
    assert {kind for kind in get_args(AnyMessage) if kind.single_float} == {
        DraftWindow, Feedback, WindowReport,
    }  # fmt: skip


@pytest.mark.parametrize("session", ["s1", "6ba7b810-9dad-11d1-80b4-00c04fd430c8"])
def test_a_drafted_token_takes_at_most_320_bytes(session: str) -> None:
    num_tokens, num_sparse = 4, 48
    window = DraftWindow(
        session, 1000, 1000, 100_000, 100_000, np.full(4, 49_000, "<i4").tobytes(),
        np.tile(np.arange(49_000, 49_000 + num_sparse, dtype="<i4"), num_tokens).tobytes(),
        np.full((num_tokens, num_sparse), 0.02, "<f2").tobytes(), 0.15, 1000, 12.3, 45.6, 7.8, 9.1,
        False,
    )  # fmt: skip
    assert len(encode(window)) <= 320 * num_tokens


@pytest.mark.parametrize("num_tokens", [1, 8, 32])
def test_ids_alone_take_four_bytes_a_token(num_tokens: int) -> None:
    """Beside at most 72 of the message, with a session id as long as those of `session_id`."""
    window = msgspec.structs.replace(
        WINDOW, session="0123456789abcdef", tokens=pack_tokens(range(49_000, 49_000 + num_tokens)),
        q_ids=b"", q_probs=b"", start=100_000, seq=100_000, threshold=0.125,
    )  # fmt: skip
    frame = encode(window)
    assert len(frame) <= 72 + 4 * num_tokens
    again = decode(frame)
    assert again == window
    assert isinstance(again, DraftWindow)
    assert again.q_id_rows.shape == again.q_prob_rows.shape == (num_tokens, 0)


@pytest.mark.parametrize(("q_ids", "q_probs"), [(b"", bytes(4)), (pack_tokens((7, 9)), b"")])
def test_half_a_row_is_refused(q_ids: bytes, q_probs: bytes) -> None:
    with pytest.raises(ValueError, match="q_probs: expected"):
        msgspec.structs.replace(WINDOW, q_ids=q_ids, q_probs=q_probs)


# --- what must not be sent --------------------------------------------------------------------


def test_a_message_over_the_limit_is_not_encoded() -> None:
    close = CloseSession("s1", 1, "x" * 100)
    size = len(encode(close))
    assert len(encode(close, max_bytes=size)) == size
    with pytest.raises(MessageTooLargeError, match=f"takes {size} bytes"):
        encode(close, max_bytes=size - 1)
    prompt = bytes(MAX_FRAME_BYTES)
    with pytest.raises(MessageTooLargeError, match="shorter prompt"):
        encode(msgspec.structs.replace(OPEN, prompt=prompt))


def test_the_largest_window_fits_a_frame() -> None:
    window = msgspec.structs.replace(
        WINDOW,
        tokens=pack_tokens(range(256)),
        q_ids=np.tile(np.arange(MAX_SPARSE, dtype="<i4"), 256).tobytes(),
        q_probs=np.ones(256 * MAX_SPARSE, "<f2").tobytes(),
    )
    assert decode(encode(window)) == msgspec.structs.replace(
        window, threshold=float(np.float32(0.15))
    )


# --- garbage ----------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(frame: bytes) -> None:
    with pytest.raises(DecodeError):
        decode(frame)


json_like: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary()
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("ab"), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(tag=st.integers(0, 12), fields=st.lists(json_like, max_size=16))
def test_well_formed_nonsense_is_refused(tag: int, fields: list[Any]) -> None:
    with pytest.raises(DecodeError):
        decode(msgpack.packb([PROTOCOL_VERSION, tag, *fields]))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_one_flipped_byte_gives_a_message_or_is_refused(data: st.DataObject) -> None:
    frame = bytearray.fromhex(data.draw(st.sampled_from([frame for _, frame in GOLDEN])))
    at = data.draw(st.integers(0, len(frame) - 1))
    frame[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(DecodeError):
        decode(bytes(frame))


@pytest.mark.parametrize("message", [m for m, _ in GOLDEN], ids=lambda m: type(m).__name__)
def test_a_cut_frame_is_refused_at_every_length(message: Message) -> None:
    frame = encode(message)
    for size in range(len(frame)):
        with pytest.raises(DecodeError):
            decode(frame[:size])
    with pytest.raises(DecodeError):
        decode(frame + b"\0")


@pytest.mark.parametrize("message", [m for m, _ in GOLDEN], ids=lambda m: type(m).__name__)
def test_a_field_too_few_or_too_many_is_refused(message: Message) -> None:
    array = array_of(message)
    for wrong in (array[:-1], [*array, 0], [*array, None]):
        with pytest.raises(DecodeError):
            decode(msgpack.packb(wrong))


@pytest.mark.parametrize("message", [m for m, _ in GOLDEN], ids=lambda m: type(m).__name__)
def test_a_field_of_a_wrong_type_is_refused(message: Message) -> None:
    array = array_of(message)
    for at in range(2, len(array)):
        for wrong in WRONG:
            if isinstance(wrong, str | bool) and type(wrong) is type(array[at]):
                continue  # an empty reason is fine, and so is a flag that is set
            if wrong == -2 and array[at] == -0.5:
                continue  # a log-likelihood may be
            changed = [*array[:at], wrong, *array[at + 1 :]]
            with pytest.raises(DecodeError):
                decode(msgpack.packb(changed))


WRONG: tuple[Any, ...] = ([], {}, True, -2, "", math.nan, math.inf, -math.inf, [[1]], 2**63)


def test_text_is_no_array() -> None:
    """msgspec takes base64 text for bytes unless told not to."""
    array = array_of(WINDOW)
    array[7] = "BwAAAAkAAAA="
    with pytest.raises(DecodeError, match="Expected `bytes`, got `str`"):
        decode(msgpack.packb(array))


@pytest.mark.parametrize("version", [0, 1, 2, 3, -1, 2**40])
def test_another_version_is_named(version: int) -> None:
    frame = msgpack.packb([version, *array_of(FEEDBACK)[1:]])
    with pytest.raises(VersionError, match=f"protocol version {version}, this side speaks 4"):
        decode(frame)


@pytest.mark.parametrize("version", [True, 1.0, "1", None, [], b"\1"])
def test_what_only_looks_like_a_version_is_none(version: object) -> None:
    with pytest.raises(DecodeError, match="expected a protocol version first"):
        decode(msgpack.packb([version, *array_of(FEEDBACK)[1:]]))


@pytest.mark.parametrize("tag", [0, 11, 2**31, -1, "5", None, 5.0, True])
def test_unknown_tags_are_refused(tag: object) -> None:
    with pytest.raises(DecodeError):
        decode(msgpack.packb([PROTOCOL_VERSION, tag, *array_of(FEEDBACK)[2:]]))


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",  # never used in MessagePack
        b"\x90",
        b"\x80",
        b"\x01",
        b"\xa3abc",
        b"\xa1\xff",  # no UTF-8
        b"\x91\x01",
        b"\xdd\xff\xff\xff\xff",  # an array of 2**32 - 1 elements, it says
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x81\x90\x01",  # a list as a key
        b"\xd6\xff\0\0\0\0",  # a timestamp
        b"\xc7\x05\xff12345",  # a timestamp of no known size
        b"\x92\x01\xd4\x07\x00",  # a foreign extension
    ],
    ids=bytes.hex,
)
def test_broken_frames_are_refused(frame: bytes) -> None:
    with pytest.raises(DecodeError):
        decode(frame)


@pytest.mark.parametrize("depth", [3, 100, 1000, 1023, 1025, 5_000, 10_000_000])
@pytest.mark.parametrize("prefix", [b"", b"\x92\x01", b"\x93\x01\x05", b"\x92\x02"])
@pytest.mark.parametrize("level", [b"\x91", b"\x81\xa1a", b"\x81"])
def test_nesting_bombs_are_refused(depth: int, prefix: bytes, level: bytes) -> None:
    bomb = prefix + level * depth + b"\xc0"
    with pytest.raises(DecodeError):
        decode(bomb, max_bytes=2**30)
    with pytest.raises(DecodeError):
        decode(bomb)


def test_frames_over_the_limit_are_not_even_read() -> None:
    frame = encode(FEEDBACK)
    with pytest.raises(DecodeError, match="the limit is 10"):
        decode(frame, max_bytes=10)
    with pytest.raises(DecodeError, match="the limit is"):
        decode(bytes(MAX_FRAME_BYTES + 1))


def test_a_report_with_garbage_in_its_feedback_is_refused() -> None:
    array = array_of(next(m for m, _ in GOLDEN if isinstance(m, WindowReport)))
    for wrong in ([], [5], array_of(FEEDBACK)[1:-1], array_of(WINDOW)[1:], FEEDBACK.session):
        with pytest.raises(DecodeError):
            decode(msgpack.packb([*array[:2], wrong, *array[3:]]))
