"""All checks of `e2sci doctor` in one run: beside a toy system, and on a tiny pair."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from bench.doctor import measure
from bench.doctor.checks import Status
from bench.doctor.expect import ALONE
from bench.doctor.run import Question, examine
from bus.settings import BusSettings
from bus.store import Store
from engines.catalog.registry import Specs
from tests.bench.test_doctor_expect import windows
from tests.bench.test_doctor_system import CONTROLLER, EDGE
from tests.edge_worker.shell import MODEL, PAIR, House
from tests.engines.tiny import byte_fallback_tokenizer, save_tiny

DEFAULT = Specs("default", "default")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("E2SCI_")]:
        monkeypatch.delenv(name)


@pytest.fixture
async def house(store: Store, bus_settings: BusSettings) -> AsyncIterator[House]:
    house = House(store, bus_settings)
    yield house
    for cloud in house.clouds:
        await cloud.stop()


@pytest.mark.long
async def test_a_running_system_s_speed_is_predicted_from_its_own_windows(
    house: House, bus_settings: BusSettings
) -> None:
    house.cloud()
    edge = msgspec.structs.replace(
        EDGE, tokenizer_digest=MODEL["tokenizer_digest"], vocab_size=PAIR.vocab_size
    )
    for record in (edge, CONTROLLER):
        await house.store.registry.beat(record, 60)
    await house.store.queue.ensure_group()  # as an edge does
    await house.store.telemetry.add(*windows(4, 3, 50, "a"), *windows(1, 1, 9, "b"))
    report = await examine(Question(DEFAULT, settings=bus_settings, quick=True))
    assert report.ok, [c for c in report.checks if c.status is Status.FAILED]
    (link,) = report.links
    assert report.expectation is not None
    near, far = report.expectation.links
    assert (near.rtt_source, near.shared, near.rtt_ms) == ("measured", True, link.rtt_ms)
    assert (far.rtt_source, far.shared, far.rtt_ms) == ("assumed", False, 40.0)
    assert report.expectation.costs.where == "in the running system"
    plain = json.loads(msgspec.json.encode(report.to_builtins()))
    assert set(plain["expectation"]["costs"]) == {
        "where", "target", "draft", "device", "acceptance", "num_tokens", "round_trip_ms", "source",
    }  # fmt: skip
    assert [way["source"] for way in plain["expectation"]["links"]] == ["predicted"] * 2


async def test_on_one_core_a_pair_is_measured_in_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "has_two_cores", lambda: False)
    tiny = str(save_tiny(tmp_path / "tiny"))
    report = await examine(Question(Specs(tiny, tiny), "float32"))
    assert report.expectation is not None
    assert report.expectation.costs.acceptance > 0.9  # float16 makes ties
    near, far = report.expectation.links
    assert (near.rtt_source, near.rtt_ms, near.shared) == ("none", 0.0, True)
    assert far.tokens_per_s[ALONE] > 0
    assert [c.status for c in report.checks if c.name == "tokenizers"] == [Status.OK]


async def test_a_pair_that_does_not_fit_fails_and_nothing_is_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "has_two_cores", lambda: False)
    tiny = str(save_tiny(tmp_path / "tiny"))
    other = str(save_tiny(tmp_path / "other", byte_fallback_tokenizer()))
    report = await examine(Question(Specs(tiny, other), "float32"))
    assert not report.ok
    assert report.expectation is None
    assert report.checks[-1].name == "tokenizers"


async def test_a_model_that_cannot_be_loaded_is_a_failed_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "has_two_cores", lambda: False)
    tiny = save_tiny(tmp_path / "tiny")
    (tmp_path / "tiny/model.safetensors").write_bytes(b"no weights")
    report = await examine(Question(Specs(str(tiny), str(tiny)), "float32"))
    assert not report.ok
    assert report.checks[-1].name == "models"
    assert "cannot be measured" in report.checks[-1].sentence


async def test_a_missing_model_is_not_measured(tmp_path: Path) -> None:
    report = await examine(Question(Specs(str(tmp_path / "none"), "default")))
    assert [c.name for c in report.checks if c.status is Status.FAILED] == ["target"]
    assert report.checks[-1].status is Status.SKIPPED
