"""Settings, ports and keys, before anything is started."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from bench.doctor.checks import Check, failed, ok, warning
from bus.protocol.errors import ConfigurationError
from bus.runtime.worker import WorkerSettings
from bus.settings import BusSettings
from bus.transport.sockets import is_loopback
from launch.ports import is_free

_KEYS = (
    "Set E2SCI_CURVE_PUBLIC_KEY and E2SCI_CURVE_SECRET_KEY on every machine: python -c "
    '"import zmq; print(*(key.decode() for key in zmq.curve_keypair()))"'
)


def check_settings() -> Check:
    """Whether each worker's settings, from environment and file, can be read."""
    problems = []
    for settings in _worker_settings():
        try:
            settings.load()
        except ConfigurationError as error:
            problems.append(f"{settings.toml_table}: {error}")
    if problems:
        return failed("settings", f"Settings are wrong: {'; '.join(problems)}.",
                      "Correct the environment (E2SCI_*) or e2sci.toml.")  # fmt: skip
    return ok("settings", "The settings of all workers can be read.")


def _worker_settings() -> tuple[type[WorkerSettings], ...]:
    from cloud_worker.settings import CloudSettings, MiddleSettings  # noqa: PLC0415 - reads models
    from controller.settings import ControllerSettings  # noqa: PLC0415
    from edge_worker.settings import EdgeSettings  # noqa: PLC0415

    return CloudSettings, MiddleSettings, EdgeSettings, ControllerSettings


def configured_ports() -> dict[int, str]:
    """Port → the setting that names it; those that are 0 take any.

    Raises:
        ConfigurationError: a setting is wrong.
    """
    found: dict[int, str] = {}
    for kind in _worker_settings():
        values = kind.load()
        for name in ("windows_port", "feedback_port", "reports_port", "updates_port"):
            if port := getattr(values, name, 0):
                found[port] = f"{kind.toml_table}.{name}"
    return found


def check_ports(ports: Mapping[int, str], movable: Iterable[tuple[int, str]]) -> list[Check]:
    """Whether ports are free.

    Args:
        ports: port → setting, of servers that need this very one.
        movable: (port, server), of servers that take the next free one.
    """
    checks = [
        failed("ports", f"Port {port} of {setting} is taken.",
               f"Stop what listens there (ss -ltnp 'sport = :{port}'), or set another port.",
               port=port)
        for port, setting in ports.items() if not is_free(port)
    ]  # fmt: skip
    servers = list(movable)
    checks += [
        warning("ports", f"Port {port} is taken; the {server} takes the next free one.",
                "Read its address from the output of `e2sci up`.", port=port)
        for port, server in servers if not is_free(port)
    ]  # fmt: skip
    free = [str(port) for port in (*ports, *(port for port, _ in servers))]
    return checks or [ok("ports", f"Free: {', '.join(free)}; all others are chosen at start.")]


def check_keys(settings: WorkerSettings) -> Check:
    """Whether the workers' sockets are encrypted, or stay on this machine."""
    endpoint = settings.endpoint(1)
    if settings.curve_public_key is not None:
        return ok("keys", "CURVE keys are set: all sockets between workers are encrypted.")
    if is_loopback(endpoint):
        return ok("keys", f"No CURVE keys are set, and workers listen on {settings.bind_host} "
                  "alone: other machines cannot reach them.")  # fmt: skip
    if settings.insecure:
        return warning("keys", f"Workers listen on {settings.bind_host} without CURVE keys "
                       "(E2SCI_INSECURE=1): everyone in that network can read prompts and send "
                       "messages.", _KEYS)  # fmt: skip
    return failed("keys", f"Workers would listen on {settings.bind_host} without CURVE keys, "
                  "which they refuse.", _KEYS)  # fmt: skip


def check_redis_access(settings: BusSettings) -> Check:
    """Whether a Redis beyond this machine asks for a password, over TLS."""
    parts = urlsplit(settings.redis_url)
    if parts.scheme == "unix" or is_loopback(f"tcp://{parts.hostname}:1"):
        return ok("redis-access", "Redis is reached on this machine alone.")
    missing = [what for what, there in (
        ("a password", bool(parts.password) or "password=" in parts.query),
        ("TLS (rediss://)", parts.scheme == "rediss"),
    ) if not there]  # fmt: skip
    if not missing:
        return ok("redis-access", "Redis is reached over TLS with a password.")
    return warning("redis-access", f"The Redis at {settings.redacted_redis_url} is reached without "
                   f"{' and '.join(missing)}.",
                   "Prompts and answers pass through it: add them, or keep to a private "
                   "network.")  # fmt: skip
