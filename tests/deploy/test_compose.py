"""compose.yaml and what it mounts agree with the code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml  # type: ignore[import-untyped]  # comes with transformers

from bus.runtime.monitor import Monitor
from bus.runtime.worker import WorkerSettings
from bus.transport.sockets import Sockets, Traffic
from cloud_worker.settings import CloudSettings, MiddleSettings
from cloud_worker.watch import CloudTally
from controller.settings import ControllerSettings
from controller.watch import ControllerTally
from edge_worker.settings import EdgeSettings
from edge_worker.watch import EdgeTally, register_worker
from gateway.metrics import GatewayMetrics
from gateway.settings import GatewaySettings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "observability"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
BOARD: dict[str, Any] = json.loads(
    (FOLDER / "grafana" / "dashboards" / "e2sci.json").read_text("utf-8")
)
SCRAPED: list[dict[str, Any]] = yaml.safe_load((FOLDER / "prometheus.yml").read_text("utf-8"))[
    "scrape_configs"
]
WORKERS: dict[str, type[WorkerSettings]] = {
    "controller": ControllerSettings, "cloud": CloudSettings, "cloud-gpu": CloudSettings,
    "middle": MiddleSettings, "edge": EdgeSettings,
}  # fmt: skip
OF_GATEWAY = frozenset(
    f"{metric.name}_total"
    for metric in GatewayMetrics().registry.collect()
    if metric.type == "counter" and metric.name.startswith("e2sci:")
)
"""Its counters; its histograms and gauges have names that workers have too."""


def queries() -> Iterator[str]:
    for panel in BOARD["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]


def names_in(query: str) -> set[str]:
    return set(re.findall(r"e2sci:[a-zA-Z0-9_]+", query))


@pytest.fixture(scope="module")
def known() -> frozenset[str]:
    """Names of the samples of all roles."""
    sockets = cast(Sockets, SimpleNamespace(counters={}, traffic=Traffic()))
    monitors = cloud, edge, controller = Monitor(), Monitor(), Monitor()
    prefixes: Any = None
    gauge: Any = None
    CloudTally(cloud.metrics).register(cloud.metrics, (), (), sockets, prefixes, gauge)
    EdgeTally(edge.metrics)
    register_worker(edge.metrics, (), sockets, prefixes)
    ControllerTally(controller.metrics, sockets)
    return OF_GATEWAY.union(*(monitor.metrics.names for monitor in monitors))


def test_the_dashboard_asks_for_metrics_that_exist(known: frozenset[str]) -> None:
    asked = set().union(*map(names_in, queries()))
    assert asked - known == set()
    assert len(asked) > 20


def test_the_dashboard_asks_by_jobs_that_are_scraped() -> None:
    jobs = {job for query in queries() for job in re.findall(r'job="([^"]*)"', query)}
    assert jobs <= {config["job_name"] for config in SCRAPED}


def test_every_panel_has_a_query_and_a_place_of_its_own() -> None:
    panels = BOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels}) == len(panels)
    assert all(panel["type"] == "row" or panel["targets"] for panel in panels)


def test_docs_name_every_metric(known: frozenset[str]) -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text("utf-8")
    shown = names_in(page)
    bases = {re.sub(r"_(bucket|sum|count)$", "", n) if n not in shown else n for n in known}
    assert bases - shown == set()
    assert shown - bases - known == {"e2sci:controlled_sessions"}  # registered with its sessions


def test_prometheus_finds_every_worker_at_its_port() -> None:
    found = {
        (name, dns["port"])
        for config in SCRAPED
        for dns in config["dns_sd_configs"]
        for name in dns["names"]
    }
    ports = {
        name: int(SERVICES[name]["environment"]["E2SCI_METRICS_PORT"]) for name in WORKERS
    }  # fmt: skip
    assert found == {*ports.items(), ("gateway", 8000)}
    assert {SERVICES[name]["environment"]["E2SCI_METRICS_HOST"] for name in WORKERS} == {"0.0.0.0"}


@pytest.mark.parametrize("service", [*WORKERS, "gateway"])
def test_settings_in_compose_exist(service: str) -> None:
    fields = WORKERS.get(service, GatewaySettings).model_fields
    ours = {
        name.removeprefix("E2SCI_").lower()
        for name in SERVICES[service]["environment"]
        if name.startswith("E2SCI_")
    }
    assert ours <= fields.keys()


def test_every_mount_is_a_file_here_or_a_volume() -> None:
    for service in SERVICES.values():
        for mount in service.get("volumes", ()):
            source = mount.split(":")[0]
            if source.startswith("."):
                assert (ROOT / source).exists(), mount
            else:
                assert source in COMPOSE["volumes"], mount


def test_ports_are_published_on_loopback_unless_set_otherwise() -> None:
    for service in SERVICES.values():
        for port in service.get("ports", ()):
            assert re.match(r"127\.0\.0\.1:|\$\{E2SCI_[A-Z]+_HOST:-127\.0\.0\.1\}:", port), port


def test_images_of_others_are_pinned() -> None:
    images = {name: service["image"] for name, service in SERVICES.items()}
    assert all(re.search(r":v?\d+\.\d+", image) for image in images.values())
    assert {*SERVICES["prometheus"]["profiles"], *SERVICES["grafana"]["profiles"]} == {
        "observability"
    }
    assert set(SERVICES["gateway"]["profiles"]) == {"cloud-side", "gpu"}


def test_every_package_reaches_the_image() -> None:
    """That pyproject.toml ships."""
    packages = {path.parent.name for path in ROOT.glob("*/py.typed")}
    ignored = (ROOT / ".dockerignore").read_text("utf-8").split()
    copied = (ROOT / "Dockerfile").read_text("utf-8")
    assert {name for name in packages if f"!{name}" not in ignored} == set()
    assert {name for name in packages if f"COPY {name} {name}" not in copied} == set()


def test_the_stage_of_weights_has_what_it_imports() -> None:
    """Whole packages would rebuild the weights whenever any file of them changes."""
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    stage = dockerfile.split(" AS weights\n")[1].split("\nFROM ")[0]
    copied = {
        name
        for line in re.findall(r"^COPY (bus/.*) bus/\S*$", stage, re.MULTILINE)
        for name in line.split()
    }
    code = (
        "import sys, engines.torch.conversion, engines.torch.draft\n"
        "print(*(m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'bus'))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    assert {str(Path(path).relative_to(ROOT)) for path in loaded} == copied


def test_redis_gives_up_root() -> None:
    """The entry point of its image does so for the command redis-server alone."""
    assert "exec docker-entrypoint.sh redis-server " in SERVICES["redis"]["command"][-1]


def test_prometheus_writes_into_its_volume() -> None:
    service = SERVICES["prometheus"]
    paths = [part.split("=")[1] for part in service["command"] if "storage.tsdb.path=" in part]
    assert paths == [
        mount.split(":")[1] for mount in service["volumes"] if mount.startswith("prometheus-data:")
    ]


def test_docs_name_every_variable_of_compose() -> None:
    asked = set(re.findall(r"(?<!\$)\$\{([A-Z0-9_]+)", (ROOT / "compose.yaml").read_text("utf-8")))
    page = (ROOT / "docs" / "containers.md").read_text("utf-8")
    assert {name for name in asked if f"`{name}`" not in page} == set()
