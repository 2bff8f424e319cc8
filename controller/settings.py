"""Settings of the controller."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from bus.worker import WorkerSettings


class ControllerSettings(WorkerSettings):
    """The controller: its sockets and what its policy sets."""

    toml_table: ClassVar[str] = "controller"

    reports_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        0, description="Port for window reports; 0: any."
    )
    updates_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        0, description="Port for control updates; 0: any."
    )
    threshold: Annotated[float, Field(ge=-1, le=1)] = Field(
        0.15, description="Acceptance threshold of the fixed policy, in nats (lossy methods only)."
    )
    window: Annotated[int, Field(ge=1, le=256)] = Field(
        4, description="Drafted tokens a window of the fixed policy (W)."
    )
