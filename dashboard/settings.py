"""Settings of the dashboard: those of every process, and a password."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, SecretStr

from bus.settings import BusSettings


class DashboardSettings(BusSettings):
    """What the dashboard needs beyond `BusSettings` (table `[dashboard]` of the TOML file)."""

    toml_table: ClassVar[str] = "dashboard"

    dashboard_password: SecretStr = Field(
        SecretStr(""),
        description="Asked for before anything is shown; empty shows everything to everybody.",
    )
    evidence: Path = Field(
        Path("runs"), description="Folder with results of `e2sci bench`, for the page Trade-offs."
    )
    refresh_s: Annotated[float, Field(ge=0.5, le=60)] = Field(
        2.0, description="Seconds between two refreshes of an open page."
    )
