"""The command `e2sci doctor`, over a real Valkey and without one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bus.store import Role, Store, WorkerRecord
from bus.store.blocking import BlockingStore
from tests.cli.conftest import invoke

STATUSES = {"ok", "warning", "failed", "skipped"}


def report(*args: str) -> tuple[int, dict[str, Any]]:
    done = invoke("doctor", "--quick", "--json", *args)
    assert done.out.count("\n") == 1
    return done.status, json.loads(done.out)


def of(found: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [check for check in found["checks"] if check["name"] == name]


def test_json_has_one_schema() -> None:
    status, found = report()
    assert set(found) == {"ok", "checks", "links", "expectation"}
    assert found["ok"] is (status == 0)
    assert (found["links"], found["expectation"]) == ([], None)
    for check in found["checks"]:
        assert set(check) == {"name", "status", "sentence", "advice", "figures"}
        assert check["status"] in STATUSES
        assert check["sentence"].endswith((".", ")"))
        assert all(
            isinstance(v, str | int | float | bool | None) for v in check["figures"].values()
        )
        if check["status"] in ("warning", "failed"):
            assert check["advice"]
    names = {check["name"] for check in found["checks"]}
    assert names >= {
        "python", "packages", "processor", "memory", "cache", "target", "draft", "settings",
        "ports", "keys", "redis", "speed",
    }  # fmt: skip


def test_without_a_system_nothing_has_failed() -> None:
    status, found = report()
    assert status == 0, [c for c in found["checks"] if c["status"] == "failed"]
    assert of(found, "redis")[0]["status"] == "skipped"
    assert "e2sci up" in of(found, "redis")[0]["sentence"]
    assert of(found, "speed")[0]["status"] == "skipped"


def test_for_people_there_are_sentences_and_a_summary() -> None:
    done = invoke("doctor", "--quick")
    assert done.status == 0
    assert "Python 3." in done.out
    assert "Nothing is wrong" in done.out.splitlines()[-1]


def test_a_redis_that_is_down_is_status_1() -> None:
    status, found = report("--redis-url", "redis://127.0.0.1:1/0")
    assert status == 1
    assert found["ok"] is False
    (check,) = of(found, "redis")
    assert check["status"] == "failed"
    assert "does not answer" in check["sentence"]
    assert of(found, "python")[0]["status"] == "ok"  # the other checks have run


def test_wrong_settings_are_a_check_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E2SCI_LEASE_S", "-1")
    status, found = report()
    assert status == 1
    (check,) = of(found, "settings")
    assert check["status"] == "failed"
    assert "lease_s" in check["sentence"]


def test_a_missing_model_is_status_1() -> None:
    status, found = report("--target", "./nowhere")
    assert status == 1
    assert of(found, "target")[0]["status"] == "failed"
    assert of(found, "draft")[0]["status"] == "ok"


@pytest.mark.usefixtures("reachable")
def test_a_worker_without_an_endpoint_is_status_1(blocking: BlockingStore) -> None:
    async def beat(store: Store) -> None:
        await store.registry.beat(
            WorkerRecord(worker_id="cloud-9", role=Role.CLOUD, boot="x"), ttl_s=60
        )

    blocking.call(beat)
    status, found = report()
    assert status == 1
    (link,) = of(found, "links")
    assert link["status"] == "failed"
    assert "cloud-9" in link["sentence"]
    assert [c["status"] for c in of(found, "ports")] == ["skipped"]


@pytest.mark.usefixtures("reachable")
def test_a_redis_without_workers_is_examined(blocking: BlockingStore) -> None:
    status, found = report()
    assert status == 0
    assert "Valkey" in of(found, "redis")[0]["sentence"]
    assert of(found, "queue")[0]["status"] == "ok"
    assert of(found, "workers")[0]["status"] == "skipped"
