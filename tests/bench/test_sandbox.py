"""Code of a model: what runs, what is refused, and what it cannot reach."""

from __future__ import annotations

import shutil
import socket

import pytest

from bench import sandbox
from bench.sandbox import Sandbox
from bus.protocol.errors import ConfigurationError


@pytest.fixture(scope="module")
def run() -> Sandbox:
    try:
        return Sandbox()
    except ConfigurationError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("program", "ends_well"),
    [
        ("assert 1 + 1 == 2", True),
        ("assert 1 + 1 == 3", False),
        ("this is no Python", False),
        ("x = 'a' * (3 << 30)", False),  # memory
        ("open('big', 'wb').write(b'x' * (2 << 20))", False),  # a file too large
        ("open('small', 'w').write('x')", True),
        ("import os; assert not os.environ.get('HOME')", True),
        ("import socket; assert [n for _, n in socket.if_nameindex()] == ['lo']", True),
    ],
)
def test_what_a_program_may_do(run: Sandbox, program: str, ends_well: bool) -> None:
    assert run(program) is ends_well


def test_a_program_cannot_reach_a_server_of_this_machine(run: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"import socket; socket.create_connection({server.getsockname()!r}, timeout=2)"
        exec(program, {})  # outside it can
        assert run(program) is False


def test_a_program_that_does_not_end_is_ended(
    run: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "CPU_S", 1)
    assert run("import time; time.sleep(60)") is False


def test_without_a_namespace_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ConfigurationError, match="needs unshare"):
        Sandbox()
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/false")
    with pytest.raises(ConfigurationError, match="refuses one"):
        Sandbox()
