"""What a request may hold, and what its author is told when it is wrong."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.protocol.bounds import SessionCoupling
from bus.protocol.errors import RequestError
from bus.protocol.requests import (
    MAX_PROMPT_BYTES,
    GenerationRequest,
    new_request,
    seed_from_id,
    session_id,
)

ENTRY = "1700000000000-0"


def parse(**fields: str | bytes) -> GenerationRequest:
    raw = {
        name.encode(): value.encode() if isinstance(value, str) else value
        for name, value in fields.items()
    }
    return GenerationRequest.from_fields(ENTRY, raw)


def test_a_prompt_is_enough() -> None:
    request = parse(prompt="Hello")
    assert request == GenerationRequest(id=ENTRY, prompt="Hello", seed=seed_from_id(ENTRY))
    assert parse(prompt="Hello").seed == request.seed
    assert seed_from_id("another") != request.seed


def test_all_fields() -> None:
    request = parse(
        id="my-id",
        prompt="Grüße 👋",
        method="fsd",
        max_new_tokens="5",
        temperature=".8",
        top_p="9e-1",
        top_k="40",
        coupling="residual",
        seed=str(2**63 - 1),
        stop='["\\n\\n", "END"]',
        raw="1",
        client="me",
    )
    assert request == GenerationRequest(
        id="my-id",
        prompt="Grüße 👋",
        method="fsd",
        max_new_tokens=5,
        temperature=0.8,
        top_p=0.9,
        top_k=40,
        coupling=SessionCoupling.RESIDUAL,
        seed=2**63 - 1,
        stop=("\n\n", "END"),
        raw=True,
        client="me",
    )


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("prompt", "", "prompt: empty"),
        ("prompt", " \n ", "prompt: empty"),
        ("prompt", b"caf\xe9", "prompt: not UTF-8 (byte 3)"),
        ("prompt", "x" * (MAX_PROMPT_BYTES + 1), "the limit is 1048576"),
        ("id", "no spaces", "id: expected"),
        ("id", "", "id: expected"),
        ("id", "x" * 65, "id: expected"),
        ("id", "1700000000000-1", "form of a stream entry id"),
        ("method", "s d", "method: expected"),
        ("client", "ä", "client: expected"),
        ("max_new_tokens", "0", "max_new_tokens: expected 1 … 2147483647, got 0"),
        ("max_new_tokens", "-3", "got -3"),
        ("max_new_tokens", "1e3", "expected a whole number, got '1e3'"),
        ("max_new_tokens", "1_000", "expected a whole number"),
        ("max_new_tokens", "٣", "expected a whole number"),
        ("max_new_tokens", "9" * 5000, "expected a whole number"),
        ("temperature", "nan", "temperature: expected a finite number, got 'nan'"),
        ("temperature", "-inf", "expected a finite number"),
        ("temperature", "1e999", "expected a finite number"),
        ("temperature", "-0.1", "temperature: expected 0 (greedy) or 0.001 … 100, got -0.1"),
        ("temperature", "1e-9", "0.001 … 100"),
        ("temperature", "100.5", "0.001 … 100"),
        ("temperature", "warm", "expected a number, got 'warm'"),
        ("temperature", b"\xff", "temperature: not UTF-8"),
        ("top_p", "0", "top_p: expected above 0"),
        ("top_p", "1.01", "top_p: expected above 0 and at most 1"),
        ("top_k", "-1", "top_k: expected 0"),
        ("seed", "-1", "seed: expected 0"),
        ("seed", str(2**63), "seed: expected 0"),
        ("coupling", "Gumbel", "coupling: expected 'gumbel' or 'residual', got 'Gumbel'"),
        ("coupling", "", "coupling: expected 'gumbel' or 'residual', got ''"),
        ("stop", "END", "stop: expected a JSON list"),
        ("stop", '"END"', "stop: expected a JSON list of strings"),
        ("stop", "[1]", "stop: expected a JSON list of strings"),
        ("stop", '[""]', "stop: each string needs"),
        ("stop", '["\\ud800"]', "stop: half of a surrogate pair"),
        ("stop", json.dumps(["x"] * 17), "17 strings, the limit is 16"),
        ("stop", "[" * 100_000, "stop: expected a JSON list"),
        ("raw", "yes", "raw: expected 0 or 1, got 'yes'"),
        ("max_tokens", "5", "'max_tokens': no such field; known are id, prompt,"),
    ],
)
def test_each_bad_field_is_explained(field: str, value: str | bytes, says: str) -> None:
    fields: dict[str, Any] = {"prompt": "Hello", field: value}
    with pytest.raises(RequestError, match=re.escape(says)) as caught:
        parse(**fields)
    assert len(str(caught.value)) < 400


def test_the_coupling_is_gumbel_unless_named() -> None:
    assert parse(prompt="Hello").coupling is SessionCoupling.GUMBEL
    assert new_request("Hello", coupling=None).coupling is SessionCoupling.GUMBEL
    for coupling in SessionCoupling:
        request = new_request("Hello", coupling=coupling.value)
        assert request.coupling is coupling
        assert request.to_fields()["coupling"] == coupling.value


def test_all_problems_in_one_message() -> None:
    with pytest.raises(RequestError) as caught:
        parse(temperature="nan", top_k="-1", stop="x")
    text = str(caught.value)
    assert all(name in text for name in ("prompt: empty", "temperature:", "top_k:", "stop:"))


def test_new_request_makes_id_and_seed() -> None:
    one, two = new_request("Hello"), new_request("Hello")
    assert re.fullmatch(r"[0-9a-f]{32}", one.id)
    assert one.id != two.id
    assert one.seed != two.seed
    assert new_request("Hello", seed=7, stop=["a"], raw=True, top_k=None).stop == ("a",)
    assert new_request("Hello", seed=0).seed == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": float("nan")}, "finite"),
        ({"max_new_tokens": 2.5}, "whole number"),
        ({"stop": "END"}, "JSON list"),
        ({"stop": [1]}, "JSON list of strings"),
        ({"sead": 1}, "no such field"),
        ({"coupling": "magic"}, "coupling: expected 'gumbel' or 'residual', got 'magic'"),
        ({"id": "mine"}, "cannot be chosen"),
    ],
)
def test_new_request_validates(options: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        new_request("Hello", **options)


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(RequestError, match="prompt: not UTF-8"):
        new_request("broken \ud83d")


requests = st.builds(
    GenerationRequest,
    id=st.from_regex(r"[A-Za-z_.:][A-Za-z0-9_.:-]{0,63}", fullmatch=True),
    prompt=st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip),
    max_new_tokens=st.integers(1, 2**31 - 1),
    temperature=st.just(0.0) | st.floats(0.001, 100),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(0, 2**31 - 1),
    seed=st.integers(0, 2**63 - 1),
    stop=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=16).map(
        tuple
    ),
    raw=st.booleans(),
)


@given(requests)
def test_fields_round_trip(request: GenerationRequest) -> None:
    assert parse(**request.to_fields()) == request


@given(st.dictionaries(st.binary(max_size=20), st.binary(max_size=200), max_size=8))
def test_garbage_is_an_error_and_never_a_crash(fields: dict[bytes, bytes]) -> None:
    with pytest.raises(RequestError):
        GenerationRequest.from_fields(ENTRY, fields | {b"raw": b"?"})


def test_session_id_is_short_and_stable() -> None:
    assert session_id("abc") == "13c9497c2425"  # an edge of another release must agree
    assert seed_from_id("abc") == 2672624945957891161


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <|im_end|>"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "Again"},
]


def test_a_chat_travels_as_json() -> None:
    request = new_request(messages=CHAT)
    fields = request.to_fields()
    assert json.loads(fields["messages"]) == CHAT
    assert "prompt" not in fields
    assert parse(**fields).messages == request.messages
    assert request.messages[-1].content == "Again"


def test_token_ids_and_log_probabilities_travel() -> None:
    request = new_request(prompt_ids=(5, 0, 7), logprobs=0, prompt_logprobs=True)
    again = parse(**request.to_fields())
    assert again == request
    assert (again.prompt_ids, again.logprobs, again.prompt_logprobs) == ((5, 0, 7), 0, True)
    assert new_request("Hi").logprobs is None


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"messages": "{"}, "messages: expected a JSON list"),
        ({"messages": "[]"}, "prompt: empty"),
        ({"messages": '[{"role": "user"}]'}, "message 0: expected an object"),
        ({"messages": '[{"role": "tool", "content": "x"}]'}, "message 0: role must be one of"),
        ({"messages": '[{"role": "user", "content": 3}]'}, "message 0: content must be text"),
        ({"messages": '[{"role": "user", "content": "\\ud800"}]'}, "half of a surrogate pair"),
        ({"messages": '[{"role": "user", "content": " "}]'}, "the last message is empty"),
        ({"messages": '[{"role": "assistant", "content": "x"}]'}, "the last message is the ass"),
        ({"messages": json.dumps(CHAT), "prompt": "x"}, "prompt and messages: give one"),
        ({"messages": json.dumps(CHAT), "raw": "1"}, "raw: messages need the chat template"),
        ({"prompt_ids": "[1, -1]"}, "a token id is at least 0"),
        ({"prompt_ids": "[true]"}, "expected a list of token ids"),
        ({"prompt_ids": "x"}, "expected a JSON list of token ids"),
        ({"prompt": "x", "logprobs": "21"}, "expected 0 … 20"),
        ({"prompt": "x", "prompt_logprobs": "1"}, "prompt_logprobs: give logprobs too"),
        ({"prompt": "x", "traceparent": "00-0-0-0"}, "expected a W3C traceparent"),
    ],
)
def test_a_bad_chat_says_what_is_wrong(fields: dict[str, str], problem: str) -> None:
    with pytest.raises(RequestError, match=re.escape(problem)):
        parse(**fields)
