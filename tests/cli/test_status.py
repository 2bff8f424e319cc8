from __future__ import annotations

import json

import pytest
from msgspec.structs import replace

from bus.protocol.requests import new_request, session_id
from bus.store import Role, SessionRecord, Store, WorkerRecord
from bus.store.blocking import BlockingStore
from cli import status
from tests.cli.conftest import ScriptedEdge, e2sci, invoke

pytestmark = pytest.mark.usefixtures("reachable")


async def fill(store: Store) -> None:
    await ScriptedEdge(store).beat()
    await store.queue.submit(new_request("waits"))
    await store.sessions.save(
        SessionRecord(
            session="abc", client="me", edge="edge-x", cloud="cloud-x", method="sd", term=1,
            version=1, threshold=0.1, window=4, credit=0.5, credit_delta=0.0, updated_at=1.0,
        )
    )  # fmt: skip


def test_json_holds_workers_queue_and_sessions(blocking: BlockingStore) -> None:
    blocking.call(fill)
    done = invoke("status", "--json")
    assert done.status == 0
    assert done.out.count("\n") == 1
    found = json.loads(done.out)
    (worker,) = found["workers"]
    assert (worker["worker_id"], worker["role"], worker["load"]) == ("edge-x", "edge", 1)
    assert worker["counters"] == {"faults": 2}
    assert (worker["bitwise"], worker["probe_digest"]) == (True, "a1b2c3d4" * 8)
    assert worker["metrics_url"] == ""
    assert 0 <= worker["heartbeat_age_s"] <= 5
    assert (found["queue"]["length"], found["queue"]["pending"]) == (1, 0)
    assert [session["session"] for session in found["sessions"]] == ["abc"]


def test_tables_name_everything(blocking: BlockingStore) -> None:
    blocking.call(fill)
    done = invoke("status")
    assert done.status == 0
    for word in (
        "edge-x",
        "tiny",
        "1/4",
        "faults 2",
        "bitwise",
        "a1b2c3d4",
        "queue: 1 requests",
        "abc",
        "cloud-x",
    ):
        assert word in done.out


def test_the_prefix_cache_has_a_line_of_its_own(blocking: BlockingStore) -> None:
    async def beat(store: Store) -> None:
        edge = ScriptedEdge(store)
        edge.counters.update(
            prefix_cache_entries=3, prefix_cache_mb=41, prefix_cache_hits_total=12,
            prefix_cache_tokens_total=3400,
        )  # fmt: skip
        await edge.beat()

    blocking.call(beat)
    done = invoke("status")
    line = "prefix cache of edge-x: 3 kept, 41 MiB; 12 hits, 3,400 tokens"
    assert line in done.out.splitlines()
    assert "faults 2" in done.out
    assert "prefix_cache" not in done.out
    (worker,) = json.loads(invoke("status", "--json").out)["workers"]
    assert worker["counters"]["prefix_cache_hits_total"] == 12


def test_a_worker_s_speculators_are_shown_beside_its_model() -> None:
    plain = WorkerRecord(
        worker_id="cloud-x", role=Role.CLOUD, boot="b", model="tiny", dtype="int8", device="cpu"
    )
    proposing = replace(plain, speculators=("medusa", "eagle3"))
    assert status._model(plain) == "tiny (int8, cpu)"
    assert status._model(proposing) == "tiny + medusa, eagle3 (int8, cpu)"
    assert status._model(replace(plain, model="")) == "-"


def test_an_empty_system_is_said_to_be_empty(blocking: BlockingStore) -> None:
    done = invoke("status")
    assert done.status == 0
    assert "queue: empty" in done.out
    assert "none is running" in done.out


async def test_the_health_check_of_one_worker(store: Store) -> None:
    await fill(store)
    alive = await e2sci("status", "--worker", "edge-x")
    assert (alive.status, alive.out, alive.err) == (0, "", "")
    dead = await e2sci("status", "--worker", "edge-y")
    assert dead.status == 1
    assert dead.err == "error: worker 'edge-y' has no live heartbeat; alive are: edge-x\n"


def test_a_session_s_story_by_its_id_or_its_request_s(blocking: BlockingStore) -> None:
    lines = ["0 ms  begun", "5 ms  Opened [x]"]
    blocking.call(lambda store: store.stories.save(session_id("r1"), "edge-x", lines))
    for name in ("r1", session_id("r1")):
        done = invoke("status", "--session", name)
        assert done.out.splitlines() == ["edge-x", "  0 ms  begun", "  5 ms  Opened [x]"]
    plain = json.loads(invoke("status", "--session", "r1", "--json").out)
    assert plain == {"edge-x": lines}
    unknown = invoke("status", "--session", "r2")
    assert unknown.status != 0
    assert "no worker has reported session or request 'r2'" in unknown.err
