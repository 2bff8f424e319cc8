"""`e2sci doctor` about this machine and the installation: each check where something is wrong."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from bench.doctor import machine, models, settings
from bench.doctor.checks import Check, Status
from bench.doctor.machine import Limits, Pins, Processor
from bus.runtime.worker import WorkerSettings
from bus.settings import BusSettings
from engines.catalog.places import files_dir
from engines.catalog.registry import Specs, load_registry
from tests.engines.index import Register
from tests.engines.tiny import save_tiny

OK, WARNING, FAILED = Status.OK, Status.WARNING, Status.FAILED


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("E2SCI_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)  # no e2sci.toml


def statuses(checks: Sequence[Check]) -> list[Status]:
    return [check.status for check in checks]


def text(checks: Sequence[Check]) -> str:
    return " ".join(f"{check.sentence} {check.advice}" for check in checks)


# --- Python and packages ----------------------------------------------------------------------


def test_an_old_python_fails_and_ours_does_not() -> None:
    assert machine.check_python().status is OK
    old = machine.check_python((3, 10, 4))
    assert old.status is FAILED
    assert "3.10.4 is too old" in old.sentence


def test_the_pins_of_this_checkout_are_installed() -> None:
    pins = machine.read_pins()
    assert pins is not None
    assert pins.needed["torch"] == "2.13.0"
    assert "redis" in pins.needed  # written with an extra of its own
    assert set(pins.extras) >= {"dev", "energy", "otel"}
    assert FAILED not in statuses(machine.check_packages(pins))


def test_pins_come_from_the_installed_package_where_there_is_no_checkout(tmp_path: Path) -> None:
    pins = machine.read_pins(tmp_path / "pyproject.toml")
    assert pins is not None
    assert pins.needed["torch"] == "2.13.0"
    assert "pytest" not in pins.needed
    assert "pytest" in pins.extras["dev"]


def test_a_missing_package_and_another_torch_fail_and_another_numpy_is_a_warning() -> None:
    pins = Pins({"no-such-package": "1.0", "torch": "1.0", "numpy": "1.0"}, {})
    checks = machine.check_packages(pins)
    assert statuses(checks) == [FAILED, FAILED, WARNING]
    assert "no-such-package==1.0" in checks[0].sentence
    assert "torch is 2." in checks[1].sentence
    assert "numpy is" in checks[2].sentence


def test_a_local_version_of_torch_is_the_pinned_one() -> None:
    found = machine.installed_version("torch")
    assert found is not None
    assert statuses(machine.check_packages(Pins({"torch": found.partition("+")[0]}, {}))) == [OK]


def test_a_missing_extra_is_named_and_no_fault() -> None:
    pins = Pins({}, {"rare": {"no-such-package": "1.0"}})
    (check,) = machine.check_packages(pins)
    assert check.status is OK
    assert "Extras not installed: rare" in check.sentence


def test_without_any_pins_there_is_a_warning() -> None:
    assert statuses(machine.check_packages(None)) == [WARNING]


# --- processor, cores, memory -----------------------------------------------------------------


def processor(tmp_path: Path, content: str) -> Processor:
    path = tmp_path / "cpuinfo"
    path.write_text(content)
    return machine.read_processor(path)


def test_instruction_sets_are_read_from_the_flags(tmp_path: Path) -> None:
    found = processor(
        tmp_path, "processor : 0\nmodel name : Big\nflags : fpu avx2 avx512f avx512_vnni\n"
    )
    check = machine.check_processor(Processor(found.name, "x86_64", found.flags))
    assert check.status is OK
    assert "Big has AVX2, AVX-512, AVX-512 VNNI" in check.sentence
    assert check.figures == {"avx2": True, "avx512": True, "vnni": True}


def test_a_processor_without_avx2_or_of_another_kind_is_a_warning(tmp_path: Path) -> None:
    old = processor(tmp_path, "model name : Old\nflags : fpu sse2\n")
    check = machine.check_processor(Processor(old.name, "x86_64", old.flags))
    assert check.status is WARNING
    assert "Old has no AVX2" in check.sentence
    arm = machine.check_processor(Processor("Arm", "aarch64", frozenset(("asimd",))))
    assert arm.status is WARNING
    assert "no x86-64" in arm.sentence


def test_limits_of_a_control_group_v2_are_the_tightest_on_the_way(tmp_path: Path) -> None:
    inner = tmp_path / "a/b"
    inner.mkdir(parents=True)
    (tmp_path / "a/cpu.max").write_text("150000 100000\n")
    (inner / "cpu.max").write_text("max 100000\n")
    (tmp_path / "a/memory.max").write_text("max\n")
    (inner / "memory.max").write_text("4000000000\n")
    own = tmp_path / "own"
    own.write_text("0::/a/b\n")
    assert machine.read_limits(tmp_path, own) == Limits(1.5, 4_000_000_000)


def test_limits_of_a_control_group_v1(tmp_path: Path) -> None:
    for name in ("cpu", "memory"):
        (tmp_path / name).mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("50000\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert machine.read_limits(tmp_path, tmp_path / "none") == Limits(0.5, None)


def test_a_tight_quota_a_busy_machine_and_a_single_core_are_warnings() -> None:
    assert statuses(machine.check_cores(Limits(), 0.1, cores=4)) == [OK]
    for limits, load, cores, words in (
        (Limits(cores=1.5), 0.0, 4, "may use 1.5 of 4 cores"),
        (Limits(), 3.0, 4, "keep 3.0 of 4 cores busy"),
        (Limits(), 0.0, 1, "There is one core"),
    ):
        (check,) = machine.check_cores(limits, load, cores)
        assert check.status is WARNING
        assert words in check.sentence


def test_models_that_do_not_fit_are_a_warning() -> None:
    fits = machine.check_memory(Limits(), 10**9, available=8 * 10**9)
    assert fits.status is OK
    assert machine.check_memory(Limits(), 5 * 10**9, available=8 * 10**9).status is WARNING
    limited = machine.check_memory(Limits(memory_bytes=10**9), 10**9, available=8 * 10**9)
    assert limited.status is WARNING
    assert limited.figures["available_bytes"] == 10**9


def test_a_cache_that_cannot_be_written_fails(tmp_path: Path) -> None:
    assert machine.check_cache(tmp_path / "new/folder").status in (OK, WARNING)
    (tmp_path / "file").write_text("")
    check = machine.check_cache(tmp_path / "file/e2sci")
    assert check.status is FAILED
    assert "XDG_CACHE_HOME" in check.advice


# --- models -----------------------------------------------------------------------------------


def test_a_pair_of_directories_is_read_and_counted(tmp_path: Path) -> None:
    here = str(save_tiny(tmp_path / "tiny"))
    checks, size = models.check_models(Specs(here, here), whole=True)
    assert statuses(checks) == [OK, OK]
    assert size == 2 * (tmp_path / "tiny/model.safetensors").stat().st_size


def test_missing_models_and_models_without_weights_fail(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text("{}")
    specs = Specs(str(tmp_path / "none"), str(tmp_path / "empty"))
    checks, size = models.check_models(specs, whole=True)
    assert statuses(checks) == [FAILED, FAILED]
    assert "no such model directory" in checks[0].sentence
    assert "no weights" in checks[1].sentence
    assert size == 0


def test_a_registered_model_is_compared_with_its_size_and_digest(register: Register) -> None:
    right = b"weights"
    register(
        '[models.mine]\nfile = "mine.gguf"\nsize_bytes = 7\nlicence = "MIT"\n'
        f'context_length = 64\nsha256 = "{hashlib.sha256(right).hexdigest()}"\n'
        '[models.mine.hub]\nrepo = "a/b"\nfile = "mine.gguf"\n'
    )
    path = load_registry().models["mine"].path
    files_dir().mkdir(parents=True)

    def check(content: bytes, whole: bool = True) -> Check:
        path.write_bytes(content)
        return models.check_models(Specs("mine", "mine@16"), whole)[0][0]

    found = check(right)
    assert found.status is OK
    assert "as registered" in found.sentence
    assert check(b"shorter").status is FAILED  # of the same size, another content
    assert "another SHA-256" in check(b"shorter").sentence
    assert check(b"shorter", whole=False).status is OK
    assert "expected 7" in check(b"short").sentence
    path.unlink()
    absent = models.check_models(Specs("mine", "mine@16"), whole=True)[0]
    assert statuses(absent) == [FAILED, FAILED]
    assert "e2sci pull mine" in text(absent)


def test_a_model_of_the_hub_that_is_not_cached_is_a_warning() -> None:
    check = models.check_models(Specs("no-one/nothing-of-this-name", "default"), whole=False)[0][0]
    assert check.status is WARNING
    assert "first start downloads it" in check.sentence


# --- settings, ports, keys --------------------------------------------------------------------


def test_wrong_settings_name_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.check_settings().status is OK
    monkeypatch.setenv("E2SCI_SLOTS", "0")
    check = settings.check_settings()
    assert check.status is FAILED
    assert "edge: settings: slots" in check.sentence


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_an_occupied_port_fails_where_it_is_fixed(
    monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    monkeypatch.setenv("E2SCI_WINDOWS_PORT", str(taken))
    ports = settings.configured_ports()
    assert list(ports) == [taken]
    (check,) = settings.check_ports(ports, [])
    assert check.status is FAILED
    assert f"Port {taken} of" in check.sentence
    (movable,) = settings.check_ports({}, [(taken, "dashboard")])
    assert movable.status is WARNING
    assert "dashboard takes the next free one" in movable.sentence


def test_a_port_that_is_free_again_is_fine(taken: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    (check,) = settings.check_ports({port: "cloud.windows_port"}, [])
    assert check.status is OK
    assert str(port) in check.sentence


@pytest.mark.parametrize(
    ("values", "status", "words"),
    [
        ({}, OK, "listen on 127.0.0.1 alone"),
        ({"bind_host": "0.0.0.0"}, FAILED, "which they refuse"),
        ({"bind_host": "0.0.0.0", "insecure": True}, WARNING, "everyone in that network"),
        (
            {"bind_host": "0.0.0.0", "curve_public_key": "a" * 40, "curve_secret_key": "b" * 40},
            OK,
            "encrypted",
        ),
    ],
)
def test_keys(values: dict[str, object], status: Status, words: str) -> None:
    check = settings.check_keys(WorkerSettings.load(**values))
    assert check.status is status
    assert words in check.sentence
    assert bool(check.advice) == (status is not OK)


@pytest.mark.parametrize(
    ("url", "status", "words"),
    [
        ("redis://127.0.0.1:6379/0", OK, "this machine alone"),
        ("unix:///run/redis.sock", OK, "this machine alone"),
        ("redis://10.0.0.5:6379/0", WARNING, "without a password and TLS"),
        ("redis://:secret@10.0.0.5:6379/0", WARNING, "without TLS"),
        ("rediss://:secret@10.0.0.5:6379/0", OK, "TLS with a password"),
    ],
)
def test_access_to_redis(url: str, status: Status, words: str) -> None:
    check = settings.check_redis_access(BusSettings.load(redis_url=url))
    assert check.status is status
    assert words in check.sentence
    assert "secret" not in check.sentence
