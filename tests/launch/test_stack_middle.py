"""Which environment a stack gives its workers."""

from __future__ import annotations

import pytest

from launch.python import module_command
from launch.stack import Stack, StackOptions


def given(options: StackOptions, env: dict[str, str] | None = None) -> dict[str, dict[str, str]]:
    """Environment by process, of a stack that is not started."""
    stack = Stack(options, log=lambda _: None, env=env)
    return {spec.name: dict(spec.env) for spec in stack._specs()}


def test_middle_workers_run_the_draft_unless_they_have_a_model_of_their_own() -> None:
    options = StackOptions(middle=2, target="T", draft="D", redis_url="redis://127.0.0.1:1/0")
    env = given(options)
    assert [name for name in env if name.startswith("middle")] == ["middle-1", "middle-2"]
    assert env["middle-1"]["E2SCI_TARGET"] == "D"
    assert env["cloud-1"]["E2SCI_TARGET"] == "T"
    other = StackOptions(middle=1, draft="D", middle_model="M", redis_url="redis://127.0.0.1:1/0")
    assert given(other)["middle-1"]["E2SCI_TARGET"] == "M"
    pairs = StackOptions(middle=1, pair="p", redis_url="redis://127.0.0.1:1/0")
    assert given(pairs)["middle-1"]["E2SCI_TARGET"] == ""
    assert given(pairs)["middle-1"]["E2SCI_PAIR"] == "p"


def test_speculators_are_set_only_where_they_are_given() -> None:
    plain = given(StackOptions(redis_url="redis://127.0.0.1:1/0"))
    assert "E2SCI_SPECULATOR" not in plain["cloud-1"]
    env = given(StackOptions(speculator="/a,/b", redis_url="redis://127.0.0.1:1/0"))
    assert env["cloud-1"]["E2SCI_SPECULATOR"] == "/a,/b"


def test_a_middle_worker_is_a_module_of_its_own() -> None:
    stack = Stack(StackOptions(middle=1, redis_url="redis://127.0.0.1:1/0"), log=lambda _: None)
    commands = {spec.name: spec.command for spec in stack._specs()}
    assert commands["middle-1"] == module_command("cloud_worker.middle")
    assert commands["cloud-1"] == module_command("cloud_worker")


def test_measured_as_on_another_device_its_passes_take_what_a_drafts_steps_take() -> None:
    env = {
        "E2SCI_LEAST_STEP_MS": "8", "E2SCI_LEAST_PASS_MS": "60", "E2SCI_STEP_COUNTS": "steps",
        "E2SCI_PASS_COUNTS": "passes",
    }  # fmt: skip
    found = given(StackOptions(middle=1, redis_url="redis://127.0.0.1:1/0"), env)
    assert found["middle-1"]["E2SCI_LEAST_PASS_MS"] == "8"
    assert found["middle-1"]["E2SCI_PASS_COUNTS"] == "steps"
    assert found["cloud-1"]["E2SCI_LEAST_PASS_MS"] == "60"


@pytest.mark.parametrize(("middle", "threads"), [(0, 4), (2, 2)])
def test_cores_are_shared_with_middle_workers(
    monkeypatch: pytest.MonkeyPatch, middle: int, threads: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert StackOptions(middle=middle).threads_each == threads
