"""Where settings come from, which source wins, and what is said about wrong ones."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import zmq
from pydantic import Field

from bus.protocol.errors import ConfigurationError
from bus.settings import TOML_TABLES, BusSettings


class EdgeLike(BusSettings):
    toml_table: ClassVar[str] = "edge"

    slots: int = Field(2, ge=1, description="How many.")


@pytest.fixture(autouse=True)
def clean_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("REDIS_URL", "CONFIG", "LEASE_S", "SLOTS", "LOG_LEVEL", "CURVE_PUBLIC_KEY"):
        monkeypatch.delenv(f"E2SCI_{name}", raising=False)
    monkeypatch.chdir(tmp_path)


def test_defaults() -> None:
    settings = BusSettings()
    assert settings.redis_url == "redis://127.0.0.1:6379/0"
    assert settings.key_prefix == "e2sci:"
    assert (settings.lease_s, settings.max_queue, settings.result_ttl_s) == (10, 10_000, 3600)
    assert settings.max_deliveries == 3


def test_flag_over_environment_over_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "e2sci.toml").write_text(
        'max_queue = 1\nlease_s = 1\nlog_level = "DEBUG"\n[edge]\nslots = 7\n[cloud]\nx = 1\n'
    )
    monkeypatch.setenv("E2SCI_MAX_QUEUE", "2")
    monkeypatch.setenv("E2SCI_LEASE_S", "2")
    settings = EdgeLike.from_cli(["--lease-s", "3"])
    assert settings.log_level == "DEBUG"
    assert settings.max_queue == 2
    assert settings.lease_s == 3
    assert settings.slots == 7
    assert BusSettings().lease_s == 2  # the table of a worker is nothing to the others


def test_named_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    named = tmp_path / "other.toml"
    monkeypatch.setenv("E2SCI_CONFIG", str(named))
    with pytest.raises(ConfigurationError, match=r"other\.toml.*No such file"):
        BusSettings.load()
    named.write_text("lease_s = ")
    with pytest.raises(ConfigurationError, match=r"other\.toml"):
        BusSettings.load()
    named.write_text("leese_s = 3")
    with pytest.raises(ConfigurationError, match="leese_s: Extra inputs"):
        BusSettings.load()
    named.write_text("lease_s = 3")
    assert BusSettings.load().lease_s == 3


@pytest.mark.parametrize(
    ("table", "near"), [("egde", "edge"), ("clouds", "cloud"), ("control", "controller")]
)
def test_a_table_of_no_worker_is_an_error_that_names_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str, near: str
) -> None:
    named = tmp_path / "named.toml"
    named.write_text(f"[{table}]\nslots = 4\n")
    monkeypatch.setenv("E2SCI_CONFIG", str(named))
    for settings in (BusSettings, EdgeLike):
        with pytest.raises(ConfigurationError, match=rf"\[{table}\]; did you mean \[{near}\]"):
            settings.load()


def test_the_tables_of_all_workers_are_known() -> None:
    from cloud_worker.settings import CloudSettings, MiddleSettings
    from controller.settings import ControllerSettings
    from dashboard.settings import DashboardSettings
    from edge_worker.settings import EdgeSettings
    from gateway.settings import GatewaySettings

    workers = (
        CloudSettings, ControllerSettings, DashboardSettings, EdgeSettings, GatewaySettings,
        MiddleSettings,
    )  # fmt: skip
    assert {settings.toml_table for settings in workers} == TOML_TABLES


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
        ("redis://:hunter2@db:6379/1", "redis://***@db:6379/1"),
        ("rediss://me:hunter2@[::1]:6379/1", "rediss://***@[::1]:6379/1"),
        ("redis://db/0?password=hunter2", "redis://***@db/0"),
        ("redis://me:hun@ter2@db/0", "redis://***@db/0"),
        ("unix://me:hunter2@/run/redis.sock", "unix://***@/run/redis.sock"),
    ],
)
def test_passwords_are_never_shown(url: str, shown: str) -> None:
    settings = BusSettings(redis_url=url)
    assert settings.redacted_redis_url == shown
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in str(settings)


def test_a_bad_url_is_explained_without_its_password() -> None:
    with pytest.raises(ConfigurationError, match="redis_url: expected redis://") as caught:
        BusSettings.load(redis_url="http://me:hunter2@db:6379")
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_curve_keys() -> None:
    public, secret = (key.decode() for key in zmq.curve_keypair())
    settings = BusSettings(curve_public_key=public, curve_secret_key=secret)
    assert secret not in repr(settings)
    assert BusSettings(curve_public_key="", curve_secret_key="").curve_public_key is None
    with pytest.raises(ConfigurationError, match="set both or neither"):
        BusSettings.load(curve_public_key=public)
    with pytest.raises(ConfigurationError, match="curve_secret_key: expected a Z85 key") as caught:
        BusSettings.load(curve_public_key=public, curve_secret_key=secret[:-1])
    assert secret[:-1] not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"lease_s": 0},
        {"lease_s": float("nan")},
        {"max_queue": 0},
        {"key_prefix": "has space"},
        {"key_prefix": "glob*"},
        {"log_level": "LOUD"},
        {"unknown": 1},
    ],
)
def test_wrong_values_name_the_field(values: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(values))):
        BusSettings.load(**values)


def test_every_field_has_a_description() -> None:
    assert all(field.description for field in BusSettings.model_fields.values())


def test_help_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        EdgeLike.from_cli(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "--lease-s" in text
    assert "--slots" in text
    with pytest.raises(SystemExit):
        EdgeLike.from_cli(["--no-such-flag"])
