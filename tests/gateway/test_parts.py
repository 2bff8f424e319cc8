"""Keys, limits, settings, and the formats of log-probabilities, by themselves."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from bus.protocol.errors import ConfigurationError, InsecureBindError
from bus.store import Alternative, ScoredToken
from gateway.errors import ApiError
from gateway.keys import KeyFile, Keys
from gateway.limits import RateLimit, Slots
from gateway.logprobs import legacy_logprobs, prompt_lengths, prompt_text
from gateway.settings import GatewaySettings


def test_a_key_is_kept_as_a_hash_in_a_file_of_its_owner(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "new" / "keys")
    key = file.add("alice")
    text = file.path.read_text()
    assert text.startswith("alice:sha256$")
    assert key not in text
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert list(file.path.parent.iterdir()) == [file.path]
    other = file.add("bob")
    assert key != other
    keys = Keys(file.path)
    assert keys.name_of(f"Bearer {key}") == "alice"
    assert keys.name_of(f"bearer {other}") == "bob"
    for wrong in ("", key, "Bearer", f"Bearer {key}x", f"Bearer sha256${text[13:77]}"):
        assert keys.name_of(wrong) is None


def test_a_key_file_that_vanishes_or_breaks_leaves_the_keys_as_they_were(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = KeyFile(tmp_path / "keys")
    key = file.add("alice")
    keys = Keys(file.path)
    file.path.write_text("junk\n")
    assert keys.name_of(f"Bearer {key}") == "alice"
    assert keys.name_of(f"Bearer {key}") == "alice"
    (record,) = caplog.records  # once, however many requests come
    assert record.message.endswith("the keys read before go on to count")
    file.path.unlink()
    assert keys.name_of(f"Bearer {key}") == "alice"
    os.mkfifo(file.path)  # reading it would wait for a writer
    assert keys.name_of(f"Bearer {key}") == "alice"
    assert "it is no regular file" in caplog.records[-1].message


def test_key_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys")
    with pytest.raises(ConfigurationError, match=r"cannot be read.*e2sci keys add NAME"):
        Keys(file.path)
    file.path.write_text("# nothing yet\n\n")
    with pytest.raises(ConfigurationError, match="holds none"):
        Keys(file.path)
    file.path.write_text("alice:md5$00\n")
    with pytest.raises(ConfigurationError, match="line 1: expected name:sha256"):
        file.add("bob")
    file.path.unlink()
    file.add("alice")
    with pytest.raises(ConfigurationError, match="a key 'alice' exists"):
        file.add("alice")
    with pytest.raises(ConfigurationError, match="expected a name"):
        file.add("a:b")
    with pytest.raises(ConfigurationError, match="there is no key 'bob'"):
        file.remove("bob")


def test_a_bucket_fills_evenly() -> None:
    now = [0.0]
    limit = RateLimit(60, lambda: now[0])
    for _ in range(60):
        limit.take("a")
    with pytest.raises(ApiError) as caught:
        limit.take("a")
    assert caught.value.status_code == 429
    assert caught.value.headers == {"Retry-After": "1"}
    limit.take("b")
    now[0] = 1.0
    limit.take("a")
    with pytest.raises(ApiError):
        limit.take("a")
    now[0] = 1e6  # no more than a minute's worth is kept
    for _ in range(60):
        limit.take("a")
    with pytest.raises(ApiError):
        limit.take("a")


def test_no_rate_lets_everything_pass() -> None:
    limit = RateLimit(0)
    for _ in range(1000):
        limit.take("a")


def test_slots_come_back() -> None:
    slots = Slots(2)
    slots.take(2)
    with pytest.raises(ApiError, match="the limit is 2"):
        slots.take(1)
    slots.give_back(1)
    slots.take(1)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.1.2.3"])
def test_loopback_needs_no_keys(host: str) -> None:
    GatewaySettings.load(host=host).check_binding()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_beyond_loopback_needs_keys_or_the_word_insecure(host: str, tmp_path: Path) -> None:
    with pytest.raises(InsecureBindError, match="E2SCI_API_KEYS_FILE"):
        GatewaySettings.load(host=host).check_binding()
    GatewaySettings.load(host=host, insecure=True).check_binding()
    GatewaySettings.load(host=host, api_keys_file=tmp_path / "keys").check_binding()


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E2SCI_PORT", "8123")
    monkeypatch.setenv("E2SCI_API_KEYS_FILE", "")
    monkeypatch.setenv("E2SCI_CORS_ORIGINS", '["https://app.example"]')
    settings = GatewaySettings.load()
    assert (settings.port, settings.api_keys_file) == (8123, None)
    assert settings.cors_origins == ("https://app.example",)


def score(data: bytes, *top: tuple[bytes, float]) -> ScoredToken:
    return ScoredToken(
        Alternative(0, -1.0, data), tuple(Alternative(1, value, text) for text, value in top)
    )


def test_tokens_that_are_half_a_character_leave_it_to_the_next() -> None:
    euro = "€".encode()
    scores = [score(b"a"), score(euro[:1]), score(euro[1:]), score(b"bc")]
    assert prompt_text(scores) == "a€bc"
    assert prompt_lengths(scores) == [1, 0, 1, 2]
    found = legacy_logprobs(scores, prompt_lengths(scores), 10)
    assert found["text_offset"] == [10, 11, 11, 12]
    assert found["tokens"] == ["a", "\ufffd", "\ufffd\ufffd", "bc"]


def test_of_alternatives_with_the_same_text_the_most_probable_counts() -> None:
    found = legacy_logprobs([score(b"x", (b"\xe2", -0.1), (b"\xe3", -0.2))], [1], 0)
    assert found["top_logprobs"] == [{"\ufffd": -0.1, "x": -1.0}]
