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
    Ack,
    CloseSession,
    ControlUpdate,
    DraftRows,
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
    TokenFeatures,
    TokenRows,
    TokenScores,
    WindowReport,
)

OPEN = OpenSession(
    "s1", "c1", "edge-1", 1, "sd", pack_tokens((1, 300)), pack_tokens((8,)), 2**62, 16,
    0.1, 0.9, 40, SessionCoupling.GUMBEL, "digest",
)  # fmt: skip
FEEDBACK = Feedback(7, 5, pack_tokens((9, 300)), 3, 1.5, 10.5, 0.25, 3, True)
FEEDBACK_OF_TREE = Feedback(7, 5, pack_tokens((9, 300)), 3, 1.5, 10.5, 0.25, 9, proposed=8, depth=3)
FEEDBACK_WITH_ROWS = Feedback(
    7, 5, pack_tokens((9, 300)), None, 1.5, 10.5, 0.25, 3, False,
    TokenRows(
        pack_tokens((9, 5, 7, 300)), np.array([0.75, 0.25, 0.5, 0.5], dtype="<f2").tobytes()
    ),
)  # fmt: skip
FEEDBACK_WITH_FEATURES = Feedback(
    7, 5, pack_tokens((9,)), None, 1.5, 10.5, 0.25, 3, False,
    features=TokenFeatures(
        np.array([1, -1, 127, -127, 0, 2], np.int8).tobytes(),
        np.array([0.5, 0.25, 0], "<f2").tobytes(),
    ),
)  # fmt: skip
SCORES = np.array([-0.5, -2.0, -0.25, -1.0], dtype="<f4")
FEEDBACK_WITH_SCORES = Feedback(
    7, 5, pack_tokens((9, 300)), 3, 1.5, 10.5, 0.25, 3,
    scores=TokenScores(SCORES[:2].tobytes(), pack_tokens((9, 7)), SCORES[2:].tobytes()),
    prompt_scores=TokenScores(SCORES[:1].tobytes(), b"", b""),
)  # fmt: skip
ROWS = DraftRows(
    pack_tokens((7, 1, 9, 5)), np.array([0.5, 0.25, 1.0, 0.0], dtype="<f2").tobytes(), 0.15, 6, 2.5,
    0.5,
)  # fmt: skip
WINDOW = DraftWindow(7, 3, 4, 5, bytes(range(8)), pack_tokens((7, 9)), ROWS)
REPORT = WindowReport(
    "s1", 1, 3, "edge-1", "c1", "sd", Outcome.PARTIAL, 2, 1, 1, 0.15, 1.5, 0.125, 20.5, 12.25, 3.5,
    10.5, 0.25, None, 2, -0.5, 1, 0.25,
)  # fmt: skip
GOLDEN: list[tuple[Message, str]] = [
    (
        OPEN,
        ("dc00160901a27331a26331a6656467652d3101a27364c408010000002c010000c40408000000cf400000"
         "000000000010cb3fb999999999999acb3feccccccccccccd28a667756d62656ca6646967657374c2c2c0"
         "c2a0c2"),
    ),
    (
        WINDOW,
        ("9a090207030405c4080001020304050607c408070000000900000096c410070000000100000009000000"
         "05000000c40800380034003c0000ca3e19999a06ca40200000ca3f000000c2"),
    ),
    (
        Ack(7, 4, 6, True),
        ("97090b070406c3c0"),
    ),
    (
        Ack(7, 5, 6, False, 0.25),
        ("97090b070506c2ca3e800000"),
    ),
    (
        CloseSession("s1", 1, "length"),
        ("950903a2733101a66c656e677468"),
    ),
    (
        SessionReady("s1", 1, "cloud-1", 7),
        ("960904a2733101a7636c6f75642d3107"),
    ),
    (
        FEEDBACK,
        ("dc001109050705c408090000002c01000003ca3fc00000ca41280000ca3e80000003c3c00000c0c0c0"),
    ),
    (
        FEEDBACK_OF_TREE,
        ("dc001109050705c408090000002c01000003ca3fc00000ca41280000ca3e80000009c2c00803c0c0c0"),
    ),
    (
        FEEDBACK_WITH_ROWS,
        ("dc001109050705c408090000002c010000c0ca3fc00000ca41280000ca3e80000003c292c41009000000"
         "05000000070000002c010000c408003a0034003800380000c0c0c0"),
    ),
    (
        FEEDBACK_WITH_FEATURES,
        ("dc001109050705c40409000000c0ca3fc00000ca41280000ca3e80000003c2c0000092c40601ff7f8100"
         "02c406003800340000c0c0"),
    ),
    (
        FEEDBACK_WITH_SCORES,
        ("dc001109050705c408090000002c01000003ca3fc00000ca41280000ca3e80000003c2c00000c093c408"
         "000000bf000000c0c4080900000007000000c408000080be000080bf93c404000000bfc400c400"),
    ),
    (
        REPORT,
        ("dc00190906a273310103a6656467652d31a26331a27364a77061727469616c020101ca3e19999aca3fc0"
         "0000ca3e000000ca41a40000ca41440000ca40600000ca41280000ca3e800000c002cabf00000001ca3e"
         "800000"),
    ),
    (
        SessionOpened("s1", "c1", "edge-1", "cloud-1", "sd", 1),
        ("980907a27331a26331a6656467652d31a7636c6f75642d31a2736401"),
    ),
    (
        SessionClosed("s1", "cloud-1", 1, "expired"),
        ("96090aa27331a7636c6f75642d3101a765787069726564"),
    ),
    (
        ControlUpdate("s1", 1, 2, 0.15, 4, 0.5, -0.25),
        ("990908a273310102cb3fc333333333333304cb3fe0000000000000cbbfd0000000000000"),
    ),
    (
        Fault("-", FaultCode.BAD_TOKENS, "why", 7),
        ("960909a12daa6261645f746f6b656e73a377687907"),
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
    made = DraftRows(
        ids.tobytes(), rows.tobytes(), draw(thresholds), draw(counters), draw(millis), draw(millis)
    )
    return DraftWindow(
        draw(counters), draw(counters), draw(counters), draw(counters),
        draw(st.binary(min_size=8, max_size=8)), pack_tokens(range(num_tokens)),
        draw(st.sampled_from([made, None])),
    )  # fmt: skip


feedbacks = st.builds(
    Feedback, counters, counters, token_bytes, st.none() | counters, millis, millis, millis,
    counters, st.booleans(), st.none(), counters, counters,
)  # fmt: skip
messages = st.one_of(
    st.builds(
        OpenSession, names, names, names, counters, names,
        token_bytes.filter(bool), token_bytes, st.integers(0, 2**63 - 1),
        st.integers(1, 2**31 - 1), st.floats(0, 100), st.floats(0, 1, exclude_min=True), counters,
        st.sampled_from(SessionCoupling),
        st.text(min_size=1, max_size=128), st.booleans(), st.booleans(),
        st.none() | st.integers(0, 20), st.booleans(), st.text(max_size=64),
        st.booleans(),
    ),
    draft_windows(),
    st.builds(CloseSession, names, counters, st.text(max_size=200)),
    st.builds(SessionReady, names, counters, names, counters),
    st.builds(Ack, counters, counters, counters, st.booleans(), st.none() | thresholds),
    feedbacks,
    st.builds(
        WindowReport, names, counters, counters, names, names, names, st.sampled_from(Outcome),
        counters, counters, counters, thresholds, st.floats(0, 1e6, width=32), st.none() | units,
        millis, millis, millis, millis, millis, st.none() | st.floats(0, 1e9, width=32), counters,
        st.floats(-1e9, 0, width=32), counters, st.floats(0, 1e9, width=32),
    ),
    st.builds(SessionOpened, names, names, names, names, names, counters),
    st.builds(SessionClosed, names, names, counters, st.text(max_size=200)),
    st.builds(
        ControlUpdate, names, counters, counters, st.floats(-1, 1), st.integers(1, 1024),
        st.floats(0, 1), st.floats(-1, 1),
    ),
    st.builds(
        Fault, names, st.sampled_from(FaultCode), st.text(max_size=500), st.none() | counters
    ),
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
    window = decode(encode(WINDOW))
    assert isinstance(window, DraftWindow)
    assert window.rows is not None
    assert window.rows.threshold == float(np.float32(0.15))
    assert {kind for kind in get_args(AnyMessage) if kind.single_float} == {
        Ack, DraftWindow, Feedback, WindowReport,
    }  # fmt: skip


def test_a_drafted_token_with_its_distribution_takes_at_most_320_bytes() -> None:
    num_tokens, num_sparse = 4, 48
    rows = DraftRows(
        np.tile(np.arange(49_000, 49_000 + num_sparse, dtype="<i4"), num_tokens).tobytes(),
        np.full((num_tokens, num_sparse), 0.02, "<f2").tobytes(), 0.15, 1000, 45.6, 7.8,
    )  # fmt: skip
    tokens = np.full(num_tokens, 49_000, "<i4").tobytes()
    window = DraftWindow(2**31 - 1, 9999, 9999, 9999, bytes(8), tokens, rows)
    assert len(encode(window)) <= 320 * num_tokens


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
    rows = msgspec.structs.replace(
        ROWS,
        q_ids=np.tile(np.arange(MAX_SPARSE, dtype="<i4"), 256).tobytes(),
        q_probs=np.ones(256 * MAX_SPARSE, "<f2").tobytes(),
        threshold=0.5,
    )
    window = msgspec.structs.replace(WINDOW, tokens=pack_tokens(range(256)), rows=rows)
    assert decode(encode(window)) == window


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
    """Fields at the end that have a default may be left out."""
    array = array_of(message)
    required = sum(field.required for field in msgspec.structs.fields(message))
    for wrong in (array[: 1 + required], [*array, 0], [*array, None]):
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


@pytest.mark.parametrize("version", [0, 1, 2, 3, 4, 5, 6, 7, 8, -1, 2**40])
def test_another_version_is_named(version: int) -> None:
    frame = msgpack.packb([version, *array_of(FEEDBACK)[1:]])
    with pytest.raises(VersionError, match=f"protocol version {version}, this side speaks 9"):
        decode(frame)


@pytest.mark.parametrize("version", [True, 1.0, "1", None, [], b"\1"])
def test_what_only_looks_like_a_version_is_none(version: object) -> None:
    with pytest.raises(DecodeError, match="expected a protocol version first"):
        decode(msgpack.packb([version, *array_of(FEEDBACK)[1:]]))


@pytest.mark.parametrize("tag", [0, 12, 2**31, -1, "5", None, 5.0, True])
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


def test_a_window_with_garbage_for_its_rows_is_refused() -> None:
    array = array_of(WINDOW)
    good = msgspec.to_builtins(ROWS, builtin_types=(bytes,))
    for wrong in ([], [5], good[:-1], [*good, 0], b"", True):
        with pytest.raises(DecodeError):
            decode(msgpack.packb([*array[:8], wrong]))
